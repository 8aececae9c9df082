// The forward pass of the kde op by tensor cores, for float32: distances and weighted sums from products of float16
// numbers (mma_half.cuh), three for each with an error like float32's, or one.
//
// A block has a tile of queries, 16 or 32 for each of its warps, and goes through tiles of 32 or 16 centers:
//   1. scalar products of a warp's queries and the centers; exponents from them, up to a term of the query's
//   2. weights 2^x, in the registers in which the products were
//   3. weighted sums of the centers, for which those registers are the left factor as they are
// A tile is summed by itself before it is added to the running sums, so long sums have two levels.
//
// Points are multiplied by kHalfUnits, and weights by a power of two, before they become float16 numbers: so they use
// the upper half of what float16 reaches, and what is lost of them lies below float32's last bit of typical ones.
//
// The expanded square loses digits where norms are large beside the distance. Its parts in an exponent being
// gain (|q|^2 + |c|^2), the error of the exponent is at most
//   2^-17 of its parts, in three products: 2^-22 each for what it leaves out and for the factors' last bit, 2^-24 each
//         step of a sum, of which one that is cut off has up to twelve;
//   2^-9 of its parts, in one: 2^-11 for the rounding of each coordinate.
// Typical is a thirtieth of that, as roundings are of either sign. A warp takes a tile of centers from differences of
// coordinates, as the other kernels do, where the parts exceed `largest_parts`, and then its sums from three products
// in any case.
//
// A warp with a query that is far from the shift takes all its sums from differences, and its block has no shift: the
// rounding of what is moved would be that of points which are near each other and far from it. So it does for a tile
// with a center beyond float16's range.
//
// While a tile is worked on, the next one is copied as it is. Each thread then brings what it has copied itself into
// the frame, splits it, and puts it where all warps read it: in two places by turns, so that one barrier a tile is
// enough.
#include "cuda/kde_passes.h"
#include "cuda/mma_half.cuh"

namespace kdejsd {
namespace cuda {
namespace {

static_assert(TensorShape{1, 1, 1}.queries() == kTileM && tensor_centers(16) % (2 * kTileN) == 0,
              "what kde_plan.h counts with");

// How many warps of an instance a multiprocessor shall have registers for. With many k-steps there are registers for
// few, which must then find in themselves what keeps a multiprocessor busy.
__host__ __device__ constexpr int resident_warps(int most_steps) { return most_steps == 1 ? 16 : 8; }

// Coordinates are that many times as large in float16 as in the frame of reference. Typical ones are then 2^6 to 2^9.
constexpr float kHalfUnits = 64;
// The squared norm, in the frame, up to which no coordinate is beyond float16's range.
constexpr float kLargestNorm = 1e6f;
// Weights are at most 2 to the power of this in float16, and its square root may be the factor of narrow centers.
constexpr int kWeightExponent = 14;

// Of a center in shared memory.
struct alignas(16) Column {
  float offset, gain, precision;  // of CenterTerms
  float norm;                     // squared, of the numbers that the products take
};

// Rows of points in two parts: the big ones of all coordinates, and then the small ones.
struct HalfRows {
  const uint16_t* first;
  int stride, small;  // from one row to the next, and from a row's big parts to its small ones

  __device__ const uint16_t* row(int i) const { return first + i * stride; }
};

// The block's shared memory.
struct Shared {
  TensorTile at;
  float* base = reinterpret_cast<float*>(dynamic_shared_memory());

  __device__ int* exclude() const { return reinterpret_cast<int*>(base + at.exclude); }
  __device__ float* query_norms() const { return base + at.query_norms; }
  __device__ float* shift() const { return base + at.shift; }
  __device__ uint16_t* query(int row) const { return halves(at.queries + row * at.stride); }
  __device__ float* whole_query(int row) const { return base + at.whole_queries + row * at.stride; }
  template <int kCenters>
  __device__ Column* columns(int turn) const {
    return reinterpret_cast<Column*>(base + at.columns) + turn * kCenters;
  }
  template <int kCenters>
  __device__ float* staged(int turn, int row) const {
    return base + at.staged + (turn * kCenters + row) * at.stride;
  }
  template <int kCenters>
  __device__ uint16_t* center(int turn, int row) const {
    return halves(at.centers + (turn * kCenters + row) * at.stride);
  }
  __device__ HalfRows rows_from(const uint16_t* first) const { return {first, 2 * at.stride, kStepK * at.steps}; }

