// One random problem and what the CUDA kernels make of it on the emulated GPU, beside the same result by plain loops in
// double: what the programs of this folder share. Problems and loops are those of the C++ tests (cpp/check.h).
#pragma once
#include "cpp/check.h"
#include "cuda/kernels.h"
#include "emulate.h"

namespace problems {

using check::Matrix;
using check::Problem;

constexpr ff::cuda::Where HERE = {0, nullptr};

// What a kernel wrote: its state or diagonal, and the estimates.
template <class T>
struct Output {
    std::vector<T> values;
    std::vector<double> condition, amplification;
    bool operator==(const Output& other) const {
        return check::same_bits(values, other.values) && check::same_bits(condition, other.condition) &&
               check::same_bits(amplification, other.amplification);
    }
};

enum class Op { spd_inverse, inverse_from_grads, inverse_diagonal_from_grads, sherman_morrison };
constexpr const char* NAMES[] = {"spd_inverse", "inverse_from_grads", "inverse_diagonal_from_grads",
                                 "sherman_morrison"};

template <class T>
class Run {
   public:
    Run(Op op, const Problem& problem) : op_(op), p_(problem), grads_(check::make_gradients(problem)) {}

    const char* name() const { return NAMES[static_cast<int>(op_)]; }

    Output<T> operator()() const {
        const int64_t K = p_.num_blocks(), B = p_.block_size;
        const double m = static_cast<double>(p_.num_grads);
        Output<T> out;
        out.condition.assign(K, 0.0);
        out.amplification.assign(K, 0.0);
        const ff::cuda::Estimates estimates = {out.condition.data(), out.amplification.data()};
        int code = 0;
        switch (op_) {
            case Op::spd_inverse:
                out.values = lower_triangles();
                code = ff::cuda::spd_inverse(out.values.data(), K, B, check::DAMPING, estimates, HERE);
                break;
            case Op::inverse_from_grads:
                out.values.assign(K * B * B, NOT_A_NUMBER);
                code = ff::cuda::inverse_from_grads<T>(out.values.data(), nullptr, grads_.view(p_), p_.blocks(), m,
                                                       check::DAMPING, estimates, HERE);
                break;
            case Op::inverse_diagonal_from_grads:
                out.values.assign(p_.num_weights, NOT_A_NUMBER);
                code = ff::cuda::inverse_from_grads<T>(nullptr, out.values.data(), grads_.view(p_), p_.blocks(), m,
                                                       check::DAMPING, estimates, HERE);
                break;
            case Op::sherman_morrison:
                out.values = start();
                code = ff::cuda::sherman_morrison(out.values.data(), grads_.view(p_), p_.blocks(), m, HERE);
                break;
        }
        if (code != 0) check::fail(std::string(name()) + ": " + ff::cuda::error_text(code), p_);
        return out;
    }

    // Compares with plain loops, entry by entry, and looks at what may not be touched.
    void judge(const Output<T>& out) const {
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            const int64_t n = length(b);
            const Matrix fisher = check::block_fisher(p_, grads_.values, b), inverse = check::inverse(fisher, n);
            if (op_ == Op::inverse_diagonal_from_grads) {
                for (int64_t i = 0; i < n; ++i) near(&out.values[p_.range[2 * b] + i], &inverse[i * (n + 1)], 1);
            } else {
                for (int64_t i = 0; i < n; ++i) near(&entry(out, b, i, 0), &inverse[i * n], n);
                symmetric(out, b);
                padding(out, b);
            }
            if (op_ != Op::sherman_morrison) estimates(out, b, fisher, inverse);
        }
        if (op_ == Op::inverse_diagonal_from_grads) gaps(out);
    }

   private:
    static constexpr T NOT_A_NUMBER = std::numeric_limits<T>::quiet_NaN();
    static constexpr double TOLERANCE = sizeof(T) == 4 ? 2e-4 : 1e-9;

    int64_t length(int64_t b) const { return p_.range[2 * b + 1] - p_.range[2 * b]; }
    const T& entry(const Output<T>& out, int64_t b, int64_t i, int64_t j) const {
        return out.values[(b * p_.block_size + i) * p_.block_size + j];
    }
    void near(const T* got, const double* want, int64_t n) const {
        check::expect_near(got, want, n, TOLERANCE, name(), p_);
    }

