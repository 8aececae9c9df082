// The forward pass of the kde op by tensor cores: float32 points, distances and weighted sums from products of TF32
// numbers. "Split" takes each float32 number as the sum of two and three of the four products, with an error like
// float32's; otherwise numbers are rounded to TF32, 11 bits.
//
// Blocks of kWarps warps work on a tile of queries times a tile of centers; a warp has 16 kRows queries, and takes the
// centers in pieces of kPiece:
//   1. scalar products, |q|^2 + |c|^2 - 2 q.c from them
//   2. weights 2^x, in the registers in which the scalar products were
//   3. weighted sums of the centers, for which those registers are the left factor as they are
// A piece is summed by itself before it is added to the running sums, so long sums have two levels.
//
// The lane (g, t) = (lane / 4, lane % 4) gets the sums of columns 2 t and 2 t + 1 from the first product, and must
// bring rows t and t + 4 of the right factor to the second; both orders being free, column n of eight stands for center
// permuted(n), for which the lanes' reads of shared memory meet no bank twice in either product.
//
// The expanded square loses digits where norms are large beside the distance. Its parts in an exponent being
// gain (|q|^2 + |c|^2), the error of the exponent is at most
//   2^-17 of its parts, split: 2^-22 each product for what it leaves out and for the factors' last bit, 2^-24 each step
//         of a sum, of which one that is cut off has up to twelve;
//   2^-9 of its parts, TF32: 2^-11 for the rounding of each coordinate.
// Typical is a thirtieth of that, as roundings are of either sign. A warp takes a piece of centers from differences of
// coordinates, as the other kernels do, where the parts exceed `largest_parts`, and then its sums from split products
// in any case.
//
// While a tile is worked on, the next one is copied. Each thread puts what it has copied itself into the frame.
#pragma once

#include "cuda/kde_mixture.cuh"
#include "cuda/ptx.cuh"

namespace kdejsd {
namespace cuda {
namespace {
namespace tensor {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kEight = 8;    // columns of a product, and terms of its sums
constexpr int kPiece = 32;   // centers
constexpr int kLoaders = 4;  // threads that load a point
constexpr int kBlocksPerMultiprocessor = 2;

// Widths are the most coordinates that a kernel takes, in eights. Many leave registers for half as many queries, and
// shared memory for fewer centers.
__host__ __device__ constexpr int rows_of(int width) { return width <= 8 ? 2 : 1; }  // tiles of 16 queries in a warp
__host__ __device__ constexpr int queries_of(int width) { return kWarps * 16 * rows_of(width); }
__host__ __device__ constexpr int centers_of(int width) { return width <= 8 ? 2 * kPiece : kPiece; }

// What a block has in shared memory, followed by its points.
template <int kWidth>
struct alignas(16) Tile {
  static constexpr int kQueries = queries_of(kWidth), kCenters = centers_of(kWidth);
  struct alignas(8) Column {
    float offset, gain;  // of CenterTerms
  };
  Item<float> item;
  int steps;   // coordinates in eights
  int stride;  // from one point to the next
  bool aligned;
  float shift[kWidth * kEight];
  float query_norms[kQueries];
  int64_t exclude[kQueries];
  // Of the two tiles of centers that are present at a time.
  float norms[2][kCenters];
  Column columns[2][kCenters];
  float precisions[2][kCenters];

