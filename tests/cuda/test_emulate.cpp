// The emulated GPU itself: it notices what it is there to notice. Each mistake is made in a process of its own.
#include <sys/wait.h>
#include <unistd.h>

#include "emulate.h"

namespace {

struct Args {
    int* out;
};

int* shared_ints() { return reinterpret_cast<int*>(ff::cuda::shared_bytes); }

__global__ void leaves_early(Args) {
    if (threadIdx.x == 3) return;
    __syncthreads();
}

__global__ void waits_elsewhere(Args) {
    if (threadIdx.x == 3) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void waits_for_a_warp(Args args) {
    if (threadIdx.x != 3) args.out[0] = __shfl_xor_sync(~0u, 1.0, 1) > 0;
}

__global__ void writes_beyond(Args) { shared_ints()[threadIdx.x + 1] = 0; }

__global__ void reads_unwritten(Args args) {
    args.out[blockIdx.x * blockDim.x + threadIdx.x] = shared_ints()[threadIdx.x];
}

__global__ void turns_around(Args args) {
    shared_ints()[threadIdx.x] = static_cast<int>(threadIdx.x + 100 * blockIdx.x);
    __syncthreads();
    args.out[blockIdx.x * blockDim.x + threadIdx.x] = shared_ints()[blockDim.x - 1 - threadIdx.x];
}

__global__ void sums_a_warp(Args args) {
    float sum = static_cast<float>(threadIdx.x);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    args.out[threadIdx.x] = static_cast<int>(sum);
}

std::vector<int> run(void (*kernel)(Args), unsigned grid, unsigned block) {
    std::vector<int> out(grid * block);
    Args args = {out.data()};
    void* list[] = {&args};
    cudaLaunchKernel(kernel, dim3(grid), dim3(block), list, block * sizeof(int), nullptr);
    return out;
}

// Whether a kernel stops the program with these words.
bool stops(void (*kernel)(Args), const std::string& words) {
    int pipe_ends[2];
    if (pipe(pipe_ends) != 0) return false;
    const pid_t child = fork();
    if (child == 0) {
        dup2(pipe_ends[1], STDERR_FILENO);
        run(kernel, 1, 64);
        _exit(0);
    }
    close(pipe_ends[1]);
    std::string text;
    char part[4096];
    for (ssize_t got; (got = read(pipe_ends[0], part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(got));
    close(pipe_ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (status != 0 && text.find(words) != std::string::npos) return true;
    std::printf("expected \"%s\", got status %d and: %s\n", words.c_str(), status, text.c_str());
    return false;
}

bool holds(bool condition, const char* what) {
    if (!condition) std::printf("%s\n", what);
    return condition;
}

}  // namespace

int main() {
    bool good = stops(leaves_early, "a thread ended");
    good &= stops(waits_elsewhere, "threads wait at two barriers");
    good &= stops(waits_for_a_warp, "a thread ended while others wait for its warp");
    good &= stops(writes_beyond, "AddressSanitizer: use-after-poison");
    for (const int value : run(reads_unwritten, 2, 64)) good &= holds(value == -1, "shared memory was not poisoned");
    const std::vector<int> turned = run(turns_around, 3, 64);
    for (int i = 0; i < 192; ++i)
        good &= holds(turned[i] == i / 64 * 100 + 63 - i % 64, "a barrier let threads through");
    for (const int sum : run(sums_a_warp, 1, 32)) good &= holds(sum == 31 * 16, "a shuffle went to the wrong lane");
    return good ? 0 : 1;
}
