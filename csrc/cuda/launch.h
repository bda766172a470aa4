// Launching a kernel on the caller's device and stream.
#pragma once
#include <cuda_runtime.h>

#include "kernels.h"

namespace ff {
namespace cuda {

// Makes a device the current one of this thread, and the one before it again at the end.
class OnDevice {
   public:
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ != cudaSuccess || before_ == device) return;
        error_ = cudaSetDevice(device);
        moved_ = error_ == cudaSuccess;
    }
    ~OnDevice() {
        if (moved_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    cudaError_t error() const { return error_; }

   private:
    int before_ = 0;
    bool moved_ = false;
    cudaError_t error_;
};

constexpr size_t FREE_SHARED_MEMORY = 48 << 10;  // a thread block has to be permitted more than these bytes

template <class Args>
int launch(void (*kernel)(Args), int64_t grid, int threads, size_t shared_bytes, Args args, Where where) {
    const OnDevice on_device(where.device);
    if (on_device.error() != cudaSuccess) return on_device.error();
    if (shared_bytes > FREE_SHARED_MEMORY) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    void* list[] = {&args};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(threads)), list,
                            shared_bytes, static_cast<cudaStream_t>(where.stream));
}

// Shared memory of the size given at the launch.
template <class S>
__device__ inline S* shared_memory() {
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    return reinterpret_cast<S*>(shared_bytes);
}

constexpr int WARP = 32;
__host__ __device__ constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

}  // namespace cuda
}  // namespace ff
