// Products by tensor cores of float32 numbers, each as two float16 numbers: the nearest to it, and the nearest to what
// that leaves. Three of the four products of these parts are float32's but for some of its last bits; the product of
// the big parts alone, which have 11 bits like TF32's, is that of reduced precision.
//
// float16 has few exponents. Numbers must be below 65504, and keep 22 bits down to 2^-4, fewer below: nothing of them
// is lost that is larger than 2^-25. Who splits brings them near the upper end first.
//
// A warp multiplies A, 16 x 16, by B, 16 x 8, and adds to 16 x 8 sums (mma.sync.m16n8k16). With g = lane / 4 and
// t = lane % 4, a lane holds of them, as the PTX manual lays them out (row, column):
//
//   register   0                       1                     2                         3
//   A          (g, 2 t), (g, 2 t + 1)  (g + 8, 2 t), ...     (g, 2 t + 8), ...         (g + 8, 2 t + 8), ...
//   B          (2 t, g), (2 t + 1, g)  (2 t + 8, g), ...
//   sums       (g, 2 t)                (g, 2 t + 1)          (g + 8, 2 t)              (g + 8, 2 t + 1)
//
// So the sums of two products that lie side by side are an A as they are.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

namespace kdejsd {
namespace cuda {

constexpr int kTileM = 16;  // rows of A
constexpr int kTileN = 8;   // columns of B
constexpr int kStepK = 16;  // columns of A and rows of B: a k-step

// Two numbers, each in two parts.
struct Parts {
  uint32_t big, small;
};

__device__ inline Parts split_in_parts(float first, float second) {
  Parts parts;
  float big_first, big_second;
  parts.big = halves_of(first, second);
  floats_of(parts.big, big_first, big_second);
  parts.small = halves_of(first - big_first, second - big_second);
  return parts;
}

// A lane's share of A; its share of B is half of such registers, 0 and 1 or 2 and 3, as they are loaded in pairs.
struct Fragment {
  uint32_t big[4], small[4];

  __device__ void set(int i, Parts parts) {
    big[i] = parts.big;
    small[i] = parts.small;
  }
};

}  // namespace cuda
}  // namespace kdejsd
