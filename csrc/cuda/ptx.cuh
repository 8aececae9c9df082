// The instructions of the device that CUDA C++ has no name for, from compute capability 8.0 on.
#pragma once

#include <cstdint>

namespace kdejsd {
namespace cuda {

// Copies kBytes, 4, 8 or 16 and aligned to as many, from global to shared memory, while the thread goes on.
template <int kBytes>
__device__ void copy_async(void* to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
  }
}

// Until all copies of this thread are there, for this thread to see.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// sum += a b by the warp's tensor core: a is 16 x 8 and b is 8 x 8 TF32, sum 16 x 8 float32; mma_tf32.cuh says which
// lane has what of them. Of the 32 bits of a factor the lowest 13 do not count.
__device__ inline void add_product_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// product = a b, likewise: the zeros that it starts from are no registers to be cleared.
__device__ inline void product_tf32(float (&product)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
      "%10, %10};"
      : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

// 2^x to 2 units in the last place, by one instruction; 0 below 2^-126.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace cuda
}  // namespace kdejsd
