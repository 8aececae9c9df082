// What the kernels of all ops share below the block: warps, vectors of shared memory, sums over neighbouring lanes.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace kdejsd {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T at[kCount];
};

template <int kCount, typename T>
__device__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

template <typename T, int kCount>
__device__ void store_vector(T* to, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

// 16 bytes of T: the widest access to shared memory, and the padding that puts rows 4 banks apart.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Over kLanes neighbouring lanes, a power of two; each of them has the result.
template <int kLanes, typename T>
__device__ T max_over(T x) {
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) x = std::fmax(x, __shfl_xor_sync(kAllLanes, x, lane));
  return x;
}

template <int kLanes, typename T>
__device__ T sum_over(T x) {
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

}  // namespace cuda
}  // namespace kdejsd
