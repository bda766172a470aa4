// One auxiliary step of FishLeg on R with Q = R R^T, a block at a time, all of it on chip:
//
//   Z = G R,  M = Z^T Z / m + gamma R^T R,  R <- R - eta (R M - R),  eta = rate / 2 / max(1, 1.1 lambda)
//
// R lies in shared memory by rows, for Z = G R and for M, which is a sum of outer products of its rows and those of Z
// and stays in registers (tile.cuh), summed up by two warps that share the rows. For R M, R lies there by columns and M
// takes the place of its rows. A thread has half a tile of Z, one of the lower triangle of M, and one of R M, in turn.
//
// Floor: k n^2 multiply-adds for Z, (k + n) n^2 / 2 for M and n^3 for R M, 128 a cycle and multiprocessor on sm_90, and
// the block read and written. Predicted for n = 50, k = 32: 3,700 cycles to issue the multiply-adds of whole tiles,
// 5,700 with what waits for loads and barriers. Measured on an H200: 9,600, or 21 ms for the 25.5 million weights of
// ResNet-50, 3.3 times the floor; shared memory leaves room for 6 blocks, too few to hide one another's waits.
//
// Triton pads blocks to 64 and holds R, M and R M in registers next to each other. Measured: 75 ms, where batched
// products in PyTorch take 52.
#include "gradients.cuh"
#include "products.cuh"

namespace ff {
namespace cuda {
namespace {

constexpr int POWER_STEPS = 3;

template <class T>
struct Args {
    T *root, *top;
    Gradients grads;
    const int64_t* range;
    int size;
    double num_grads, damping, rate;
    double *loss, *largest;
};

template <class Tl>
struct alignas(16) Shared {
    using T = typename Tl::T;
    static constexpr int N = Tl::N, EDGE = Tl::EDGE;
    static constexpr int ROWS = 4 * N;                                                      // gradients at a time
    static constexpr int GRADIENT_PITCH = ROWS + Tl::UNIT * (ROWS / Tl::UNIT % 2 ? 2 : 1);  // odd in units of 16 bytes
    static constexpr int COLUMN_PITCH = Tl::PITCH + Tl::UNIT * (Tl::PITCH / Tl::UNIT % 2 ? 2 : 1);
    // One after the other in the same place: what makes Z, the parts of products, the columns of R.
    static constexpr int MAKING_Z = EDGE * N * GRADIENT_PITCH + ROWS * Tl::PITCH;
    static constexpr int COLUMNS = EDGE * N * COLUMN_PITCH;
    static constexpr int PARTS = sizeof(Products<Tl>) / sizeof(T);

    T rows[EDGE * N * Tl::PITCH];  // of R, then of M
    T work[MAKING_Z > COLUMNS ? (MAKING_Z > PARTS ? MAKING_Z : PARTS) : (COLUMNS > PARTS ? COLUMNS : PARTS)];
    T v[Tl::PITCH];
    double partial[2][Tl::MAX_THREADS / WARP];

