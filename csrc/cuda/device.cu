// What this build holds and what this machine has.
#include <cuda_runtime.h>

#include "machine.h"

namespace kdejsd {
namespace cuda {

int device_count(std::string* error) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  cudaGetLastError();  // it is told here and shall not surface at the next launch
  *error = std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
  return 0;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string built_architectures() {
  std::string names;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {  // 10 times the compute capability
    names += (names.empty() ? "sm_" : " sm_") + std::to_string(architecture / 10);
  }
  return names;
}

}  // namespace cuda
}  // namespace kdejsd