 private:
  __device__ uint16_t* halves(int word) const { return reinterpret_cast<uint16_t*>(base + word); }
};

// ----------------------------------------------------------------------------------------------------------------
// Points on their way into shared memory. `sharers` threads bring a row, in vectors that each of them finds again.

struct Share {
  int own, sharers;
};

__device__ inline void copy_row(const float* from, int l, bool aligned, Share share, float* to) {
  const int first = 4 * share.own, step = 4 * share.sharers;
  if (aligned) {
    from += first;
    to += first;
    for (int k = first; k < l; k += step, from += step, to += step) copy_async<16>(to, from);
  } else {
    for (int k = first; k < l; k += step) {
      for (int e = k; e < k + 4 && e < l; ++e) copy_async<4>(to + e, from + e);
    }
  }
}

// Copies leave what is beyond l as it is: it is to be 0.
__device__ inline void clear_padding(int l, int steps, Share share, float* row) {
  for (int k = 4 * share.own; k < kStepK * steps; k += 4 * share.sharers) {
    for (int e = k; e < k + 4; ++e) {
      if (e >= l) row[e] = 0;
    }
  }
}

// The squared norm of a point over all that share it.
__device__ inline float over_sharers(float sum, int sharers) {
  for (int lane = 1; lane < sharers; lane *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
  return sum;
}

template <int kCount>
__device__ Vector<float, kCount> scaled(Vector<float, kCount> point, float scale) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) point.at[e] *= scale;
  return point;
}

// Rows of points as whole numbers, times the scale. In global memory, with zeros behind them:
struct GlobalRow {
  const float* row;
  int l;
  bool aligned;
  float scale;

  template <int kCount>
  __device__ Vector<float, kCount> load(int k) const {
    Vector<float, kCount> point;
    if (kCount == 4 && aligned && k < l) {
      point = load_vector<kCount>(row + k);
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) point.at[e] = k + e < l ? row[k + e] : 0.0f;
    }
    return scaled(point, scale);
  }
};

// And in shared memory, where that has been done.
struct SharedRow {
  const float* row;

  template <int kCount>
  __device__ Vector<float, kCount> load(int k) const {
    return load_vector<kCount>(row + k);
  }
};

// This thread's share of the squared norm that a row will have in the frame.
__device__ inline float share_of_norm(const GlobalRow& row, const float* shift, int steps, Share share) {
  float norm = 0;
  for (int k = 4 * share.own; k < kStepK * steps; k += 4 * share.sharers) {
    const Vector<float, 4> point = row.load<4>(k);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float x = point.at[e] - shift[k + e];
      norm = std::fma(x, x, norm);
    }
  }
  return norm;
}

// Brings four coordinates into the frame, in parts. Returns the squared norm, in units of float16, of the numbers that
// the products will take.
template <bool kSplit>
__device__ float recentre(Vector<float, 4> point, const float* shift, uint16_t* big, uint16_t* small) {
  const Vector<float, 4> from = load_vector<4>(shift);
  Vector<uint32_t, 2> bigs, smalls;
  float norm = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) point.at[e] = (point.at[e] - from.at[e]) * kHalfUnits;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    float& first = point.at[2 * pair];
    float& second = point.at[2 * pair + 1];
    const Parts parts = split_in_parts(first, second);
    bigs.at[pair] = parts.big;
    smalls.at[pair] = parts.small;
    if (!kSplit) floats_of(parts.big, first, second);
    norm = std::fma(first, first, norm);
    norm = std::fma(second, second, norm);
  }
  store_vector(reinterpret_cast<uint32_t*>(big), bigs);
  store_vector(reinterpret_cast<uint32_t*>(small), smalls);
  return norm;
}

