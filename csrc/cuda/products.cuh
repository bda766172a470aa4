// The product of a symmetric matrix in registers (tile.cuh) with a vector, through shared memory: a tile adds to the
// entries of its rows and, for the upper triangle, of its columns; one thread for each entry sums these parts up, in a
// fixed order.
#pragma once
#include "tile.cuh"

namespace ff {
namespace cuda {

template <class Tl>
struct alignas(16) Products {
    using T = typename Tl::T;
    // Parts of one tile, by rows I, then tiles K. The odd length makes both ways of writing, along a row of tiles and
    // along a column, free of bank conflicts.
    static constexpr int LENGTH = Tl::EDGE | 1;
    static constexpr int PARTS = Tl::PLANES * Tl::EDGE * LENGTH * Tl::PACK;
    // There is room for Tile::write, too.
    T parts[PARTS > 2 * Tl::BAND ? PARTS : 2 * Tl::BAND];

    static __device__ int place(int plane, int I, int K) { return ((plane * Tl::EDGE + I) * LENGTH + K) * Tl::PACK; }

    // What tile K adds to the entries of the product in tile I.
    __device__ void store(int I, int K, const T (&x)[Tl::N]) {
#pragma unroll
        for (int plane = 0; plane < Tl::PLANES; ++plane) store_pack<Tl>(parts + place(plane, I, K), x, plane);
    }
};

// The sum of x over the threads of a warp, in a fixed order.
__device__ inline double sum_over_warp(double x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// This thread's parts of s g; returns its part of g.(s g). A barrier must follow.
template <class Tl>
__device__ double multiply(const Tile<Tl>& s, Products<Tl>& products, const typename Tl::T* g) {
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
    products.store(s.I, s.J, by_row);
    if (s.on_diagonal()) return static_cast<double>(dot);
    products.store(s.J, s.I, by_column);
    return 2 * static_cast<double>(dot);
}

// The entry of a product that a thread sums up; threads with consecutive ranks take consecutive tiles.
template <class Tl>
struct Entry {
    int plane, I, e, tiles;
    bool mine;

    __device__ Entry(Team team, int tiles)
        : plane(team.rank / Tl::PACK / tiles),
          I(team.rank / Tl::PACK % tiles),
          e(team.rank % Tl::PACK),
          tiles(tiles),
          mine(team.rank < tiles * Tl::N) {}

    __device__ int slot() const { return plane * Tl::PLANE + I * Tl::PACK + e; }
    __device__ int index() const { return I * Tl::N + plane * Tl::PACK + e; }

    __device__ typename Tl::T sum(const Products<Tl>& products) const {
        const typename Tl::T* const from = products.parts + Products<Tl>::place(plane, I, 0) + e;
        typename Tl::T v = 0;
#pragma unroll(Tl::EDGE / 2)
        for (int K = 0; K < tiles; ++K) v += from[K * Tl::PACK];
        return v;
    }
};

}  // namespace cuda
}  // namespace ff
