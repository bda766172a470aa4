// The Gram matrix of the gradients of one block, summed up in registers (tile.cuh).
#pragma once
#include "gradients.cuh"

namespace ff {
namespace cuda {

constexpr int GRAM_ROWS = 8;   // gradients on chip at a time; as many are on their way
constexpr int TOGETHER = 128;  // gradients summed up in one go

// Shared memory while gradients are summed up.
template <class Tl>
struct alignas(16) GramShared {
    using T = typename Tl::T;
    T gradients[2][GRAM_ROWS * Tl::PITCH];
    T sums[1];  // of the gradients before, tile by tile as publish_tile leaves them; there only if they are needed

    static constexpr int tiles(int size) { return Tl::tiles(size) * (Tl::tiles(size) + 1) / 2; }
    static constexpr size_t bytes(int size, int64_t rows) {
        const size_t sums = rows > TOGETHER ? tiles(size) * Tl::TILE * sizeof(T) : 0;
        return sizeof(GramShared) + sums;
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
    GradientColumn<typename Tl::T, GRAM_ROWS> next;
    s.fill(0);
    next.fetch(grads, 0, start + column, column < n);
    if (staging) next.put(shared.gradients[0] + Tl::slot(column), Tl::PITCH, grads.dtype);
    __syncthreads();
    int side = 0;
    for (int64_t row = 0; row < grads.rows; row += GRAM_ROWS) {
        const int64_t done = row + GRAM_ROWS;
        next.fetch(grads, done, start + column, column < n);
        s.template add_outer<GRAM_ROWS>(shared.gradients[side]);
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

}  // namespace cuda
}  // namespace ff
