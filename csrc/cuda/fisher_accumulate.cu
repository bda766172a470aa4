// fisher [K, B, B], lower triangles, += G^T G / m: a block is summed up in registers and added to memory once.
//
// Floor: m B^2 / 2 multiply-adds, and a triangle of the block read and written.
//
// Triton does not get there: it pads blocks to a power of two, computes both triangles of a tile on the diagonal, and
// takes float32 apart into three products for the matrix units. Measured on an H200 at B = 50 and 128, m = 256: 5 and
// 2.3 times this, which is 1.2 and 0.9 times as fast as a batched product in PyTorch. In float64 the matrix units win:
// a kernel like this one took 1.4 times as long as Triton's, and was deleted.
#include "gram.cuh"

namespace ff {
namespace cuda {
namespace {

struct Args {
    float* fisher;
    Gradients grads;
    const int64_t* range;
    int size;
    float factor;
};

template <class Tl, int RESIDENT>
__global__ void __launch_bounds__(summing_threads<Tl>(Tl::MAX_B), RESIDENT) fisher_accumulate_kernel(Args args) {
    constexpr int N = Tl::N;
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size;
    const Team team = whole_block();

    Tile<Tl> s(team, n);
    gram(s, *shared_memory<GramShared<Tl>>(), args.grads, start, n, team);
    s.scale(args.factor);
    float* const block = args.fisher + b * B * B;
    float* const room = *shared_memory<float[2 * Tl::BAND]>();
    s.by_bands(n, Tl::tiles(n), team, room, [&](int band, int j, const typename Tile<Tl>::Column& column) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int row = band * N + i;
            if (j <= row && row < n) block[row * B + j] += column[i];
        }
    });
}

}  // namespace

int fisher_accumulate(float* fisher, Gradients grads, Blocks blocks, double num_grads, Where where) {
    if (blocks.size > LARGEST_BLOCK<float>) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args args = {fisher, grads, blocks.range, size, static_cast<float>(1 / num_grads)};
    return with_summing_cut(fisher, size, [&](auto cut) {
        using Tl = typename decltype(cut)::Tl;
        const size_t bytes = GramShared<Tl>::bytes(size, grads.rows), room = 2 * Tl::BAND * sizeof(float);
        return launch(fisher_accumulate_kernel<Tl, decltype(cut)::RESIDENT>, blocks.count, summing_threads<Tl>(size),
                      bytes > room ? bytes : room, args, where);
    });
}

}  // namespace cuda
}  // namespace ff
