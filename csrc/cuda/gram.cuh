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

// Threads to launch for one matrix a thread block: a warp where its tiles take no more, whose threads then bring in
// several columns each, else one for each column at least.
template <class Tl>
constexpr int summing_threads(int64_t n) {
    return Tl::threads(Tl::MAX_B) <= WARP ? WARP : Tl::launched(n);
}

// As with_cut; a multiprocessor holds more thread blocks of one warp.
template <class F>
int with_summing_cut(const float* t, int64_t size, F f) {
    if (size <= 16) return f(Cut<Tiling<float, 4, 16, false>, 24>());
    if (size <= 36) return f(Cut<Tiling<float, 6, 36, false>, 16>());
    if (size <= 56) return f(Cut<Tiling<float, 8, 56, false>, 12>());
    if (size <= 70) return f(Cut<Tiling<float, 10, 70, false>, 8>());
    return with_cut(t, size, f);
}

template <class F>
int with_summing_cut(const double* t, int64_t size, F f) {
    return with_cut(t, size, f);
}

// The columns of a block, as the threads bring them in.
template <class Tl>
class GradientColumns {
   public:
    static constexpr int COLUMNS = (Tl::MAX_B + summing_threads<Tl>(Tl::MAX_B) - 1) / summing_threads<Tl>(Tl::MAX_B);

    __device__ void fetch(const Gradients& grads, int64_t row, int64_t start, int n, Team team) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int column = team.rank + c * team.size;
            next_[c].fetch(grads, row, start + column, column < n);
        }
    }

    __device__ void put(typename Tl::T* rows, int n, Team team, DType dtype) const {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int column = team.rank + c * team.size;
            if (column < Tl::tiles(n) * Tl::N) next_[c].put(rows + Tl::slot(column), Tl::PITCH, dtype);
        }
    }

   private:
    GradientColumn<typename Tl::T, GRAM_ROWS> next_[COLUMNS];
};

// s <- the sum of g g^T over all gradients, restricted to the n weights at `start`. One running sum over thousands of
// gradients would lose digits to its own size; so every TOGETHER of them are summed up on their own, and added to the
// sum before, which waits in shared memory.
template <class Tl>
__device__ void gram(Tile<Tl>& s, GramShared<Tl>& shared, const Gradients& grads, int64_t start, int n, Team team) {
    const int place = s.I * (s.I + 1) / 2 + s.J;
    GradientColumns<Tl> next;
    s.fill(0);
    next.fetch(grads, 0, start, n, team);
    next.put(shared.gradients[0], n, team, grads.dtype);
    __syncthreads();
    int side = 0;
    for (int64_t row = 0; row < grads.rows; row += GRAM_ROWS) {
        const int64_t done = row + GRAM_ROWS;
        next.fetch(grads, done, start, n, team);
        s.template add_outer<GRAM_ROWS>(shared.gradients[side]);
        side ^= 1;
        next.put(shared.gradients[side], n, team, grads.dtype);
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
