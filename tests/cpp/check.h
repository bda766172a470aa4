// One random problem, every kernel, and the same result by plain loops in double: what the tests and the fuzz target
// share. Memory is allocated to the byte, so that the address sanitizer sees every access outside of it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace check {

using ff::Blocks;
using ff::Convolution;
using ff::DType;
using ff::Dual;
using ff::Gradients;
using ff::Kernels;
using ff::KernelTable;
using Matrix = std::vector<double>;  // row-major

constexpr double DAMPING = 0.5;

struct Problem {
    int64_t block_size = 1;
    std::vector<int64_t> range;  // start, stop of each block
    int64_t num_weights = 1;
    int64_t num_grads = 1;
    int64_t columns = 1;  // of the matrix that the inverse is applied to
    DType dtype = DType::f32;
    int64_t extra_stride = 0;  // of the gradient rows
    uint32_t seed = 0;

    int64_t num_blocks() const { return static_cast<int64_t>(range.size()) / 2; }
    Blocks blocks() const { return {range.data(), num_blocks(), block_size}; }
    std::string text() const {
        return "K=" + std::to_string(num_blocks()) + " B=" + std::to_string(block_size) +
               " d=" + std::to_string(num_weights) + " k=" + std::to_string(num_grads) +
               " n=" + std::to_string(columns) + " dtype=" + std::to_string(static_cast<int>(dtype)) +
               " seed=" + std::to_string(seed);
    }
};

// Blocks of `block_size` over `num_weights`, the last one short; every third block is followed by a gap when `gaps`.
inline Problem make_problem(int64_t block_size, int64_t num_weights, int64_t num_grads, bool gaps = false) {
    Problem p;
    p.block_size = block_size;
    p.num_weights = num_weights;
    p.num_grads = num_grads;
    for (int64_t start = 0, b = 0; start < num_weights; ++b) {
        const int64_t stop = std::min(start + block_size, num_weights);
        p.range.insert(p.range.end(), {start, stop});
        start = stop + (gaps && b % 3 == 2 ? 2 : 0);
    }
    return p;
}

[[noreturn]] inline void fail(const std::string& what, const Problem& p) {
    std::fprintf(stderr, "FAILED %s: %s\n", what.c_str(), p.text().c_str());
    std::abort();
}

// Gradients as stored, and the very same numbers in double.
struct StoredGradients {
    std::vector<unsigned char> bytes;
    Matrix values;  // [k, d]
    int64_t stride = 0;
    Gradients view(const Problem& p) const { return {bytes.data(), p.dtype, p.num_grads, stride}; }
};

// Multiples of 1/16 between -2 and 2: exact in every dtype, so that all kernels see the numbers that the loops see.
inline StoredGradients make_gradients(const Problem& p) {
    std::mt19937 random(p.seed);
    StoredGradients g;
    g.stride = p.num_weights + p.extra_stride;
    g.values.resize(p.num_grads * p.num_weights);
    const int64_t size = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
    g.bytes.assign(((p.num_grads - 1) * g.stride + p.num_weights) * size, 0xff);  // the gaps between rows are NaN
    for (int64_t a = 0; a < p.num_grads; ++a) {
        for (int64_t q = 0; q < p.num_weights; ++q) {
            const int sixteenths = static_cast<int>(random() % 65) - 32;
            const double value = sixteenths / 16.0;
            const float single = static_cast<float>(value);
            unsigned char* at = g.bytes.data() + (a * g.stride + q) * size;
            g.values[a * p.num_weights + q] = value;
            uint32_t bits;
            std::memcpy(&bits, &single, 4);
            if (p.dtype == DType::f64) std::memcpy(at, &value, 8);
            if (p.dtype == DType::f32) std::memcpy(at, &single, 4);
            if (p.dtype == DType::bf16) {
                const uint16_t half = static_cast<uint16_t>(bits >> 16);
                std::memcpy(at, &half, 2);
            }
            if (p.dtype == DType::f16) {
                const uint32_t exponent = (bits >> 23 & 0xff) - 127 + 15;
                const uint16_t half = static_cast<uint16_t>(
                    sixteenths == 0 ? 0 : bits >> 31 << 15 | exponent << 10 | (bits >> 13 & 0x3ff));
                std::memcpy(at, &half, 2);
            }
        }
    }
    return g;
}

// The inverse of a small matrix [n, n] by Gauss-Jordan elimination with pivoting.
inline Matrix inverse(Matrix a, int64_t n) {
    Matrix x(n * n, 0.0);
    for (int64_t i = 0; i < n; ++i) x[i * n + i] = 1;
    for (int64_t c = 0; c < n; ++c) {
        int64_t pivot = c;
        for (int64_t r = c; r < n; ++r)
            if (std::fabs(a[r * n + c]) > std::fabs(a[pivot * n + c])) pivot = r;
        for (int64_t j = 0; j < n; ++j) {
            std::swap(a[c * n + j], a[pivot * n + j]);
            std::swap(x[c * n + j], x[pivot * n + j]);
        }
        const double scale = 1 / a[c * n + c];
        for (int64_t j = 0; j < n; ++j) {
            a[c * n + j] *= scale;
            x[c * n + j] *= scale;
        }
        for (int64_t r = 0; r < n; ++r) {
            const double factor = a[r * n + c];
            if (r == c || factor == 0) continue;
            for (int64_t j = 0; j < n; ++j) {
                a[r * n + j] -= factor * a[c * n + j];
                x[r * n + j] -= factor * x[c * n + j];
            }
        }
    }
    return x;
}

// ||D^1/2 A^-1 D^1/2||_F for D = diag(A): the norm of the inverse of A scaled to unit diagonal.
inline double scaled_inverse_norm(const Matrix& a, const Matrix& inv, int64_t n) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) squares += inv[i * n + j] * inv[i * n + j] * a[i * n + i] * a[j * n + j];
    return std::sqrt(squares);
}

