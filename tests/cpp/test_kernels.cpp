// Every kernel against plain loops over shapes that leave tails everywhere: B = 1, B around a vector, around a cache
// tile and above what is kept in cache; short last blocks, gaps between blocks, more blocks than threads and fewer.
#include "check.h"

int main() {
    const int64_t shapes[][3] = {
        // B, d, k
        {1, 1, 1},     {1, 37, 5},    {2, 33, 3},    {3, 10, 7},    {5, 64, 20},    {7, 7, 1},     {8, 100, 16},
        {9, 40, 70},   {16, 64, 33},  {17, 100, 9},  {31, 95, 40},  {50, 233, 65},  {64, 64, 130}, {100, 250, 30},
        {193, 400, 4}, {257, 300, 6}, {300, 301, 2}, {40, 40, 200}, {450, 450, 11},
    };
    uint32_t seed = 0;
    for (const auto& shape : shapes) {
        for (int variant = 0; variant < (shape[0] > 150 ? 1 : 4); ++variant) {
            auto p = check::make_problem(shape[0], shape[1], shape[2], variant % 2 == 1);
            p.dtype = static_cast<ff::DType>(variant);
            p.columns = variant % 2 ? 3 : 1;
            p.extra_stride = variant;
            p.seed = ++seed;
            check::everywhere(p, 2 + variant);
        }
    }
    int isas = 0;
    for (const char* const* isa = ff::available_isas(); *isa; ++isa, ++isas) std::printf("%s ", *isa);
    if (ff::kernel_table("no such instruction set")) return 1;
    std::printf("passed %u problems\n", seed);
    return isas == 0;
}
