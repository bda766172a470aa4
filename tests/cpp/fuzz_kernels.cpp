// Fuzz target: the bytes choose shape, dtype, stride and threads of a problem, and the values where they are wild.
//
// A tame problem is checked against plain loops. A wild one takes its gradients, state and weights bit by bit from the
// input (NaN, infinities, subnormals): nothing may be read or written out of bounds, and the number of threads may not
// change a bit. With clang: -fsanitize=fuzzer -DFF_LIBFUZZER. Without, main() feeds bytes from a seeded generator:
//     fuzz_kernels [seconds] [seed]
#include <chrono>

#include "check.h"

namespace {

// Reads the input byte after byte; zeros follow its end.
class Input {
   public:
    Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
    uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
    int64_t between(int64_t low, int64_t high) {
        const int64_t value = byte() | byte() << 8;
        return low + value % (high - low + 1);
    }
    template <class V>
    std::vector<V> values(int64_t count) {
        std::vector<V> out(count);
        std::vector<uint8_t> bytes(count * sizeof(V));
        for (auto& b : bytes) b = byte();
        if (!bytes.empty()) std::memcpy(out.data(), bytes.data(), bytes.size());
        return out;
    }

   private:
    const uint8_t* data_;
    size_t size_, at_ = 0;
};

check::Problem shape(Input& in) {
    const uint8_t kind = in.byte();
    const int64_t block_size = kind < 230 ? in.between(1, 40) : in.between(41, 280);
    const int64_t num_weights = block_size + in.between(0, kind < 230 ? 90 : 20);
    auto p = check::make_problem(block_size, num_weights, in.between(1, kind < 200 ? 20 : 80), in.byte() % 2);
    p.dtype = static_cast<ff::DType>(in.byte() % 4);
    p.columns = in.between(1, 5);
    p.extra_stride = in.between(0, 9);
    p.seed = in.byte();
    return p;
}

// Runs a kernel on copies with one thread and with several.
template <class V, class F>
std::vector<V> same_for_any_threads(const std::vector<V>& start, int threads, const check::Problem& p, F kernel) {
    std::vector<V> one(start), many(start);
    kernel(one.data(), 1);
    kernel(many.data(), threads);
    if (!check::same_bits(one, many)) check::fail("wild values depend on the number of threads", p);
    return one;
}

template <class T>
void wild(const ff::Kernels<T>& run, ff::DualFactor dual_factor, const check::Problem& p, Input in, int threads) {
    const int64_t K = p.num_blocks(), B = p.block_size, k = p.num_grads, d = p.num_weights;
    const int64_t size = p.dtype == ff::DType::f64 ? 8 : p.dtype == ff::DType::f32 ? 4 : 2;
    const int64_t stride = d + p.extra_stride;
    const auto bytes = in.values<uint8_t>(((k - 1) * stride + d) * size);
    const ff::Gradients grads{bytes.data(), p.dtype, k, stride};
    const auto state = in.values<T>(K * B * B), weight = in.values<T>(d), x = in.values<T>(d * p.columns);
    const auto mask_bytes = in.values<uint8_t>(d);
    std::vector<uint8_t> mask, failed(K);
    for (uint8_t b : mask_bytes) mask.push_back(b & 1);
    const double m = in.values<double>(1)[0], damping = in.values<double>(1)[0];
    std::vector<double> condition(K), amplification(K);
    int64_t invalid = 0;
    const auto each = [&](const std::vector<T>& start, auto kernel) {
        return same_for_any_threads(start, threads, p, kernel);
    };

    each(state, [&](T* f, int t) { run.sherman_morrison(f, grads, p.blocks(), m, t); });
    each(state, [&](T* f, int t) { run.woodbury(f, grads, p.blocks(), m, t); });
    each(state, [&](T* f, int t) { run.fisher_accumulate(f, grads, p.blocks(), m, t); });
    each(state, [&](T* f, int t) { run.spd_inverse(f, K, B, damping, condition.data(), amplification.data(), t); });
    each(state, [&](T* f, int t) {
        run.inverse_from_grads(f, nullptr, grads, p.blocks(), m, damping, condition.data(), amplification.data(), t);
    });
    each(weight, [&](T* w, int t) {
        run.inverse_from_grads(nullptr, w, grads, p.blocks(), m, damping, condition.data(), amplification.data(), t);
    });
    each(weight, [&](T* out, int t) { run.inverse_diagonal(out, state.data(), p.blocks(), t); });
    each(x, [&](T* out, int t) { run.block_matvec(out, x.data(), p.columns, state.data(), p.blocks(), t); });
    each(x, [&](T* out, int t) { run.fisher_vector_product(out, x.data(), p.columns, grads, p.blocks(), m, t); });
    same_for_any_threads(std::vector<uint8_t>(d), threads, p, [&](uint8_t* out, int t) {
        run.prune_mask(out, &invalid, weight.data(), mask.data(), d, d / 2, t);
    });
    each(weight, [&](T* out, int t) { run.obs_saliency(out, weight.data(), x.data(), d, t); });
    each(weight, [&](T* w, int t) { run.obs_update(w, state.data(), x.data(), d, p.blocks(), mask.data(), t); });
    each(weight, [&](T* w, int t) { run.obs_solve(w, state.data(), p.blocks(), mask.data(), failed.data(), t); });
    std::vector<double> loss(d);
    const std::vector<int64_t> places(d);
    const int64_t together = 1 + static_cast<int64_t>(in.byte() % 5);
    same_for_any_threads(places, threads, p, [&](int64_t* order, int t) {
        run.obs_eliminate(order, loss.data(), failed.data(), weight.data(), state.data(), p.blocks(), nullptr, 0,
                          together, t);
    });
    each(state, [&](T* root, int t) {
        std::vector<T> top(x.begin(), x.begin() + 1);
        top.resize(K * B, T(1));
        run.fishleg_block_step(root, top.data(), grads, p.blocks(), m, damping, 0.5, condition.data(),
                               amplification.data(), t);
    });
    each(weight, [&](T* out, int t) { run.factor_diagonal(out, state.data(), p.blocks(), t); });
    each(x, [&](T* out, int t) { run.block_factor_matvec(out, x.data(), p.columns, state.data(), p.blocks(), t); });
    each(state, [&](T* root, int t) { run.factor_downdate(root, p.blocks(), mask.data(), t); });
    const std::vector<T> tiles(state.begin(), state.begin() + B * B), line(B, T(1));
    each(line, [&](T* out, int t) {
        run.kron_matvec(out, tiles.data(), weight.data(), state.data(), line.data(), 1, 1, B, 1, t);
    });
    const ff::Convolution conv{1, 1, 1, 1, {B, B}, {B, B}, {1, 3}, {1, 1}, {0, 1}, {1, 1}, false, true};
    each(std::vector<T>(3), [&](T* out, int t) { run.conv_weight_grads(out, 3, state.data(), tiles.data(), conv, t); });
    const auto factor = same_for_any_threads(std::vector<double>(K * k * k), threads, p, [&](double* out, int t) {
        dual_factor(out, grads, p.blocks(), m, damping, condition.data(), t);
    });
    const ff::Dual dual{grads, factor.data(), damping};
    each(weight, [&](T* out, int t) { run.inverse_diagonal_dual(out, dual, p.blocks(), t); });
    same_for_any_threads(places, threads, p, [&](int64_t* order, int t) {
        run.obs_eliminate_dual(order, loss.data(), failed.data(), weight.data(), dual, p.blocks(), nullptr, 0, together,
                               t);
    });
    each(x, [&](T* out, int t) { run.block_matvec_dual(out, x.data(), p.columns, dual, p.blocks(), t); });
    each(weight, [&](T* w, int t) { run.obs_update_dual(w, dual, x.data(), d, p.blocks(), mask.data(), t); });
    each(weight,
         [&](T* w, int t) { run.obs_solve_dual(w, grads, p.blocks(), m, damping, mask.data(), failed.data(), t); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const bool tame = in.byte() % 2;
    const int threads = static_cast<int>(in.between(2, 5));
    const check::Problem p = shape(in);
    if (tame) {
        check::everywhere(p, threads);
        return 0;
    }
    for (const char* const* isa = ff::available_isas(); *isa; ++isa) {
        const ff::KernelTable& table = *ff::kernel_table(*isa);
        wild<float>(table.f32, table.dual_factor, p, in, threads);
        wild<double>(table.f64, table.dual_factor, p, in, threads);
    }
    return 0;
}

#ifndef FF_LIBFUZZER
int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 20;
    const uint32_t first = argc > 2 ? static_cast<uint32_t>(std::atoll(argv[2])) : 0;
    const auto start = std::chrono::steady_clock::now();
    uint32_t seed = first;
    do {
        std::mt19937 random(seed++);
        std::vector<uint8_t> bytes(64 + random() % 65536);
        for (auto& b : bytes) b = static_cast<uint8_t>(random());
        std::fprintf(stderr, "\rseed %u", seed - 1);  // the last line before an abort names the input
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
    std::printf("\npassed %u inputs, seeds %u to %u\n", seed - first, first, seed - 1);
    return 0;
}
#endif