  __device__ float* queries() { return reinterpret_cast<float*>(this + 1); }
  __device__ float* centers(int buffer) { return queries() + (kQueries + buffer * kCenters) * stride; }
};

// An odd multiple of eight: four neighbouring points, eight coordinates of each, lie in different banks.
__host__ __device__ constexpr int stride_of(int steps) { return kEight * (steps + (steps % 2 == 0 ? 1 : 0)); }

// ----------------------------------------------------------------------------------------------------------------
// Points

// The threads kLoaders i ... of the block load row i, in vectors that each of them finds again.
template <int kCount, typename Function>
__device__ void for_own_rows(const Function& function) {
#pragma unroll 1
  for (int row = threadIdx.x / kLoaders; row < kCount; row += kThreads / kLoaders) function(row);
}

template <int kCount, int kWidth>
__device__ void copy_rows(const Tile<kWidth>& tile, const float* points, int64_t first, int64_t count, float* to) {
  const int l = static_cast<int>(tile.item.l);
  for_own_rows<kCount>([&](int row) {
    if (first + row >= count) return;
    const float* from = points + (first + row) * l;
    for (int k = 4 * (threadIdx.x % kLoaders); k < l; k += 4 * kLoaders) {
      float* at = to + row * tile.stride + k;
      if (tile.aligned) {
        copy_async<16>(at, from + k);
      } else {
        for (int e = k; e < k + 4 && e < l; ++e) copy_async<4>(to + row * tile.stride + e, from + e);
      }
    }
  });
}

__device__ inline uint32_t round_to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

// Brings the points that this thread has copied into the frame, with zeros where there are none, and writes the squared
// norms of the numbers that the products will take.
template <bool kSplit, int kCount, int kWidth>
__device__ void recentre_rows(const Tile<kWidth>& tile, int64_t first, int64_t count, float* points, float* norms) {
  const int l = static_cast<int>(tile.item.l);
  for_own_rows<kCount>([&](int row) {
    const bool inside = first + row < count;
    float norm = 0;
    for (int k = 4 * (threadIdx.x % kLoaders); k < kEight * tile.steps; k += 4 * kLoaders) {
      float* at = points + row * tile.stride + k;
      Vector<float, 4> point = load_vector<4>(at);
      float square = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        point.at[e] = inside && k + e < l ? (point.at[e] - tile.shift[k + e]) * tile.item.scale : 0.0f;
        const float factor = kSplit ? point.at[e] : __uint_as_float(round_to_tf32(point.at[e]));
        square = std::fma(factor, factor, square);
      }
      *reinterpret_cast<Vector<float, 4>*>(at) = point;
      norm += square;
    }
    norm = sum_over<kLoaders>(norm);
    if (threadIdx.x % kLoaders == 0) norms[row] = norm;
  });
}

// ----------------------------------------------------------------------------------------------------------------
// Products

// Numbers as factors of a product; where they are split, number = big + small to 24 bits.
template <bool kSplit, int kCount>
struct Factors {
  uint32_t big[kCount], small[kSplit ? kCount : 1];

  __device__ void set(int i, float x) {
    big[i] = round_to_tf32(x);
    if constexpr (kSplit) small[i] = __float_as_uint(x - __uint_as_float(big[i]));
  }
};

// A sum of products of 16 x 8 numbers. Split, each product of the big parts is added by itself, since a sum in a tensor
// core is cut off, not rounded; the others are so small that this does no harm.
template <bool kSplit>
struct Sum {
  float big[4], small[kSplit ? 4 : 1];

  __device__ void add_product(const Factors<kSplit, 4>& a, const Factors<kSplit, 2>& b) {
    if constexpr (kSplit) {
      float product[4] = {};
      add_product_tf32(product, a.big, b.big);
      add_product_tf32(small, a.big, b.small);
      add_product_tf32(small, a.small, b.big);
#pragma unroll
      for (int e = 0; e < 4; ++e) big[e] += product[e];
    } else {
      add_product_tf32(big, a.big, b.big);
    }
  }
  __device__ float total(int i) const {
    if constexpr (kSplit) return big[i] + small[i];
    return big[i];
  }
};

// Which of eight centers stands in column n of a product.
__device__ inline int permuted(int n) { return (n & 4) | (((n ^ (n >> 2)) & 1) << 1) | ((n >> 1) & 1); }

// The pairs of a warp's queries and a piece of centers: [16 queries][8 centers][as add_product_tf32 has its sums].
template <int kRows>
using Pairs = float[kRows][kPiece / kEight][4];

// Of queries (g and g + 8 of each 16) and centers (permuted(g) of each 8): both pointers are the lane's own.
template <bool kSplit, int kWidth>
__device__ void squares_from_products(const float* queries, const float* query_norms, const float* centers,
                                      const float* norms, int stride, int steps, Pairs<rows_of(kWidth)>& squares) {
  constexpr int kRows = rows_of(kWidth), kEights = kPiece / kEight;
  const int t = threadIdx.x % 4;
  Sum<kSplit> sums[kRows][kEights] = {};
#pragma unroll(kSplit ? 1 : 2)
  for (int step = 0; step < steps; ++step) {
    Factors<kSplit, 4> query[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vector<float, 2> two = load_vector<2>(queries + (16 * r + 8 * half) * stride + kEight * step + 2 * t);
        query[r].set(half, two.at[0]);
        query[r].set(half + 2, two.at[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const Vector<float, 2> two = load_vector<2>(centers + kEight * j * stride + kEight * step + 2 * t);
      Factors<kSplit, 2> center;
      center.set(0, two.at[0]);
      center.set(1, two.at[1]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r][j].add_product(query[r], center);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float norm = query_norms[2 * r + e / 2] + norms[kEight * j + permuted(2 * t + e % 2)];
        squares[r][j][e] = std::fma(-2.0f, sums[r][j].total(e), norm);
      }
    }
  }
}

// The same from differences: `queries` as above, `centers` those of the piece.
template <int kRows>
__device__ void squares_from_differences(const float* queries, const float* centers, int stride, int width,
                                         Pairs<kRows>& squares) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kPiece / kEight; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) squares[r][j][e] = 0;
    }
  }
#pragma unroll 1
  for (int k = 0; k < width; k += 4) {
    Vector<float, 4> query[2 * kRows];
#pragma unroll
    for (int row = 0; row < 2 * kRows; ++row) query[row] = load_vector<4>(queries + 8 * row * stride + k);
#pragma unroll
    for (int column = 0; column < kPiece / 4; ++column) {
      const int j = column / 2;
      const Vector<float, 4> center =
          load_vector<4>(centers + (kEight * j + permuted(2 * t + column % 2)) * stride + k);
#pragma unroll
      for (int row = 0; row < 2 * kRows; ++row) {
        float square = 0;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float difference = query[row].at[v] - center.at[v];
          square = std::fma(difference, difference, square);
        }
        squares[row / 2][j][2 * (row % 2) + column % 2] += square;
      }
    }
  }
}

