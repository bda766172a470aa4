// Optimal Brain Surgeon one weight at a time: the order in which a block loses its weights, and what each removal
// costs.
//
// Removing q takes v v^T from F^-1, v = F^-1 e_q / sqrt([F^-1]_qq). That is a Cholesky factorisation whose pivots are
// chosen on the way, and as in one no downdated matrix is kept: only its diagonal, the weights, and the rows v so far.
// A column is that of F^-1 less its part in those, n^3 / 2 multiply-adds in all that only read; in the dual form F^-1
// itself is I / damping less such rows. All in float64. Letting go of the places of removed weights would save two
// thirds of the multiply-adds and was measured: no faster at n = 50, where moving what is left costs as much.
#pragma once
#include "inverse_diagonal.h"

namespace ff {
namespace FF_NAMESPACE {

// col [N vectors] -= sum over s < count of v[s, q] v[s, :].
template <int N>
FF_INLINE void subtract_rows(double* col, const double* v, int64_t ld, int64_t count, const double* at_q) {
    Vec<double> sum[N];
    for (int j = 0; j < N; ++j) sum[j] = vec(col + j * W<double>);
    for (int64_t s = 0; s < count; ++s) {
        const double a = at_q[s * ld];
        for (int j = 0; j < N; ++j) sum[j] -= a * vec(v + s * ld + j * W<double>);
    }
    for (int j = 0; j < N; ++j) vec(col + j * W<double>) = sum[j];
}

template <int N>
struct Count {
    constexpr operator int() const { return N; }
};

// Calls body with the number 1 .. 8 as a constant.
template <class F>
FF_INLINE void with_count(int64_t count, F body) {
    switch (count) {
        case 1:
            return body(Count<1>());
        case 2:
            return body(Count<2>());
        case 3:
            return body(Count<3>());
        case 4:
            return body(Count<4>());
        case 5:
            return body(Count<5>());
        case 6:
            return body(Count<6>());
        case 7:
            return body(Count<7>());
        default:
            return body(Count<8>());
    }
}

// A matrix less v v^T of every row v: F^-1 of one block after the removals so far.
class Rows {
   public:
    Rows(int64_t n, int64_t count) : ld_(padded<double>(n)), rows_(count * ld_) {}

    // col [ld] -= its part in the rows.
    void subtract(int64_t q, double* col) {
        // sums of 8 vectors run side by side, and what is left over does too
        double* v = rows_;
        for (int64_t i = 0, step; i < ld_; i += step * W<double>) {
            step = min<int64_t>(8, (ld_ - i) / W<double>);
            with_count(step, [&](auto vectors) { subtract_rows<vectors>(col + i, v + i, ld_, count_, v + q); });
        }
    }

    void remove(const double* v) { std::memcpy(row(count_++), v, static_cast<size_t>(ld_) * sizeof(double)); }

   protected:
    double* row(int64_t s) { return static_cast<double*>(rows_) + s * ld_; }

    int64_t ld_, count_ = 0;
    Scratch<double> rows_;
};

template <class T>
struct PrimalColumns : Rows {
    PrimalColumns(const T* f_inv, int64_t B, int64_t n, bool last)
        : Rows(n, n), f_inv_(f_inv), B_(B), n_(n), last_(last) {}

    double entry(int64_t i, int64_t j) const { return static_cast<double>(f_inv_[i * B_ + j]); }

    void column(int64_t q, double* col) {
        // rows are read in no order that the processor could guess: half of the time would go into waiting for them
        const T* next = f_inv_ + (B_ + count_) * B_;
        for (int64_t i = 0; i < B_ && !last_; i += 64 / sizeof(T)) __builtin_prefetch(next + i, 0, 2);
        for (int64_t i = 0; i < n_; ++i) col[i] = static_cast<double>(f_inv_[q * B_ + i]);
        for (int64_t i = n_; i < ld_; ++i) col[i] = 0;
        subtract(q, col);
    }

