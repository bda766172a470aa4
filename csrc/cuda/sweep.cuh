// The inverse of a symmetric positive definite matrix F [n, n] held in registers (tile.cuh), by sweeping N pivots at a
// time: B^3 / 2 multiply-adds, as many as a Cholesky factor, its inverse and their product take, but all of them in
// rank-N terms on the whole matrix, which is the shape that registers can hold.
//
// The threads hold S = -F. With the pivots' block F_pp = L L^T and the rows H = F_.p L^-T, one sweep is
//     S_rs <- S_rs + H_r H_s^T,  S_rp <- -H_r L^-1,  S_pp <- (L L^T)^-1,
// and after all of them S = F^-1. The last two are the first one with S_rp = S_pp = 0 before it and H_p = L^-T, with
// the sign of H_r for r other than p turned: so every tile does the same. Each entry is computed once, or for both
// triangles of a diagonal tile from the same products, so the inverse is symmetric to the bit.
//
// A sweep has two barriers. Between them, one thread for each row solves for its row of H; then all tiles add their
// term, the owners of the next pivots' rows publish those, and the owner of the next F_pp factors it.
#pragma once
#include "tile.cuh"

namespace ff {
namespace cuda {

constexpr int SUMMING = 8;  // threads that sum up the squares of the others

// L lies by columns, the reciprocals of the diagonal in place of it, in whole units of 16 bytes.
template <class Tl>
constexpr int FACTOR_PITCH = round_up(Tl::N, Tl::UNIT);

// Shared memory of one matrix.
template <class Tl>
struct alignas(16) SweepShared {
    using T = typename Tl::T;
    T band[2][Tl::BAND];  // tiles of the pivots' rows of S; the vectors of H
    T factor[Tl::N * FACTOR_PITCH<Tl>];
    T root[Tl::PITCH];          // sqrt(F_ii), 0 in the padding
    T inverse_root[Tl::PITCH];  // 1 / sqrt(F_ii), 0 in the padding
    T fisher[Tl::PITCH];        // f_i = F_ii - damping, 0 in the padding
    T squares[3][Tl::MAX_THREADS];
    double partial[3][SUMMING];
    T largest[SUMMING];
    int failed;  // a pivot was not positive and finite
};

// S <- its Cholesky factor, S = -F_pp being negative definite; L goes to `factor`. False when a pivot is not positive
// and finite.
template <class Tl>
__device__ inline bool factor_tile(Tile<Tl>& s, typename Tl::T* factor) {
    using T = typename Tl::T;
    constexpr int N = Tl::N, UNIT = Tl::UNIT;
    bool usable = true;
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const T pivot = -s.a[k][k];
        usable = usable && pivot > T(0) && pivot < T(INFINITY);
        const T r = reciprocal_root(pivot);
        s.a[k][k] = r;
#pragma unroll
        for (int i = k + 1; i < N; ++i) s.a[i][k] *= -r;
#pragma unroll
        for (int i = k + 1; i < N; ++i)
#pragma unroll
            for (int j = k + 1; j <= i; ++j) s.a[i][j] = fma(s.a[i][k], s.a[j][k], s.a[i][j]);
#pragma unroll
        for (int unit = k / UNIT; unit * UNIT < N; ++unit) {
            Pack<T, UNIT> pack;
#pragma unroll
            for (int e = 0; e < UNIT; ++e) {
                const int i = unit * UNIT + e;
                pack.x[e] = i >= k && i < N ? s.a[i][k] : T(0);
            }
            *reinterpret_cast<Pack<T, UNIT>*>(factor + k * FACTOR_PITCH<Tl> + unit * UNIT) = pack;
        }
    }
    return usable;
}

// Publishes what the sweep over the pivots of tile p needs: L, and the band, with an identity in place of F_pp because
// solve_rows makes L^-T of it.
template <class Tl>
__device__ inline void prepare_sweep(Tile<Tl>& s, SweepShared<Tl>& shared, int p) {
    const bool pivots = s.I == p && s.J == p;
    if (!pivots) s.publish(shared.band[0], p);
    if (!pivots) return;  // not one condition with an else: nvcc then keeps the tile twice and spills
    publish_tile<Tl>(shared.band[0], p, [](int i, int j) { return typename Tl::T(i == j); });
    if (!factor_tile(s, shared.factor)) shared.failed = 1;
}

// The row of H of every row of the matrix.
template <class Tl>
__device__ inline void solve_rows(SweepShared<Tl>& shared, int n, int p, Team team) {
    using T = typename Tl::T;
    constexpr int N = Tl::N, UNIT = Tl::UNIT;
    for (int i = team.rank; i < n; i += team.size) {
        const auto row = Tile<Tl>::published(shared.band[0], p, i);
        T h[N];
#pragma unroll
        for (int k = 0; k < N; ++k) h[k] = row[k];
#pragma unroll
        for (int k = 0; k < N; ++k) {
#pragma unroll
            for (int unit = k / UNIT; unit * UNIT < N; ++unit) {
                const T* const from = shared.factor + k * FACTOR_PITCH<Tl> + unit * UNIT;
                const Pack<T, UNIT> column = *reinterpret_cast<const Pack<T, UNIT>*>(from);
#pragma unroll
                for (int e = 0; e < UNIT; ++e) {
                    const int j = unit * UNIT + e;
                    if (j == k) h[k] *= column.x[e];
                    if (j > k && j < N) h[j] = fma(-column.x[e], h[k], h[j]);
                }
            }
            shared.band[1][k * Tl::PITCH + Tl::slot(i)] = h[k];
        }
    }
}

// The damped matrix F = M + damping I in place of M, negated; with it the scales of the estimates. M is 0
// beyond n. A barrier must follow.
template <class Tl>
__device__ inline void negate_and_scale(Tile<Tl>& s, SweepShared<Tl>& shared, int n, typename Tl::T damping,
                                        Team team) {
    using T = typename Tl::T;
    constexpr int N = Tl::N;
    if (team.leads()) shared.failed = 0;
    // Nothing else writes H in the padding.
    for (int i = n + team.rank; i < Tl::tiles(n) * N; i += team.size)
        for (int k = 0; k < N; ++k) shared.band[1][k * Tl::PITCH + Tl::slot(i)] = T(0);
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) s.a[i][j] = -s.a[i][j];
    if (s.I == Tile<Tl>::NONE || !s.on_diagonal()) return;
    T root[N], inverse_root[N], fisher[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const bool inside = s.I * N + i < n;
        fisher[i] = -s.a[i][i];
        const T damped = fisher[i] + damping, r = reciprocal_root(damped);
        root[i] = inside ? damped * r : T(0);
        inverse_root[i] = inside ? r : T(0);
        s.a[i][i] = inside ? -damped : T(-1);  // the padding is an identity of its own
    }
    store<Tl>(shared.root, s.I, root);
    store<Tl>(shared.inverse_root, s.I, inverse_root);
    store<Tl>(shared.fisher, s.I, fisher);
}

