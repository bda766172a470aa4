// A GPU made of fibres, for tests: the files of csrc/cuda compile against it unchanged and run on the processor.
//
// The threads of a block are cooperative fibres that run one at a time and hand over where they must wait: at a barrier
// or a warp shuffle. Who runs next is drawn at random from a seed, so that whatever relies on an order that no barrier
// enforces gives other results from seed to seed. Shared memory is filled with 0xff, which is NaN, before every block,
// and is closed to the address sanitizer beyond the bytes that the launch asked for. A thread that waits at another
// barrier than the others, or ends while they wait, stops the program with a sentence.
//
// Each __syncthreads() is a site, known by file and line; one of them can be switched off, which is how the tests show
// that every barrier is needed and that a missing one is noticed.
#pragma once
#include <math.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t code) { return code == cudaSuccess ? "no error" : "invalid value"; }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

namespace ff {
namespace cuda {
__align__(16) inline unsigned char shared_bytes[163 << 10];  // what a block of sm_80 may have
}
}  // namespace ff

namespace emulate {

struct Site {
    std::string file;
    int line;
    bool operator==(const Site& other) const { return line == other.line && file == other.file; }
    std::string text() const { return file.substr(file.rfind('/') + 1) + ":" + std::to_string(line); }
};

[[noreturn]] inline void stop(const std::string& sentence) {
    std::fprintf(stderr, "emulated GPU: %s\n", sentence.c_str());
    std::abort();
}

class Machine {
   public:
    std::vector<Site> sites;  // every barrier met so far
    int switched_off = -1;    // index of the one that is passed without waiting, or -1
    uint32_t seed = 1;
    size_t permitted = 48 << 10;  // bytes of shared memory that the next launch may ask for
    unsigned threads = 0;         // of a block of the last launch
    size_t shared_bytes = 0;

    void launch(dim3 grid, dim3 block, size_t shared, std::function<void()> kernel) {
        if (shared > permitted) stop("more shared memory than a block may have without permission");
        if (block.x > 1024 || block.x == 0 || grid.x == 0) stop("a launch of a size that no GPU takes");
        permitted = 48 << 10;
        threads = block.x;
        shared_bytes = shared;
        random_.seed(seed);
        kernel_ = std::move(kernel);
        gridDim = grid;
        blockDim = block;
        while (fibres_.size() < block.x) fibres_.push_back(std::make_unique<Fibre>());
        for (unsigned b = 0; b < grid.x; ++b) {
            blockIdx = dim3(b);
            std::memset(ff::cuda::shared_bytes, 0xff, sizeof ff::cuda::shared_bytes);
            close_shared_memory(shared);
            run_block(block.x);
            close_shared_memory(sizeof ff::cuda::shared_bytes);
        }
    }

    void barrier(const char* file, int line) {
        const int site = site_of({file, line});
        if (site == switched_off) return;
        if (waiting_ == 0) barrier_ = site;
        if (site != barrier_)
            stop("threads wait at two barriers, " + sites[barrier_].text() + " and " + sites[site].text());
        ++waiting_;
        if (waiting_ == alive_) {
            if (alive_ != static_cast<int>(blockDim.x)) stop("a thread ended before " + sites[site].text());
            waiting_ = 0;
            for (int t = 0; t < alive_; ++t) ready_.push_back(t);
        }
        hand_over();
    }

    // Waits until all 32 threads of this warp are here with a value; returns what each of them brought.
    template <class T>
    std::vector<T> exchange(T value) {
        const unsigned thread = threadIdx.x, warp = thread / 32;
        if ((warp + 1) * 32 > blockDim.x) stop("a shuffle in a warp that is not full");
        Warp& w = warps_[warp];
        std::vector<double>& values = w.values[w.round & 1];
        const int round = w.round;
        values[thread % 32] = static_cast<double>(value);  // exact for float and double
        if (++w.arrived == 32) {
            w.arrived = 0;
            ++w.round;
            for (unsigned lane = 0; lane < 32; ++lane) ready_.push_back(static_cast<int>(warp * 32 + lane));
        }
        hand_over();
        const std::vector<double>& all = w.values[round & 1];
        return std::vector<T>(all.begin(), all.end());
    }

   private:
    static constexpr size_t STACK = 256 << 10;

