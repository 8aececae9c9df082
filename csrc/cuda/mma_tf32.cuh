// Products by tensor cores of float32 numbers: rounded to TF32, or split in two TF32 numbers each, three of whose four
// products give what float32 would.
//
// A warp multiplies A, 16 x 8, by B, 8 x 8, and adds to 16 x 8 sums (mma.sync.m16n8k8). With g = lane / 4 and
// t = lane % 4, a lane holds of them, as the PTX manual lays them out (row, column):
//
//   register   0             1                2             3
//   A          (g, t)        (g + 8, t)       (g, t + 4)    (g + 8, t + 4)
//   B          (t, g)        (t + 4, g)
//   sums       (g, 2 t)      (g, 2 t + 1)     (g + 8, 2 t)  (g + 8, 2 t + 1)
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

namespace kdejsd {
namespace cuda {

constexpr int kTileM = 16;  // rows of A
constexpr int kTileN = 8;   // columns of B
constexpr int kStepK = 8;   // columns of A and rows of B: a k-step

// The nearest TF32 number in the upper 19 bits; what lies in the others the tensor core does not read. A NaN, which a
// device writes as 0x7fffffff, becomes -0: whoever rounds must carry NaN another way.
__device__ inline uint32_t round_to_tf32(float x) { return __float_as_uint(x) + 0x1000u; }

__device__ inline float tf32_value(uint32_t rounded) { return __uint_as_float(rounded & 0xffffe000u); }

// The two parts of a number: big + small = x, exactly.
struct Parts {
  float big, small;
};

__device__ inline Parts split_in_parts(float x) {
  const float big = tf32_value(round_to_tf32(x));
  return {big, x - big};
}

// A lane's share of A (kCount = 4) or B (kCount = 2).
template <bool kSplit, int kCount>
struct Fragment {
  uint32_t big[kCount], small[kSplit ? kCount : 1];

  __device__ void set(int i, float x) {
    if constexpr (kSplit) {
      set(i, split_in_parts(x));
    } else {
      big[i] = round_to_tf32(x);
    }
  }
  __device__ void set(int i, Parts x) {
    static_assert(kSplit, "a number in parts is for split products");
    big[i] = __float_as_uint(x.big);
    small[i] = __float_as_uint(x.small);
  }
};

// A lane's share of 16 x 8 sums. Where numbers are split, each product of the big parts is added by itself, since a sum
// in a tensor core is cut off, not rounded; the other products are so small that this does no harm. These have kChains
// sums: a product must wait for the one before it in the same sum.
template <bool kSplit, int kChains = 1>
struct Accumulator {
  float big[4], small[kSplit ? kChains : 1][4];

  __device__ void add_product(const Fragment<kSplit, 4>& a, const Fragment<kSplit, 2>& b) {
    if constexpr (kSplit) {
      float product[4];
      product_tf32(product, a.big, b.big);
      add_product_tf32(small[0], a.big, b.small);
      add_product_tf32(small[kChains - 1], a.small, b.big);
#pragma unroll
      for (int e = 0; e < 4; ++e) big[e] += product[e];
    } else {
      add_product_tf32(big, a.big, b.big);
    }
  }
  __device__ float total(int i) const {
    if constexpr (kSplit) return big[i] + (kChains == 1 ? small[0][i] : small[0][i] + small[kChains - 1][i]);
    return big[i];
  }
};

// Which of eight points stands in column n of a first product, whose sums become A of a second one with the points as
// B. The lane that has the sums of columns 2 t and 2 t + 1 then has A's columns t and t + 4, so it must bring these two
// points to B: any order of the points is right if both products follow it, and this one lets a warp read them without
// a conflict of banks in either.
__host__ __device__ constexpr int point_of_column(int n) {
  return (n & 4) | (((n ^ (n >> 2)) & 1) << 1) | ((n >> 1) & 1);
}

// Rows lie an odd multiple of 8 words apart, so four rows are in four different quarters of the banks if no two of them
// are equal modulo 4. In the first product half of the lanes read 8 words of each of four rows at a time, columns 0 to
// 3 or 4 to 7; in the second all lanes do, of the even or the odd columns.
constexpr bool no_bank_conflicts() {
  int points = 0, quarters[4] = {};
  for (int n = 0; n < kTileN; ++n) {
    points |= 1 << point_of_column(n);
    quarters[n / 4] |= 1 << point_of_column(n) % 4;
    quarters[2 + n % 2] |= 1 << point_of_column(n) % 4;
  }
  return points == 255 && quarters[0] == 15 && quarters[1] == 15 && quarters[2] == 15 && quarters[3] == 15;
}
static_assert(no_bank_conflicts(), "point_of_column");

}  // namespace cuda
}  // namespace kdejsd
