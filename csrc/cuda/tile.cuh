// A symmetric matrix [n, n] in the registers of the threads that work on it: each holds one N x N tile of the lower
// triangle. Registers hold twice what shared memory does and are read many times faster, which is what decides here:
// every step of every kernel touches all of the matrix. Shared memory carries vectors only.
//
// A rank-one term x x^T costs a thread 2 N loads for N^2 multiply-adds; consecutive threads share the row of tiles, so
// that half of the loads are broadcasts and the other half is contiguous.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace ff {
namespace cuda {

// T: type of the matrix. N: edge of a tile. MAX_B: longest matrix. DIAGONAL_WARP: the tiles on the diagonal have the
// first warp for themselves, see Tile::add_outer.
template <class T_, int N_, int MAX_B_, bool DIAGONAL_WARP_>
struct Tiling {
    using T = T_;
    static constexpr int N = N_, MAX_B = MAX_B_;
    static constexpr bool DIAGONAL_WARP = DIAGONAL_WARP_;
    static constexpr int EDGE = (MAX_B + N - 1) / N;  // tiles along the edge of the largest matrix
    static_assert(!DIAGONAL_WARP || EDGE <= WARP, "the diagonal does not fit a warp");
    // Elements of a vector that are loaded at once: the largest power of two that divides N and fits 16 bytes.
    static constexpr int PACK = (N % 4 == 0 && sizeof(T) == 4) ? 4 : 2;
    static constexpr int PLANES = N / PACK;
    // A vector lies in memory as PLANES planes: plane c holds pack c of each tile, one tile after the other, so that
    // threads with consecutive tiles load without bank conflicts.
    static constexpr int PLANE = EDGE * PACK;
    static constexpr int PITCH = PLANE * PLANES;
    // A tile lies in memory row by row, and takes an odd number of 16-byte units, so that threads with consecutive
    // tiles store without bank conflicts.
    static constexpr int UNIT = 16 / sizeof(T);
    static constexpr int TILE = (N * N / UNIT | 1) * UNIT;
    // Elements that a band takes, be it N vectors or the tiles of N rows.
    static constexpr int BAND = N * PITCH > EDGE* TILE ? N * PITCH : EDGE * TILE;

    static __host__ __device__ constexpr int tiles(int64_t n) { return static_cast<int>((n + N - 1) / N); }
    // Threads that a matrix of length n takes: one for each tile.
    static __host__ __device__ constexpr int threads(int64_t n) {
        return (DIAGONAL_WARP ? WARP : tiles(n)) + tiles(n) * (tiles(n) - 1) / 2;
    }
    // Threads to launch for one matrix a thread block, one for each of its rows at least.
    static __host__ __device__ constexpr int launched(int64_t n) {
        return round_up(threads(n) < tiles(n) * N ? tiles(n) * N : threads(n), WARP);
    }
    static constexpr int MAX_THREADS = launched(MAX_B);

