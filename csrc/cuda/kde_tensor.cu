// The forward pass of the kde op by tensor cores, for float32: distances and weighted sums from products of TF32
// numbers (mma_tf32.cuh), split with an error like float32's, or rounded.
//
// A block has a tile of queries, 16 or 32 for each of its warps, and goes through tiles of 32 or 16 centers:
//   1. scalar products of a warp's queries and the centers; -d2 up to a term of the center's, from them
//   2. weights 2^x, in the registers in which the products were
//   3. weighted sums of the centers, for which those registers are the left factor as they are
// A tile is summed by itself before it is added to the running sums, so long sums have two levels.
//
// The expanded square loses digits where norms are large beside the distance. Its parts in an exponent being
// gain (|q|^2 + |c|^2), the error of the exponent is at most
//   2^-17 of its parts, split: 2^-22 each product for what it leaves out and for the factors' last bit, 2^-24 each step
//         of a sum, of which one that is cut off has up to twelve;
//   2^-9 of its parts, TF32: 2^-11 for the rounding of each coordinate.
// Typical is a thirtieth of that, as roundings are of either sign. A warp takes a tile of centers from differences of
// coordinates, as the other kernels do, where the parts exceed `largest_parts`, and then its sums from split products
// in any case.
//
// A warp with a query that is far from the shift takes all its sums from differences, and its block has no shift: the
// rounding of what is moved would be that of points which are near each other and far from it.
//
// While a tile is worked on, the next one is copied as it is. Each thread then brings what it has copied itself into
// the frame, splits it, and puts it where all warps read it: in two places by turns, so that one barrier a tile is
// enough.
#include "cuda/kde_passes.h"
#include "cuda/mma_tf32.cuh"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kMostThreads = kTensorWarps[1] * kWarp;

static_assert(TensorShape{1, 1, 1}.queries() == kTileM && tensor_centers(1) % kTileN == 0,
              "what kde_plan.h counts with");

// Whether an instance has registers for 16 warps a multiprocessor; else for 8, which must then find in themselves what
// keeps a multiprocessor busy.
__host__ __device__ constexpr bool many_warps(int most_steps, int m_tiles) {
  return most_steps == 1 || (most_steps == 8 && m_tiles == 1);
}

// Of a center in shared memory.
struct alignas(16) Column {
  float offset, gain, precision;  // of CenterTerms
  float norm;                     // squared, of the numbers that the products take
};

// The block's shared memory.
struct Shared {
  TensorTile at;
  float* base = reinterpret_cast<float*>(dynamic_shared_memory());

  __device__ int* exclude() const { return reinterpret_cast<int*>(base + at.exclude); }
  __device__ float* query_norms() const { return base + at.query_norms; }
  __device__ float* shift() const { return base + at.shift; }
  __device__ float* query(int row) const { return base + at.queries + row * at.query_stride; }
  __device__ float* staged(int row) const { return base + at.staged + row * at.staged_stride; }
  template <int kCenters>
  __device__ Column* columns(int turn) const {
    return reinterpret_cast<Column*>(base + at.columns) + turn * kCenters;
  }
  template <int kCenters>
  __device__ float* centers(int turn) const {
    return base + at.centers + turn * (kCenters * at.center_stride + kBeyond);
  }
};

// ----------------------------------------------------------------------------------------------------------------
// Points on their way into shared memory. `sharers` threads bring a row, in vectors that each of them finds again.

struct Share {
  int own, sharers;
};