// total = total * factor + weights times centers, for all coordinates; `centers` are those of the piece.
template <bool kSplit, int kWidth>
__device__ void add_weighted_sums(const Pairs<rows_of(kWidth)>& weights, const float* centers, int stride, int steps,
                                  const float (&factor)[2 * rows_of(kWidth)],
                                  float (&total)[rows_of(kWidth)][kWidth][4]) {
  constexpr int kRows = rows_of(kWidth), kEights = kPiece / kEight;
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  Factors<kSplit, 4> left[kRows][kEights];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      left[r][j].set(0, weights[r][j][0]);
      left[r][j].set(1, weights[r][j][2]);
      left[r][j].set(2, weights[r][j][1]);
      left[r][j].set(3, weights[r][j][3]);
    }
  }
  const float* even = centers + permuted(2 * t) * stride + g;
  const float* odd = centers + permuted(2 * t + 1) * stride + g;
#pragma unroll
  for (int step = 0; step < kWidth; ++step) {
    if (step >= steps) break;
    Sum<kSplit> sums[kRows] = {};
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      Factors<kSplit, 2> right;
      right.set(0, even[kEight * (j * stride + step)]);
      right.set(1, odd[kEight * (j * stride + step)]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r].add_product(left[r][j], right);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        total[r][step][e] = std::fma(total[r][step][e], factor[2 * r + e / 2], sums[r].total(e));
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// The kernel

// Running sums of a thread's queries, over the centers that this thread has seen.
template <int kRows>
struct RowSums {
  float max[2 * kRows], sum[2 * kRows], moment[2 * kRows];
};

// Turns squared distances into weights relative to the queries' new maxima; factor brings the old sums there. `column`
// is the first of the piece in its tile, `first_center` the index of its center.
template <int kWidth>
__device__ void weights_from_squares(const Tile<kWidth>& tile, int buffer, int column, int64_t first_center,
                                     int first_row, bool with_moment, Pairs<rows_of(kWidth)>& pairs,
                                     RowSums<rows_of(kWidth)>& sums, float (&factor)[2 * rows_of(kWidth)]) {
  constexpr int kOwn = kPiece / 4;  // centers of a thread
  const int t = threadIdx.x % 4;
  typename Tile<kWidth>::Column terms[kOwn];
#pragma unroll
  for (int n = 0; n < kOwn; ++n) {
    terms[n] = tile.columns[buffer][column + kEight * (n / 2) + permuted(2 * t + n % 2)];
  }
#pragma unroll
  for (int row = 0; row < 2 * rows_of(kWidth); ++row) {
    float (&own)[kPiece / kEight][4] = pairs[row / 2];
    const int half = 2 * (row % 2);
    const bool excluding = tile.item.exclude != nullptr;
    const int64_t excluded = excluding ? tile.exclude[first_row + 8 * row] - first_center : -1;
    float x[kOwn], top = -INFINITY;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      x[n] = std::fma(-terms[n].gain, own[n / 2][half + n % 2], terms[n].offset);
      if (excluding && excluded == kEight * (n / 2) + permuted(2 * t + n % 2)) x[n] = -INFINITY;
      top = std::fmax(top, x[n]);
    }
    const float max = std::fmax(sums.max[row], max_over<4>(top)), base = exponent_base(max);
    factor[row] = rescale_factor(sums.max[row], max);
    float sum = 0, moment = 0;
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      float& pair = own[n / 2][half + n % 2];
      float weight = fast_exp2(x[n] - base);
      sum += weight;
      if (tile.item.per_center) {
        weight *= tile.precisions[buffer][column + kEight * (n / 2) + permuted(2 * t + n % 2)];
        moment += weight;
      } else if (with_moment) {
        moment += weight == 0 ? 0.0f : weight * pair;  // d2 may be infinite where the weight is 0
      }
      pair = weight;
    }
    sums.max[row] = max;
    sums.sum[row] = std::fma(sums.sum[row], factor[row], sum);
    sums.moment[row] = std::fma(sums.moment[row], factor[row], moment);
  }
}

