// f_inv [K, B, B] <- f_inv - v v^T / (m + g.v), v = f_inv g, for every gradient in turn, for blocks of more than 128
// weights: a block stays in registers (tile.cuh), as its negative S, while the gradients stream past.
//
// Each step adds u u^T of the gradient before and multiplies S by the next one. A tile adds to the entries of S g in
// its rows and, for the upper triangle, in its columns; these parts are summed up through shared memory in a fixed
// order, by one thread for each entry, which also scales it: u = v (m + g.v)^-1/2, one factor for both sides.
//
// Floor: 3 B^2 / 2 multiply-adds for each gradient, 128 a cycle and multiprocessor on sm_90 and sm_100: 768 cycles at
// B = 256. Packed in shared memory instead, which does hold the block, S is read and written there in every step: 2,055
// cycles. Predicted from the instructions of sm_90, for no GPU was at hand: 1,550 cycles, of which 400 wait for the
// sums.
//
// Triton does not get there: with both triangles and padded to 256 a block fills all registers, so that it has to be
// read and written for every gradient, or for every few of them, through the second-level cache.
#include "gradients.cuh"

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
    // Products of one tile with g, by rows I, then tiles K. The odd length makes both ways of writing, along a row of
    // tiles and along a column, free of bank conflicts.
    static constexpr int LENGTH = Tl::EDGE | 1;
    T products[Tl::PLANES * Tl::EDGE * LENGTH * Tl::PACK];
    T gradients[2][ROWS * Tl::PITCH];
    T u[Tl::PITCH];
    double dots[Tl::MAX_THREADS / WARP];  // of the tiles of a warp

    static_assert(sizeof products >= 2 * Tl::BAND * sizeof(T), "the products make room for Tile::write");

    static __device__ int place(int plane, int I, int K) { return ((plane * Tl::EDGE + I) * LENGTH + K) * Tl::PACK; }
};

// What tile K adds to the entries of v in tile I.
template <class Tl>
__device__ void store_products(Shared<Tl>& shared, int I, int K, const typename Tl::T (&x)[Tl::N]) {
#pragma unroll
    for (int plane = 0; plane < Tl::PLANES; ++plane)
        store_pack<Tl>(shared.products + Shared<Tl>::place(plane, I, K), x, plane);
}

// s += u u^T.
template <class Tl>
__device__ void add_update(Tile<Tl>& s, const typename Tl::T* u) {
    typename Tl::T x[Tl::N], y[Tl::N];
    if (s.I == Tile<Tl>::NONE) return;
    load<Tl>(u, s.I, x);
    load<Tl>(u, s.J, y);
    s.add_product(x, y);
}

// This thread's part of s g, by rows and, for the upper triangle, by columns; returns its part of g.(s g).
template <class Tl>
__device__ double multiply(const Tile<Tl>& s, Shared<Tl>& shared, const typename Tl::T* g) {
    constexpr int N = Tl::N;
    typename Tl::T x[N], y[N], by_row[N], by_column[N], dot = 0;
    if (s.I == Tile<Tl>::NONE) return 0;
    load<Tl>(g, s.I, x);
    load<Tl>(g, s.J, y);
#pragma unroll
    for (int i = 0; i < N; ++i) by_row[i] = by_column[i] = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            by_row[i] = fma(s.a[i][j], y[j], by_row[i]);
            by_column[j] = fma(s.a[i][j], x[i], by_column[j]);
        }
        dot = fma(x[i], by_row[i], dot);
    }
    store_products(shared, s.I, s.J, by_row);
    if (s.on_diagonal()) return static_cast<double>(dot);
    store_products(shared, s.J, s.I, by_column);
    return 2 * static_cast<double>(dot);
}

template <class Tl>
__global__ void __launch_bounds__(Tl::MAX_THREADS) sherman_morrison_kernel(Args<typename Tl::T> args) {
    using T = typename Tl::T;
    constexpr int PACK = Tl::PACK;
    Shared<Tl>& shared = *shared_memory<Shared<Tl>>();
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size, tiles = Tl::tiles(n);
    const Team team = {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
    T* const block = args.f_inv + b * B * B;

    Tile<Tl> s(team, n);
    s.read(block, B, n);
    s.scale(-1);

    // The entry of s g that this thread sums up; threads with consecutive ranks take consecutive tiles.
    const bool sums = team.rank < tiles * Tl::N;
    const int plane = team.rank / PACK / tiles, I = team.rank / PACK % tiles, e = team.rank % PACK;
    const int slot = plane * Tl::PLANE + I * PACK + e;

    const int column = team.rank;  // of the gradients, which this thread brings in
    GradientColumn<T, ROWS> next;
    next.fetch(args.grads, 0, start + column, column < n);
    if (sums) {
        next.put(shared.gradients[0] + Tl::slot(column), Tl::PITCH, args.grads.dtype);
        shared.u[slot] = 0;
    }
    if (team.rank < Tl::MAX_THREADS / WARP) shared.dots[team.rank] = 0;  // there may be fewer warps
    __syncthreads();
    for (int64_t row = 0; row < args.grads.rows; ++row) {
        const int r = static_cast<int>(row % ROWS), side = static_cast<int>(row / ROWS % 2);
        if (r == 0) next.fetch(args.grads, row + ROWS, start + column, column < n);
        add_update(s, shared.u);
        double dot = multiply(s, shared, shared.gradients[side] + r * Tl::PITCH);
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
        if (team.rank % WARP == 0) shared.dots[team.rank / WARP] = dot;
        __syncthreads();
        if (sums) {
            const T* const products = shared.products + Shared<Tl>::place(plane, I, 0) + e;
            T v = 0;
#pragma unroll(Tl::EDGE / 2)
            for (int K = 0; K < tiles; ++K) v += products[K * PACK];
            double denominator = args.num_grads;
#pragma unroll
            for (int warp = 0; warp < Tl::MAX_THREADS / WARP; ++warp) denominator -= shared.dots[warp];
            shared.u[slot] = v * reciprocal_root(static_cast<T>(denominator));
            if (r == ROWS - 1) next.put(shared.gradients[1 - side] + Tl::slot(column), Tl::PITCH, args.grads.dtype);
        }
        __syncthreads();
    }
    add_update(s, shared.u);
    s.scale(-1);
    s.write(block, B, n, tiles, team, shared.products, true);
}

}  // namespace

template <class T>
int sherman_morrison(T* f_inv, Gradients grads, Blocks blocks, double num_grads, Where where) {
    using Tl = Largest<T>;
    if (blocks.size > Tl::MAX_B) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args<T> args = {f_inv, grads, blocks.range, size, num_grads};
    return launch(sherman_morrison_kernel<Tl>, blocks.count, Tl::launched(size), sizeof(Shared<Tl>), args, where);
}

template int sherman_morrison(float*, Gradients, Blocks, double, Where);
template int sherman_morrison(double*, Gradients, Blocks, double, Where);

}  // namespace cuda
}  // namespace ff
