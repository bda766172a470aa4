// matrix [K, B, B] <- (M + damping I)^-1 from the lower triangle of M, with the two estimates; a block is read once,
// swept in registers (sweep.cuh) and written once.
//
// Floor: B^3 / 2 multiply-adds, 128 a cycle and multiprocessor on sm_90 and sm_100, and 6 B^2 bytes in float32 (half of
// the block read, all of it written), about 15 a cycle on an H100. The multiply-adds decide from B = 106 on.
// Predicted from the instructions of sm_90 as shares of the floor: 40 % at B = 50, 38 % at 128, 45 % at 256; measured
// on an H200: 19, 28 and 35 %. The inner loop is 86 % multiply-adds; the rest goes to publishing bands, to barriers
// and, for small B, to the pivots.
//
// Triton does not get there: it cannot address a register, so that taking a column out of a block costs as much as a
// rank-one term; it computes both triangles, pads B to a power of two, and a block of 256 fills all registers.
#include "sweep.cuh"

namespace ff {
namespace cuda {
namespace {

template <class T>
struct Args {
    T* matrix;
    int64_t count;
    int size, blocks_per_cta, threads_per_block;
    T damping;
    Estimates estimates;
};

constexpr int FULL = 128;  // threads that small blocks share

template <class Tl>
constexpr int THREADS = Tl::MAX_THREADS > FULL ? Tl::MAX_THREADS : FULL;

// RESIDENT: thread blocks that are to fit on a multiprocessor.
template <class Tl, int RESIDENT>
__global__ void __launch_bounds__(THREADS<Tl>, RESIDENT) spd_inverse_kernel(Args<typename Tl::T> args) {
    using Shared = SweepShared<Tl>;
    const int thread = static_cast<int>(threadIdx.x), slot = thread / args.threads_per_block;
    const int64_t b = static_cast<int64_t>(blockIdx.x) * args.blocks_per_cta + slot;
    const bool live = slot < args.blocks_per_cta && b < args.count;
    const Team team = live ? Team{thread % args.threads_per_block, args.threads_per_block} : Team{0, 0};
    const int B = args.size, bands = Tl::tiles(B), n = live ? B : 0;
    Shared& shared = shared_memory<Shared>()[live ? slot : 0];
    typename Tl::T* const matrix = args.matrix + (live ? b : 0) * B * B;

    Tile<Tl> s(team, n);
    s.read(matrix, B, n);
    negate_and_scale(s, shared, n, args.damping, team);
    __syncthreads();
    invert(s, shared, n, bands, team);
    const bool usable = estimate(s, shared, n, team, args.estimates.condition + b, args.estimates.amplification + b);
    s.write(matrix, B, n, bands, team, shared.band[0], usable);
}

template <class Tl, int RESIDENT>
int launch_with(Args<typename Tl::T> args, Where where) {
    using Shared = SweepShared<Tl>;
    static_assert(sizeof(Shared) <= FREE_SHARED_MEMORY, "a block does not fit");
    const int fitting = static_cast<int>(FREE_SHARED_MEMORY / sizeof(Shared)), threads = Tl::threads(args.size);
    const int sharing = threads < FULL ? FULL / threads : 1;
    args.threads_per_block = threads;
    args.blocks_per_cta = sharing < fitting ? sharing : fitting;
    const int64_t grid = (args.count + args.blocks_per_cta - 1) / args.blocks_per_cta;
    return launch(spd_inverse_kernel<Tl, RESIDENT>, grid, round_up(threads * args.blocks_per_cta, WARP),
                  args.blocks_per_cta * sizeof(Shared), args, where);
}

// Large tiles spend the fewest instructions on a block; small ones keep more threads busy where blocks are small.
int choose(Args<float> args, Where where) {
    if (args.size <= 16) return launch_with<Tiling<float, 4, 16, false>, 7>(args, where);
    if (args.size <= 64) return launch_with<Tiling<float, 8, 64, false>, 4>(args, where);
    if (args.size <= 128) return launch_with<Tiling<float, 8, 128, true>, 3>(args, where);
    return launch_with<Largest<float>, 1>(args, where);
}

int choose(Args<double> args, Where where) {
    if (args.size <= 64) return launch_with<Tiling<double, 4, 64, false>, 3>(args, where);
    return launch_with<Largest<double>, 1>(args, where);
}

}  // namespace

template <class T>
int spd_inverse(T* matrix, int64_t num_blocks, int64_t block_size, double damping, Estimates estimates, Where where) {
    if (block_size > LARGEST_BLOCK<T>) return cudaErrorInvalidValue;
    return choose({matrix, num_blocks, static_cast<int>(block_size), 0, 0, static_cast<T>(damping), estimates}, where);
}

template int spd_inverse(float*, int64_t, int64_t, double, Estimates, Where);
template int spd_inverse(double*, int64_t, int64_t, double, Estimates, Where);

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace ff
