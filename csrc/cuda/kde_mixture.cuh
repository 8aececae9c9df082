// What the kernels of the kde op share: a batch item with its frame of reference, and what a forward pass leaves for
// the merge of its splits.
//
// Points are taken as (point - shift) * scale. The scale is the power of two next to 1/h0, h0 the bandwidth, or the
// middle one where each center has its own, so it costs no digit; the shift puts centers that are far from the origin
// about it. Exponents are in powers of two and relative to h0:
//   x[i, j] = offset[j] - gain[j] d2[i, j],  gain[j] = log2(e)/2 (h0/h[j])^2 / (scale h0)^2,
//   offset[j] = log2(e) log_weights[j] + l log2(h0/h[j]).
#pragma once

#include "cuda/launch.cuh"
#include "kernels.h"
#include "math/log_sum_exp.h"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffffu;

// ----------------------------------------------------------------------------------------------------------------
// Small helpers

template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Vector {
  T at[kCount];
};

template <int kCount, typename T>
__device__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}

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

// ----------------------------------------------------------------------------------------------------------------
// One batch item and its frame of reference

template <typename T>
struct Item {
  const T* query;          // [n, l]
  const T* centers;        // [m, l]
  const T* bandwidth;      // [m] or [1]
  const T* log_weights;    // [m] or null
  const int64_t* exclude;  // [n] or null
  int64_t n, m, l;
  bool per_center;
  T h0;     // the bandwidth, or the middle one; NaN where it is not positive and finite
  T scale;  // a power of two, scale h0 is in [1, 2)
  T gain;   // of a center with bandwidth h0
};

template <typename T>
__device__ T power_of_two_near_inverse(T h) {
  constexpr int kLargest = sizeof(T) == 4 ? 126 : 1022;  // beyond, the power itself would not be a normal number
  const int exponent = h > T(0) ? -std::ilogb(h) : 0;
  return std::ldexp(T(1), exponent < -kLargest ? -kLargest : exponent > kLargest ? kLargest : exponent);
}

template <typename T>
__device__ Item<T> batch_item(const KdeMixture& mixture, const T* middle /* [batch] or null */, int64_t batch) {
  Item<T> item;
  item.query = static_cast<const T*>(mixture.query) + batch * mixture.query_stride;
  item.centers = static_cast<const T*>(mixture.centers) + batch * mixture.centers_stride;
  item.bandwidth = static_cast<const T*>(mixture.bandwidth) + batch * mixture.bandwidth_stride;
  item.log_weights = static_cast<const T*>(mixture.log_weights);
  if (item.log_weights != nullptr) item.log_weights += batch * mixture.log_weights_stride;
  item.exclude = mixture.exclude;
  if (item.exclude != nullptr) item.exclude += batch * mixture.exclude_stride;
  item.n = mixture.n;
  item.m = mixture.m;
  item.l = mixture.l;
  item.per_center = mixture.per_center;
  item.h0 = middle != nullptr ? middle[batch] : checked_bandwidth(item.bandwidth[0]);
  item.scale = power_of_two_near_inverse(item.h0);
  const double scaled = static_cast<double>(item.scale) * static_cast<double>(item.h0);
  item.gain = static_cast<T>(0.5 * kLog2E / (scaled * scaled));
  return item;
}

// What is subtracted from coordinate k of all points. Where four centers spread over the array agree in it within a
// factor of three it is their mean, rounded to an eighth of their range: to subtract that from points near them is
// exact. Elsewhere little would be gained.
template <typename T>
__device__ T shift_of(const Item<T>& item, int64_t k) {
  if (k >= item.l) return T(0);
  T low = item.centers[k], high = low, mean = low / 4;
#pragma unroll
  for (int sample = 1; sample < 4; ++sample) {
    const T coordinate = item.centers[(item.m - 1) * sample / 3 * item.l + k];
    low = std::fmin(low, coordinate);
    high = std::fmax(high, coordinate);
    mean += coordinate / 4;
  }
  const bool far = low > T(0) ? high < 3 * low : high < T(0) && low > 3 * high;
  const T rounder =
      (high - low) * T(sizeof(T) == 4 ? 1ll << 21 : 1ll << 50);  // its last place is a quarter of the range
  const T shift = (mean + rounder) - rounder;
  return far && std::fabs(shift) < T(INFINITY) ? shift : T(0);
}

// What the pairs of one center have in common.
template <typename T>
struct CenterTerms {
  T offset;     // of the exponent; -inf beyond the last center
  T gain;       // of the squared distance in the exponent
  T precision;  // (h0/h)^2, the weight's factor in gradients
};

template <typename T>
__device__ CenterTerms<T> center_terms(const Item<T>& item, int64_t j) {
  if (j >= item.m) return {-T(INFINITY), item.gain, T(1)};
  CenterTerms<T> terms = {T(0), item.gain, T(1)};
  if (item.log_weights != nullptr) terms.offset = T(kLog2E) * item.log_weights[j];
  if (item.per_center) {
    const T ratio = item.h0 / checked_bandwidth(item.bandwidth[j]);
    terms.offset += static_cast<T>(item.l) * std::log2(ratio);
    terms.precision = ratio * ratio;
    terms.gain *= terms.precision;
  }
  return terms;
}

// ----------------------------------------------------------------------------------------------------------------
// What a forward pass leaves

// What a split of the centers leaves per query; sums are relative to 2^exponent_base(max).
template <typename T>
struct Partials {
  T* max;          // [splits, batch, n]
  T* sum;          // [splits, batch, n], of the weights
  T* moment;       // [splits, batch, n], of the weights times (h0/h)^2 with one h per center, times d2 else; or null
  T* sum_centers;  // [splits, batch, n, l], of the weights times (h0/h)^2 times the center; or null
};

// How a forward call is cut into blocks, and where in the workspace the partial sums and the middle bandwidths lie.
struct ForwardPlan {
  int tensor_width;     // where tensor cores do it: the most coordinates that their kernel takes, in eights; else 0
  float largest_parts;  // as kde_tensor.cuh says
  int lc, slabs;        // template arguments: coordinates per thread, chunks per block at most
  int groups;           // blocks that share a tile of queries and differ in the chunks that they sum
  int chunks;           // that each of them sums
  int64_t query_tiles, center_tiles, splits, tiles_per_split;
  int64_t max, sum, moment, sum_centers, middle;  // offsets in elements
  int64_t elements;

  int64_t blocks(int64_t batch) const { return query_tiles * groups * splits * batch; }
};

}  // namespace
}  // namespace cuda
}  // namespace kdejsd
