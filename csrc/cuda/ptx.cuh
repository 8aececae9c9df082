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

// Two numbers as float16, rounded to the nearest; the first is the lower half.
__device__ inline uint32_t halves_of(float first, float second) {
  uint32_t halves;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
  return halves;
}

__device__ inline void floats_of(uint32_t halves, float& first, float& second) {
  asm("{.reg .b16 first, second; mov.b32 {first, second}, %2; cvt.f32.f16 %0, first; cvt.f32.f16 %1, second;}"
      : "=f"(first), "=f"(second)
      : "r"(halves));
}

// Four 8 x 8 matrices of float16 in shared memory: lane i brings the address, of 16 aligned bytes, of row i % 8 of
// matrix i / 8. With g = lane / 4 and t = lane % 4 a lane gets the numbers (g, 2 t) and (g, 2 t + 1) of each, or
// transposed (2 t, g) and (2 t + 1, g).
__device__ inline void load_matrices(uint32_t (&numbers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(numbers[0]), "=r"(numbers[1]), "=r"(numbers[2]), "=r"(numbers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

__device__ inline void load_transposed(uint32_t (&numbers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(numbers[0]), "=r"(numbers[1]), "=r"(numbers[2]), "=r"(numbers[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// sum += a b by the warp's tensor core: a is 16 x 16 and b is 16 x 8 float16, sum 16 x 8 float32; mma_half.cuh says
// which lane has what of them.
__device__ inline void add_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum = a b, likewise: the zeros that it starts from are no registers to be cleared.
__device__ inline void start_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, "
      "%10, %10};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// 2^x to 2 units in the last place, by one instruction; 0 below 2^-126.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace cuda
}  // namespace kdejsd