// A query, which is also kept whole where `whole` is not null. Returns this thread's share of its squared norm.
template <bool kSplit>
__device__ float bring_query(const GlobalRow& row, const float* shift, int steps, Share share, uint16_t* to,
                             float* whole) {
  float norm = 0;
  for (int k = 4 * share.own; k < kStepK * steps; k += 4 * share.sharers) {
    const Vector<float, 4> point = row.load<4>(k);
    if (whole != nullptr) store_vector(whole + k, point);
    norm += recentre<kSplit>(point, shift + k, to + k, to + kStepK * steps + k);
  }
  return norm * (1 / (kHalfUnits * kHalfUnits));
}

// A center from its row as it was copied, which becomes a SharedRow where kWhole.
template <bool kSplit, bool kWhole>
__device__ float bring_center(float* row, const float* shift, float scale, int steps, Share share, uint16_t* to) {
  float norm = 0;
#pragma unroll 2
  for (int k = 4 * share.own; k < kStepK * steps; k += 4 * share.sharers) {
    const Vector<float, 4> point = scaled(load_vector<4>(row + k), scale);
    if (kWhole) store_vector(row + k, point);
    norm += recentre<kSplit>(point, shift + k, to + k, to + kStepK * steps + k);
  }
  return norm * (1 / (kHalfUnits * kHalfUnits));
}

// ----------------------------------------------------------------------------------------------------------------
// A warp's queries times a tile of centers

// [16 queries][8 centers][a lane's share of the sums]: first products or -d2, then weights.
template <int kM, int kN>
using Pairs = float[kM][kN][4];

// The whole queries of a lane, rows g and g + 8 of each 16. Where kWhole they are in shared memory, and centers too, in
// the frame's scale: there is room for them in few dimensions, in which many bandwidths need them.
template <bool kWhole>
struct Queries {
  const float* first;  // the lane's own row, or the batch item's first
  int stride, l;
  int64_t from, last;  // the lane's first, and the last there is
  bool aligned;
  float scale;

  __device__ auto row(int i) const {
    if constexpr (kWhole) {
      return SharedRow{first + 8 * i * stride};
    } else {
      const int64_t query = from + 8 * i < last ? from + 8 * i : last;
      return GlobalRow{first + query * l, l, aligned, scale};
    }
  }
};

// pairs = q.c in units of float16.
template <bool kSplit, int kM, int kN>
__device__ void pairs_from_products(const HalfRows& queries, const HalfRows& centers, int steps, Pairs<kM, kN>& pairs) {
  const int lane = threadIdx.x % kWarp;
  const uint16_t* query = queries.row(lane % 16) + lane / 16 * 8;
  const uint16_t* center = centers.row(lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 8;
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[r][j][e] = 0;
    }
  }
#pragma unroll 2
  for (int step = 0; step < steps; ++step, query += kStepK, center += kStepK) {
    Fragment left[kM];
#pragma unroll
    for (int r = 0; r < kM; ++r) {
      load_matrices(left[r].big, query + kTileM * r * queries.stride);
      if (kSplit) load_matrices(left[r].small, query + kTileM * r * queries.stride + queries.small);
    }
#pragma unroll
    for (int j = 0; j < kN; j += 2) {
      Fragment right;
      load_matrices(right.big, center + kTileN * j * centers.stride);
      if (kSplit) load_matrices(right.small, center + kTileN * j * centers.stride + centers.small);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int b = 2 * half;
#pragma unroll
        for (int r = 0; r < kM; ++r) {
          float product[4];  // added by itself, since a sum in a tensor core is cut off, not rounded
          if constexpr (kSplit) {
            start_product(product, left[r].big, right.small[b], right.small[b + 1]);
            add_product(product, left[r].small, right.big[b], right.big[b + 1]);
            add_product(product, left[r].big, right.big[b], right.big[b + 1]);
          } else {
            start_product(product, left[r].big, right.big[b], right.big[b + 1]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) pairs[r][j + half][e] += product[e];
        }
      }
    }
  }
}