__device__ inline void copy_row(const float* from, int l, bool aligned, Share share, float* to) {
  for (int k = 4 * share.own; k < l; k += 4 * share.sharers) {
    if (aligned) {
      copy_async<16>(to + k, from + k);
    } else {
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

// A center in shared memory, k-step by k-step: its 8 numbers, or where products are split their 8 big parts and then
// the 8 small ones, so that no warp splits them again.
template <bool kInParts>
struct CenterRow {
  static constexpr int kStepWords = kInParts ? 2 * kStepK : kStepK;
  const float* row;

  // Where coordinate k lies, its small part 8 words behind.
  static __device__ int word_of(int k) { return kInParts ? 2 * k - k % kStepK : k; }

  // Coordinates k and k + 1 of a k-step, to be the factors of a product.
  template <bool kSplit>
  __device__ void load_two(int step, int k, Fragment<kSplit, 2>& fragment) const {
    const float* at = row + kStepWords * step + k;
    const Vector<float, 2> big = load_vector<2>(at);
    if constexpr (kInParts) {
      const Vector<float, 2> small = load_vector<2>(at + kStepK);
      fragment.set(0, Parts{big.at[0], small.at[0]});
      fragment.set(1, Parts{big.at[1], small.at[1]});
    } else {
      fragment.set(0, big.at[0]);
      fragment.set(1, big.at[1]);
    }
  }
  // Coordinate k of a k-step, to be factor i.
  template <bool kSplit>
  __device__ void load_one(int step, int k, int i, Fragment<kSplit, 2>& fragment) const {
    const float* at = row + kStepWords * step + k;
    if constexpr (kInParts) {
      fragment.set(i, Parts{at[0], at[kStepK]});
    } else {
      fragment.set(i, at[0]);
    }
  }
  // Coordinates from k on, of one k-step.
  template <int kCount>
  __device__ Vector<float, kCount> load(int k) const {
    const float* at = row + word_of(k);
    Vector<float, kCount> point = load_vector<kCount>(at);
    if constexpr (kInParts) {
      const Vector<float, kCount> small = load_vector<kCount>(at + kStepK);
#pragma unroll
      for (int e = 0; e < kCount; ++e) point.at[e] += small.at[e];
    }
    return point;
  }
};

// The tile of centers.
template <bool kInParts>
struct CenterRows {
  const float* first;
  int stride;

  __device__ CenterRow<kInParts> operator[](int row) const { return {first + row * stride}; }
};

// This thread's share of the squared norm that a row will have in the frame.
__device__ inline float share_of_norm(const float* row, const float* shift, float scale, int steps, Share share) {
  float norm = 0;
  for (int k = 4 * share.own; k < kStepK * steps; k += 4 * share.sharers) {
    for (int e = k; e < k + 4; ++e) {
      const float x = (row[e] - shift[e]) * scale;
      norm = std::fma(x, x, norm);
    }
  }
  return norm;
}

// Brings a row into the frame: as numbers, or where kInParts as their parts, as CenterRow has them. Returns this
// thread's share of the squared norm of the numbers that the products will take. A NaN counts as itself, which TF32
// products lose.
template <bool kSplit, bool kInParts>
__device__ float recentre_row(const float* row, const float* shift, float scale, int steps, Share share, float* to) {
  float norm = 0;
  for (int k = 4 * share.own; k < kStepK * steps; k += 4 * share.sharers) {
    Vector<float, 4> point = load_vector<4>(row + k);
    const Vector<float, 4> from = load_vector<4>(shift + k);
    float square = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      point.at[e] = (point.at[e] - from.at[e]) * scale;
      const float rounded = tf32_value(round_to_tf32(point.at[e]));
      const float factor = kSplit || point.at[e] != point.at[e] ? point.at[e] : rounded;
      square = std::fma(factor, factor, square);
    }
    norm += square;
    if constexpr (kInParts) {
      Vector<float, 4> small;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Parts parts = split_in_parts(point.at[e]);
        point.at[e] = parts.big;
        // inf - inf would be NaN; the norm is infinite too, so no product will take it.
        small.at[e] = std::fabs(parts.big) == INFINITY ? 0.0f : parts.small;
      }
      const int word = CenterRow<true>::word_of(k);
      store_vector(to + word, point);
      store_vector(to + word + kStepK, small);
    } else {
      store_vector(to + k, point);
    }
  }
  return norm;
}

// ----------------------------------------------------------------------------------------------------------------
// A warp's queries times a tile of centers

// [16 queries][8 centers][a lane's share of the sums]: first -d2 + |c|^2 or -d2, then weights.
template <int kM, int kN>
using Pairs = float[kM][kN][4];

// A lane's share of a k-step of the queries, rows g and g + 8 of each 16.
template <bool kSplit, int kM>
__device__ void load_queries(const float* queries, int stride, int step, Fragment<kSplit, 4> (&fragments)[kM]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* row = queries + (kTileM * r + 8 * half) * stride;
      const Vector<float, 2> two = load_vector<2>(row + kStepK * step + 2 * t);
      fragments[r].set(half, two.at[0]);
      fragments[r].set(half + 2, two.at[1]);
    }
  }
}

