// What every launcher needs: errors that name their source, grids that fit, shared memory beyond 48 KiB, occupancy.
// Nothing here or in the kernels is an extension of the C++ syntax: with a header in the place of cuda_runtime.h that
// runs the threads one by one, any C++ compiler makes tests of them (python_tests/cuda_on_host/).
//
// The caller has made the device current that the stream and all arrays belong to.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "math/integer.h"

namespace kdejsd {
namespace cuda {

// launch.cu: what needs more of the standard library than each unit shall be compiled with.
void check_failed(cudaError_t error, const char* what, const char* name);
void check_blocks(int64_t blocks, const char* kernel);
void allow_shared_memory(const void* kernel, int device);
int resident_blocks(const void* kernel, int threads, int shared_bytes, int device);

inline void check(cudaError_t error, const char* what, const char* name = "") {
  if (error != cudaSuccess) check_failed(error, what, name);
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

// How many blocks of a kernel a multiprocessor of the device holds at a time.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, int shared_bytes, int device) {
  return resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared_bytes, device);
}

// Queues a kernel. All grids here are flat: x alone may pass 65535, up to 2^31 - 1 blocks. Errors of the kernel's
// execution surface at the caller's next synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  check_blocks(blocks, name);
  if (shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel), current_device());
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
