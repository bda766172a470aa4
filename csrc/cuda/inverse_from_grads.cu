// f_inv [K, B, B], or inv_diag [d], <- (damping I + G^T G / m)^-1 straight from the gradients: the Fisher is summed up
// in the registers in which it is then inverted (sweep.cuh), and never written.
//
// Floor: (m B^2 + B^3) / 2 multiply-adds, 128 a cycle and multiprocessor on sm_90 and sm_100; next to them the m B
// gradients and the B^2 results hardly count.
// Predicted from the instructions of sm_90 for a block of 256: 410 cycles a gradient (62 % of the floor) and 133,000
// for the inverse; 57 % of the floor at m = 512. Measured on an H200 at m = 256: 43 %.
//
// Triton does not get there: a Gram matrix [256, 256] with both triangles fills all registers of a multiprocessor, so
// that it must be summed up in parts, written, and read again to be inverted; and a smaller one is padded to a power of
// two and swept by masks. Measured: 8 times this at B = 50, 5.7 times at B = 256.
#include "gram.cuh"
#include "sweep.cuh"

namespace ff {
namespace cuda {
namespace {

template <class T>
struct Args {
    T* f_inv;     // or null, then
    T* inv_diag;  // its diagonal
    Gradients grads;
    const int64_t* range;
    int size;
    T damping, factor, outside;  // outside: 1 / damping
    Estimates estimates;
};

// What lies outside of [n, n] in a block [B, B].
template <class T>
__device__ void write_padding(T* block, int B, int n, Team team, T on_diagonal, bool usable) {
    for (int i = 0; i < B; ++i)
        for (int j = (i < n ? n : 0) + team.rank; j < B; j += team.size)
            block[static_cast<int64_t>(i) * B + j] = usable ? (i == j ? on_diagonal : T(0)) : T(NAN);
}

template <class Tl, int RESIDENT>
__global__ void __launch_bounds__(summing_threads<Tl>(Tl::MAX_B), RESIDENT)
    inverse_from_grads_kernel(Args<typename Tl::T> args) {
    using T = typename Tl::T;
    constexpr int N = Tl::N;
    SweepShared<Tl>& shared = *shared_memory<SweepShared<Tl>>();
    const int64_t b = blockIdx.x, start = args.range[2 * b];
    const int n = static_cast<int>(args.range[2 * b + 1] - start), B = args.size, bands = Tl::tiles(n);
    const Team team = whole_block();

    Tile<Tl> s(team, n);
    gram(s, *shared_memory<GramShared<Tl>>(), args.grads, start, n, team);
    s.mirror();
    s.scale(args.factor);
    negate_and_scale(s, shared, n, args.damping, team);
    __syncthreads();
    invert(s, shared, n, bands, team);
    const bool usable = estimate(s, shared, n, team, args.estimates.condition + b, args.estimates.amplification + b);
    if (args.f_inv) {
        T* const block = args.f_inv + b * B * B;
        s.write(block, B, n, bands, team, shared.band[0], usable);
        write_padding(block, B, n, team, args.outside, usable);
    } else if (s.I != Tile<Tl>::NONE && s.on_diagonal()) {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (s.I * N + i < n) args.inv_diag[start + s.I * N + i] = usable ? s.a[i][i] : T(NAN);
    }
}

}  // namespace

template <class T>
int inverse_from_grads(T* f_inv, T* inv_diag, Gradients grads, Blocks blocks, double num_grads, double damping,
                       Estimates estimates, Where where) {
    if (blocks.size > LARGEST_BLOCK<T>) return cudaErrorInvalidValue;
    const int size = static_cast<int>(blocks.size);
    const Args<T> args = {f_inv,
                          inv_diag,
                          grads,
                          blocks.range,
                          size,
                          static_cast<T>(damping),
                          static_cast<T>(1 / num_grads),
                          static_cast<T>(1 / damping),
                          estimates};
    return with_summing_cut(static_cast<const T*>(nullptr), size, [&](auto cut) {
        using Tl = typename decltype(cut)::Tl;
        const size_t gram_bytes = GramShared<Tl>::bytes(size, grads.rows), sweep_bytes = sizeof(SweepShared<Tl>);
        return launch(inverse_from_grads_kernel<Tl, decltype(cut)::RESIDENT>, blocks.count, summing_threads<Tl>(size),
                      gram_bytes > sweep_bytes ? gram_bytes : sweep_bytes, args, where);
    });
}

template int inverse_from_grads(float*, float*, Gradients, Blocks, double, double, Estimates, Where);
template int inverse_from_grads(double*, double*, Gradients, Blocks, double, double, Estimates, Where);

}  // namespace cuda
}  // namespace ff