   private:
    const T* f_inv_;
    int64_t B_, n_;
    bool last_;  // no block follows
};

// F^-1 = I / damping - V^T V / damping, V = L^-1 G: the same with k rows more.
struct DualColumns : Rows {
    DualColumns(const Dual& dual, const double* factor, int64_t start, int64_t n)
        : Rows(n, dual.grads.rows + max(n, SPAN)), damping_(dual.damping) {
        const int64_t k = dual.grads.rows, ld = leading<double>(SPAN);
        Scratch<double> panel(SPAN * ld);
        pack_rows<double>(dual.grads, 0, k, start, n, rows_, ld_, ld_);
        for (int64_t r = k; r < ceil_div(k, MR) * MR; ++r) fill_zero(row(r), ld_);
        for (int64_t c = 0; c < ld_; c += STRIP)
            substitute_strip(k, factor, row(0) + c, ld_, min(STRIP, ld_ - c), panel, ld);
        for (int64_t a = 0; a < k; ++a) scale(1 / std::sqrt(damping_), row(a), ld_);
        count_ = k;
    }

    // Before any removal.
    double entry(int64_t i, int64_t j) {
        double sum = i == j ? 1 / damping_ : 0;
        for (int64_t a = 0; a < count_; ++a) sum -= row(a)[i] * row(a)[j];
        return sum;
    }

    void column(int64_t q, double* col) {
        fill_zero(col, ld_);
        col[q] = 1 / damping_;
        subtract(q, col);
    }

   private:
    double damping_;
};

// 1/2 w^T S^-1 w of one set of c weights; S [c, c], of which the lower triangle is read, and w are overwritten.
inline double joint_loss(double* S, double* w, int64_t c) {
    double loss = 0;
    for (int64_t j = 0; j < c; ++j) {
        const double pivot = S[j * c + j];
        if (!usable_pivot(pivot)) return __builtin_inf();
        loss += w[j] * w[j] / (2 * pivot);
        for (int64_t i = j + 1; i < c; ++i) {
            const double a = S[i * c + j] / pivot;
            w[i] -= a * w[j];
            for (int64_t l = j + 1; l <= i; ++l) S[i * c + l] -= a * S[l * c + j];
        }
    }
    return loss;
}

// One block: who goes next, and what is left of the weights and of the diagonal of F^-1.
template <class Columns>
class Elimination {
   public:
    template <class T>
    Elimination(Columns& columns, const T* weight, int64_t n, const int64_t* groups, int64_t keep, int64_t together)
        : columns_(columns),
          n_(n),
          ld_(padded<double>(n)),
          c_(together),
          groups_(groups),
          keep_(keep),
          gone_(n),
          w_(ld_),
          diagonal_(ld_),
          bar_(ld_),
          cost_(ld_),
          v_(ld_),
          parts_(together > 1 ? n * together : 0),
          set_(together > 1 ? together * (together + 1) : 0) {
        fill_zero<uint8_t>(gone_, n);
        for (int64_t i = 0; i < ld_; ++i) {
            w_[i] = i < n ? static_cast<double>(weight[i]) : 0;
            diagonal_[i] = i < n ? columns.entry(i, i) : 1;
            bar_[i] = i < n ? 0 : INFINITE;
            v_[i] = 0;
        }
        for (int64_t i = 0; i < n && c_ > 1; ++i)
            for (int64_t j = i / c_ * c_; j <= i; ++j) parts_[i * c_ + j % c_] = columns.entry(i, j);
        for (int64_t i = 0; i < n && groups; ++i) guard(i);
    }

    // order, loss [n], places from `start` on; false where a pivot is not positive and finite.
    bool run(int64_t* order, double* loss, int64_t start) {
        int64_t count = 0;
        bool sound = true;
        for (int64_t q; sound && (q = cheapest()) >= 0;) {
            for (int64_t i = q; sound && i < min(n_, q + c_); ++i)
                if ((sound = remove(i, loss + count))) order[count++] = start + i;
            if (groups_) guard(q);
        }
        for (int64_t i = 0; i < n_; ++i) {
            if (gone_[i]) continue;
            if (!(bar_[i] > 0)) sound = false;  // a candidate whose loss is no number
            loss[count] = __builtin_nan("");
            order[count++] = start + i;
        }
        return sound;
    }

   private:
    static constexpr double INFINITE = __builtin_inf();

    // Bars the group of weight i, whose members lie side by side, once no more than `keep` of it are there.
    void guard(int64_t i) {
        int64_t a = i, b = i, left = 0;
        while (a > 0 && groups_[a - 1] == groups_[i]) --a;
        for (; b < n_ && groups_[b] == groups_[i]; ++b) {
        }
        for (int64_t j = a; j < b; ++j) left += !gone_[j];
        for (int64_t j = a; j < b && left <= keep_; ++j) bar_[j] = INFINITE;
    }