    // F without the damping in the lower triangles, 1 on the diagonal of the padding, NaN above the diagonal.
    std::vector<T> lower_triangles() const {
        const int64_t B = p_.block_size;
        std::vector<T> matrix(p_.num_blocks() * B * B, NOT_A_NUMBER);
        for (int64_t b = 0; b < p_.num_blocks(); ++b) {
            const int64_t n = length(b);
            const Matrix fisher = check::block_fisher(p_, grads_.values, b);
            for (int64_t i = 0; i < B; ++i)
                for (int64_t j = 0; j <= i; ++j)
                    matrix[(b * B + i) * B + j] = i < n    ? T(fisher[i * n + j] - (i == j ? check::DAMPING : 0))
                                                  : i == j ? T(1)
                                                           : T(0);
        }
        return matrix;
    }

    // I / damping; the padding is NaN, and nothing may read it.
    std::vector<T> start() const {
        const int64_t B = p_.block_size;
        std::vector<T> state(p_.num_blocks() * B * B, NOT_A_NUMBER);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t i = 0; i < length(b); ++i)
                for (int64_t j = 0; j < length(b); ++j)
                    state[(b * B + i) * B + j] = i == j ? T(1 / check::DAMPING) : T(0);
        return state;
    }

    void symmetric(const Output<T>& out, int64_t b) const {
        for (int64_t i = 0; i < length(b); ++i)
            for (int64_t j = 0; j < i; ++j)
                if (entry(out, b, i, j) != entry(out, b, j, i)) check::fail("symmetry of " + std::string(name()), p_);
    }

    void padding(const Output<T>& out, int64_t b) const {
        const int64_t n = length(b), B = p_.block_size;
        for (int64_t i = 0; i < B; ++i)
            for (int64_t j = i < n ? n : 0; j < B; ++j) {
                const T got = entry(out, b, i, j);
                const double outside = op_ == Op::spd_inverse ? 1 / (1 + check::DAMPING) : 1 / check::DAMPING;
                const bool right =
                    op_ == Op::sherman_morrison ? std::isnan(got) : std::fabs(got - (i == j ? outside : 0)) <= 1e-6;
                if (!right) check::fail("padding of " + std::string(name()), p_);
            }
    }

    void estimates(const Output<T>& out, int64_t b, const Matrix& fisher, const Matrix& inverse) const {
        const int64_t n = length(b);
        // spd_inverse takes the padding for a part of the matrix: 1 + damping on its diagonal, f = 1.
        const int64_t padded = op_ == Op::spd_inverse ? p_.block_size - n : 0;
        const double norm = std::sqrt(std::pow(check::scaled_norm(fisher, n), 2) + padded);
        const double inverse_norm = std::sqrt(std::pow(check::scaled_inverse_norm(fisher, inverse, n), 2) + padded);
        double squares = padded / std::pow(1 + check::DAMPING, 2), largest = padded > 0;
        for (int64_t j = 0; j < n; ++j) {
            const double f = fisher[j * (n + 1)] - check::DAMPING;
            largest = std::max(largest, f);
            for (int64_t i = 0; i < n; ++i) squares += inverse[i * n + j] * inverse[i * n + j] * f;
        }
        const double condition = norm * inverse_norm, amplification = norm * std::sqrt(squares * largest);
        check::expect_near(&out.condition[b], &condition, 1, 1e-4, "condition", p_);
        check::expect_near(&out.amplification[b], &amplification, 1, 1e-4, "amplification", p_);
    }

    void gaps(const Output<T>& out) const {
        std::vector<bool> inside(p_.num_weights, false);
        for (int64_t b = 0; b < p_.num_blocks(); ++b)
            for (int64_t q = p_.range[2 * b]; q < p_.range[2 * b + 1]; ++q) inside[q] = true;
        for (int64_t q = 0; q < p_.num_weights; ++q)
            if (!inside[q] && !std::isnan(out.values[q])) check::fail("written between blocks", p_);
    }

    Op op_;
    const Problem& p_;
    check::StoredGradients grads_;
};

}  // namespace problems