template <int kWidth>
__device__ void load_columns(Tile<kWidth>& tile, int buffer, int64_t first) {
  if (threadIdx.x >= centers_of(kWidth)) return;
  const CenterTerms<float> terms = center_terms(tile.item, first + threadIdx.x);
  tile.columns[buffer][threadIdx.x] = {terms.offset, terms.gain};
  tile.precisions[buffer][threadIdx.x] = terms.precision;
}

template <bool kSplit, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    kde_tensor_kernel(const KdeMixture mixture, const float* middle, const ForwardPlan plan,
                      const Partials<float> partials) {
  constexpr int kRows = rows_of(kWidth), kQueries = queries_of(kWidth), kCenters = centers_of(kWidth);
  // Neighbouring blocks read the same centers at the same time.
  const int64_t query_tile = blockIdx.x % plan.query_tiles, rest = blockIdx.x / plan.query_tiles;
  const int64_t split = rest % plan.splits, batch = rest / plan.splits;
  const int64_t first_query = query_tile * kQueries;
  const int64_t first_tile = split * plan.tiles_per_split;
  const int64_t end_tile =
      first_tile + plan.tiles_per_split < plan.center_tiles ? first_tile + plan.tiles_per_split : plan.center_tiles;

  Tile<kWidth>& tile = *reinterpret_cast<Tile<kWidth>*>(dynamic_shared_memory());
  const Item<float>& item = tile.item;
  if (threadIdx.x == 0) {
    tile.item = batch_item(mixture, middle, batch);
    tile.steps = static_cast<int>(ceil_div(item.l, kEight));
    tile.stride = stride_of(tile.steps);
    const uintptr_t addresses = reinterpret_cast<uintptr_t>(item.query) | reinterpret_cast<uintptr_t>(item.centers);
    tile.aligned = addresses % 16 == 0 && item.l % 4 == 0;
  }
  __syncthreads();
  copy_rows<kQueries>(tile, item.query, first_query, item.n, tile.queries());
  copy_rows<kCenters>(tile, item.centers, first_tile * kCenters, item.m, tile.centers(0));
  for (int k = threadIdx.x; k < kEight * tile.steps; k += kThreads) tile.shift[k] = shift_of(item, k);
  for (int row = threadIdx.x; row < kQueries; row += kThreads) {
    tile.exclude[row] = item.exclude != nullptr && first_query + row < item.n ? item.exclude[first_query + row] : -1;
  }
  __syncthreads();
  wait_for_copies();
  recentre_rows<kSplit, kQueries>(tile, first_query, item.n, tile.queries(), tile.query_norms);
  __syncthreads();

  const int steps = tile.steps, stride = tile.stride, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int first_row = threadIdx.x / kWarp * 16 * kRows + g;  // of this thread's rows, which are 8 apart
  const float* queries = tile.queries() + first_row * stride;
  const bool with_moment = partials.moment != nullptr, with_sums = partials.sum_centers != nullptr;
  float query_norms[2 * kRows], largest_norm = 0, total[kRows][kWidth][4] = {};
  RowSums<kRows> sums = {};
#pragma unroll
  for (int row = 0; row < 2 * kRows; ++row) {
    query_norms[row] = tile.query_norms[first_row + 8 * row];
    largest_norm = std::fmax(largest_norm, query_norms[row]);
    sums.max[row] = -INFINITY;
  }
  largest_norm = max_over<kWarp>(largest_norm);

  for (int64_t center_tile = first_tile; center_tile < end_tile; ++center_tile) {
    const int buffer = static_cast<int>((center_tile - first_tile) % 2);
    wait_for_copies();
    recentre_rows<kSplit, kCenters>(tile, center_tile * kCenters, item.m, tile.centers(buffer), tile.norms[buffer]);
    load_columns(tile, buffer, center_tile * kCenters);
    __syncthreads();  // the tile is ready, and nobody is at the one before it
    if (center_tile + 1 < end_tile) {
      copy_rows<kCenters>(tile, item.centers, (center_tile + 1) * kCenters, item.m, tile.centers(1 - buffer));
    }
#pragma unroll 1
    for (int column = 0; column < kCenters; column += kPiece) {
      const float* centers = tile.centers(buffer) + column * stride;
      const float* norms = tile.norms[buffer] + column;
      const float parts = tile.columns[buffer][column + lane].gain * (largest_norm + norms[lane]);
      Pairs<kRows> pairs;
      const bool from_products = __all_sync(kAllLanes, parts <= plan.largest_parts);
      if (from_products) {
        squares_from_products<kSplit, kWidth>(queries, query_norms, centers + permuted(g) * stride, norms, stride,
                                              steps, pairs);
      } else {
        squares_from_differences<kRows>(queries, centers, stride, kEight * steps, pairs);
      }
      float factor[2 * kRows];
      weights_from_squares(tile, buffer, column, center_tile * kCenters + column, first_row, with_moment, pairs, sums,
                           factor);
      if (!with_sums) continue;
      if (kSplit || !from_products) {
        add_weighted_sums<true, kWidth>(pairs, centers, stride, steps, factor, total);
      } else {
        add_weighted_sums<false, kWidth>(pairs, centers, stride, steps, factor, total);
      }
    }
  }

#pragma unroll
  for (int row = 0; row < 2 * kRows; ++row) {
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
#pragma unroll
    for (int step = 0; step < kWidth; ++step) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = kEight * step + 2 * t + e;
        if (k < item.l) partials.sum_centers[at * item.l + k] = total[row / 2][step][2 * (row % 2) + e];
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// The kernel's place in a forward pass

using Kernel = void (*)(KdeMixture, const float*, ForwardPlan, Partials<float>);

inline Kernel kernel(int width, bool split) {
  if (split) {
    return width == 8    ? kde_tensor_kernel<true, 8>
           : width == 16 ? kde_tensor_kernel<true, 16>
                         : kde_tensor_kernel<true, 32>;
  }
  return width == 8    ? kde_tensor_kernel<false, 8>
         : width == 16 ? kde_tensor_kernel<false, 16>
                       : kde_tensor_kernel<false, 32>;
}

inline int shared_bytes(int width, int64_t l) {
  const size_t tile = width == 8 ? sizeof(Tile<8>) : width == 16 ? sizeof(Tile<16>) : sizeof(Tile<32>);
  const int points = queries_of(width) + 2 * centers_of(width);
  return static_cast<int>(tile + sizeof(float) * points * stride_of(static_cast<int>(ceil_div(l, kEight))));
}

// The kernel's width for a call; 0: the other kernels do it. Below l = 16 the exponentials are most of the work, and
// the products' padding is much.
inline int width_for(const KdeForward& args, int device) {
  const KdeMixture& mixture = args.mixture;
  if (args.products == KdeProducts::kNone || mixture.dtype != DType::kFloat32 || mixture.l < 16) return 0;
  for (const int width : {8, 16, 32}) {
    if (mixture.l > width * kEight) continue;
    return shared_bytes(width, mixture.l) <= most_shared_bytes(device) ? width : 0;
  }
  return 0;
}

// The parts of an exponent up to which pairs are taken from products. They are 1.4 l / h^2 for points of variance 1, so
// this leaves products to bandwidths from 0.35 on, with errors that grow with l as the values and their rounding do.
// With TF32 the error of an exponent is 1 at the worst.
inline float largest_parts(int64_t l, bool split) {
  const float parts = 12.0f * static_cast<float>(l);
  return split || parts < 512.0f ? parts : 512.0f;
}

}  // namespace tensor
}  // namespace
}  // namespace cuda
}  // namespace kdejsd