// The sum of (a_ij x_i x_j)^2 over this thread's share of the symmetric matrix.
template <class Tl>
__device__ inline typename Tl::T scaled_squares(const Tile<Tl>& s, const typename Tl::T* x) {
    using T = typename Tl::T;
    if (s.I == Tile<Tl>::NONE) return T(0);
    T row[Tl::N], column[Tl::N], sum = T(0);
    load<Tl>(x, s.I, row);
    load<Tl>(x, s.J, column);
#pragma unroll
    for (int i = 0; i < Tl::N; ++i)
#pragma unroll
        for (int j = 0; j < Tl::N; ++j) {
            const T scaled = s.a[i][j] * (row[i] * column[j]);
            sum = fma(scaled, scaled, sum);
        }
    return s.on_diagonal() ? sum : 2 * sum;
}

// The sum of a_ij^2 f_j over this thread's share. a f is of the order of 1, a^2 may be out of range.
template <class Tl>
__device__ inline typename Tl::T weighted_squares(const Tile<Tl>& s, const typename Tl::T* f) {
    using T = typename Tl::T;
    if (s.I == Tile<Tl>::NONE) return T(0);
    T row[Tl::N], column[Tl::N], sum = T(0);
    load<Tl>(f, s.I, row);
    load<Tl>(f, s.J, column);
#pragma unroll
    for (int i = 0; i < Tl::N; ++i)
#pragma unroll
        for (int j = 0; j < Tl::N; ++j) sum = fma(s.a[i][j], s.a[i][j] * (row[i] + column[j]), sum);
    return s.on_diagonal() ? sum / 2 : sum;
}

// S = -F -> F^-1. Every thread of the block must call it, with the same number of `panels`.
template <class Tl>
__device__ inline void invert(Tile<Tl>& s, SweepShared<Tl>& shared, int n, int panels, Team team) {
    if (team.size) shared.squares[0][team.rank] = scaled_squares(s, shared.inverse_root);
    prepare_sweep(s, shared, 0);
    __syncthreads();
    for (int p = 0; p < panels; ++p) {
        solve_rows(shared, n, p, team);
        __syncthreads();
        if (s.I == p || s.J == p) s.fill(0);
        s.template add_outer<Tl::N>(shared.band[1]);
        if (p + 1 < panels) prepare_sweep(s, shared, p + 1);
        __syncthreads();
    }
    s.mirror();
}

__device__ inline double or_infinity(double x) { return x < INFINITY ? x : INFINITY; }

// The two estimates of kernels.h, once `invert` has run; written by one thread. Returns whether all pivots were usable.
template <class Tl>
__device__ inline bool estimate(const Tile<Tl>& s, SweepShared<Tl>& shared, int n, Team team, double* condition,
                                double* amplification) {
    using T = typename Tl::T;
    const int rank = team.rank;
    if (team.size) {
        shared.squares[1][rank] = scaled_squares(s, shared.root);
        shared.squares[2][rank] = weighted_squares(s, shared.fisher);
    }
    __syncthreads();
    const int lanes = team.size < SUMMING ? team.size : SUMMING;
    if (rank < lanes) {
        for (int which = 0; which < 3; ++which) {
            double sum = 0;
            for (int i = rank; i < team.size; i += lanes) sum += static_cast<double>(shared.squares[which][i]);
            shared.partial[which][rank] = sum;
        }
        T largest = T(0);
        for (int i = rank; i < n; i += lanes) largest = fmax(largest, shared.fisher[Tl::slot(i)]);
        shared.largest[rank] = largest;
    }
    __syncthreads();
    const bool usable = !shared.failed;
    if (team.leads()) {
        double sums[3] = {0, 0, 0}, largest = 0;
        for (int lane = 0; lane < lanes; ++lane) {
            for (int which = 0; which < 3; ++which) sums[which] += shared.partial[which][lane];
            largest = fmax(largest, static_cast<double>(shared.largest[lane]));
        }
        const double norm = sqrt(sums[0]);
        *condition = usable ? or_infinity(norm * sqrt(sums[1])) : INFINITY;
        *amplification = usable ? or_infinity(norm * sqrt(sums[2]) * sqrt(largest)) : INFINITY;
    }
    return usable;
}

}  // namespace cuda
}  // namespace ff