    // Where element i of a vector lies.
    static __device__ int slot(int i) { return i % N / PACK * PLANE + i / N * PACK + i % PACK; }
};

// For the largest blocks that fit on chip. 12 warps with 168 registers each hold 26 x 26 tiles of 10 x 10 float32
// numbers, 8 warps with 255 registers 22 x 22 tiles of 8 x 8 float64 numbers.
template <class T>
using Largest = std::conditional_t<sizeof(T) == 4, Tiling<T, 10, 256, true>, Tiling<T, 8, 176, false>>;

// A way of cutting a block into tiles, and how many thread blocks of it are to fit on a multiprocessor.
template <class Tl_, int RESIDENT_>
struct Cut {
    using Tl = Tl_;
    static constexpr int RESIDENT = RESIDENT_;
};

// f(the cut for blocks of so many weights). The tiles of a block should fill whole warps, or nearly: 4 x 4 of them for
// 16, 6 x 6 for 36, 7 x 7 for 56 and 70 weights make 10, 21 and twice 28 threads.
template <class F>
int with_cut(const float*, int64_t size, F f) {
    if (size <= 16) return f(Cut<Tiling<float, 4, 16, false>, 24>());
    if (size <= 36) return f(Cut<Tiling<float, 6, 36, false>, 10>());
    if (size <= 56) return f(Cut<Tiling<float, 8, 56, false>, 8>());
    if (size <= 70) return f(Cut<Tiling<float, 10, 70, false>, 4>());
    if (size <= 128) return f(Cut<Tiling<float, 8, 128, true>, 3>());
    return f(Cut<Largest<float>, 1>());
}

template <class F>
int with_cut(const double*, int64_t size, F f) {
    if (size <= 16) return f(Cut<Tiling<double, 4, 16, false>, 16>());
    if (size <= 64) return f(Cut<Tiling<double, 4, 64, false>, 3>());
    return f(Cut<Largest<double>, 1>());
}

template <class T, int PACK>
struct alignas(PACK * sizeof(T)) Pack {
    T x[PACK];
};

// The elements of a vector that belong to tile I.
template <class Tl>
__device__ inline void load(const typename Tl::T* vector, int I, typename Tl::T (&x)[Tl::N]) {
#pragma unroll
    for (int c = 0; c < Tl::PLANES; ++c) {
        using P = Pack<typename Tl::T, Tl::PACK>;
        const P pack = *reinterpret_cast<const P*>(vector + c * Tl::PLANE + I * Tl::PACK);
#pragma unroll
        for (int e = 0; e < Tl::PACK; ++e) x[c * Tl::PACK + e] = pack.x[e];
    }
}

// to <- pack c of x.
template <class Tl>
__device__ inline void store_pack(typename Tl::T* to, const typename Tl::T (&x)[Tl::N], int c) {
    using P = Pack<typename Tl::T, Tl::PACK>;
    P pack;
#pragma unroll
    for (int e = 0; e < Tl::PACK; ++e) pack.x[e] = x[c * Tl::PACK + e];
    *reinterpret_cast<P*>(to) = pack;
}

template <class Tl>
__device__ inline void store(typename Tl::T* vector, int I, const typename Tl::T (&x)[Tl::N]) {
#pragma unroll
    for (int c = 0; c < Tl::PLANES; ++c) store_pack<Tl>(vector + c * Tl::PLANE + I * Tl::PACK, x, c);
}

// The place of a tile in a band <- element(i, j).
template <class Tl, class Element>
__device__ inline void publish_tile(typename Tl::T* tiles, int place, Element element) {
    using P = Pack<typename Tl::T, Tl::UNIT>;
#pragma unroll
    for (int unit = 0; unit < Tl::N * Tl::N / Tl::UNIT; ++unit) {
        P pack;
#pragma unroll
        for (int e = 0; e < Tl::UNIT; ++e) {
            const int at = unit * Tl::UNIT + e;
            pack.x[e] = element(at / Tl::N, at % Tl::N);
        }
        *reinterpret_cast<P*>(tiles + place * Tl::TILE + unit * Tl::UNIT) = pack;
    }
}

__device__ inline float rough_reciprocal_root(float x) { return rsqrtf(x); }
__device__ inline double rough_reciprocal_root(double x) { return rsqrt(x); }

// x^-1/2 with one Newton step, because the instruction alone is off by up to 2 ulp.
template <class T>
__device__ inline T reciprocal_root(T x) {
    const T r = rough_reciprocal_root(x);
    return fma(T(0.5) * r, fma(-x * r, r, T(1)), r);
}

// The threads that work on one matrix, and which of them this one is. A thread without a matrix has size 0 and n = 0;
// it takes part in the barriers only.
struct Team {
    int rank, size;
    __device__ bool leads() const { return size > 0 && rank == 0; }
};

// All threads of a thread block. Those with tiles are the first ones by rank, and an idle warp may be left behind them;
// the ranks of thread blocks that run beside each other begin at different warps, because a multiprocessor binds warps
// to its four schedulers by their place.
__device__ inline Team whole_block() {
    const unsigned warps = blockDim.x / WARP;
    return {static_cast<int>((threadIdx.x + blockIdx.x % warps * WARP) % blockDim.x), static_cast<int>(blockDim.x)};
}

// One thread's part of a matrix: tile (I, J), J <= I.
template <class Tl>
struct Tile {
    using T = typename Tl::T;
    static constexpr int N = Tl::N;

    T a[N][N];
    int I, J;  // NONE in a thread without a tile
    static constexpr int NONE = -1;

    // Threads on the diagonal come first, the others row by row.
    __device__ Tile(Team team, int n) : I(team.rank), J(team.rank) {
        const int tiles = Tl::tiles(n), on_diagonal = Tl::DIAGONAL_WARP ? WARP : tiles;
        if (team.rank >= on_diagonal) {
            I = 1;
            J = team.rank - on_diagonal;
            while (J >= I && I < tiles) J -= I++;
        }
        if (I >= tiles) I = J = NONE;
    }