// pairs -= squares of kCount coordinates' differences.
template <int kCount, bool kWhole, int kM, int kN>
__device__ void subtract_squares(const Queries<kWhole>& queries, const float* centers, int stride, int k,
                                 Pairs<kM, kN>& pairs) {
  const int t = threadIdx.x % 4;
  Vector<float, kCount> query[2 * kM];
#pragma unroll
  for (int row = 0; row < 2 * kM; ++row) query[row] = queries.row(row).template load<kCount>(k);
#pragma unroll
  for (int n = 0; n < 2 * kN; ++n) {
    const int column = kTileN * (n / 2) + 2 * t + n % 2;
    Vector<float, kCount> center = load_vector<kCount>(centers + column * stride + k);
    if (!kWhole) center = scaled(center, queries.scale);
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) {
      float square = 0;
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        const float difference = query[row].at[v] - center.at[v];
        square = std::fma(difference, difference, square);
      }
      pairs[row / 2][n / 2][2 * (row % 2) + n % 2] -= square;
    }
  }
}

// pairs = -d2 from differences, of whole numbers.
template <bool kWhole, int kM, int kN>
__device__ void pairs_from_differences(const Queries<kWhole>& queries, const float* centers, int stride,
                                       Pairs<kM, kN>& pairs) {
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[r][j][e] = 0;
    }
  }
  int k = 0;
#pragma unroll 1
  for (; k + 2 < queries.l; k += 4) subtract_squares<4>(queries, centers, stride, k, pairs);
  if (k < queries.l) subtract_squares<2>(queries, centers, stride, k, pairs);
}

// total = total * factor + weights times centers, for all coordinates. The steps are unrolled, as the totals lie in
// registers.
template <bool kSplit, int kM, int kN, int kMostSteps>
__device__ void add_weighted_sums(const Pairs<kM, kN>& weights, const HalfRows& centers, int l,
                                  const float (&factor)[2 * kM], float (&total)[kM][2 * kMostSteps][4]) {
  const int lane = threadIdx.x % kWarp;
  const uint16_t* center = centers.row(lane % 16) + lane / 16 * 8;
  Fragment left[kM][kN / 2];
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[r][j / 2].set(2 * (j % 2) + half, split_in_parts(weights[r][j][2 * half], weights[r][j][2 * half + 1]));
      }
    }
  }
#pragma unroll
  for (int step = 0; step < kMostSteps; ++step) {
    if (kStepK * step >= l) break;
    Fragment right[kN / 2];
#pragma unroll
    for (int j = 0; j < kN / 2; ++j) {
      load_transposed(right[j].big, center + 16 * j * centers.stride + kStepK * step);
      if (kSplit) load_transposed(right[j].small, center + 16 * j * centers.stride + kStepK * step + centers.small);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && kStepK * step + kTileN >= l) break;
      const int b = 2 * half;
#pragma unroll
      for (int r = 0; r < kM; ++r) {
        float sums[4] = {};
#pragma unroll
        for (int j = 0; j < kN / 2; ++j) {
          if constexpr (kSplit) {
            add_product(sums, left[r][j].big, right[j].small[b], right[j].small[b + 1]);
            add_product(sums, left[r][j].small, right[j].big[b], right[j].big[b + 1]);
          }
        }
#pragma unroll
        for (int j = 0; j < kN / 2; ++j) add_product(sums, left[r][j].big, right[j].big[b], right[j].big[b + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& sum = total[r][2 * step + half][e];
          sum = std::fma(sum, factor[2 * r + e / 2], sums[e]);
        }
      }
    }
  }
}