// pairs = 2 q.c - |q|^2. Columns of the products are coordinates 2 t and 2 t + 1 of a k-step in the places of t and
// t + 4, for queries and centers alike. `queries` is the lane's own row g.
template <bool kSplit, int kM, int kN>
__device__ void pairs_from_products(const float* queries, int query_stride, const float (&query_norms)[2 * kM],
                                    const CenterRows<kSplit>& centers, int steps, Pairs<kM, kN>& pairs) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  Accumulator<kSplit, kM * kN <= 2 ? 2 : 1> sums[kM][kN] = {};
#pragma unroll(kSplit ? 1 : 2)
  for (int step = 0; step < steps; ++step) {
    Fragment<kSplit, 4> query[kM];
    load_queries(queries, query_stride, step, query);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      Fragment<kSplit, 2> center;
      centers[kTileN * j + point_of_column(g)].load_two(step, 2 * t, center);
#pragma unroll
      for (int r = 0; r < kM; ++r) sums[r][j].add_product(query[r], center);
    }
  }
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[r][j][e] = std::fma(2.0f, sums[r][j].total(e), -query_norms[2 * r + e / 2]);
    }
  }
}

// pairs = -d2 from differences; `queries` as above.
template <bool kInParts, int kM, int kN>
__device__ void pairs_from_differences(const float* queries, int query_stride, const CenterRows<kInParts>& centers,
                                       int l, Pairs<kM, kN>& pairs) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[r][j][e] = 0;
    }
  }
#pragma unroll 1
  for (int k = 0; k < l; k += 4) {
    Vector<float, 4> query[2 * kM];
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) query[row] = load_vector<4>(queries + 8 * row * query_stride + k);
#pragma unroll
    for (int column = 0; column < 2 * kN; ++column) {
      const int j = column / 2;
      const Vector<float, 4> center = centers[kTileN * j + point_of_column(2 * t + column % 2)].template load<4>(k);
#pragma unroll
      for (int row = 0; row < 2 * kM; ++row) {
        float square = 0;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float difference = query[row].at[v] - center.at[v];
          square = std::fma(difference, difference, square);
        }
        pairs[row / 2][j][2 * (row % 2) + column % 2] -= square;
      }
    }
  }
}

// total = total * factor + weights times centers, for all coordinates. The steps are unrolled, as the totals lie in
// registers.
template <bool kSplit, bool kInParts, int kM, int kN, int kMostSteps>
__device__ void add_weighted_sums(const Pairs<kM, kN>& weights, const CenterRows<kInParts>& centers, int steps,
                                  const float (&factor)[2 * kM], float (&total)[kM][kMostSteps][4]) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  Fragment<kSplit, 4> left[kM][kN];
#pragma unroll
  for (int r = 0; r < kM; ++r) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      left[r][j].set(0, weights[r][j][0]);
      left[r][j].set(1, weights[r][j][2]);
      left[r][j].set(2, weights[r][j][1]);
      left[r][j].set(3, weights[r][j][3]);
    }
  }
  // The centers of a step are loaded while the step before is computed, and of one step too many.
  Fragment<kSplit, 2> right[2][kN];
  const auto load_right = [&](int step) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      centers[kTileN * j + point_of_column(2 * t)].load_one(step, g, 0, right[step % 2][j]);
      centers[kTileN * j + point_of_column(2 * t + 1)].load_one(step, g, 1, right[step % 2][j]);
    }
  };
  load_right(0);
#pragma unroll
  for (int step = 0; step < kMostSteps; ++step) {
    if (step >= steps) break;
    if (step + 1 < kMostSteps) load_right(step + 1);
    Accumulator<kSplit, many_warps(kMostSteps, kM) ? 1 : 2> sums[kM] = {};
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int r = 0; r < kM; ++r) sums[r].add_product(left[r][j], right[step % 2][j]);
    }
#pragma unroll
    for (int r = 0; r < kM; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[r][step][e] = std::fma(total[r][step][e], factor[2 * r + e / 2], sums[r].total(e));
      }
    }
  }
}