    __device__ T* gradients() { return work; }                      // [n, ROWS]
    __device__ T* z() { return work + EDGE * N * GRADIENT_PITCH; }  // [ROWS, n]
    __device__ T* columns() { return work; }                        // of R, [n, n]
    __device__ Products<Tl>& products() { return *reinterpret_cast<Products<Tl>*>(work); }
};

// The sum of x over all threads, in a fixed order; `turn` alternates, so that one barrier suffices.
template <class Tl>
__device__ double sum_over_block(double x, Shared<Tl>& shared, int turn, Team team) {
    x = sum_over_warp(x);
    if (team.rank % WARP == 0) shared.partial[turn % 2][team.rank / WARP] = x;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < team.size / WARP; ++warp) sum += shared.partial[turn % 2][warp];
    return sum;
}

__device__ inline bool positive(double x) { return x > 0 && x < INFINITY; }

// Z is made in pieces of half a tile, which leave the tile of M its registers.
template <class Tl>
constexpr int HALF = Tl::N / 2;

// x <- half a tile of gradients.
template <class Tl>
__device__ void load_half(const typename Tl::T* from, typename Tl::T (&x)[HALF<Tl>]) {
    constexpr int PACK = HALF<Tl> % 4 == 0 && sizeof(typename Tl::T) == 4 ? 4 : HALF<Tl> % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int c = 0; c < HALF<Tl>; c += PACK) {
        using P = Pack<typename Tl::T, PACK>;
        const P pack = *reinterpret_cast<const P*>(from + c);
#pragma unroll
        for (int e = 0; e < PACK; ++e) x[c + e] = pack.x[e];
    }
}

// shared.rows <- R, zeros up to whole tiles.
template <class Tl>
__device__ void read_rows(Shared<Tl>& shared, const typename Tl::T* block, int B, int n, Team team) {
    constexpr int AHEAD = 16;
    const int column = team.rank, length = Tl::tiles(n) * Tl::N;
    if (column >= length) return;
    typename Tl::T* const to = shared.rows + Tl::slot(column);
    for (int i = 0; i < length; i += AHEAD) {
        typename Tl::T x[AHEAD];
#pragma unroll
        for (int r = 0; r < AHEAD; ++r)
            x[r] = i + r < n && column < n ? block[static_cast<int64_t>(i + r) * B + column] : typename Tl::T(0);
#pragma unroll
        for (int r = 0; r < AHEAD; ++r)
            if (i + r < length) to[(i + r) * Tl::PITCH] = x[r];
    }
}

// shared.gradients() <- gradients row .. row + ROWS, PIECE of them at a time in the registers of a thread.
template <class Tl, int PIECE>
__device__ void read_gradients(Shared<Tl>& shared, const Gradients& grads, int64_t row, int64_t start, int n,
                               Team team) {
    if (team.rank >= n) return;
    typename Tl::T* const to = shared.gradients() + team.rank * Shared<Tl>::GRADIENT_PITCH;
    for (int r = 0; r < Shared<Tl>::ROWS; r += PIECE) {
        GradientColumn<typename Tl::T, PIECE> piece;
        piece.fetch(grads, row + r, start + team.rank, true);
        piece.put(to + r, 1, grads.dtype);
    }
}

// Sets of threads that each hold all tiles of M and sum up their share of the rows.
template <class Tl>
constexpr int GROUPS = Tl::MAX_THREADS >= 2 * round_up(Tl::threads(Tl::MAX_B), WARP) ? 2 : 1;

// s <- M. Every thread of the block must call it.
template <class Tl>
__device__ void step_matrix(Tile<Tl>& s, Shared<Tl>& shared, const Args<typename Tl::T>& args, int64_t start, int n,
                            int group, Team team) {
    using T = typename Tl::T;
    constexpr int N = Tl::N, ROWS = Shared<Tl>::ROWS, PITCH = Shared<Tl>::GRADIENT_PITCH;
    const int tiles = Tl::tiles(n), I = team.rank / tiles, J = team.rank % tiles;
    const T factor = static_cast<T>(1 / sqrt(args.num_grads));
    read_gradients<Tl, ROWS>(shared, args.grads, 0, start, n, team);  // before the tile takes its registers
    s.fill(0);
    for (int i = group; i < tiles; i += GROUPS<Tl>) s.template add_outer<N>(shared.rows + i * N * Tl::PITCH);
    s.scale(static_cast<T>(args.damping));
    for (int64_t row = 0; row < args.grads.rows; row += ROWS) {
        if (row > 0) read_gradients<Tl, ROWS / 4>(shared, args.grads, row, start, n, team);
        __syncthreads();
        if (I < ROWS / HALF<Tl>) {
            T z[HALF<Tl>][N], x[HALF<Tl>], y[N];
#pragma unroll
            for (int i = 0; i < HALF<Tl>; ++i)
#pragma unroll
                for (int j = 0; j < N; ++j) z[i][j] = 0;
#pragma unroll 2
            for (int k = 0; k < n; ++k) {
                load_half<Tl>(shared.gradients() + k * PITCH + I * HALF<Tl>, x);
                load<Tl>(shared.rows + k * Tl::PITCH, J, y);
#pragma unroll
                for (int i = 0; i < HALF<Tl>; ++i)
#pragma unroll
                    for (int j = 0; j < N; ++j) z[i][j] = fma(x[i], y[j], z[i][j]);
            }
#pragma unroll
            for (int i = 0; i < HALF<Tl>; ++i) {
#pragma unroll
                for (int j = 0; j < N; ++j) y[j] = factor * z[i][j];
                store<Tl>(shared.z() + (I * HALF<Tl> + i) * Tl::PITCH, J, y);
            }
        }
        __syncthreads();
        s.template add_outer<ROWS / GROUPS<Tl>>(shared.z() + group * (ROWS / GROUPS<Tl> * Tl::PITCH));
        __syncthreads();
    }
    if (GROUPS<Tl> > 1) {
        const int place = s.I * (s.I + 1) / 2 + s.J;
        const bool live = s.I != Tile<Tl>::NONE;
        if (live && group > 0) publish_tile<Tl>(shared.work, place, [&](int i, int j) { return s.a[i][j]; });
        __syncthreads();
        if (live && group == 0) s.add_tile(shared.work, place);
        if (group > 0) s.I = s.J = Tile<Tl>::NONE;
        __syncthreads();
    }
    s.mirror();
}

// The largest eigenvalue of M as the norm of its last product with a unit vector; shared.v begins as `top` and becomes
// that product, scaled to length 1.
template <class Tl>
__device__ double power_iteration(const Tile<Tl>& s, Shared<Tl>& shared, const typename Tl::T* top, int n, Team team) {
    using T = typename Tl::T;
    const Entry<Tl> entry(team, Tl::tiles(n));
    const bool inside = entry.mine && entry.index() < n;
    double w = inside ? static_cast<double>(top[entry.index()]) : 0.0;
    double norm = sqrt(sum_over_block(w * w, shared, 0, team));
    if (entry.mine)
        shared.v[entry.slot()] =
            !inside ? T(0) : static_cast<T>(positive(norm) ? w / norm : 1 / sqrt(static_cast<double>(n)));
    __syncthreads();
    for (int step = 0; step < POWER_STEPS; ++step) {
        multiply(s, shared.products(), shared.v);
        __syncthreads();
        w = entry.mine ? static_cast<double>(entry.sum(shared.products())) : 0.0;
        norm = sqrt(sum_over_block(w * w, shared, step + 1, team));
        if (entry.mine && positive(norm)) shared.v[entry.slot()] = static_cast<T>(w / norm);
        __syncthreads();
    }
    return norm;
}

// shared.columns() <- those of R, then shared.rows <- the rows of M.
template <class Tl>
__device__ void turn(const Tile<Tl>& s, Shared<Tl>& shared, int n, Team team) {
    using T = typename Tl::T;
    constexpr int N = Tl::N;
    const int length = Tl::tiles(n) * N, column = team.rank;
    if (column < length) {
        T* const to = shared.columns() + column * Shared<Tl>::COLUMN_PITCH;
        for (int I = 0; I < length; I += N) {
            T x[N];
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] = shared.rows[(I + i) * Tl::PITCH + Tl::slot(column)];
            store<Tl>(to, I / N, x);
        }
    }
    __syncthreads();
    if (s.I != Tile<Tl>::NONE) {
#pragma unroll
        for (int i = 0; i < N; ++i) store<Tl>(shared.rows + (s.I * N + i) * Tl::PITCH, s.J, s.a[i]);
        if (!s.on_diagonal()) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                T column_of_tile[N];
#pragma unroll
                for (int i = 0; i < N; ++i) column_of_tile[i] = s.a[i][j];
                store<Tl>(shared.rows + (s.J * N + j) * Tl::PITCH, s.I, column_of_tile);
            }
        }
    }
    __syncthreads();
}

