// What every launcher needs: the right device for its duration, errors that name their source, grids that fit. Nothing
// here or in the kernels is an extension of the C++ syntax: with a header in the place of cuda_runtime.h that runs the
// threads one by one, any C++ compiler makes tests of them (python_tests/cuda_on_host/).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace kdejsd {
namespace cuda {

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes `device` current and gives the caller's device back on leaving.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessor_count(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

inline int most_shared_bytes(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Queues a kernel. All grids here are flat: x alone may pass 65535, up to 2^31 - 1 blocks. More dynamic shared memory
// than the 48 KiB that are granted without asking is asked for. Errors of the kernel's execution surface at the
// caller's next synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  const std::string what = std::string("launch of ") + name;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(what + ": " + std::to_string(blocks) + " blocks are more than a grid holds");
  }
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), what);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned int>(blocks));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return shared_memory;
}

}  // namespace cuda
}  // namespace kdejsd