    __device__ bool on_diagonal() const { return I == J; }

    __device__ void fill(T value) {
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) a[i][j] = value;
    }

    __device__ void scale(T factor) {
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) a[i][j] *= factor;
    }

    // On the diagonal, the upper triangle <- the lower one.
    __device__ void mirror() {
        if (!on_diagonal()) return;
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < i; ++j) a[j][i] = a[i][j];
    }

    // a += x x^T over `ROWS` vectors. A warp of diagonal tiles computes only their lower triangles: it has work of its
    // own afterwards (factor_tile), which it then finishes while the other warps are still here.
    template <int ROWS>
    __device__ void add_outer(const T* vectors) {
        if (I == NONE) return;
        if (Tl::DIAGONAL_WARP && on_diagonal()) {
            add_outer_part<ROWS, true>(vectors);
        } else {
            add_outer_part<ROWS, false>(vectors);
        }
    }

    // a <- the tile of a matrix of which the lower triangle is read; 0 beyond n.
    __device__ void read(const T* matrix, int64_t ld, int n) {
        fill(0);
        if (I == NONE) return;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int row = I * N + i;
            const T* from = matrix + row * ld + J * N;
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (row < n && J * N + j <= row) a[i][j] = from[j];
        }
        mirror();
    }

    // matrix <- all of the symmetric matrix, or NaN, in one piece whatever the alignment. As by_bands.
    __device__ void write(T* matrix, int64_t ld, int n, int bands, Team team, T* room, bool valid) const {
        by_bands(n, bands, team, room, [&](int band, int j, const Column& column) {
            T* const to = matrix + band * N * ld + j;
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (band * N + i < n) to[i * ld] = valid ? column[i] : T(NAN);
        });
    }

    // f(band, j, what column j of the matrix holds of the band) for bands of N rows, which go through shared memory, in
    // turn; columns are shared out among the threads. Every thread of the block must call it, with the same `bands`.
    // room [2, BAND]: in turns, so that a band needs only one barrier.
    template <class F>
    __device__ void by_bands(int n, int bands, Team team, T* room, F f) const {
        for (int band = 0; band < bands; ++band) {
            T* const tiles = room + (band & 1) * Tl::BAND;
            publish(tiles, band);
            __syncthreads();
            for (int j = team.rank; j < n; j += team.size) f(band, j, published(tiles, band, j));
        }
    }

    // tiles <- the tiles of a band, each as its owner holds it: those left of the diagonal are rows of the band, those
    // below it are columns, which is the same by symmetry.
    __device__ void publish(T* tiles, int band) const {
        if (I != band && J != band) return;
        publish_tile<Tl>(tiles, I == band ? J : I, [&](int i, int j) { return a[i][j]; });
    }

    // a += the tile at `place` of a band.
    __device__ void add_tile(const T* tiles, int place) {
#pragma unroll
        for (int unit = 0; unit < N * N / Tl::UNIT; ++unit) {
            using P = Pack<T, Tl::UNIT>;
            const P pack = *reinterpret_cast<const P*>(tiles + place * Tl::TILE + unit * Tl::UNIT);
#pragma unroll
            for (int e = 0; e < Tl::UNIT; ++e) a[(unit * Tl::UNIT + e) / N][(unit * Tl::UNIT + e) % N] += pack.x[e];
        }
    }

    // What was published in column j of the matrix: rows band * N .. of it.
    struct Column {
        const T* first;
        int step;
        __device__ T operator[](int i) const { return first[i * step]; }
    };
    static __device__ Column published(const T* tiles, int band, int j) {
        const T* const tile = tiles + j / N * Tl::TILE;
        return j / N <= band ? Column{tile + j % N, N} : Column{tile + j % N * N, 1};
    }

    // a += x y^T.
    template <bool LOWER = false>
    __device__ void add_product(const T (&x)[N], const T (&y)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i)
#pragma unroll
            for (int j = 0; j < (LOWER ? i + 1 : N); ++j) a[i][j] = fma(x[i], y[j], a[i][j]);
    }

   private:
    template <int ROWS, bool LOWER>
    __device__ void add_outer_part(const T* vector) {
#pragma unroll(N <= 4 ? ROWS : 1)
        for (int k = 0; k < ROWS; ++k, vector += Tl::PITCH) {
            T x[N], y[N];
            load<Tl>(vector, I, x);
            load<Tl>(vector, J, y);
            add_product<LOWER>(x, y);
        }
    }
};

}  // namespace cuda
}  // namespace ff
