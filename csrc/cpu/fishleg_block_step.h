// One auxiliary step of FishLeg on R with Q = R R^T, a block at a time, all of it in cache:
//
//   Z = G R,  M = Z^T Z / m + gamma R^T R,  R <- R - eta (R M - R),  eta = rate / 2 / max(1, 1.1 lambda)
//
// Rows of R M become rows of the new R at once; R itself stays in scratch memory, for a block that turns out not
// finite. R and Z / (m gamma)^1/2 lie under each other in one matrix P, so that M = gamma P^T P is one Gram product.
// The loss 1/2 <M, R^T R> - tr R^T R is 1/2 <R M, R> - |R|^2, of which the step has both. n^2 (3 k + 3 n) / 2
// multiply-adds.
#pragma once
#include "dense.h"
#include "fisher_accumulate.h"
#include "gradients.h"

namespace ff {
namespace FF_NAMESPACE {

constexpr int64_t STEP_ROWS = 64;  // gradients at a time
constexpr int POWER_STEPS = 3;

struct Step {
    double num_grads, damping, rate;
};

template <class T>
struct StepScratch {
    StepScratch(int64_t B, int64_t k)
        : ld(leading<T>(B)),
          P((B + padded<T>(k) + MR) * ld),
          G(padded<T>(k) * ld),
          M(padded<T>(B) * ld),
          RM(MR * ld),
          v(padded<T>(B)),
          w(padded<T>(B)) {}
    const int64_t ld;
    Scratch<T> P, G, M, RM, v, w;
};

// v [n] <- x / |x|, and |x|; v stays where that is no positive finite number.
template <class T>
FF_INLINE double normalised(const T* x, int64_t n, T* v) {
    const double norm = std::sqrt(dot<double>(x, x, n));
    if (usable_pivot(norm))
        for (int64_t i = 0; i < n; ++i) v[i] = static_cast<T>(static_cast<double>(x[i]) / norm);
    return norm;
}

// The largest eigenvalue of a symmetric scratch matrix M [n, n] as the norm of its last product with a unit vector v,
// which begins as `start` and becomes that product.
template <class T>
inline double power_iteration(int64_t n, const T* M, int64_t ld, const T* start, T* v, T* w) {
    if (!usable_pivot(normalised(start, n, v)))
        for (int64_t i = 0; i < n; ++i) v[i] = static_cast<T>(1 / std::sqrt(static_cast<double>(n)));
    double norm = 0;
    for (int step = 0; step < POWER_STEPS; ++step) {
        vector_times<T, 0>(n, v, M, ld, w, n);
        norm = normalised<T>(w, n, v);
    }
    return norm;
}

// Scratch matrix M [n, n] <- factor M from its lower triangle, both triangles, zeros in the padded columns.
template <class T>
inline void scale_and_mirror(T factor, T* M, int64_t n, int64_t ld) {
    const int64_t rows = ceil_div(n, MR) * MR;
    for (int64_t i = 0; i < rows; i += MR) {
        for (int64_t r = i; r < i + MR; ++r)
            for (int64_t j = 0; j < i + MR; ++j) M[r * ld + j] *= factor;
        for (int64_t j = 0; j < i + MR; ++j) {
            T column[MR];
            for (int64_t r = 0; r < MR; ++r) column[r] = M[max(i + r, j) * ld + min(i + r, j)];
            for (int64_t r = 0; r < MR; ++r) M[j * ld + i + r] = column[r];
        }
    }
    for (int64_t i = 0; i < n; ++i) fill_zero(M + i * ld + rows, padded<T>(n) - rows);
}

// s.M <- M of one block, whose R begins s.P, zero in its padded columns; both triangles.
template <class T>
inline void step_matrix(StepScratch<T>& s, const Gradients& g, int64_t start, int64_t n, const Step& step,
                        int64_t ahead) {
    const int64_t np = padded<T>(n), ld = s.ld;
    T *Z = s.P + n * ld, *M = s.M;
    const T factor = static_cast<T>(1 / std::sqrt(step.num_grads * step.damping));
    for (int64_t a = 0; a < g.rows; a += STEP_ROWS) {
        const int64_t rows = min(STEP_ROWS, g.rows - a), filled = ceil_div(rows, MR) * MR;
        pack_rows<T>(g, a, rows, start, n, s.G, ld, np, ahead);
        fill_zero(s.G + rows * ld, (filled - rows) * ld);
        for (int64_t r = 0; r < rows; r += MR) tile_row<T, 0, true>(n, s.G + r * ld, ld, s.P, ld, Z + r * ld, ld, n);
        for (int64_t r = 0; r < rows; ++r) scale(factor, Z + r * ld, np);
        if (a == 0) {
            gram_lower<T, 0>(n + rows, s.P, ld, n, M, ld);
        } else {
            gram_lower<T, 1>(rows, Z, ld, n, M, ld);
        }
    }
    scale_and_mirror(static_cast<T>(step.damping), M, n, ld);
}

// A row of a block and of R M: out <- R - eta (R M - R), lanes += R (R M / 2 - R), whose sum is the loss.
template <class T>
FF_INLINE void finish_row(const T* r, const T* rm, int64_t n, T eta, T* __restrict__ out, double* __restrict__ lanes) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        for (int64_t l = 0; l < 16; ++l) lanes[l] += static_cast<double>(r[j + l] * (rm[j + l] / 2 - r[j + l]));
        for (int64_t l = 0; l < 16; ++l) out[j + l] = r[j + l] - eta * (rm[j + l] - r[j + l]);
    }
    for (int64_t l = 0; j < n; ++j, ++l) {
        lanes[l] += static_cast<double>(r[j] * (rm[j] / 2 - r[j]));
        out[j] = r[j] - eta * (rm[j] - r[j]);
    }
}