// total = total * factor + weights times differences of centers and queries, or of centers and the shift where that is
// not null, for all coordinates. It is rare, so there is one copy of the step, and not one for each place of the
// totals.
template <bool kWhole, int kM, int kN, int kPlaces>
__device__ void add_weighted_differences(const Pairs<kM, kN>& weights, const Queries<kWhole>& queries,
                                         const float* shift, const float* centers, int stride,
                                         const float (&factor)[2 * kM], float (&total)[kM][kPlaces][4]) {
  const int lane = threadIdx.x % kWarp, t = lane % 4;
#pragma unroll 1
  for (int step = 0; kTileN * step < queries.l; ++step) {
    const int k = kTileN * step + 2 * t;
    float sums[kM][4] = {};
    Vector<float, 2> from[2 * kM];
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) {
      from[row] = shift != nullptr ? load_vector<2>(shift + k) : queries.row(row).template load<2>(k);
    }
#pragma unroll 1
    for (int other = 0; other < 4; ++other) {  // the lane of the four of a row that has the weights
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        const int center = kTileN * (n / 2) + 2 * other + n % 2;
        Vector<float, 2> point = load_vector<2>(centers + center * stride + k);
        if (!kWhole) point = scaled(point, queries.scale);
#pragma unroll
        for (int row = 0; row < 2 * kM; ++row) {
          const int half = 2 * (row % 2);
          const float weight = __shfl_sync(kAllLanes, weights[row / 2][n / 2][half + n % 2], lane - t + other);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = sums[row / 2][half + e];
            sum = std::fma(weight, point.at[e] - from[row].at[e], sum);
          }
        }
      }
    }
#pragma unroll
    for (int place = 0; place < kPlaces; ++place) {
      if (place != step) continue;
#pragma unroll
      for (int r = 0; r < kM; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[r][place][e] = std::fma(total[r][place][e], factor[2 * r + e / 2], sums[r][e] * kHalfUnits);
        }
      }
    }
  }
}

// Running sums of a thread's queries, rows g and g + 8 of each 16, over the centers that this thread has seen.
template <int kM>
struct RowSums {
  float max[2 * kM], sum[2 * kM], moment[2 * kM];
};

// What pairs are, and what the weights shall be.
struct Weighting {
  bool from_products;  // q.c in units of float16; else -d2
  bool per_center, with_moment;
  float gain;      // of a center with the bandwidth h0
  float exponent;  // weights are 2^exponent times as large
};

template <int kCount>
__device__ float largest(const float (&x)[kCount]) {
  float top[kCount / 2];
#pragma unroll
  for (int n = 0; n < kCount / 2; ++n) top[n] = std::fmax(x[n], x[n + kCount / 2]);
  if constexpr (kCount > 2) return largest(top);
  return top[0];
}

template <int kCount>
__device__ float sum_of(const float (&x)[kCount]) {
  float sum[kCount / 2];
#pragma unroll
  for (int n = 0; n < kCount / 2; ++n) sum[n] = x[n] + x[n + kCount / 2];
  if constexpr (kCount > 2) return sum_of(sum);
  return sum[0];
}