    // The first weight of the set with the least loss, the first of equal ones; -1 where none may go.
    int64_t cheapest() {
        double *w = w_, *diagonal = diagonal_, *bar = bar_, *cost = cost_, least = INFINITE;
        if (c_ == 1) {
            Vec<double> lanes = {};
            lanes += INFINITE;
            for (int64_t i = 0; i < ld_; i += W<double>) {
                const Vec<double> each = vec(w + i) * vec(w + i) / (2 * vec(diagonal + i)) + vec(bar + i);
                vec(cost + i) = each;
                lanes = each < lanes ? each : lanes;
            }
            for (int64_t j = 0; j < W<double>; ++j) least = min<double>(lanes[j], least);
        }
        for (int64_t i = 0; c_ > 1 && i < n_; i += c_) {
            cost[i] = bar[i] > 0 ? INFINITE : set_loss(i);
            least = min(cost[i], least);
        }
        if (!(least < INFINITE)) return -1;
        int64_t i = 0;
        while (cost[i] != least) i += c_;
        return i;
    }

    double set_loss(int64_t i) {
        const int64_t c = min(c_, n_ - i);
        double *S = set_, *w = S + c * c;
        for (int64_t a = 0; a < c; ++a) {
            w[a] = w_[i + a];
            for (int64_t b = 0; b <= a; ++b) S[a * c + b] = parts_[(i + a) * c_ + b];
        }
        return joint_loss(S, w, c);
    }

    bool remove(int64_t q, double* loss) {
        double *v = v_, *w = w_, *diagonal = diagonal_;
        columns_.column(q, v);
        const double pivot = v[q];
        if (!usable_pivot(pivot)) return false;
        const double scale = 1 / std::sqrt(pivot), step = w[q] * scale;
        *loss = step * step / 2;
        for (int64_t i = 0; i < ld_; i += W<double>) {
            const Vec<double> each = vec(v + i) * scale;
            vec(v + i) = each;
            vec(w + i) -= step * each;
            vec(diagonal + i) -= each * each;
        }
        columns_.remove(v);
        for (int64_t i = 0; c_ > 1 && i < n_; ++i)
            for (int64_t j = i / c_ * c_; j <= i; ++j) parts_[i * c_ + j % c_] -= v[i] * v[j];
        gone_[q] = 1;
        bar_[q] = INFINITE;
        return true;
    }

    Columns& columns_;
    int64_t n_, ld_, c_;
    const int64_t* groups_;
    int64_t keep_;
    Scratch<uint8_t> gone_;
    Scratch<double> w_, diagonal_, bar_, cost_, v_;
    Scratch<double> parts_, set_;  // the blocks of F^-1 of each set, its rows [n, c]; and one of them with its weights
};

template <class T>
void obs_eliminate(int64_t* order, double* loss, uint8_t* failed, const T* weight, const T* f_inv, Blocks blocks,
                   const int64_t* groups, int64_t keep, int64_t together, int threads) {
    const int64_t B = blocks.size;
    auto task = [&](int64_t b) {
        const int64_t start = blocks.start(b), n = blocks.length(b);
        PrimalColumns<T> columns(f_inv + b * B * B, B, n, b + 1 == blocks.count);
        Elimination<PrimalColumns<T>> block(columns, weight + start, n, groups ? groups + start : nullptr, keep,
                                            together);
        failed[b] = !block.run(order + start, loss + start, start);
    };
    parallel(blocks.count, threads, task);
}

template <class T>
void obs_eliminate_dual(int64_t* order, double* loss, uint8_t* failed, const T* weight, Dual dual, Blocks blocks,
                        const int64_t* groups, int64_t keep, int64_t together, int threads) {
    const int64_t k = dual.grads.rows;
    auto task = [&](int64_t b) {
        const int64_t start = blocks.start(b), n = blocks.length(b);
        DualColumns columns(dual, dual.factor + b * k * k, start, n);
        Elimination<DualColumns> block(columns, weight + start, n, groups ? groups + start : nullptr, keep, together);
        failed[b] = !block.run(order + start, loss + start, start);
    };
    parallel(blocks.count, threads, task);
}

}  // namespace FF_NAMESPACE
}  // namespace ff
