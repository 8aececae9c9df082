// Errors that name their source, and what is asked once for each kernel and device.
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/launch.cuh"

namespace kdejsd {
namespace cuda {

void check_failed(cudaError_t error, const char* what, const char* name) {
  const bool is_elsewhere = error == cudaErrorNoKernelImageForDevice;
  throw std::runtime_error(std::string(what) + name + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error) +
                           (is_elsewhere ? "; `kdejsd info` lists what this build is for: build it again where this "
                                           "device is, or with its architecture in CUDAARCHS"
                                         : ""));
}

void check_blocks(int64_t blocks, const char* kernel) {
  if (blocks <= INT32_MAX) return;
  throw std::runtime_error(std::string("launch of ") + kernel + ": " + std::to_string(blocks) +
                           " blocks are more than a grid holds");
}

// More dynamic shared memory than the 48 KiB that are granted without asking must be allowed. It is allowed once for
// each kernel and device, and then as much as the device has: what one call needs could be lowered by another thread's
// before it is launched.
void allow_shared_memory(const void* kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<const void*, int> key(kernel, device);
  if (allowed.count(key) > 0) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes(device)),
        "cudaFuncSetAttribute");
  allowed.insert(key);
}

int resident_blocks(const void* kernel, int threads, int shared_bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, threads, shared_bytes, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  allow_shared_memory(kernel, device);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return known[key] = blocks;
}

}  // namespace cuda
}  // namespace kdejsd