// ||D^-1/2 A D^-1/2||_F: the norm of A scaled to unit diagonal.
inline double scaled_norm(const Matrix& a, int64_t n) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) squares += a[i * n + j] * a[i * n + j] / (a[i * n + i] * a[j * n + j]);
    return std::sqrt(squares);
}

// lambda I + G^T G / m over one block, or over the weights of it that `keep` names.
inline Matrix block_fisher(const Problem& p, const Matrix& grads, int64_t b) {
    const int64_t start = p.range[2 * b], n = p.range[2 * b + 1] - start;
    Matrix fisher(n * n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            double sum = 0;
            for (int64_t a = 0; a < p.num_grads; ++a)
                sum += grads[a * p.num_weights + start + i] * grads[a * p.num_weights + start + j];
            fisher[i * n + j] = sum / static_cast<double>(p.num_grads) + (i == j ? DAMPING : 0);
        }
    }
    return fisher;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// |got - want| <= tolerance * max |want|, and no NaN.
template <class T>
void expect_near(const T* got, const double* want, int64_t n, double tolerance, const char* what, const Problem& p) {
    double scale = 1e-30;
    for (int64_t i = 0; i < n; ++i) scale = std::max(scale, std::fabs(want[i]));
    for (int64_t i = 0; i < n; ++i)
        if (!(std::fabs(static_cast<double>(got[i]) - want[i]) <= tolerance * scale)) {
            std::fprintf(stderr, "entry %lld: got %.17g, want %.17g\n", static_cast<long long>(i),
                         static_cast<double>(got[i]), want[i]);
            fail(what, p);
        }
}

template <class T>
class Checker {
   public:
    Checker(const Kernels<T>& kernels, ff::DualFactor dual_factor, const Problem& problem, int threads)
        : run_(kernels), dual_factor_(dual_factor), p_(problem), threads_(threads), grads_(make_gradients(problem)) {
        const int64_t K = p_.num_blocks();
        for (int64_t b = 0; b < K; ++b) {
            fisher_.push_back(block_fisher(p_, grads_.values, b));
            inverse_.push_back(inverse(fisher_.back(), length(b)));
        }
        state_.assign(K * area(), NOT_A_NUMBER);  // the padding of short blocks stays NaN: nothing may read it
        for (int64_t b = 0; b < K; ++b)
            for (int64_t i = 0; i < length(b); ++i)
                for (int64_t j = 0; j < length(b); ++j)
                    state_[b * area() + i * p_.block_size + j] = static_cast<T>(inverse_[b][i * length(b) + j]);
        std::mt19937 random(p_.seed + 1);
        for (int64_t q = 0; q < p_.num_weights; ++q) {
            weight_.push_back(static_cast<T>(static_cast<double>(random() % 2001) / 1000 - 1));
            mask_.push_back(random() % 3 != 0);
        }
    }

    void everything() {
        rank_updates();
        accumulate();
        invert();
        build();
        diagonal_and_saliency();
        select();
        matvec();
        fisher_product();
        update();
        solve();
        eliminate();
        fishleg();
        removal();
        kron();
        convolution();
        dual();
    }

   private:
    static constexpr T NOT_A_NUMBER = std::numeric_limits<T>::quiet_NaN();
    static constexpr double TOLERANCE = sizeof(T) == 4 ? 2e-4 : 1e-9;

    int64_t length(int64_t b) const { return p_.range[2 * b + 1] - p_.range[2 * b]; }
    int64_t area() const { return p_.block_size * p_.block_size; }
    double m() const { return static_cast<double>(p_.num_grads); }
    Dual dual_state(const std::vector<double>& factor) const { return {grads_.view(p_), factor.data(), DAMPING}; }

    // Runs `kernel(out, threads)` on copies of `out`, with one thread and with several; both must agree to the bit.
    template <class V, class F>
    std::vector<V> twice(const std::vector<V>& out, const char* what, F kernel) const {
        std::vector<V> one(out), many(out);
        kernel(one.data(), 1);
        kernel(many.data(), threads_);
        if (!same_bits(one, many)) fail(std::string(what) + " depends on the number of threads", p_);
        return one;
    }

    void expect_block(const std::vector<T>& state, int64_t b, const Matrix& want, const char* what) const {
        for (int64_t i = 0; i < length(b); ++i)
            expect_near(&state[b * area() + i * p_.block_size], &want[i * length(b)], length(b), TOLERANCE, what, p_);
        for (int64_t i = 0; i < p_.block_size; ++i)
            for (int64_t j = 0; j < p_.block_size; ++j)
                if ((i >= length(b) || j >= length(b)) && !std::isnan(state[b * area() + i * p_.block_size + j]))
                    fail(std::string(what) + " wrote into the padding", p_);
    }