// total = total * factor + weights times differences of centers and queries, for all coordinates; `queries` as above.
// It is rare, so there is one copy of the step, and not one for each place of the totals.
template <bool kInParts, int kM, int kN, int kMostSteps>
__device__ void add_weighted_differences(const Pairs<kM, kN>& weights, const float* queries, int query_stride,
                                         const CenterRows<kInParts>& centers, int steps, const float (&factor)[2 * kM],
                                         float (&total)[kM][kMostSteps][4]) {
  const int lane = threadIdx.x % kWarp, t = lane % 4;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int k = kStepK * step + 2 * t;
    float sums[kM][4] = {};
    Vector<float, 2> query[2 * kM];
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) query[row] = load_vector<2>(queries + 8 * row * query_stride + k);
#pragma unroll 1
    for (int from = 0; from < 4; ++from) {  // the lane of the four of a row that has the weights
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        const int center = kTileN * (n / 2) + point_of_column(2 * from + n % 2);
        const Vector<float, 2> point = centers[center].template load<2>(k);
#pragma unroll
        for (int row = 0; row < 2 * kM; ++row) {
          const int half = 2 * (row % 2);
          const float weight = __shfl_sync(kAllLanes, weights[row / 2][n / 2][half + n % 2], lane - t + from);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& sum = sums[row / 2][half + e];
            sum = std::fma(weight, point.at[e] - query[row].at[e], sum);
          }
        }
      }
    }
#pragma unroll
    for (int place = 0; place < kMostSteps; ++place) {
      if (place != step) continue;
#pragma unroll
      for (int r = 0; r < kM; ++r) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[r][place][e] = std::fma(total[r][place][e], factor[2 * r + e / 2], sums[r][e]);
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

// Turns -d2, or -d2 + |c|^2, into weights relative to the queries' new maxima; factor brings the old sums there.
// `exclude` are the excluded centers of the lane's rows, counted from the tile's first.
template <int kM, int kN>
__device__ void weights_from_pairs(const Column* columns, bool from_products, bool per_center, bool with_moment,
                                   const int (&exclude)[2 * kM], Pairs<kM, kN>& pairs, RowSums<kM>& sums,
                                   float (&factor)[2 * kM]) {
  const int t = threadIdx.x % 4;
  const auto column_of = [&](int n) { return kTileN * (n / 2) + point_of_column(2 * t + n % 2); };
  float offset[2 * kN], gain[2 * kN];
#pragma unroll
  for (int n = 0; n < 2 * kN; ++n) {
    const Column column = columns[column_of(n)];
    gain[n] = column.gain;
    offset[n] = from_products ? std::fma(-column.gain, column.norm, column.offset) : column.offset;
  }
#pragma unroll
  for (int row = 0; row < 2 * kM; ++row) {
    float (&own)[kN][4] = pairs[row / 2];
    const int half = 2 * (row % 2);
    float x[2 * kN], top = -INFINITY;
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) x[n] = std::fma(gain[n], own[n / 2][half + n % 2], offset[n]);
    if (exclude[row] >= 0 && exclude[row] < kTileN * kN) {  // of few tiles
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        if (exclude[row] == column_of(n)) x[n] = -INFINITY;
      }
    }
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) top = std::fmax(top, x[n]);
    const float max = std::fmax(sums.max[row], max_over<4>(top)), base = exponent_base(max);
    factor[row] = fast_exp2(sums.max[row] - base);
    sums.max[row] = max;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) {
      x[n] = fast_exp2(x[n] - base);
      sum += x[n];
    }
    sums.sum[row] = std::fma(sums.sum[row], factor[row], sum);
    if (per_center) {
      float moment = 0;
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        x[n] *= columns[column_of(n)].precision;
        moment += x[n];
      }
      sums.moment[row] = std::fma(sums.moment[row], factor[row], moment);
    } else if (with_moment) {
      float moment = 0;
#pragma unroll
      for (int n = 0; n < 2 * kN; ++n) {
        const float pair = own[n / 2][half + n % 2];
        const float d2 = from_products ? columns[column_of(n)].norm - pair : -pair;
        moment += x[n] == 0 ? 0.0f : x[n] * d2;  // d2 may be infinite where the weight is 0
      }
      sums.moment[row] = std::fma(sums.moment[row], factor[row], moment);
    }
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) own[n / 2][half + n % 2] = x[n];
  }
}

