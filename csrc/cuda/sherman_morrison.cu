// f_inv [K, B, B] <- f_inv - v v^T / (m + g.v), v = f_inv g, for every gradient in turn: a block stays in registers
// (tile.cuh), as its negative S, while the gradients stream past.
//
// Each step adds u u^T of the gradient before and multiplies S by the next one (products.cuh); the thread that sums up
// an entry of the product also scales it: u = v (m + g.v)^-1/2, one factor for both sides.
//
// Floor: 3 B^2 / 2 multiply-adds for each gradient, 128 a cycle and multiprocessor on sm_90 and sm_100: 768 cycles at
// B = 256. Packed in shared memory instead, which does hold the block, S is read and written there in every step: 2,055
// cycles. Predicted from the instructions of sm_90: 1,550 cycles, of which 400 wait for the sums; measured on an H200:
// 3,000.
//
// Triton does not get there: with both triangles and padded to 256 a block fills all registers, so that it has to be
// read and written for every gradient, or for every few of them, through the second-level cache. Measured: 3.1 times
// this at B = 256.
#include "gradients.cuh"
#include "products.cuh"

namespace ff {
namespace cuda {
namespace {

template <class T>
struct Args {
    T* f_inv;
    Gradients grads;
    const int64_t* range;
    int size;
    double num_grads;
};

constexpr int ROWS = 4;  // gradients on chip at a time; as many are on their way

template <class Tl>
struct alignas(16) Shared {
    using T = typename Tl::T;
    Products<Tl> products;
    T gradients[2][ROWS * Tl::PITCH];
    T u[Tl::PITCH];
    double dots[Tl::MAX_THREADS / WARP];  // of the tiles of a warp
};

// s += u u^T.
template <class Tl>
__device__ void add_update(Tile<Tl>& s, const typename Tl::T* u) {
    typename Tl::T x[Tl::N], y[Tl::N];
    if (s.I == Tile<Tl>::NONE) return;
    load<Tl>(u, s.I, x);
    load<Tl>(u, s.J, y);
    s.add_product(x, y);
}

template <class Tl, int RESIDENT>
__global__ void __launch_bounds__(Tl::MAX_THREADS, RESIDENT) sherman_morrison_kernel(Args<typename Tl::T> args) {
    using T = typename Tl::T;
    Shared<Tl>& shared = *shared_memory<Shared<Tl>>();
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size, tiles = Tl::tiles(n);
    const Team team = whole_block();
    T* const block = args.f_inv + b * B * B;

    Tile<Tl> s(team, n);
    s.read(block, B, n);
    s.scale(-1);

    const Entry<Tl> entry(team, tiles);
    const int column = team.rank;  // of the gradients, which this thread brings in
    GradientColumn<T, ROWS> next;
    next.fetch(args.grads, 0, start + column, column < n);
    if (entry.mine) {
        next.put(shared.gradients[0] + Tl::slot(column), Tl::PITCH, args.grads.dtype);
        shared.u[entry.slot()] = 0;
    }
    if (team.rank < Tl::MAX_THREADS / WARP) shared.dots[team.rank] = 0;  // there may be fewer warps
    __syncthreads();
    for (int64_t row = 0; row < args.grads.rows; ++row) {
        const int r = static_cast<int>(row % ROWS), side = static_cast<int>(row / ROWS % 2);
        if (r == 0) next.fetch(args.grads, row + ROWS, start + column, column < n);
        add_update(s, shared.u);
        const double dot = sum_over_warp(multiply(s, shared.products, shared.gradients[side] + r * Tl::PITCH));
        if (team.rank % WARP == 0) shared.dots[team.rank / WARP] = dot;
        __syncthreads();
        if (entry.mine) {
            const T v = entry.sum(shared.products);
            double denominator = args.num_grads;
#pragma unroll
            for (int warp = 0; warp < Tl::MAX_THREADS / WARP; ++warp) denominator -= shared.dots[warp];
            shared.u[entry.slot()] = v * reciprocal_root(static_cast<T>(denominator));
            if (r == ROWS - 1) next.put(shared.gradients[1 - side] + Tl::slot(column), Tl::PITCH, args.grads.dtype);
        }
        __syncthreads();
    }
    add_update(s, shared.u);
    s.scale(-1);
    s.write(block, B, n, tiles, team, shared.products.parts, true);
}

}  // namespace

template <class T>
int sherman_morrison(T* f_inv, Gradients grads, Blocks blocks, double num_grads, Where where) {
    if (blocks.size > LARGEST_BLOCK<T>) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args<T> args = {f_inv, grads, blocks.range, size, num_grads};
    return with_cut(f_inv, size, [&](auto cut) {
        using Tl = typename decltype(cut)::Tl;
        return launch(sherman_morrison_kernel<Tl, decltype(cut)::RESIDENT>, blocks.count, Tl::launched(size),
                      sizeof(Shared<Tl>), args, where);
    });
}

template int sherman_morrison(float*, Gradients, Blocks, double, Where);
template int sherman_morrison(double*, Gradients, Blocks, double, Where);

}  // namespace cuda
}  // namespace ff
