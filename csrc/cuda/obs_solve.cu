// weight_R <- w_R - F^-1[R, Q] (F^-1[Q, Q])^-1 w_Q, weight_Q <- 0, in float64: Q are the weights that go, R the others.
//
// F^-1 with the rows and columns of R replaced by those of an identity is inverted in registers (sweep.cuh) and
// multiplied by w_Q, band by band as it would be written; the product with F^-1[R, Q] reads the block a second time,
// when it is still in a cache. An inverse takes three times the multiply-adds of a Cholesky solve, all of a shape that
// registers can hold.
//
// Floor: the columns of Q read. Predicted from spd_inverse.cu for B = 50: 4,000 cycles of a multiprocessor a block.
// Measured on an H200: 9,600, or 21 ms for the 25.5 million weights of ResNet-50, where a batched solve in PyTorch
// takes
// 80. Triton, which takes a column out of a block by masks, took 784.
#include "sweep.cuh"

namespace ff {
namespace cuda {
namespace {

template <class State>
struct Args {
    State* weight;
    const State* f_inv;
    const int64_t* range;
    int size;
    const uint8_t* mask;  // 0: the weight goes
    uint8_t* failed;
};

template <class Tl>
struct Shared {
    SweepShared<Tl> sweep;
    double removed[Tl::MAX_B + Tl::N];  // w_Q, 0 elsewhere
    double y[Tl::MAX_B + Tl::N];        // (F^-1[Q, Q])^-1 w_Q, 0 elsewhere
    bool gone[Tl::MAX_B + Tl::N];
};

template <class Tl, class State>
__device__ void read_removed(Tile<Tl>& s, const State* block, int64_t B, const bool* gone) {
    s.fill(0);
    if (s.I == Tile<Tl>::NONE) return;
#pragma unroll
    for (int i = 0; i < Tl::N; ++i) {
        const int row = s.I * Tl::N + i;
#pragma unroll
        for (int j = 0; j < Tl::N; ++j) {
            const int column = s.J * Tl::N + j;
            if (column > row) continue;
            if (gone[row] && gone[column]) s.a[i][j] = static_cast<double>(block[row * B + column]);
            if (row == column && !gone[row]) s.a[i][j] = 1;
        }
    }
    s.mirror();
}

template <class Tl, int RESIDENT, class State>
__global__ void __launch_bounds__(Tl::MAX_THREADS, RESIDENT) obs_solve_kernel(Args<State> args) {
    constexpr int N = Tl::N;
    Shared<Tl>& shared = *shared_memory<Shared<Tl>>();
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size, bands = Tl::tiles(n);
    const Team team = whole_block();
    const State* const block = args.f_inv + b * B * B;
    const int column = team.rank;
    const bool inside = column < n;

    const State weight = inside ? args.weight[start + column] : State(0);
    const bool gone = inside && !args.mask[start + column];
    if (column < bands * N) {
        shared.gone[column] = gone;
        shared.removed[column] = gone ? static_cast<double>(weight) : 0.0;
    }
    __syncthreads();
    Tile<Tl> s(team, n);
    read_removed(s, block, B, shared.gone);
    negate_and_scale(s, shared.sweep, n, 0.0, team);
    __syncthreads();
    invert(s, shared.sweep, n, bands, team);

    double y = 0;
    s.by_bands(n, bands, team, shared.sweep.band[0], [&](int band, int, const typename Tile<Tl>::Column& entries) {
#pragma unroll
        for (int i = 0; i < N; ++i) y = fma(entries[i], shared.removed[band * N + i], y);
    });
    if (inside) shared.y[column] = y;
    __syncthreads();
    double delta = 0;
    if (inside) {
#pragma unroll 8
        for (int q = 0; q < n; ++q)
            if (shared.gone[q])
                delta = fma(static_cast<double>(block[static_cast<int64_t>(q) * B + column]), shared.y[q], delta);
        if (!(fabs(delta) < INFINITY)) shared.sweep.failed = 1;
    }
    __syncthreads();
    const bool failed = shared.sweep.failed;
    if (team.leads()) args.failed[b] = failed;
    if (inside && !failed)
        args.weight[start + column] = gone ? State(0) : static_cast<State>(static_cast<double>(weight) - delta);
}

}  // namespace

template <class T>
int obs_solve(T* weight, const T* f_inv, Blocks blocks, const uint8_t* mask, uint8_t* failed, Where where) {
    if (blocks.size > LARGEST_BLOCK<double>) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args<T> args = {weight, f_inv, blocks.range, size, mask, failed};
    return with_cut(static_cast<const double*>(nullptr), size, [&](auto cut) {
        using Tl = typename decltype(cut)::Tl;
        return launch(obs_solve_kernel<Tl, decltype(cut)::RESIDENT, T>, blocks.count, Tl::launched(size),
                      sizeof(Shared<Tl>), args, where);
    });
}

template int obs_solve(float*, const float*, Blocks, const uint8_t*, uint8_t*, Where);
template int obs_solve(double*, const double*, Blocks, const uint8_t*, uint8_t*, Where);

}  // namespace cuda
}  // namespace ff