// Turns pairs into weights relative to the queries' new maxima; factor brings the old sums there. `exclude` are the
// excluded centers of the lane's rows, counted from the tile's first. Each step is done for all rows before the next
// one, so that a warp waits for several results at a time.
template <int kM, int kN>
__device__ void weights_from_pairs(const Column* columns, const Weighting& weighting, const float (&norms)[2 * kM],
                                   const int (&exclude)[2 * kM], Pairs<kM, kN>& pairs, RowSums<kM>& sums,
                                   float (&factor)[2 * kM]) {
  constexpr int kRows = 2 * kM, kColumns = 2 * kN;
  constexpr float kSquareUnits = kHalfUnits * kHalfUnits;
  const int t = threadIdx.x % 4;
  const bool from_products = weighting.from_products;
  const float unit = from_products ? 2 / kSquareUnits : 1.0f;  // of the pairs in an exponent, beside the gain
  const auto column_of = [&](int n) { return kTileN * (n / 2) + 2 * t + n % 2; };
  const auto at = [&](int row, int n) -> float& { return pairs[row / 2][n / 2][2 * (row % 2) + n % 2]; };

  float in_base[kRows];  // the query's own part of an exponent: all centers have it alike, so it is taken from the base
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    in_base[row] = from_products && !weighting.per_center ? norms[row] * weighting.gain : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const Column column = columns[column_of(n)];
    const float offset = from_products ? std::fma(-column.gain, column.norm, column.offset) : column.offset;
#pragma unroll
    for (int row = 0; row < kRows; ++row) at(row, n) = std::fma(column.gain * unit, at(row, n), offset);
    if (weighting.per_center && from_products) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) at(row, n) = std::fma(-column.gain, norms[row], at(row, n));
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (exclude[row] < 0 || exclude[row] >= kTileN * kN) continue;  // as in most tiles
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      if (exclude[row] == column_of(n)) at(row, n) = -INFINITY;
    }
  }

  float lowered[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float x[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) x[n] = at(row, n);
    lowered[row] = largest(x);
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float max = std::fmax(sums.max[row], max_over<4>(lowered[row]) - in_base[row]), base = exponent_base(max);
    factor[row] = fast_exp2(sums.max[row] - base);
    sums.max[row] = max;
    lowered[row] = base + in_base[row] - weighting.exponent;
  }

  const bool with_moment = weighting.with_moment && !weighting.per_center;
  if (with_moment) {  // d2 from the exponents, before they are gone; it may be infinite where the weight is 0
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float moment = 0;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const float x = at(row, n), weight = fast_exp2(x - lowered[row]);
        moment += weight == 0 ? 0.0f : weight * (columns[column_of(n)].offset - (x - in_base[row]));
      }
      sums.moment[row] = std::fma(sums.moment[row], factor[row], moment / weighting.gain);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float weights[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) weights[n] = at(row, n) = fast_exp2(at(row, n) - lowered[row]);
    sums.sum[row] = std::fma(sums.sum[row], factor[row], sum_of(weights));
  }
  if (weighting.per_center) {
    float moment[kRows] = {};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float precision = columns[column_of(n)].precision;
#pragma unroll
      for (int row = 0; row < kRows; ++row) moment[row] += at(row, n) *= precision;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      sums.moment[row] = std::fma(sums.moment[row], factor[row], moment[row]);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// The kernel

template <bool kSplit, int kMostSteps>
__global__ void __launch_bounds__(kWarp* resident_warps(kMostSteps))
    kde_tensor_kernel(const KdeMixture mixture, const float* middle, const ForwardPlan plan,
                      const Partials<float> partials) {
  constexpr int kM = tensor_m_tiles(kMostSteps), kCenters = tensor_centers(kMostSteps), kN = kCenters / kTileN;
  constexpr bool kWhole = has_whole_queries(kMostSteps);
  const TensorShape shape = {kMostSteps, kM, static_cast<int>(blockDim.x) / kWarp};
  const int rows = shape.queries();
  const auto [query_tile, group, split, batch, first_tile, end_tile] =
      block_share(plan, plan.query_tiles, plan.center_tiles);
  const int64_t first_query = query_tile * rows;

  const Item<float> item = batch_item(mixture, middle, batch);
  const Shared shared = {tensor_tile(shape, mixture.l)};
  const int l = static_cast<int>(mixture.l), steps = shared.at.steps;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(item.query) | reinterpret_cast<uintptr_t>(item.centers);
  const bool aligned = addresses % 16 == 0 && l % 4 == 0;
  const int sharers = static_cast<int>(blockDim.x) / kCenters, own_row = threadIdx.x / sharers;
  const Share share = {static_cast<int>(threadIdx.x) % sharers, sharers};
  // Beyond the last point the last one is taken once more: its weight will be 0, or nobody will read its results.
  const auto copy_centers = [&](int64_t tile, int turn) {
    const int64_t j = tile * kCenters + own_row < item.m ? tile * kCenters + own_row : item.m - 1;
    copy_row(item.centers + j * l, l, aligned, share, shared.staged<kCenters>(turn, own_row));
  };
  const auto query_row = [&](int row) {
    const int64_t i = first_query + row < item.n ? first_query + row : item.n - 1;
    return GlobalRow{item.query + i * l, l, aligned, item.scale};
  };

  copy_centers(first_tile, 0);
  for (int turn = 0; turn < 2; ++turn) clear_padding(l, steps, share, shared.staged<kCenters>(turn, own_row));
  bool is_moved = false;
  for (int k = threadIdx.x; k < kStepK * steps; k += blockDim.x) {
    shared.shift()[k] = shift_of(item, k) * item.scale;
    is_moved = is_moved || shared.shift()[k] != 0;
  }
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    const int64_t i = first_query + row;
    const int64_t exclude = item.exclude != nullptr && i < item.n ? item.exclude[i] : -1;
    shared.exclude()[row] = among(exclude, first_tile * kCenters, end_tile * kCenters);
  }
  const float norm_of_sums = most_parts_of_sums(item) / largest_gain(item);
  is_moved = __syncthreads_or(is_moved) != 0;
  if (is_moved) {
    bool is_far = false;
    for (int row = own_row; row < rows; row += kCenters) {
      const float own = share_of_norm(query_row(row), shared.shift(), steps, share);
      const float norm = over_sharers(own, sharers);
      is_far = is_far || norm > norm_of_sums;
    }
    if (__syncthreads_or(is_far) != 0) {
      for (int k = threadIdx.x; k < kStepK * steps; k += blockDim.x) shared.shift()[k] = 0;
      __syncthreads();
    }
  }
  for (int row = own_row; row < rows; row += kCenters) {
    const float norm = bring_query<kSplit>(query_row(row), shared.shift(), steps, share, shared.query(row),
                                           kWhole ? shared.whole_query(row) : nullptr);
    const float all = over_sharers(norm, sharers);
    if (share.own == 0) shared.query_norms()[row] = all;
  }
  __syncthreads();

  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarp * kTileM * kM;
  const int first_row = warp_row + g;  // of this thread's, which are 8 apart
  const Queries<kWhole> queries = {kWhole ? shared.whole_query(first_row) : item.query,
                                   shared.at.stride,
                                   l,
                                   first_query + first_row,
                                   item.n - 1,
                                   aligned,
                                   item.scale};
  const HalfRows query_halves = shared.rows_from(shared.query(warp_row));
  const bool with_moment = partials.moment != nullptr, with_sums = partials.sum_centers != nullptr;
  // Narrow centers have a larger factor, for which the weights leave room.
  const float narrow = item.h0 / item.least;
  const float room = item.per_center ? std::fmax(std::ceil(2 * std::log2(narrow)), 0.0f) : 0.0f;
  const bool has_room = room <= kWeightExponent;
  const float exponent = has_room ? kWeightExponent - room : 0.0f;
  float query_norms[2 * kM], largest_norm = 0, total[kM][2 * kMostSteps][4] = {};
  RowSums<kM> sums = {};
#pragma unroll
  for (int row = 0; row < 2 * kM; ++row) {
    query_norms[row] = shared.query_norms()[first_row + 8 * row];
    largest_norm = std::fmax(largest_norm, query_norms[row]);
    sums.max[row] = -INFINITY;
  }
  largest_norm = max_over<kWarp>(largest_norm);
  const bool near = largest_norm <= norm_of_sums;

  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int turn = static_cast<int>(tile - first_tile) % 2,
              first_center = static_cast<int>(tile - first_tile) * kCenters;
    Column* columns = shared.columns<kCenters>(turn);
    wait_for_copies();
    const float norm = bring_center<kSplit, kWhole>(shared.staged<kCenters>(turn, own_row), shared.shift(), item.scale,
                                                    steps, share, shared.center<kCenters>(turn, own_row));
    const float own_norm = over_sharers(norm, sharers);
    if (share.own == 0) {
      const CenterTerms<float> terms = center_terms(item, tile * kCenters + own_row);
      columns[own_row] = {terms.offset, terms.gain, terms.precision, own_norm};
    }
    __syncthreads();  // the tile is ready, and nobody is at the one before it
    if (tile + 1 < end_tile) copy_centers(tile + 1, 1 - turn);

    const HalfRows halves = shared.rows_from(shared.center<kCenters>(turn, 0));
    const float* staged = shared.staged<kCenters>(turn, 0);
    bool in_range = true, near_enough = true;  // for float16, and for products
#pragma unroll
    for (int column = lane % kCenters; column < kCenters; column += kWarp) {
      const float norms = largest_norm + columns[column].norm;
      in_range = in_range && norms <= kLargestNorm;
      near_enough = near_enough && columns[column].gain * norms <= plan.largest_parts;
    }
    in_range = __all_sync(kAllLanes, in_range);
    const bool from_products = in_range && __all_sync(kAllLanes, near_enough);
    Pairs<kM, kN> pairs;
    if (from_products) {
      pairs_from_products<kSplit>(query_halves, halves, kMostSteps == 1 ? 1 : steps, pairs);
    } else {
      pairs_from_differences(queries, staged, shared.at.stride, pairs);
    }
    int exclude[2 * kM];
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) exclude[row] = shared.exclude()[first_row + 8 * row] - first_center;
    float factor[2 * kM];
    const Weighting weighting = {from_products, item.per_center, with_moment, item.gain, exponent};
    weights_from_pairs<kM, kN>(columns, weighting, query_norms, exclude, pairs, sums, factor);
    if (!with_sums) continue;
    if (!near || !in_range || !has_room) {
      add_weighted_differences(pairs, queries, near ? shared.shift() : nullptr, staged, shared.at.stride, factor,
                               total);
    } else if (kSplit || from_products) {
      add_weighted_sums<kSplit, kM, kN, kMostSteps>(pairs, halves, l, factor, total);
    } else {
      add_weighted_sums<true, kM, kN, kMostSteps>(pairs, halves, l, factor, total);
    }
  }

  const float weight_unit = std::ldexp(1.0f, -static_cast<int>(exponent));