    struct Fibre {
        ucontext_t context;
        std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
    };
    struct Warp {
        std::vector<double> values[2] = {std::vector<double>(32), std::vector<double>(32)};
        int arrived = 0, round = 0;
    };

    int site_of(const Site& site) {
        for (size_t i = 0; i < sites.size(); ++i)
            if (sites[i] == site) return static_cast<int>(i);
        sites.push_back(site);
        return static_cast<int>(sites.size()) - 1;
    }

    void run_block(unsigned threads) {
        alive_ = static_cast<int>(threads);
        waiting_ = 0;
        ready_.clear();
        warps_.assign((threads + 31) / 32, Warp());
        for (unsigned t = 0; t < threads; ++t) {
            Fibre& fibre = *fibres_[t];
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.get();
            fibre.context.uc_stack.ss_size = STACK;
            fibre.context.uc_link = nullptr;
            makecontext(&fibre.context, &Machine::enter, 0);
            ready_.push_back(static_cast<int>(t));
        }
        current_ = HOST;
        hand_over();
    }

    static void enter();

    void body() {
        finish_switch(nullptr);
        kernel_();
        --alive_;
        if (waiting_ > 0) stop("a thread ended while others wait at " + sites[barrier_].text());
        if (ready_.empty() && alive_ > 0) stop("a thread ended while others wait for its warp");
        hand_over(true);
    }

    // Runs another thread that is ready, drawn at random, or the host when all have ended.
    void hand_over(bool for_ever = false) {
        int next = HOST;
        if (!ready_.empty()) {
            std::swap(ready_[random_() % ready_.size()], ready_.back());
            next = ready_.back();
            ready_.pop_back();
        } else if (alive_ > 0) {
            stop("no thread can go on: some wait at a barrier, others for their warp");
        }
        if (next == current_) return;
        ucontext_t& from = context(current_);
        const int self = current_;
        current_ = next;
        if (next != HOST) threadIdx = dim3(static_cast<unsigned>(next));
        void* fake_stack = nullptr;
        start_switch(for_ever ? nullptr : &fake_stack, next);
        swapcontext(&from, &context(next));
        finish_switch(fake_stack);
        if (self != HOST) threadIdx = dim3(static_cast<unsigned>(self));
    }

    ucontext_t& context(int thread) { return thread == HOST ? host_ : fibres_[thread]->context; }

#if defined(__SANITIZE_ADDRESS__)
    void start_switch(void** fake_stack, int next) {
        const void* bottom = next == HOST ? host_bottom_ : fibres_[next]->stack.get();
        __sanitizer_start_switch_fiber(fake_stack, bottom, next == HOST ? host_size_ : STACK);
    }
    void finish_switch(void* fake_stack) {
        const void* bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
        if (!host_bottom_) host_bottom_ = bottom, host_size_ = size;  // the first switch comes from the host
    }
    void close_shared_memory(size_t open) {
        __asan_unpoison_memory_region(ff::cuda::shared_bytes, sizeof ff::cuda::shared_bytes);
        __asan_poison_memory_region(ff::cuda::shared_bytes + open, sizeof ff::cuda::shared_bytes - open);
    }
    const void* host_bottom_ = nullptr;
    size_t host_size_ = 0;
#else
    void start_switch(void**, int) {}
    void finish_switch(void*) {}
    void close_shared_memory(size_t) {}
#endif

    static constexpr int HOST = -1;
    std::mt19937 random_;
    std::function<void()> kernel_;
    std::vector<std::unique_ptr<Fibre>> fibres_;
    std::vector<Warp> warps_;
    std::vector<int> ready_;
    ucontext_t host_;
    int current_ = HOST, alive_ = 0, waiting_ = 0, barrier_ = 0;
};

inline Machine machine;
inline void Machine::enter() { machine.body(); }

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(args[I])...);
}

}  // namespace emulate

#define __syncthreads() emulate::machine.barrier(__FILE__, __LINE__)

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
    emulate::machine.launch(grid, block, shared, [=] { emulate::call(kernel, args, std::index_sequence_for<P...>()); });
    return cudaSuccess;
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int bytes) {
    if (bytes > static_cast<int>(sizeof ff::cuda::shared_bytes)) return cudaErrorInvalidValue;
    emulate::machine.permitted = static_cast<size_t>(bytes);
    return cudaSuccess;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulate::machine.exchange(value)[(threadIdx.x % 32) ^ static_cast<unsigned>(lanes)];
}
