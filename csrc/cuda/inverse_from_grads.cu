// f_inv [K, B, B], or inv_diag [d], <- (damping I + G^T G / m)^-1 straight from the gradients, for blocks of more than
// 128 weights: the Fisher is summed up in the registers in which it is then inverted (sweep.cuh), and never written.
//
// Floor: (m B^2 + B^3) / 2 multiply-adds, 128 a cycle and multiprocessor on sm_90 and sm_100; next to them the m B
// gradients and the B^2 results hardly count.
// Predicted from the instructions of sm_90, for no GPU was at hand: for a block of 256, 410 cycles a gradient (62 % of
// the floor) and 133,000 for the inverse; 57 % of the floor at m = 512.
//
// Triton does not get there: a Gram matrix [256, 256] with both triangles fills all registers of a multiprocessor, so
// it must be summed up in parts, written, and read again to be inverted. Its matrix units would sum faster than this
// does, but not in IEEE float32.
#include "gradients.cuh"
#include "sweep.cuh"

namespace ff {
namespace cuda {
namespace {

template <class T>
struct Args {
    T* f_inv;     // or null, then
    T* inv_diag;  // its diagonal
    Gradients grads;
    const int64_t* range;
    int size;
    T damping, factor, outside;  // outside: 1 / damping
    Estimates estimates;
};

constexpr int ROWS = 8;        // gradients on chip at a time; as many are on their way
constexpr int TOGETHER = 128;  // gradients summed up in one go

// Shared memory while gradients are summed up; the sweep has it afterwards.
template <class Tl>
struct GramShared {
    using T = typename Tl::T;
    T gradients[2][ROWS * Tl::PITCH];
    T sums[1];  // of the gradients before, tile by tile as publish_tile leaves them; there only if they are needed

    static constexpr int tiles(int size) { return Tl::tiles(size) * (Tl::tiles(size) + 1) / 2; }
    static constexpr size_t bytes(int size, int64_t rows) {
        const size_t sums = rows > TOGETHER ? tiles(size) * Tl::TILE * sizeof(T) : 0;
        return sizeof gradients + sums;
    }
};

// s <- the sum of g g^T over all gradients, restricted to the n weights at `start`. One running sum over thousands of
// gradients would lose digits to its own size; so every TOGETHER of them are summed up on their own, and added to the
// sum before, which waits in shared memory.
template <class Tl>
__device__ void gram(Tile<Tl>& s, GramShared<Tl>& shared, const Gradients& grads, int64_t start, int n, Team team) {
    const int column = team.rank;
    const bool staging = column < Tl::tiles(n) * Tl::N;
    const int place = s.I * (s.I + 1) / 2 + s.J;
    GradientColumn<typename Tl::T, ROWS> next;
    s.fill(0);
    next.fetch(grads, 0, start + column, column < n);
    if (staging) next.put(shared.gradients[0] + Tl::slot(column), Tl::PITCH, grads.dtype);
    __syncthreads();
    int side = 0;
    for (int64_t row = 0; row < grads.rows; row += ROWS) {
        const int64_t done = row + ROWS;
        next.fetch(grads, done, start + column, column < n);
        s.template add_outer<ROWS>(shared.gradients[side]);
        side ^= 1;
        if (staging) next.put(shared.gradients[side] + Tl::slot(column), Tl::PITCH, grads.dtype);
        if (s.I != Tile<Tl>::NONE && (done % TOGETHER == 0 || done >= grads.rows)) {
            if (done > TOGETHER) s.add_tile(shared.sums, place);
            if (done < grads.rows) {
                publish_tile<Tl>(shared.sums, place, [&](int i, int j) { return s.a[i][j]; });
                s.fill(0);
            }
        }
        __syncthreads();
    }
}

// What lies outside of [n, n] in a block [B, B].
template <class T>
__device__ void write_padding(T* block, int B, int n, Team team, T on_diagonal, bool usable) {
    for (int i = 0; i < B; ++i)
        for (int j = (i < n ? n : 0) + team.rank; j < B; j += team.size)
            block[static_cast<int64_t>(i) * B + j] = usable ? (i == j ? on_diagonal : T(0)) : T(NAN);
}

template <class Tl>
__global__ void __launch_bounds__(Tl::MAX_THREADS) inverse_from_grads_kernel(Args<typename Tl::T> args) {
    using T = typename Tl::T;
    constexpr int N = Tl::N;
    SweepShared<Tl>& shared = *shared_memory<SweepShared<Tl>>();
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size, bands = Tl::tiles(n);
    const Team team = {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};

    Tile<Tl> s(team, n);
    gram(s, *shared_memory<GramShared<Tl>>(), args.grads, start, n, team);
    s.mirror();
    s.scale(args.factor);
    negate_and_scale(s, shared, n, args.damping, team);
    __syncthreads();
    invert(s, shared, n, bands, team);
    const bool usable = estimate(s, shared, n, team, args.estimates.condition + b, args.estimates.amplification + b);
    if (args.f_inv) {
        T* const block = args.f_inv + b * B * B;
        s.write(block, B, n, bands, team, shared.band[0], usable);
        write_padding(block, B, n, team, args.outside, usable);
    } else if (s.I != Tile<Tl>::NONE && s.on_diagonal()) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (s.I * N + i < n) args.inv_diag[start + s.I * N + i] = usable ? s.a[i][i] : T(NAN);
    }
}

}  // namespace

template <class T>
int inverse_from_grads(T* f_inv, T* inv_diag, Gradients grads, Blocks blocks, double num_grads, double damping,
                       Estimates estimates, Where where) {
    using Tl = Largest<T>;
    if (blocks.size > Tl::MAX_B) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args<T> args = {f_inv,
                          inv_diag,
                          grads,
                          blocks.range,
                          size,
                          static_cast<T>(damping),
                          static_cast<T>(1 / num_grads),
                          static_cast<T>(1 / damping),
                          estimates};
    const size_t bytes = GramShared<Tl>::bytes(size, grads.rows);
    return launch(inverse_from_grads_kernel<Tl>, blocks.count, Tl::launched(size),
                  bytes > sizeof(SweepShared<Tl>) ? bytes : sizeof(SweepShared<Tl>), args, where);
}

template int inverse_from_grads(float*, float*, Gradients, Blocks, double, double, Estimates, Where);
template int inverse_from_grads(double*, double*, Gradients, Blocks, double, double, Estimates, Where);

}  // namespace cuda
}  // namespace ff