// ----------------------------------------------------------------------------------------------------------------
// The kernel

template <bool kSplit, int kMostSteps, int kM>
__global__ void __launch_bounds__(kMostThreads, many_warps(kMostSteps, kM) ? 2 : 1)
    kde_tensor_kernel(const KdeMixture mixture, const float* middle, const ForwardPlan plan,
                      const Partials<float> partials) {
  constexpr int kCenters = tensor_centers(kMostSteps), kN = kCenters / kTileN;
  const TensorShape shape = {kMostSteps, kM, static_cast<int>(blockDim.x) / kWarp};
  const int rows = shape.queries();
  const auto [query_tile, group, split, batch, first_tile, end_tile] =
      block_share(plan, plan.query_tiles, plan.center_tiles);
  const int64_t first_query = query_tile * rows;

  const Item<float> item = batch_item(mixture, middle, batch);
  const Shared shared = {tensor_tile(shape, kSplit, mixture.l)};
  const int l = static_cast<int>(mixture.l), steps = shared.at.steps;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(item.query) | reinterpret_cast<uintptr_t>(item.centers);
  const bool aligned = addresses % 16 == 0 && l % 4 == 0;
  const int sharers = static_cast<int>(blockDim.x) / kCenters, own_row = threadIdx.x / sharers;
  const Share share = {static_cast<int>(threadIdx.x) % sharers, sharers};
  // Beyond the last point the last one is copied once more: its weight will be 0, or nobody will read its results.
  const auto copy_centers = [&](int64_t tile) {
    const int64_t j = tile * kCenters + own_row < item.m ? tile * kCenters + own_row : item.m - 1;
    copy_row(item.centers + j * l, l, aligned, share, shared.staged(own_row));
  };

  copy_centers(first_tile);
  for (int row = own_row; row < rows; row += kCenters) {
    const int64_t i = first_query + row < item.n ? first_query + row : item.n - 1;
    copy_row(item.query + i * l, l, aligned, share, shared.query(row));
    clear_padding(l, steps, share, shared.query(row));
  }
  clear_padding(l, steps, share, shared.staged(own_row));
  bool is_moved = false;
  for (int k = threadIdx.x; k < kStepK * steps; k += blockDim.x) {
    shared.shift()[k] = shift_of(item, k);
    is_moved = is_moved || shared.shift()[k] != 0;
  }
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    const int64_t i = first_query + row;
    const int64_t exclude = item.exclude != nullptr && i < item.n ? item.exclude[i] : -1;
    shared.exclude()[row] = among(exclude, first_tile * kCenters, end_tile * kCenters);
  }
  const float norm_of_sums = most_parts_of_sums(item) / largest_gain(item);
  is_moved = __syncthreads_or(is_moved) != 0;
  wait_for_copies();
  if (is_moved) {
    bool is_far = false;
    for (int row = own_row; row < rows; row += kCenters) {
      const float own = share_of_norm(shared.query(row), shared.shift(), item.scale, steps, share);
      const float norm = over_sharers(own, sharers);
      is_far = is_far || norm > norm_of_sums;
    }
    if (__syncthreads_or(is_far) != 0) {
      for (int k = threadIdx.x; k < kStepK * steps; k += blockDim.x) shared.shift()[k] = 0;
      __syncthreads();
    }
  }
  for (int row = own_row; row < rows; row += kCenters) {
    float* query = shared.query(row);
    const float norm = recentre_row<kSplit, false>(query, shared.shift(), item.scale, steps, share, query);
    const float all = over_sharers(norm, sharers);
    if (share.own == 0) shared.query_norms()[row] = all;
  }
  __syncthreads();

  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int first_row = static_cast<int>(threadIdx.x) / kWarp * kTileM * kM + g;  // of this thread's, which are 8 apart
  const float* queries = shared.query(first_row);
  const int query_stride = shared.at.query_stride, center_stride = shared.at.center_stride;
  const bool with_moment = partials.moment != nullptr, with_sums = partials.sum_centers != nullptr;
  float query_norms[2 * kM], largest_norm = 0, total[kM][kMostSteps][4] = {};
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
    float* first_row_of_centers = shared.centers<kCenters>(turn);
    wait_for_copies();
    const float norm = recentre_row<kSplit, kSplit>(shared.staged(own_row), shared.shift(), item.scale, steps, share,
                                                    first_row_of_centers + own_row * center_stride);
    const float own_norm = over_sharers(norm, sharers);
    if (share.own == 0) {
      const CenterTerms<float> terms = center_terms(item, tile * kCenters + own_row);
      columns[own_row] = {terms.offset, terms.gain, terms.precision, own_norm};
    }
    __syncthreads();  // the tile is ready, and nobody is at the one before it
    if (tile + 1 < end_tile) copy_centers(tile + 1);

    const CenterRows<kSplit> centers = {first_row_of_centers, center_stride};
    const Column& one = columns[lane % kCenters];
    const bool from_products = __all_sync(kAllLanes, one.gain * (largest_norm + one.norm) <= plan.largest_parts);
    Pairs<kM, kN> pairs;
    if (from_products) {
      pairs_from_products(queries, query_stride, query_norms, centers, kMostSteps == 1 ? 1 : steps, pairs);
    } else {
      pairs_from_differences(queries, query_stride, centers, l, pairs);
    }
    int exclude[2 * kM];
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) exclude[row] = shared.exclude()[first_row + 8 * row] - first_center;
    float factor[2 * kM];
    weights_from_pairs<kM, kN>(columns, from_products, item.per_center, with_moment, exclude, pairs, sums, factor);
    if (!with_sums) continue;
    if (!near) {
      add_weighted_differences(pairs, queries, query_stride, centers, steps, factor, total);
    } else if (kSplit || from_products) {
      add_weighted_sums<kSplit>(pairs, centers, steps, factor, total);
    } else {
      add_weighted_sums<true>(pairs, centers, steps, factor, total);
    }
  }

