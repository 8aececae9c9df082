// What every launcher needs: errors that name their source, grids that fit, shared memory beyond 48 KiB, occupancy.
// Nothing here or in the kernels is an extension of the C++ syntax: with a header in the place of cuda_runtime.h that
// runs the threads one by one, any C++ compiler makes tests of them (python_tests/cuda_on_host/).
//
// The caller has made the device current that the stream and all arrays belong to.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "math/integer.h"

namespace kdejsd {
namespace cuda {

inline void check(cudaError_t error, const char* what, const char* name = "") {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + name + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessor_count(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

// Of dynamic shared memory, that a block may have; no kernel that asks for it has static shared memory beside.
inline int most_shared_bytes(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// More dynamic shared memory than the 48 KiB that are granted without asking must be allowed. It is allowed once for
// each kernel and device, and then as much as the device has: what one call needs could be lowered by another thread's
// before it is launched.
template <typename... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...), int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<const void*, int> key(reinterpret_cast<const void*>(kernel), device);
  if (allowed.count(key) > 0) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes(device)),
        "cudaFuncSetAttribute");
  allowed.insert(key);
}

// How many blocks of a kernel a multiprocessor of the device holds at a time.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, int shared_bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(reinterpret_cast<const void*>(kernel), threads, shared_bytes, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  allow_shared_memory(kernel, device);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return known[key] = blocks;
}

// Queues a kernel. All grids here are flat: x alone may pass 65535, up to 2^31 - 1 blocks. Errors of the kernel's
// execution surface at the caller's next synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string("launch of ") + name + ": " + std::to_string(blocks) +
                             " blocks are more than a grid holds");
  }
  if (shared_bytes > 48 * 1024) allow_shared_memory(kernel, current_device());
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned int>(blocks));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch of ", name);
}

// The block's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return shared_memory;
}

}  // namespace cuda
}  // namespace kdejsd