template <class Tl, int RESIDENT>
__global__ void __launch_bounds__(Tl::MAX_THREADS, RESIDENT) fishleg_block_step_kernel(Args<typename Tl::T> args) {
    using T = typename Tl::T;
    constexpr int N = Tl::N, PITCH = Shared<Tl>::COLUMN_PITCH;
    Shared<Tl>& shared = *shared_memory<Shared<Tl>>();
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size, tiles = Tl::tiles(n);
    const Team team = whole_block();
    T *const block = args.root + b * B * B, *const top = args.top + b * B;

    read_rows(shared, block, B, n, team);
    __syncthreads();
    double lambda;
    {
        constexpr int MEMBERS = Tl::MAX_THREADS / GROUPS<Tl>;
        const int group = team.rank / MEMBERS;
        Tile<Tl> s(Team{team.rank % MEMBERS, MEMBERS}, n);
        step_matrix(s, shared, args, start, n, group, team);
        lambda = power_iteration(s, shared, top, n, team);
        turn(s, shared, n, team);
    }
    const T eta = static_cast<T>(args.rate / 2 / fmax(1.0, 1.1 * lambda));
    const int I = team.rank / tiles, J = team.rank % tiles;
    T rm[N][N];
    double loss = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) rm[i][j] = 0;
    if (I < tiles) {
        T x[N], y[N];
#pragma unroll 2
        for (int k = 0; k < n; ++k) {
            load<Tl>(shared.columns() + k * PITCH, I, x);
            load<Tl>(shared.rows + k * Tl::PITCH, J, y);
#pragma unroll
            for (int i = 0; i < N; ++i)
#pragma unroll
                for (int j = 0; j < N; ++j) rm[i][j] = fma(x[i], y[j], rm[i][j]);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            load<Tl>(shared.columns() + (J * N + j) * PITCH, I, x);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                loss += static_cast<double>(x[i] * (rm[i][j] / 2 - x[i]));
                rm[i][j] = x[i] - eta * (rm[i][j] - x[i]);
            }
        }
    }
    loss = sum_over_block(loss, shared, POWER_STEPS + 1, team);
    const bool finite = lambda < INFINITY && fabs(loss) < INFINITY;
    if (team.leads()) {
        args.loss[b] = finite ? loss : INFINITY;
        args.largest[b] = finite ? lambda : INFINITY;
    }
    if (!finite) return;
    if (team.rank < n) top[team.rank] = shared.v[Tl::slot(team.rank)];
    if (I >= tiles) return;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (I * N + i < n && J * N + j < n) block[static_cast<int64_t>(I * N + i) * B + J * N + j] = rm[i][j];
}