#pragma unroll
  for (int row = 0; row < 2 * kM; ++row) {
    const float sum = sum_over<4>(sums.sum[row]), moment = sum_over<4>(sums.moment[row]);
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
    for (int step = 0; step < kMostSteps; ++step) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = kStepK * step + 2 * t + e;
        if (k >= l) continue;
        const float own = near ? queries[8 * row * query_stride + k] * mass : 0.0f;
        partials.sum_centers[at * l + k] = total[row / 2][step][2 * (row % 2) + e] - own;
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// Launchers

using Kernel = void (*)(KdeMixture, const float*, ForwardPlan, Partials<float>);

template <bool kSplit>
Kernel kernel_of(TensorShape shape) {
  if (shape.most_steps == 1) return kde_tensor_kernel<kSplit, 1, 2>;
  if (shape.most_steps == 8)
    return shape.m_tiles == 2 ? kde_tensor_kernel<kSplit, 8, 2> : kde_tensor_kernel<kSplit, 8, 1>;
  return shape.most_steps == 16 ? kde_tensor_kernel<kSplit, 16, 1> : kde_tensor_kernel<kSplit, 32, 1>;
}

Kernel kernel_of(const ForwardPlan& plan, bool split) {
  return split ? kernel_of<true>(plan.tensor) : kernel_of<false>(plan.tensor);
}

int bytes_of(const ForwardPlan& plan, bool split, int64_t l) { return tensor_tile(plan.tensor, split, l).bytes; }

}  // namespace

int tensor_resident(const ForwardPlan& plan, bool split, int64_t l, int device) {
  return resident_blocks(kernel_of(plan, split), plan.tensor.warps * kWarp, bytes_of(plan, split, l), device);
}

void launch_tensor(const KdeForward& args, const float* middle, const ForwardPlan& plan,
                   const Partials<float>& partials, cudaStream_t stream) {
  const bool split = args.products == KdeProducts::kSplit;
  launch("kde_tensor_kernel", kernel_of(plan, split), plan.blocks(args.mixture.batch), plan.tensor.warps * kWarp,
         bytes_of(plan, split, args.mixture.l), stream, args.mixture, middle, plan, partials);
}

}  // namespace cuda
}  // namespace kdejsd