#pragma unroll
  for (int row = 0; row < 2 * kM; ++row) {
    const float sum = sum_over<4>(sums.sum[row]) * weight_unit, moment = sum_over<4>(sums.moment[row]) * weight_unit;
    const int64_t i = first_query + first_row + 8 * row;
    const int64_t at = (split * mixture.batch + batch) * item.n + i;
    if (i >= item.n) continue;
    if (t == 0) {
      partials.max[at] = sums.max[row];
      partials.sum[at] = sum;
      if (with_moment) partials.moment[at] = moment;
    }
    if (!with_sums) continue;
    // What the sums of centers have too much, where they are not those of differences.
    const float mass = item.per_center ? moment : sum;
#pragma unroll
    for (int place = 0; place < 2 * kMostSteps; ++place) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = kTileN * place + 2 * t + e;
        if (k >= l) continue;
        const float own = near ? (item.query[i * l + k] * item.scale - shared.shift()[k]) * mass : 0.0f;
        partials.sum_centers[at * l + k] = total[row / 2][place][2 * (row % 2) + e] * (weight_unit / kHalfUnits) - own;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// Launchers

using Kernel = void (*)(KdeMixture, const float*, ForwardPlan, Partials<float>);

template <bool kSplit>
Kernel kernel_of(TensorShape shape) {
  if (shape.most_steps == 1) return kde_tensor_kernel<kSplit, 1>;
  if (shape.most_steps == 4) return kde_tensor_kernel<kSplit, 4>;
  return shape.most_steps == 8 ? kde_tensor_kernel<kSplit, 8> : kde_tensor_kernel<kSplit, 16>;
}

Kernel kernel_of(const ForwardPlan& plan, bool split) {
  return split ? kernel_of<true>(plan.tensor) : kernel_of<false>(plan.tensor);
}

int bytes_of(const ForwardPlan& plan, int64_t l) { return tensor_tile(plan.tensor, l).bytes; }

}  // namespace

int tensor_resident(const ForwardPlan& plan, bool split, int64_t l, int device) {
  return resident_blocks(kernel_of(plan, split), plan.tensor.warps * kWarp, bytes_of(plan, l), device);
}

void launch_tensor(const KdeForward& args, const float* middle, const ForwardPlan& plan,
                   const Partials<float>& partials, cudaStream_t stream) {
  const bool split = args.products == KdeProducts::kSplit;
  launch("kde_tensor_kernel", kernel_of(plan, split), plan.blocks(args.mixture.batch), plan.tensor.warps * kWarp,
         bytes_of(plan, args.mixture.l), stream, args.mixture, middle, plan, partials);
}

}  // namespace cuda
}  // namespace kdejsd