    void rank_updates() const {
        std::vector<T> start(state_);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i)
                for (int64_t j = 0; j < length(b); ++j)
                    start[b * area() + i * p_.block_size + j] = i == j ? static_cast<T>(1 / DAMPING) : T(0);
        const auto by_steps = twice(start, "sherman_morrison", [&](T* f_inv, int threads) {
            run_.sherman_morrison(f_inv, grads_.view(p_), p_.blocks(), m(), threads);
        });
        const auto at_once = twice(start, "woodbury", [&](T* f_inv, int threads) {
            run_.woodbury(f_inv, grads_.view(p_), p_.blocks(), m(), threads);
        });
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            expect_block(by_steps, b, inverse_[b], "sherman_morrison");
            expect_block(at_once, b, inverse_[b], "woodbury");
        }
        for (T& x : start) x = -x;  // a negative definite start makes the capacitance indefinite once k outweighs m
        run_.woodbury(start.data(), grads_.view(p_), p_.blocks(), 1e-3, threads_);
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            double squares = 0;
            for (int64_t q = p_.range[2 * b]; q < p_.range[2 * b + 1]; ++q)
                squares += grads_.values[q] * grads_.values[q];
            if (squares > 0 && !std::isnan(start[b * area()])) fail("woodbury kept an indefinite block", p_);
        }
    }

    void accumulate() const {
        std::vector<T> start(state_.size(), NOT_A_NUMBER);  // neither padding nor upper triangle may be touched
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i)
                for (int64_t j = 0; j <= i; ++j)
                    start[b * area() + i * p_.block_size + j] = i == j ? static_cast<T>(DAMPING) : T(0);
        const auto got = twice(start, "fisher_accumulate", [&](T* fisher, int threads) {
            run_.fisher_accumulate(fisher, grads_.view(p_), p_.blocks(), m(), threads);
        });
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < p_.block_size; ++i) {
                const T* row = &got[b * area() + i * p_.block_size];
                const int64_t valid = i < length(b) ? i + 1 : 0;
                if (valid) expect_near(row, &fisher_[b][i * length(b)], valid, TOLERANCE, "fisher_accumulate", p_);
                for (int64_t j = valid; j < p_.block_size; ++j)
                    if (!std::isnan(row[j])) fail("fisher_accumulate wrote above the diagonal", p_);
            }
    }

    // Blocks as the package hands them over: without damping, 0 in the padding, NaN above the diagonal everywhere.
    std::vector<T> padded_gram() const {
        std::vector<T> matrix(state_.size(), NOT_A_NUMBER);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < p_.block_size; ++i)
                for (int64_t j = 0; j <= i; ++j)
                    matrix[b * area() + i * p_.block_size + j] =
                        i < length(b) ? static_cast<T>(fisher_[b][i * length(b) + j] - (i == j ? DAMPING : 0)) : T(0);
        return matrix;
    }

    // `padding` more weights without gradient count with 1 in both norms.
    void expect_estimates(double condition, double amplification, int64_t b, int64_t padding, const char* what) const {
        const int64_t n = length(b);
        const double extra = static_cast<double>(padding);
        const double norm = std::sqrt(std::pow(scaled_norm(fisher_[b], n), 2) + extra);
        const double inverse_norm = std::sqrt(std::pow(scaled_inverse_norm(fisher_[b], inverse_[b], n), 2) + extra);
        double columns = 0, largest = 0;
        for (int64_t j = 0; j < n; ++j) {
            const double f = fisher_[b][j * (n + 1)] - DAMPING;
            largest = std::max(largest, f);
            for (int64_t i = 0; i < n; ++i) columns += inverse_[b][i * n + j] * inverse_[b][i * n + j] * f;
        }
        const double want[2] = {norm * inverse_norm, norm * std::sqrt(columns * largest)};
        expect_near(&condition, &want[0], 1, 1e-2, what, p_);
        expect_near(&amplification, &want[1], 1, 1e-2, what, p_);
    }

    void invert() const {
        const int64_t K = p_.num_blocks(), B = p_.block_size;
        std::vector<double> condition(K), amplification(K);
        const auto got = twice(padded_gram(), "spd_inverse", [&](T* matrix, int threads) {
            run_.spd_inverse(matrix, K, B, DAMPING, condition.data(), amplification.data(), threads);
        });
        for (int64_t b = 0; b < K; ++b) {
            for (int64_t i = 0; i < length(b); ++i)
                expect_near(&got[b * area() + i * B], &inverse_[b][i * length(b)], length(b), TOLERANCE, "spd_inverse",
                            p_);
            expect_estimates(condition[b], amplification[b], b, B - length(b), "estimates of spd_inverse");
        }
        std::vector<T> broken = padded_gram();
        for (int64_t b = 0; b < K; ++b) broken[b * area() + (length(b) - 1) * (B + 1)] = b % 2 ? T(-1) : NOT_A_NUMBER;
        run_.spd_inverse(broken.data(), K, B, DAMPING, condition.data(), amplification.data(), threads_);
        for (int64_t b = 0; b < K; ++b)
            if (!std::isinf(condition[b]) || !std::isinf(amplification[b]) || !std::isnan(broken[b * area()]) ||
                !std::isnan(broken[(b + 1) * area() - 1]))
                fail("spd_inverse did not report a broken block", p_);
    }

    void build() const {
        const int64_t K = p_.num_blocks(), B = p_.block_size;
        std::vector<double> condition(K), amplification(K);
        const auto got =
            twice(std::vector<T>(state_.size(), NOT_A_NUMBER), "inverse_from_grads", [&](T* out, int threads) {
                run_.inverse_from_grads(out, nullptr, grads_.view(p_), p_.blocks(), m(), DAMPING, condition.data(),
                                        amplification.data(), threads);
            });
        for (int64_t b = 0; b < K; ++b) {
            expect_estimates(condition[b], amplification[b], b, 0, "estimates of inverse_from_grads");
            for (int64_t i = 0; i < B; ++i)
                for (int64_t j = 0; j < B; ++j) {
                    const bool inside = i < length(b) && j < length(b);
                    const double want = inside ? inverse_[b][i * length(b) + j] : i == j ? 1 / DAMPING : 0;
                    const double error = std::fabs(static_cast<double>(got[b * area() + i * B + j]) - want);
                    if (!(error <= TOLERANCE / DAMPING)) fail("inverse_from_grads", p_);
                }
        }
        const auto diagonal = twice(weight_, "inverse_diagonal_from_grads", [&](T* out, int threads) {
            run_.inverse_from_grads(nullptr, out, grads_.view(p_), p_.blocks(), m(), DAMPING, condition.data(),
                                    amplification.data(), threads);
        });
        std::vector<T> want(weight_);
        for (int64_t b = 0; b < K; ++b)
            for (int64_t i = 0; i < length(b); ++i) want[p_.range[2 * b] + i] = got[b * area() + i * (B + 1)];
        if (!same_bits(diagonal, want)) fail("the diagonal is not that of the inverse", p_);
    }

    void expect_weights(const std::vector<T>& got, const Matrix& want, int64_t columns, const char* what) const {
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            const int64_t at = p_.range[2 * b] * columns;
            expect_near(&got[at], &want[at], length(b) * columns, TOLERANCE, what, p_);
        }
    }

    void diagonal_and_saliency() const {
        Matrix want(p_.num_weights, 0.0);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i) want[p_.range[2 * b] + i] = inverse_[b][i * (length(b) + 1)];
        const std::vector<T> ones(p_.num_weights, T(1));
        const auto diagonal = twice(ones, "inverse_diagonal", [&](T* out, int threads) {
            run_.inverse_diagonal(out, state_.data(), p_.blocks(), threads);
        });
        expect_weights(diagonal, want, 1, "inverse_diagonal");
        const auto saliency = twice(ones, "obs_saliency", [&](T* out, int threads) {
            run_.obs_saliency(out, weight_.data(), diagonal.data(), p_.num_weights, threads);
        });
        for (int64_t q = 0; q < p_.num_weights; ++q)
            want[q] = static_cast<double>(weight_[q]) * static_cast<double>(weight_[q]) /
                      (2 * static_cast<double>(diagonal[q]));
        expect_near(saliency.data(), want.data(), p_.num_weights, TOLERANCE, "obs_saliency", p_);
    }

    void select() const {
        std::vector<T> saliency(p_.num_weights);
        std::vector<uint8_t> dead(p_.num_weights);
        std::vector<std::pair<double, int64_t>> order;
        for (int64_t q = 0; q < p_.num_weights; ++q) {
            saliency[q] = static_cast<T>(std::round(static_cast<double>(weight_[q]) * 8));  // many ties, both signs
            dead[q] = q % 5 == 3;
            order.emplace_back(dead[q] ? -1e9 : static_cast<double>(saliency[q]), q);
        }
        std::sort(order.begin(), order.end());
        const int64_t zeros = p_.num_weights / 2;
        std::vector<uint8_t> want(p_.num_weights, 1);
        for (int64_t q = 0; q < p_.num_weights; ++q) want[q] = !dead[q];
        for (int64_t i = 0; i < zeros; ++i) want[order[i].second] = 0;
        int64_t invalid = 0;
        const auto got = twice(std::vector<uint8_t>(p_.num_weights, 2), "prune_mask", [&](uint8_t* mask, int threads) {
            run_.prune_mask(mask, &invalid, saliency.data(), dead.data(), p_.num_weights, zeros, threads);
        });
        if (!same_bits(got, want) || invalid != -1) fail("prune_mask", p_);
        saliency[p_.num_weights - 1] = NOT_A_NUMBER;
        dead[p_.num_weights - 1] = 0;
        std::vector<uint8_t> mask(p_.num_weights);
        run_.prune_mask(mask.data(), &invalid, saliency.data(), dead.data(), p_.num_weights, zeros, threads_);
        if (invalid != p_.num_weights - 1) fail("prune_mask did not see a saliency that is not a number", p_);
    }

    std::vector<T> right_hand_side() const {
        std::vector<T> x;
        for (int64_t c = 0; c < p_.columns; ++c) x.insert(x.end(), weight_.begin(), weight_.end());
        return x;
    }

    Matrix applied(const std::vector<T>& x) const {
        Matrix want(x.size(), 0.0);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i)
                for (int64_t j = 0; j < length(b); ++j)
                    for (int64_t c = 0; c < p_.columns; ++c)
                        want[(p_.range[2 * b] + i) * p_.columns + c] +=
                            inverse_[b][i * length(b) + j] *
                            static_cast<double>(x[(p_.range[2 * b] + j) * p_.columns + c]);
        return want;
    }

    void matvec() const {
        const std::vector<T> x = right_hand_side();
        const auto got = twice(std::vector<T>(x.size(), NOT_A_NUMBER), "block_matvec", [&](T* out, int threads) {
            run_.block_matvec(out, x.data(), p_.columns, state_.data(), p_.blocks(), threads);
        });
        expect_weights(got, applied(x), p_.columns, "block_matvec");
    }

    void fisher_product() const {
        const std::vector<T> x = right_hand_side();
        const auto got = twice(std::vector<T>(x.size(), T(0)), "fisher_vector_product", [&](T* out, int threads) {
            run_.fisher_vector_product(out, x.data(), p_.columns, grads_.view(p_), p_.blocks(), m(), threads);
        });
        Matrix want(x.size(), 0.0);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i)
                for (int64_t j = 0; j < length(b); ++j)
                    for (int64_t c = 0; c < p_.columns; ++c)
                        want[(p_.range[2 * b] + i) * p_.columns + c] +=
                            (fisher_[b][i * length(b) + j] - (i == j ? DAMPING : 0)) *
                            static_cast<double>(x[(p_.range[2 * b] + j) * p_.columns + c]);
        expect_weights(got, want, p_.columns, "fisher_vector_product");
    }

    // w - F^-1 (1_Q w / inv_diag), and w_Q = 0; weights in the gaps between blocks stay.
    void expect_summed(const std::vector<T>& got, const std::vector<T>& inv_diag, const char* what) const {
        Matrix want(weight_.begin(), weight_.end());
        std::vector<bool> inside(want.size(), false);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0, start = p_.range[2 * b]; i < length(b); ++i) {
                inside[start + i] = true;
                for (int64_t j = 0; j < length(b); ++j)
                    if (!mask_[start + j])
                        want[start + i] -= inverse_[b][i * length(b) + j] * static_cast<double>(weight_[start + j]) /
                                           static_cast<double>(inv_diag[start + j]);
                if (!mask_[start + i]) want[start + i] = 0;
            }
        expect_weights(got, want, 1, what);
        for (int64_t q = 0; q < p_.num_weights; ++q) {
            if (inside[q] && !mask_[q] && got[q] != 0) fail(std::string(what) + " left a removed weight", p_);
            if (!inside[q] && got[q] != weight_[q]) fail(std::string(what) + " wrote between the blocks", p_);
        }
    }

    std::vector<T> stored_diagonal() const {
        std::vector<T> inv_diag(p_.num_weights, T(1));
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i)
                inv_diag[p_.range[2 * b] + i] = static_cast<T>(inverse_[b][i * (length(b) + 1)]);
        return inv_diag;
    }

    void update() const {
        const std::vector<T> inv_diag = stored_diagonal();
        const auto got = twice(weight_, "obs_update", [&](T* weight, int threads) {
            run_.obs_update(weight, state_.data(), inv_diag.data(), p_.num_weights, p_.blocks(), mask_.data(), threads);
        });
        expect_summed(got, inv_diag, "obs_update");
    }

    // w_Q = 0 and the kept weights at the minimum of (w' - w)^T F (w' - w): w'_R = w_R + F_RR^-1 F_RQ w_Q.
    Matrix pruned() const {
        Matrix want(weight_.begin(), weight_.end());
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            const int64_t start = p_.range[2 * b], n = length(b);
            std::vector<int64_t> kept;
            for (int64_t i = 0; i < n; ++i)
                if (mask_[start + i]) kept.push_back(i);
            const int64_t r = static_cast<int64_t>(kept.size());
            Matrix part(r * r), pull(r, 0.0);
            for (int64_t i = 0; i < r; ++i) {
                for (int64_t j = 0; j < r; ++j) part[i * r + j] = fisher_[b][kept[i] * n + kept[j]];
                for (int64_t q = 0; q < n; ++q)
                    if (!mask_[start + q])
                        pull[i] += fisher_[b][kept[i] * n + q] * static_cast<double>(weight_[start + q]);
            }
            part = inverse(part, r);
            for (int64_t q = 0; q < n; ++q)
                if (!mask_[start + q]) want[start + q] = 0;
            for (int64_t i = 0; i < r; ++i)
                for (int64_t j = 0; j < r; ++j) want[start + kept[i]] += part[i * r + j] * pull[j];
        }
        return want;
    }

    void expect_pruned(const std::vector<T>& got, const std::vector<uint8_t>& failed, const char* what) const {
        expect_weights(got, pruned(), 1, what);
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            if (failed[b]) fail(std::string(what) + " gave up a sound block", p_);
            for (int64_t q = p_.range[2 * b]; q < p_.range[2 * b + 1]; ++q)
                if (!mask_[q] && got[q] != 0) fail(std::string(what) + " left a removed weight", p_);
        }
    }

    void solve() const {
        std::vector<uint8_t> failed(p_.num_blocks(), 2);
        const auto got = twice(weight_, "obs_solve", [&](T* weight, int threads) {
            run_.obs_solve(weight, state_.data(), p_.blocks(), mask_.data(), failed.data(), threads);
        });
        expect_pruned(got, failed, "obs_solve");

        std::vector<T> negative(state_), weight(weight_);
        for (T& x : negative) x = -x;
        run_.obs_solve(weight.data(), negative.data(), p_.blocks(), mask_.data(), failed.data(), threads_);
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            bool any = false;
            for (int64_t q = p_.range[2 * b]; q < p_.range[2 * b + 1]; ++q) any |= !mask_[q];
            if (failed[b] != static_cast<uint8_t>(any)) fail("obs_solve did not report a broken block", p_);
        }
        if (!same_bits(weight, weight_)) fail("obs_solve changed the weights of a broken block", p_);
    }

    // In the order told, every removal costs w^2 / (2 F^-1) of what is left, and no candidate would have cost less.
    void expect_elimination(const std::vector<int64_t>& order, const std::vector<double>& loss,
                            const std::vector<uint8_t>& failed, int64_t keep, const char* what) const {
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            if (failed[b]) fail(std::string(what) + " gave up a sound block", p_);
            const int64_t start = p_.range[2 * b], n = length(b);
            Matrix f = inverse_[b], w(weight_.begin() + start, weight_.begin() + start + n);
            std::vector<int64_t> left((n + 3) / 4);
            std::vector<bool> there(n, true);
            for (int64_t i = 0; i < n; ++i) ++left[i / 4];
            for (int64_t t = 0; t < n; ++t) {
                const int64_t q = order[start + t] - start;
                if (q < 0 || q >= n || !there[q]) fail(std::string(what) + " is no order", p_);
                double least = std::numeric_limits<double>::infinity();
                for (int64_t i = 0; i < n; ++i)
                    if (there[i] && left[i / 4] > keep) least = std::min(least, w[i] * w[i] / (2 * f[i * n + i]));
                there[q] = false;
                if (std::isnan(loss[start + t])) {
                    if (left[q / 4] > keep) fail(std::string(what) + " kept a weight that may go", p_);
                    continue;
                }
                --left[q / 4];
                const double pivot = f[q * n + q], cost = w[q] * w[q] / (2 * pivot);
                // costs span decades, and rounding of F^-1 moves the small ones
                const double slack = 1e3 * TOLERANCE * (least + cost) + 1e-12;
                if (std::abs(cost - loss[start + t]) > slack || cost > least + slack)
                    fail(std::string(what) + " removed a weight at " + std::to_string(loss[start + t]) + ", not " +
                             std::to_string(cost) + ", least " + std::to_string(least),
                         p_);
                const double step = w[q] / pivot;
                Matrix column(n);
                for (int64_t i = 0; i < n; ++i) column[i] = f[i * n + q];
                for (int64_t i = 0; i < n; ++i) w[i] -= column[i] * step;
                for (int64_t i = 0; i < n; ++i)
                    for (int64_t j = 0; j < n; ++j) f[i * n + j] -= column[i] * column[j] / pivot;
            }
        }
    }

    template <class F>
    void eliminated(const char* what, F kernel) const {
        std::vector<int64_t> groups(p_.num_weights, -1);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i) groups[p_.range[2 * b] + i] = p_.range[2 * b] + i / 4;
        for (const int64_t keep : {0, 2}) {
            std::vector<double> loss(p_.num_weights, 7.0);
            std::vector<uint8_t> failed(p_.num_blocks(), 2);
            const auto order = twice(std::vector<int64_t>(p_.num_weights, -1), what, [&](int64_t* out, int threads) {
                kernel(out, loss.data(), failed.data(), keep ? groups.data() : nullptr, keep, threads);
            });
            expect_elimination(order, loss, failed, keep, what);
        }
    }

    void eliminate() const {
        eliminated("obs_eliminate", [&](int64_t* order, double* loss, uint8_t* failed, const int64_t* groups,
                                        int64_t keep, int threads) {
            run_.obs_eliminate(order, loss, failed, weight_.data(), state_.data(), p_.blocks(), groups, keep, 1,
                               threads);
        });
        std::vector<T> negative(state_);
        for (T& x : negative) x = -x;
        std::vector<int64_t> order(p_.num_weights);
        std::vector<double> loss(p_.num_weights);
        std::vector<uint8_t> failed(p_.num_blocks());
        run_.obs_eliminate(order.data(), loss.data(), failed.data(), weight_.data(), negative.data(), p_.blocks(),
                           nullptr, 0, 3, threads_);
        for (const uint8_t f : failed)
            if (!f) fail("obs_eliminate did not report a broken block", p_);
    }

    // R with R R^T = F^-1, lower triangular, and its blocks in double as stored.
    std::vector<T> root_state(std::vector<Matrix>& blocks) const {
        std::vector<T> root(state_.size(), NOT_A_NUMBER);
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            const int64_t n = length(b);
            Matrix L(n * n, 0.0);
            for (int64_t j = 0; j < n; ++j)
                for (int64_t i = j; i < n; ++i) {
                    double sum = inverse_[b][i * n + j];
                    for (int64_t c = 0; c < j; ++c) sum -= L[i * n + c] * L[j * n + c];
                    L[i * n + j] = i == j ? std::sqrt(sum) : sum / L[j * n + j];
                }
            for (int64_t i = 0; i < n * n; ++i) {
                T& stored = root[b * area() + i / n * p_.block_size + i % n];
                stored = static_cast<T>(L[i]);
                L[i] = static_cast<double>(stored);
            }
            blocks.push_back(L);
        }
        return root;
    }

    // A step from R / 2: M = I / 4 there, and every product of it with a vector keeps the direction.
    void fishleg() const {
        const int64_t K = p_.num_blocks(), B = p_.block_size;
        std::vector<Matrix> exact;
        std::vector<T> half = root_state(exact);
        const std::vector<T> root = half;
        for (T& x : half) x /= 2;
        std::vector<double> loss(K), largest(K);
        std::vector<T> top;
        const auto got = twice(half, "fishleg_block_step", [&](T* out, int threads) {
            top.assign(K * B, T(1));
            run_.fishleg_block_step(out, top.data(), grads_.view(p_), p_.blocks(), m(), DAMPING, 1.0, loss.data(),
                                    largest.data(), threads);
        });
        for (int64_t b = 0; b < K; ++b) {
            Matrix want = exact[b];
            double trace = 0;
            for (int64_t i = 0; i < length(b); ++i) trace += inverse_[b][i * (length(b) + 1)] / 4;
            for (double& x : want) x *= 0.5 * (1 + 0.5 * 0.75);
            expect_block(got, b, want, "fishleg_block_step");
            const double quarter = 0.25, before = trace / 8 - trace;
            expect_near(&largest[b], &quarter, 1, TOLERANCE, "eigenvalue of fishleg_block_step", p_);
            expect_near(&loss[b], &before, 1, TOLERANCE, "loss of fishleg_block_step", p_);
            for (int64_t i = length(b); i < B; ++i)
                if (top[b * B + i] != T(1)) fail("fishleg_block_step wrote into the padding", p_);
        }
        std::vector<T> broken = root;
        for (int64_t b = 0; b < K; ++b) broken[b * area()] = NOT_A_NUMBER;
        const std::vector<T> before = broken;
        run_.fishleg_block_step(broken.data(), top.data(), grads_.view(p_), p_.blocks(), m(), DAMPING, 1.0, loss.data(),
                                largest.data(), threads_);
        if (!same_bits(broken, before)) fail("fishleg_block_step changed a broken block", p_);
        for (const double x : largest)
            if (!std::isinf(x)) fail("fishleg_block_step did not report a broken block", p_);

        Matrix diagonal(p_.num_weights, 0.0);
        for (int64_t b = 0; b < K; ++b)
            for (int64_t i = 0; i < length(b); ++i) diagonal[p_.range[2 * b] + i] = inverse_[b][i * (length(b) + 1)];
        expect_weights(
            twice(weight_, "factor_diagonal",
                  [&](T* out, int threads) { run_.factor_diagonal(out, root.data(), p_.blocks(), threads); }),
            diagonal, 1, "factor_diagonal");
        const std::vector<T> x = right_hand_side();
        expect_weights(twice(std::vector<T>(x.size(), NOT_A_NUMBER), "block_factor_matvec",
                             [&](T* out, int threads) {
                                 run_.block_factor_matvec(out, x.data(), p_.columns, root.data(), p_.blocks(), threads);
                             }),
                       applied(x), p_.columns, "block_factor_matvec");
    }

    // R R^T of the weights that are left is the inverse of their part of F.
    void removal() const {
        std::vector<Matrix> exact;
        const auto got = twice(root_state(exact), "factor_downdate", [&](T* root, int threads) {
            run_.factor_downdate(root, p_.blocks(), mask_.data(), threads);
        });
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            const int64_t n = length(b);
            std::vector<int64_t> kept;
            for (int64_t i = 0; i < n; ++i)
                if (mask_[p_.range[2 * b] + i]) kept.push_back(i);
            const int64_t r = static_cast<int64_t>(kept.size());
            Matrix part(r * r), want(n * n, 0.0), product(n * n, 0.0);
            for (int64_t i = 0; i < r * r; ++i) part[i] = fisher_[b][kept[i / r] * n + kept[i % r]];
            part = inverse(part, r);
            for (int64_t i = 0; i < r * r; ++i) want[kept[i / r] * n + kept[i % r]] = part[i];
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < n; ++j)
                    for (int64_t c = 0; c < n; ++c)
                        product[i * n + j] += static_cast<double>(got[b * area() + i * p_.block_size + c]) *
                                              static_cast<double>(got[b * area() + j * p_.block_size + c]);
            expect_near(product.data(), want.data(), n * n, TOLERANCE, "factor_downdate", p_);
        }
    }

    // Tiles [o, i] of the size of a block and of the number of columns, cut out of the weights again and again.
    void kron() const {
        const int64_t o = p_.block_size, i = std::max<int64_t>(p_.columns, 1), N = 2, n = 2;
        const auto numbers = [&](int64_t count, int64_t salt) {
            std::vector<T> found;
            for (int64_t q = 0; q < count; ++q) found.push_back(weight_[(q * 7 + salt) % p_.num_weights]);
            return found;
        };
        std::vector<T> left = numbers(N * o * o, 1), right = numbers(N * i * i, 2);
        for (int64_t t = 0; t < N; ++t) {
            for (int64_t a = 0; a < o; ++a)
                for (int64_t b = 0; b < a; ++b) left[(t * o + b) * o + a] = left[(t * o + a) * o + b];
            for (int64_t a = 0; a < i; ++a)
                for (int64_t b = 0; b < a; ++b) right[(t * i + b) * i + a] = right[(t * i + a) * i + b];
        }
        const auto scale = numbers(N * o * i, 3), x = numbers(n * N * o * i, 4);
        Matrix want(x.size(), 0.0);
        for (int64_t c = 0; c < n * N; ++c) {
            const int64_t t = c % N;
            Matrix inner(o * i, 0.0);
            for (int64_t a = 0; a < o; ++a)
                for (int64_t e = 0; e < o; ++e)
                    for (int64_t b = 0; b < i; ++b)
                        inner[a * i + b] += static_cast<double>(left[(t * o + a) * o + e]) *
                                            static_cast<double>(scale[(t * o + e) * i + b]) *
                                            static_cast<double>(x[(c * o + e) * i + b]);
            for (int64_t a = 0; a < o; ++a)
                for (int64_t b = 0; b < i; ++b)
                    for (int64_t e = 0; e < i; ++e)
                        want[(c * o + a) * i + b] += inner[a * i + e] *
                                                     static_cast<double>(right[(t * i + e) * i + b]) *
                                                     static_cast<double>(scale[(t * o + a) * i + b]);
        }
        const auto got = twice(std::vector<T>(x.size(), NOT_A_NUMBER), "kron_matvec", [&](T* out, int threads) {
            run_.kron_matvec(out, left.data(), right.data(), scale.data(), x.data(), n, N, o, i, threads);
        });
        expect_near(got.data(), want.data(), static_cast<int64_t>(want.size()), TOLERANCE, "kron_matvec", p_);
    }

    // Small images whose channels, groups and steps follow from the problem's sizes; values cut out of the weights.
    void convolution() const {
        const int64_t B = p_.block_size, s = 1 + B % 2, n = 2, groups = 1 + B % 3 * (p_.columns % 4) * 5;
        Convolution conv{n,
                         groups,
                         1 + p_.num_grads % 5,
                         groups > 1 ? 1 + B % 9 : std::min<int64_t>(B, 70),
                         {6, 4 + B % 4},
                         {},
                         {1 + B % 3, 3},
                         {s, 1},
                         {B % 2, 1},
                         {1, 1 + p_.num_grads % 2},
                         p_.extra_stride % 2 == 1,
                         p_.columns % 2 == 1};
        for (int i = 0; i < 2; ++i)
            conv.out_size[i] =
                (conv.size[i] + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel[i] - 1) - 1) / conv.stride[i] + 1;
        const int64_t C = groups * conv.in, O = groups * conv.out, taps = conv.kernel[0] * conv.kernel[1];
        const int64_t plane = conv.size[0] * conv.size[1], pixels = conv.out_size[0] * conv.out_size[1];
        std::vector<T> x, g;
        for (int64_t q = 0; q < n * C * plane; ++q) x.push_back(weight_[(q * 7 + 1) % p_.num_weights]);
        for (int64_t q = 0; q < n * O * pixels; ++q) g.push_back(weight_[(q * 5 + 2) % p_.num_weights]);
        const auto at = [](const std::vector<T>& from, bool last, int64_t count, int64_t size, int64_t sample,
                           int64_t channel, int64_t place) {
            const int64_t inside = last ? place * count + channel : channel * size + place;
            return static_cast<double>(from[sample * count * size + inside]);
        };
        const int64_t length = O * conv.in * taps, stride = length + p_.extra_stride;
        Matrix want(n * stride, std::numeric_limits<double>::quiet_NaN());
        for (int64_t q = 0; q < n * length; ++q) {
            const int64_t sample = q / length, o = q % length / (conv.in * taps), c = q / taps % conv.in;
            const int64_t ky = q % taps / conv.kernel[1], kx = q % conv.kernel[1];
            double sum = 0;
            for (int64_t p = 0; p < pixels; ++p) {
                const int64_t y = p / conv.out_size[1] * conv.stride[0] + ky * conv.dilation[0] - conv.padding[0];
                const int64_t z = p % conv.out_size[1] * conv.stride[1] + kx * conv.dilation[1] - conv.padding[1];
                if (y < 0 || y >= conv.size[0] || z < 0 || z >= conv.size[1]) continue;
                sum += at(g, conv.g_last, O, pixels, sample, o, p) *
                       at(x, conv.x_last, C, plane, sample, o / conv.out * conv.in + c, y * conv.size[1] + z);
            }
            want[sample * stride + q % length] = sum;
        }
        const auto got = twice(
            std::vector<T>(want.size(), NOT_A_NUMBER), "conv_weight_grads",
            [&](T* rows, int threads) { run_.conv_weight_grads(rows, stride, x.data(), g.data(), conv, threads); });
        for (int64_t sample = 0; sample < n; ++sample) {
            expect_near(&got[sample * stride], &want[sample * stride], length, TOLERANCE, "conv_weight_grads", p_);
            for (int64_t q = length; q < stride; ++q)
                if (got[sample * stride + q] == got[sample * stride + q]) fail("conv_weight_grads between rows", p_);
        }
    }

    void dual() const {
        const int64_t K = p_.num_blocks(), k = p_.num_grads;
        std::vector<double> condition(K);
        const std::vector<double> poison(K * k * k, std::numeric_limits<double>::quiet_NaN());
        const auto factor = twice(poison, "dual_factor", [&](double* out, int threads) {
            dual_factor_(out, grads_.view(p_), p_.blocks(), m(), DAMPING, condition.data(), threads);
        });
        for (int64_t b = 0; b < K; ++b) expect_factor(&factor[b * k * k], condition[b], b);

        const std::vector<T> ones(p_.num_weights, T(1));
        const auto diagonal = twice(ones, "inverse_diagonal_dual", [&](T* out, int threads) {
            run_.inverse_diagonal_dual(out, dual_state(factor), p_.blocks(), threads);
        });
        for (int64_t b = 0; b < K; ++b)
            for (int64_t i = 0; i < length(b); ++i)
                expect_near(&diagonal[p_.range[2 * b] + i], &inverse_[b][i * (length(b) + 1)], 1, TOLERANCE,
                            "inverse_diagonal_dual", p_);

        const std::vector<T> x = right_hand_side();
        const auto product =
            twice(std::vector<T>(x.size(), NOT_A_NUMBER), "block_matvec_dual", [&](T* out, int threads) {
                run_.block_matvec_dual(out, x.data(), p_.columns, dual_state(factor), p_.blocks(), threads);
            });
        expect_weights(product, applied(x), p_.columns, "block_matvec_dual");

        const std::vector<T> inv_diag = stored_diagonal();
        const auto summed = twice(weight_, "obs_update_dual", [&](T* out, int threads) {
            run_.obs_update_dual(out, dual_state(factor), inv_diag.data(), p_.num_weights, p_.blocks(), mask_.data(),
                                 threads);
        });
        expect_summed(summed, inv_diag, "obs_update_dual");

        std::vector<uint8_t> failed(K, 2);
        const auto weight = twice(weight_, "obs_solve_dual", [&](T* out, int threads) {
            run_.obs_solve_dual(out, grads_.view(p_), p_.blocks(), m(), DAMPING, mask_.data(), failed.data(), threads);
        });
        expect_pruned(weight, failed, "obs_solve_dual");

        eliminated("obs_eliminate_dual", [&](int64_t* order, double* loss, uint8_t* broken, const int64_t* groups,
                                             int64_t keep, int threads) {
            run_.obs_eliminate_dual(order, loss, broken, weight_.data(), dual_state(factor), p_.blocks(), groups, keep,
                                    1, threads);
        });
    }

    // U^T U must give back m lambda I + G G^T, and the estimate must lie between ||A^-1||_2 / 4 and ||A^-1||_F.
    void expect_factor(const double* factor, double condition, int64_t b) const {
        const int64_t k = p_.num_grads;
        Matrix gram(k * k), back(k * k, 0.0);
        for (int64_t i = 0; i < k; ++i)
            for (int64_t j = 0; j < k; ++j) {
                double sum = i == j ? m() * DAMPING : 0;
                for (int64_t q = p_.range[2 * b]; q < p_.range[2 * b + 1]; ++q)
                    sum += grads_.values[i * p_.num_weights + q] * grads_.values[j * p_.num_weights + q];
                gram[i * k + j] = sum;
                for (int64_t a = 0; a <= std::min(i, j); ++a) back[i * k + j] += factor[a * k + i] * factor[a * k + j];
                if (j < i && factor[i * k + j] != 0) fail("dual_factor left something below the diagonal", p_);
            }
        expect_near(back.data(), gram.data(), k * k, 1e-12, "dual_factor", p_);
        const double norm = scaled_inverse_norm(gram, inverse(gram, k), k);  // >= ||A^-1||_2 >= norm / sqrt(k)
        if (!(condition <= norm * 1.0001 && condition >= norm / std::sqrt(static_cast<double>(k)) / 4))
            fail("condition of dual_factor is " + std::to_string(condition) + ", the norm " + std::to_string(norm), p_);
    }

    const Kernels<T>& run_;
    ff::DualFactor dual_factor_;
    const Problem& p_;
    int threads_;
    StoredGradients grads_;
    std::vector<Matrix> fisher_, inverse_;  // of each block, damping included
    std::vector<T> state_, weight_;
    std::vector<uint8_t> mask_;
};

// Every kernel of every instruction set this machine runs, in both precisions, on one problem.
inline void everywhere(const Problem& p, int threads) {
    for (const char* const* isa = ff::available_isas(); *isa; ++isa) {
        const KernelTable& table = *ff::kernel_table(*isa);
        Checker<float>(table.f32, table.dual_factor, p, threads).everything();
        Checker<double>(table.f64, table.dual_factor, p, threads).everything();
    }
}

}  // namespace check
