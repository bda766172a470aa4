// Every CUDA kernel on the emulated GPU against plain loops: tails, gaps, short blocks, all types of gradients, failed
// blocks, several orders of the threads. Memory is allocated to the byte; built with sanitizers.
#include "problems.h"

namespace {

using namespace problems;

template <class T>
void compare(Op op, const Problem& p) {
    const Run<T> run(op, p);
    emulate::machine.seed = 1;
    const Output<T> out = run();
    run.judge(out);
    emulate::machine.seed = p.seed + 2;
    if (!(run() == out)) check::fail(std::string(run.name()) + " depends on the order of the threads", p);
}

// The vectors that `launch` leaves, whatever the order of the threads. What they hold is compared with float64 by the
// conformance tests; here memory ends where the arguments do.
template <class T, class Launch>
void in_any_order(const char* name, const Problem& p, const std::vector<std::vector<T>>& start, Launch launch) {
    std::vector<std::vector<T>> out[2] = {start, start};
    for (int turn = 0; turn < 2; ++turn) {
        emulate::machine.seed = turn ? p.seed + 2 : 1;
        if (launch(out[turn]) != 0) check::fail(std::string(name) + " was not launched", p);
    }
    for (size_t i = 0; i < start.size(); ++i)
        if (!check::same_bits(out[0][i], out[1][i]))
            check::fail(std::string(name) + " depends on the order of the threads", p);
}

// Blocks 2 I + a rank-one term, weights and masks that differ from place to place.
template <class T>
void updates(const Problem& p) {
    const int64_t K = p.num_blocks(), B = p.block_size;
    const check::StoredGradients grads = check::make_gradients(p);
    std::vector<T> state(K * B * B), top(K * B), weight(p.num_weights);
    std::vector<uint8_t> mask(p.num_weights), failed(K);
    std::vector<double> loss(K), largest(K);
    for (int64_t i = 0; i < K * B * B; ++i) {
        const int64_t row = i / B % B, column = i % B;
        state[i] = T(row == column ? 2 : 0) + T(0.01) * T(row % 7) * T(column % 7);
    }
    for (int64_t i = 0; i < K * B; ++i) top[i] = T(1 + i % 3);
    for (int64_t q = 0; q < p.num_weights; ++q) {
        weight[q] = T(q % 5) - T(1.5);
        mask[q] = q % 3 != 0;
    }
    if constexpr (sizeof(T) == 4)
        in_any_order<T>("fisher_accumulate", p, {state}, [&](auto& out) {
            return ff::cuda::fisher_accumulate(out[0].data(), grads.view(p), p.blocks(), 3.0, HERE);
        });
    if (B <= ff::cuda::LARGEST_BLOCK<double>)
        in_any_order<T>("obs_solve", p, {weight}, [&](auto& out) {
            return ff::cuda::obs_solve(out[0].data(), state.data(), p.blocks(), mask.data(), failed.data(), HERE);
        });
    if (B <= ff::cuda::LARGEST_STEP)
        in_any_order<T>("fishleg_block_step", p, {state, top}, [&](auto& out) {
            return ff::cuda::fishleg_block_step(out[0].data(), out[1].data(), grads.view(p), p.blocks(), 3.0, 0.1, 1.0,
                                                loss.data(), largest.data(), HERE);
        });
}

template <class T>
void everything(const Problem& p) {
    if (p.block_size > ff::cuda::LARGEST_BLOCK<T>) return;
    for (Op op : {Op::spd_inverse, Op::inverse_from_grads, Op::inverse_diagonal_from_grads, Op::sherman_morrison})
        compare<T>(op, p);
    updates<T>(p);
}

// Of three blocks the middle one cannot be inverted; its neighbours must not notice.
template <class T>
void failures(int64_t B, double bad) {
    const Problem p = check::make_problem(B, 3 * B, 1);
    std::vector<T> matrix(3 * B * B, T(0));
    for (int64_t i = 0; i < 3 * B; ++i) matrix[i * B + i % B] = T(4);
    matrix[(B + B / 2) * B + B / 2] = T(bad);
    std::vector<double> condition(3), amplification(3);
    ff::cuda::spd_inverse(matrix.data(), 3, B, 0.0, {condition.data(), amplification.data()}, HERE);
    for (int64_t b = 0; b < 3; ++b) {
        const bool failed = b == 1;
        if (std::isinf(condition[b]) != failed || std::isinf(amplification[b]) != failed)
            check::fail("estimates of a failed block", p);
        for (int64_t i = 0; i < B * B; ++i) {
            const T got = matrix[b * B * B + i], want = i % (B + 1) == 0 ? T(0.25) : T(0);
            if (failed ? !std::isnan(got) : got != want) check::fail("spd_inverse beside a failed block", p);
        }
    }
}

// The same through gradients: one that is not finite.
template <class T>
void failures_from_grads() {
    Problem p = check::make_problem(20, 55, 3);
    p.seed = 5;
    std::vector<float> grads(3 * 55, 1.0f);
    grads[2 * 55 + 25] = std::numeric_limits<float>::infinity();
    const ff::Gradients view = {grads.data(), ff::DType::f32, 3, 55};
    std::vector<T> f_inv(3 * 20 * 20), inv_diag(55);
    std::vector<double> condition(3), amplification(3);
    const ff::cuda::Estimates estimates = {condition.data(), amplification.data()};
    ff::cuda::inverse_from_grads<T>(f_inv.data(), nullptr, view, p.blocks(), 3, 0.5, estimates, HERE);
    ff::cuda::inverse_from_grads<T>(nullptr, inv_diag.data(), view, p.blocks(), 3, 0.5, estimates, HERE);
    for (int64_t i = 0; i < 3 * 400; ++i)
        if (std::isnan(f_inv[i]) != (i / 400 == 1)) check::fail("inverse beside a failed block", p);
    for (int64_t q = 0; q < 55; ++q)
        if (std::isnan(inv_diag[q]) != (q / 20 == 1)) check::fail("diagonal beside a failed block", p);
    if (std::isinf(condition[0]) || !std::isinf(condition[1]) || !std::isinf(amplification[1]) ||
        std::isinf(condition[2]))
        check::fail("estimates of a failed block", p);
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {
        // B, d, k
        {1, 40, 2},     {2, 33, 3},    {7, 150, 4},    {16, 70, 5},     {17, 50, 9},    {33, 100, 8},
        {64, 100, 16},  {65, 130, 1},  {100, 230, 7},  {128, 300, 12},  {129, 200, 17}, {131, 262, 3},
        {176, 190, 20}, {200, 391, 5}, {256, 300, 11}, {140, 150, 300},
    };
    uint32_t seed = 0;
    for (const auto& shape : shapes) {
        Problem p = check::make_problem(shape[0], shape[1], shape[2], shape[0] < 128);
        p.dtype = static_cast<ff::DType>(seed % 4);
        p.extra_stride = seed % 3;
        p.seed = ++seed;
        everything<float>(p);
        everything<double>(p);
    }
    for (const double bad : {-1.0, 0.0, std::nan(""), std::numeric_limits<double>::infinity()})
        for (const int64_t B : {1, 5, 40, 90, 150}) {
            failures<float>(B, bad);
            failures<double>(B, bad);
        }
    failures_from_grads<float>();
    failures_from_grads<double>();
    std::vector<float> room(300 * 300);
    std::vector<double> estimate(1);
    if (ff::cuda::spd_inverse(room.data(), 1, 300, 0.0, {estimate.data(), estimate.data()}, HERE) == 0) return 1;
    std::printf("passed %u problems, %zu barriers\n", seed, emulate::machine.sites.size());
    return 0;
}