// `next` is the R of the block after this one, which is asked for meanwhile; null after the last.
template <class T>
inline void step_block(StepScratch<T>& s, T* root, int64_t B, T* top, const Gradients& g, int64_t start, int64_t n,
                       const Step& step, double* loss, double* largest, int64_t ahead, const T* next) {
    const int64_t np = padded<T>(n), ld = s.ld;
    T *R = s.P, *RM = s.RM;
    for (int64_t i = 0; i < n; ++i) {
        std::memcpy(R + i * ld, root + i * B, static_cast<size_t>(n) * sizeof(T));
        fill_zero(R + i * ld + n, np - n);
    }
    step_matrix(s, g, start, n, step, ahead);
    const double lambda = power_iteration<T>(n, s.M, ld, top, s.v, s.w);
    const T eta = static_cast<T>(step.rate / 2 / max(1.0, 1.1 * lambda));
    double lanes[16] = {}, sum = 0;
    for (int64_t i = 0; i < n; i += MR) {
        for (int64_t j = 0; next && j < MR * B; j += 64 / sizeof(T)) __builtin_prefetch(next + i * B + j, 1, 2);
        tile_row<T, 0, true>(n, R + i * ld, ld, s.M, ld, RM, ld, n);
        for (int64_t r = i; r < min(n, i + MR); ++r)
            finish_row<T>(R + r * ld, RM + (r - i) * ld, n, eta, root + r * B, lanes);
    }
    for (double lane : lanes) sum += lane;
    constexpr double INFINITE = std::numeric_limits<double>::infinity();
    const bool finite = lambda < INFINITE && std::fabs(sum) < INFINITE;
    *loss = finite ? sum : INFINITE;
    *largest = finite ? lambda : INFINITE;
    if (finite) {
        std::memcpy(top, s.v, static_cast<size_t>(n) * sizeof(T));
        return;
    }
    for (int64_t i = 0; i < n; ++i) std::memcpy(root + i * B, R + i * ld, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
void fishleg_block_step(T* root, T* top, Gradients g, Blocks blocks, double num_grads, double damping, double rate,
                        double* loss, double* largest, int threads) {
    const int64_t B = blocks.size, per_task = blocks_per_task(blocks.count, threads);
    const Step step = {num_grads, damping, rate};
    auto task = [&](int64_t t) {
        StepScratch<T> s(B, min(STEP_ROWS, g.rows));
        for (int64_t b = t * per_task; b < min(blocks.count, (t + 1) * per_task); ++b) {
            T* R = root + b * B * B;
            const bool more = b + 1 < blocks.count;
            step_block<T>(s, R, B, top + b * B, g, blocks.start(b), blocks.length(b), step, loss + b, largest + b,
                          more ? blocks.length(b + 1) : 0, more ? R + B * B : nullptr);
        }
    };
    parallel(ceil_div(blocks.count, per_task), threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
