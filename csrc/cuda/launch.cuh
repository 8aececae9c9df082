// What every launcher needs: the right device for its duration, errors that name their source, grids that fit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace kdejsd {
namespace cuda {

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// To be called right after a launch. Errors of the kernel's execution surface at the caller's next synchronisation.
inline void check_launch(const std::string& kernel) { check(cudaGetLastError(), "launch of " + kernel); }

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

inline int multiprocessor_count(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// All grids here are flat: x alone may pass 65535, up to 2^31 - 1 blocks.
inline unsigned int flat_grid(int64_t blocks, const std::string& kernel) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error("launch of " + kernel + ": " + std::to_string(blocks) +
                             " blocks are more than a grid holds");
  }
  return static_cast<unsigned int>(blocks);
}

// Lets a kernel have more dynamic shared memory than the 48 KiB that are granted without asking.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, const std::string& name) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory of " + name);
}

}  // namespace cuda
}  // namespace kdejsd