// As with_cut, but with a thread for each tile of a whole matrix.
template <class F>
int with_square_cut(const float*, int64_t size, F f) {
    if (size <= 16) return f(Cut<Tiling<float, 4, 16, false>, 16>());
    if (size <= 36) return f(Cut<Tiling<float, 6, 36, false>, 8>());
    if (size <= 56) return f(Cut<Tiling<float, 8, 56, false>, 6>());
    return f(Cut<Tiling<float, 8, 64, false>, 6>());
}

template <class F>
int with_square_cut(const double*, int64_t size, F f) {
    if (size <= 16) return f(Cut<Tiling<double, 4, 16, false>, 8>());
    return f(Cut<Tiling<double, 8, 64, false>, 2>());
}

}  // namespace

template <class T>
int fishleg_block_step(T* root, T* top, Gradients grads, Blocks blocks, double num_grads, double damping, double rate,
                       double* loss, double* largest, Where where) {
    if (blocks.size > LARGEST_STEP) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args<T> args = {root, top, grads, blocks.range, size, num_grads, damping, rate, loss, largest};
    return with_square_cut(root, size, [&](auto cut) {
        using Tl = typename decltype(cut)::Tl;
        static_assert(Tl::EDGE * Tl::EDGE <= Tl::MAX_THREADS && 8 * Tl::EDGE <= Tl::MAX_THREADS, "");
        return launch(fishleg_block_step_kernel<Tl, decltype(cut)::RESIDENT>, blocks.count, Tl::MAX_THREADS,
                      sizeof(Shared<Tl>), args, where);
    });
}

template int fishleg_block_step(float*, float*, Gradients, Blocks, double, double, double, double*, double*, Where);
template int fishleg_block_step(double*, double*, Gradients, Blocks, double, double, double, double*, double*, Where);

}  // namespace cuda
}  // namespace ff
