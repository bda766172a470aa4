// fisher [K, B, B], lower triangles, += G^T G / m: a block is summed up in registers and added to memory once.
//
// Floor: m B^2 / 2 multiply-adds, and a triangle of the block read and written.
//
// Triton does not get there: it pads blocks to a power of two, computes both triangles of a tile on the diagonal, and
// takes float32 apart into three products for the matrix units. Measured on an H200, m = 256: 108 ms for the 25.5
// million weights of ResNet-50 at B = 50, four times a batched product in PyTorch.
#include "gram.cuh"

namespace ff {
namespace cuda {
namespace {

template <class T>
struct Args {
    T* fisher;
    Gradients grads;
    const int64_t* range;
    int size;
    T factor;
};

template <class Tl, int RESIDENT>
__global__ void __launch_bounds__(summing_threads<Tl>(Tl::MAX_B), RESIDENT)
    fisher_accumulate_kernel(Args<typename Tl::T> args) {
    constexpr int N = Tl::N;
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size;
    const Team team = whole_block();

    Tile<Tl> s(team, n);
    gram(s, *shared_memory<GramShared<Tl>>(), args.grads, start, n, team);
    if (s.I == Tile<Tl>::NONE) return;
    s.scale(args.factor);
    typename Tl::T* const block = args.fisher + b * B * B;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int row = s.I * N + i;
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (row < n && s.J * N + j <= row) block[row * B + s.J * N + j] += s.a[i][j];
    }
}

}  // namespace

template <class T>
int fisher_accumulate(T* fisher, Gradients grads, Blocks blocks, double num_grads, Where where) {
    if (blocks.size > LARGEST_BLOCK<T>) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args<T> args = {fisher, grads, blocks.range, size, static_cast<T>(1 / num_grads)};
    return with_summing_cut(fisher, size, [&](auto cut) {
        using Tl = typename decltype(cut)::Tl;
        return launch(fisher_accumulate_kernel<Tl, decltype(cut)::RESIDENT>, blocks.count, summing_threads<Tl>(size),
                      GramShared<Tl>::bytes(size, grads.rows), args, where);
    });
}

template int fisher_accumulate(float*, Gradients, Blocks, double, Where);
template int fisher_accumulate(double*, Gradients, Blocks, double, Where);

}  // namespace cuda
}  // namespace ff
