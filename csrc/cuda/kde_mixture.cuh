// What the kernels of the kde op share: a batch item with its frame of reference, and what a forward pass leaves for
// the merge of its splits.
//
// Points are taken as point * scale. The scale is the power of two next to 1/h0, h0 the bandwidth, or the middle one
// where each center has its own, so it costs no digit, and neither do differences of points that are near each other.
// Only the tensor cores' kernel takes them as (point - shift) * scale. Exponents are in powers of two and relative to
// h0:
//   x[i, j] = offset[j] - gain[j] d2[i, j],  gain[j] = log2(e)/2 (h0/h[j])^2 / (scale h0)^2,
//   offset[j] = log2(e) log_weights[j] + l log2(h0/h[j]).
//
// Weighted sums are those of differences, sum of w (point - own), for each of the points that a pass leaves results
// for. Taken as (sum of w point) - own (sum of w), they cost half the arithmetic and a rounding of `own`: that is done
// where `own` is near the origin, see most_parts_of_sums.
#pragma once

#include "cuda/kde_plan.h"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"
#include "kernels.h"
#include "math/log_sum_exp.h"

namespace kdejsd {
namespace cuda {

// ----------------------------------------------------------------------------------------------------------------
// One batch item and its frame of reference

template <typename T>
struct Item {
  const T* query;          // [n, l]
  const T* centers;        // [m, l]
  const T* bandwidth;      // [m] or [1], or null: a number
  const T* log_weights;    // [m] or null
  const int64_t* exclude;  // [n] or null
  int64_t n, m, l;
  bool per_center;
  T h0;     // the bandwidth, or the middle one; NaN where it is not positive and finite
  T least;  // bandwidth
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
__device__ Item<T> batch_item(const KdeMixture& mixture, const T* middle /* [2, batch] or null */, int64_t batch) {
  Item<T> item;
  item.query = static_cast<const T*>(mixture.query) + batch * mixture.query_stride;
  item.centers = static_cast<const T*>(mixture.centers) + batch * mixture.centers_stride;
  item.bandwidth = static_cast<const T*>(mixture.bandwidth);
  if (item.bandwidth != nullptr) item.bandwidth += batch * mixture.bandwidth_stride;
  item.log_weights = static_cast<const T*>(mixture.log_weights);
  if (item.log_weights != nullptr) item.log_weights += batch * mixture.log_weights_stride;
  item.exclude = mixture.exclude;
  if (item.exclude != nullptr) item.exclude += batch * mixture.exclude_stride;
  item.n = mixture.n;
  item.m = mixture.m;
  item.l = mixture.l;
  item.per_center = mixture.per_center;
  if (middle != nullptr) {
    item.h0 = middle[batch];
    item.least = middle[mixture.batch + batch];
  } else {
    const T number = static_cast<T>(mixture.bandwidth_number);
    item.least = item.h0 = checked_bandwidth(item.bandwidth != nullptr ? item.bandwidth[0] : number);
  }
  item.scale = power_of_two_near_inverse(item.h0);
  const double scaled = static_cast<double>(item.scale) * static_cast<double>(item.h0);
  item.gain = static_cast<T>(0.5 * kLog2E / (scaled * scaled));
  return item;
}

template <typename T>
__device__ T bandwidth_of(const Item<T>& item, int64_t j) {
  return item.per_center ? checked_bandwidth(item.bandwidth[j]) : item.h0;
}

// Of all centers.
template <typename T>
__device__ T largest_gain(const Item<T>& item) {
  const T ratio = item.h0 / item.least;
  return item.gain * (ratio * ratio);
}

// Up to which gain |own|^2 weighted sums are taken by way of the sum of the weights. Their error is 2^-24 of |own|,
// which is the root of these parts in bandwidths, about; so it is alike that of differences of points some bandwidths
// apart. Typical points have up to 12 l at the bandwidths in use, and weighted differences that are so much longer.
template <typename T>
__device__ T most_parts_of_sums(const Item<T>& item) {
  return std::fmax(T(128), T(12) * static_cast<T>(item.l));
}

// The shift of coordinate k: the middle between the second lowest and the second highest of nine centers, where these
// two agree within a factor of three; elsewhere little would be gained. So one that lies far from the others takes
// nothing with it. The middle is rounded to a quarter of the two's distance, and to 2^-16 of itself, so that to
// subtract it is exact for centers near it and for larger ones too. The centers are spread over the array without a
// period, which the array may have. `kAhead` of them are loaded at a time, where there are registers.
template <int kAhead = 9, typename T>
__device__ T shift_of(const Item<T>& item, int64_t k) {
  if (k >= item.l) return T(0);
  T lowest = T(INFINITY), low = T(INFINITY), highest = -T(INFINITY), high = -T(INFINITY);
#pragma unroll kAhead
  for (int s = 0; s < 9; ++s) {
    const int place = 316 * (2 * s + 1) % 1024;  // multiples of half the golden ratio, in 1024ths
    const T coordinate = item.centers[item.m * place / 1024 * item.l + k];
    low = std::fmin(low, std::fmax(lowest, coordinate));
    lowest = std::fmin(lowest, coordinate);
    high = std::fmax(high, std::fmin(highest, coordinate));
    highest = std::fmax(highest, coordinate);
  }
  const bool far = low > T(0) ? high < 3 * low : high < T(0) && low > 3 * high;
  constexpr int kDigits = sizeof(T) == 4 ? 23 : 52;
  const T middle = low + (high - low) / 2;
  // A number whose last place is what is to be rounded to.
  const T rounder = std::fmax((high - low) * T(1ll << (kDigits - 2)), std::fabs(middle) * T(1ll << (kDigits - 16)));
  const T shift = (middle + rounder) - rounder;
  return far && std::fabs(shift) < T(INFINITY) ? shift : T(0);
}

// What the pairs of one center have in common.
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) CenterTerms {
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
    const T ratio = item.h0 / bandwidth_of(item, j);
    terms.offset += static_cast<T>(item.l) * std::log2(ratio);
    terms.precision = ratio * ratio;
    terms.gain *= terms.precision;
  }
  return terms;
}

// The index of a center that is left out, counted from the first of a block's centers; -1 where it is not among them.
__device__ inline int among(int64_t index, int64_t first, int64_t end) {
  return index >= first && index < end ? static_cast<int>(index - first) : -1;
}

// ----------------------------------------------------------------------------------------------------------------
// A block's share of a pass

struct BlockShare {
  int64_t row_tile;
  int group;  // of chunks, as the plan has them
  int64_t split, batch;
  int64_t first_tile, end_tile;  // of the columns
};

// Neighbouring blocks have the same columns, and read them at the same time.
template <typename Plan>
__device__ BlockShare block_share(const Plan& plan, int64_t row_tiles, int64_t column_tiles) {
  BlockShare share;
  int64_t block = blockIdx.x;
  share.row_tile = block % row_tiles;
  block /= row_tiles;
  share.group = static_cast<int>(block % plan.groups);
  block /= plan.groups;
  share.split = block % plan.splits;
  share.batch = block / plan.splits;
  share.first_tile = share.split * plan.tiles_per_split;
  const int64_t end = share.first_tile + plan.tiles_per_split;
  share.end_tile = end < column_tiles ? end : column_tiles;
  return share;
}

// ----------------------------------------------------------------------------------------------------------------
// What a forward pass leaves

// What a split of the centers leaves per query; sums are relative to 2^exponent_base(max).
template <typename T>
struct Partials {
  T* max;          // [splits, batch, n]
  T* sum;          // [splits, batch, n], of the weights
  T* moment;       // [splits, batch, n], of the weights times d2; or null
  T* sum_centers;  // [splits, batch, n, l], of the weights times (h0/h)^2 (center - query), scaled; or null
};

}  // namespace cuda
}  // namespace kdejsd
