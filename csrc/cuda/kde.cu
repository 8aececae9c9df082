// The kde op on CUDA devices: log p_e at every query with its gradients in one pass over the centers, and the
// transposed pass that gives the gradients of centers, log weights and bandwidths. Nothing of size n x m is stored.
// Where tensor cores can, they do the forward pass (kde_tensor.cuh); what is here does the rest.
//
// Arrays are row-major: query [batch, n, l], centers [batch, m, l]. Blocks of 16 x 16 threads work on tiles of 64 rows
// times 64 columns (forward: queries times centers; backward: centers times queries). Thread (ty, tx) has the 16 pairs
// of rows 4 ty + {0..3} and columns tx + {0, 16, 32, 48}, and goes through three steps per tile:
//   1. squared distances, from differences of coordinates; these pass through shared memory in chunks of 16 LC
//   2. weights 2^x, which the block exchanges through shared memory
//   3. weighted sums of the column points: rows 4 ty + {0..3}, coordinates LC tx + {0..LC-1} of up to kSlabs chunks
// A tile is summed by itself before it is added to the running sums, so long sums have two levels.
//
// A call is a pass over the pairs and a merge of what its blocks leave; before them, where each center has a bandwidth
// of its own, a look for the middle one.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "cuda/kde_mixture.cuh"
#include "cuda/kde_tensor.cuh"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kSide = 16;              // threads along each side of a block
constexpr int kMicro = 4;              // rows and columns of a thread
constexpr int kTile = kSide * kMicro;  // rows and columns of a tile
constexpr int kThreads = kSide * kSide;
constexpr int kMergeThreads = 256;
constexpr int kMiddleThreads = 1024;

// 16 bytes of T: the widest access to shared memory, and the padding that puts rows 4 banks apart.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Blocks that a multiprocessor's registers hold.
template <typename T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 4 ? 2 : 1;

// ----------------------------------------------------------------------------------------------------------------
// The middle bandwidth of one per center

// One block per batch item.
template <typename T>
__global__ void __launch_bounds__(kMiddleThreads) kde_middle_kernel(const KdeMixture mixture, T* middle /* [batch] */) {
  constexpr int kWarps = kMiddleThreads / kWarp;
  __shared__ T least[kWarps], greatest[kWarps];
  const T* bandwidth = static_cast<const T*>(mixture.bandwidth) + blockIdx.x * mixture.bandwidth_stride;
  T low = T(INFINITY), high = T(0);
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < mixture.m; j += kMiddleThreads) {
    // One that is not positive and finite counts as 0, which is too far from all others.
    const T h = bandwidth[j] > T(0) && bandwidth[j] < T(INFINITY) ? bandwidth[j] : T(0);
    low = std::fmin(low, h);
    high = std::fmax(high, h);
  }
  low = -max_over<kWarp>(-low);
  high = max_over<kWarp>(high);
  if (threadIdx.x % kWarp == 0) {
    least[threadIdx.x / kWarp] = low;
    greatest[threadIdx.x / kWarp] = high;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    low = std::fmin(low, least[warp]);
    high = std::fmax(high, greatest[warp]);
  }
  middle[blockIdx.x] = static_cast<T>(middle_bandwidth(low, high));
}

// Queues it where there is one bandwidth per center; the result is then `at`, else null.
template <typename T>
const T* launch_middle(const KdeMixture& mixture, T* at /* [batch] */, cudaStream_t stream) {
  if (!mixture.per_center) return nullptr;
  launch("kde_middle_kernel", kde_middle_kernel<T>, mixture.batch, kMiddleThreads, 0, stream, mixture, at);
  return at;
}

int64_t middle_count(const KdeMixture& mixture) { return mixture.per_center ? mixture.batch : 0; }

// ----------------------------------------------------------------------------------------------------------------
// A tile of pairs in shared memory

template <typename T>
struct Points {
  const T* points;  // [count, l]
  int64_t count;
};

// A thread's four rows: running sums over the columns that this thread has seen.
template <typename T>
struct alignas(16) RowSums {
  T max[kMicro], sum[kMicro], moment[kMicro];
};

template <typename T, int LC>
struct Tile {
  static constexpr int kChunk = kSide * LC;  // coordinates that are present at a time
  static constexpr bool kAhead = LC == 1;    // there is room for the columns of the next tile, and registers
  using Chunk = T[kTile][kChunk + kVector<T>];
  alignas(16) Chunk rows;
  alignas(16) Chunk columns;
  alignas(16) T next_columns[kAhead ? kTile : 1][kChunk];  // as they lie in global memory
  alignas(16) T pairs[kTile][kTile + kVector<T>];          // [column][row], weights or distances
  RowSums<T> row_sums[kThreads];                           // here rather than in registers, of which there are few
  Item<T> item;
  Points<T> row_points, column_points;
  CenterTerms<T> centers[kTile];
  int64_t exclude[kTile];   // of the queries; forward only
  int excluded_row[kTile];  // of the queries, the row of this tile that is left out; backward only
  T grad[kTile];            // of the queries; backward only
  T log2_prob[kTile];       // of the queries, in the units of x; backward only
  double log_constant[2];   // of a query that counts all centers, and of one that excludes one; backward only
};

template <typename T, int LC>
__device__ Tile<T, LC>& shared_tile() {
  static_assert(sizeof(Tile<T, LC>) <= 99 * 1024, "what a block may have at most, from compute capability 8.0 on");
  return *reinterpret_cast<Tile<T, LC>*>(dynamic_shared_memory());
}

template <typename T, int LC>
__device__ void start_tile(Tile<T, LC>& tile, const KdeMixture& mixture, const T* middle, int64_t batch,
                           bool rows_are_queries) {
  if (threadIdx.x == 0) {
    const Item<T> item = batch_item(mixture, middle, batch);
    const Points<T> queries = {item.query, item.n}, centers = {item.centers, item.m};
    tile.item = item;
    tile.row_points = rows_are_queries ? queries : centers;
    tile.column_points = rows_are_queries ? centers : queries;
  }
  __syncthreads();
}

template <typename T, int LC>
__device__ void load_centers(Tile<T, LC>& tile, int64_t first) {
  if (threadIdx.x < kTile) tile.centers[threadIdx.x] = center_terms(tile.item, first + threadIdx.x);
}

// Brings chunks of the points of a tile's two sides into shared memory, and remembers what is there.
template <typename T, int LC, int kSlabs>
struct Stage {
  static constexpr int kChunk = Tile<T, LC>::kChunk;
  static constexpr int kLoads = 8 / kSlabs;  // in flight per thread, as many as the registers have room for

  Tile<T, LC>& tile;
  int64_t first_row;
  int64_t first_column = 0;
  int present = -1;    // the chunk that was loaded last, -1 before the first
  T shift = T(0);      // of this thread's coordinate in it
  bool ahead = false;  // the columns have been asked for

  __device__ int chunks() const { return static_cast<int>(ceil_div(tile.item.l, kChunk)); }

  // To be called between two barriers. Where l has one chunk only, the rows need loading but once.
  __device__ void load(int chunk, bool with_rows) {
    const bool first = present < 0;
    if (chunk != present) shift = shift_of(tile.item, coordinate(chunk));
    present = chunk;
    if (with_rows && (first || chunks() > 1)) load_points(tile.rows, tile.row_points, first_row);
    if (ahead) {
      take_columns();
    } else {
      load_points(tile.columns, tile.column_points, first_column);
    }
    ahead = false;
  }

  // Asks for the columns of the next tile, to be copied while this one is worked on. Where there is room for them, l
  // has but one chunk.
  __device__ void load_ahead(int64_t first) {
    if constexpr (Tile<T, LC>::kAhead) {
      const int64_t l = tile.item.l, k = coordinate(0);
      const T* from = tile.column_points.points + first * l + k;
      for (int row = threadIdx.x / kChunk; row < rows_inside(tile.column_points, first, k); row += kStep) {
        copy_async<sizeof(T)>(&tile.next_columns[row][threadIdx.x % kChunk], from + row * l);
      }
      ahead = true;
    }
  }

 private:
  static constexpr int kStep = kThreads / kChunk;  // rows that the block loads at once

  __device__ int64_t coordinate(int chunk) const { return static_cast<int64_t>(chunk) * kChunk + threadIdx.x % kChunk; }

  // How many of a tile's rows from `first` on have a coordinate k.
  __device__ int rows_inside(const Points<T>& source, int64_t first, int64_t k) const {
    const int64_t left = k < tile.item.l ? source.count - first : 0;
    return static_cast<int>(left < kTile ? left : kTile);
  }

  __device__ void load_points(typename Tile<T, LC>::Chunk& to, const Points<T>& source, int64_t first) const {
    const int start = threadIdx.x / kChunk, end = rows_inside(source, first, coordinate(present));
    const T scale = tile.item.scale;
    const T* from = source.points + (first + start) * tile.item.l + coordinate(present);
#pragma unroll kLoads
    for (int step = 0; step < kTile / kStep; ++step) {
      const int row = start + step * kStep;
      to[row][threadIdx.x % kChunk] = row < end ? (*from - shift) * scale : T(0);
      from += kStep * tile.item.l;
    }
  }

  // Each thread takes what it has asked for itself.
  __device__ void take_columns() {
    const int end = rows_inside(tile.column_points, first_column, coordinate(0));
    wait_for_copies();
#pragma unroll
    for (int row = threadIdx.x / kChunk; row < kTile; row += kStep) {
      const T point = row < end ? (tile.next_columns[row][threadIdx.x % kChunk] - shift) * tile.item.scale : T(0);
      tile.columns[row][threadIdx.x % kChunk] = point;
    }
  }
};

// A thread's 16 pairs to and from the block's 64 x 64.
template <typename T, int LC>
__device__ void store_pairs(Tile<T, LC>& tile, const T (&pairs)[kMicro][kMicro]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
#pragma unroll
  for (int b = 0; b < kMicro; ++b) {
    const Vector<T, kMicro> column = {{pairs[0][b], pairs[1][b], pairs[2][b], pairs[3][b]}};
    *reinterpret_cast<Vector<T, kMicro>*>(&tile.pairs[tx + kSide * b][kMicro * ty]) = column;
  }
}

template <typename T, int LC>
__device__ void add_stored_pairs(const Tile<T, LC>& tile, T (&pairs)[kMicro][kMicro]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
#pragma unroll
  for (int b = 0; b < kMicro; ++b) {
    const Vector<T, kMicro> column = load_vector<kMicro>(&tile.pairs[tx + kSide * b][kMicro * ty]);
#pragma unroll
    for (int a = 0; a < kMicro; ++a) pairs[a][b] += column.at[a];
  }
}

// Adds to d2[a][b], row 4 ty + a and column tx + 16 b, the first `width` coordinates that are present.
template <typename T, int LC>
__device__ void add_squared_distances(const Tile<T, LC>& tile, int width, T (&d2)[kMicro][kMicro]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  for (int k = 0; k < width; k += kVector<T>) {  // the tile is 0 beyond l
    Vector<T, kVector<T>> column[kMicro];
#pragma unroll
    for (int b = 0; b < kMicro; ++b) column[b] = load_vector<kVector<T>>(&tile.columns[tx + kSide * b][k]);
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
      const Vector<T, kVector<T>> row = load_vector<kVector<T>>(&tile.rows[kMicro * ty + a][k]);
#pragma unroll
      for (int b = 0; b < kMicro; ++b) {
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          const T difference = row.at[v] - column[b].at[v];
          d2[a][b] = std::fma(difference, difference, d2[a][b]);
        }
      }
    }
  }
}

// Of the tile whose columns start at stage.first_column; those of the next one at next_column, or -1: there is none.
// Chunks from the last to the first, so that the weighted sums find the first one still present. What else the tile
// needs is loaded beside the first of them. Between chunks the sums wait in shared memory: so there are two levels of
// them, and registers for what goes on.
template <typename T, int LC, int kSlabs, typename Load>
__device__ void squared_distances(Stage<T, LC, kSlabs>& stage, int64_t next_column, T (&d2)[kMicro][kMicro],
                                  const Load& load_beside) {
  constexpr int kChunk = Tile<T, LC>::kChunk;
  const int last = stage.chunks() - 1;
  for (int chunk = last; chunk >= 0; --chunk) {
    const int64_t left = stage.tile.item.l - static_cast<int64_t>(chunk) * kChunk;
    __syncthreads();
    if (chunk == last) load_beside();
    stage.load(chunk, true);
    __syncthreads();
    if (next_column >= 0) stage.load_ahead(next_column);
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
#pragma unroll
      for (int b = 0; b < kMicro; ++b) d2[a][b] = T(0);
    }
    add_squared_distances(stage.tile, static_cast<int>(left < kChunk ? left : kChunk), d2);
    if (chunk < last) add_stored_pairs(stage.tile, d2);
    if (chunk > 0) store_pairs(stage.tile, d2);
  }
}

// sums[a][c] = sum over the tile's columns of weight[row 4 ty + a] * coordinate LC tx + c of the chunk that is present.
template <typename T, int LC>
__device__ void weighted_sums(const Tile<T, LC>& tile, T (&sums)[kMicro][LC]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
#pragma unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vector<T, kMicro> weight = load_vector<kMicro>(&tile.pairs[j][kMicro * ty]);
    const Vector<T, LC> point = load_vector<LC>(&tile.columns[j][LC * tx]);
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
#pragma unroll
      for (int c = 0; c < LC; ++c) sums[a][c] = std::fma(weight.at[a], point.at[c], sums[a][c]);
    }
  }
}

// total = total * factor + the tile's weighted sums, for the chunks first_chunk + {0..slabs-1}, slabs <= kSlabs.
template <typename T, int LC, int kSlabs>
__device__ void add_weighted_sums(Stage<T, LC, kSlabs>& stage, int first_chunk, int slabs, const T (&factor)[kMicro],
                                  T (&total)[kSlabs][kMicro][LC]) {
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    const int chunk = first_chunk + slab;
    if (slab >= slabs || chunk >= stage.chunks()) break;
    if (chunk != stage.present) {
      __syncthreads();
      stage.load(chunk, false);
      __syncthreads();
    }
    T sums[kMicro][LC] = {};
    weighted_sums(stage.tile, sums);
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
#pragma unroll
      for (int c = 0; c < LC; ++c) total[slab][a][c] = std::fma(total[slab][a][c], factor[a], sums[a][c]);
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// Forward

// Turns squared distances into weights relative to the rows' new maxima; factor brings the old sums there.
template <typename T, int LC>
__device__ void forward_weights(Tile<T, LC>& tile, int64_t first_center, T (&pairs)[kMicro][kMicro],
                                T (&factor)[kMicro]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  RowSums<T> sums = tile.row_sums[threadIdx.x];
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const int64_t excluded = tile.exclude[kMicro * ty + a] - first_center;
    T x[kMicro], top = -T(INFINITY);
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      const CenterTerms<T>& center = tile.centers[tx + kSide * b];
      x[b] = excluded == tx + kSide * b ? -T(INFINITY) : std::fma(-center.gain, pairs[a][b], center.offset);
      top = std::fmax(top, x[b]);
    }
    const T max = std::fmax(sums.max[a], max_over<kSide>(top));
    factor[a] = rescale_factor(sums.max[a], max);
    T sum = T(0), moment = T(0);
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      const T weight = std::exp2(x[b] - exponent_base(max));
      sum += weight;
      const T scaled = weight * tile.centers[tx + kSide * b].precision;
      const T distance = weight == T(0) ? T(0) : weight * pairs[a][b];  // d2 may be infinite where the weight is 0
      moment += tile.item.per_center ? scaled : distance;
      pairs[a][b] = scaled;
    }
    sums.max[a] = max;
    sums.sum[a] = std::fma(sums.sum[a], factor[a], sum);
    sums.moment[a] = std::fma(sums.moment[a], factor[a], moment);
  }
  tile.row_sums[threadIdx.x] = sums;
}

template <typename T>
__device__ void write_row_sums(const RowSums<T>& sums, const Partials<T>& partials, int64_t first_row,
                               int64_t end_row) {
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const T sum = sum_over<kSide>(sums.sum[a]);
    const T moment = sum_over<kSide>(sums.moment[a]);
    const int64_t row = first_row + a;
    if (threadIdx.x % kSide != 0 || row >= end_row) continue;
    partials.max[row] = sums.max[a];
    partials.sum[row] = sum;
    if (partials.moment != nullptr) partials.moment[row] = moment;
  }
}

template <typename T, int LC, int kSlabs>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    kde_forward_kernel(const KdeMixture mixture, const T* middle, const ForwardPlan plan, const Partials<T> partials) {
  // Neighbouring blocks read the same centers at the same time.
  int64_t block = blockIdx.x;
  const int64_t query_tile = block % plan.query_tiles;
  block /= plan.query_tiles;
  const int group = static_cast<int>(block % plan.groups);
  block /= plan.groups;
  const int64_t split = block % plan.splits;
  const int64_t batch = block / plan.splits;
  const int64_t first_tile = split * plan.tiles_per_split;
  const int64_t end_tile =
      first_tile + plan.tiles_per_split < plan.center_tiles ? first_tile + plan.tiles_per_split : plan.center_tiles;
  Tile<T, LC>& tile = shared_tile<T, LC>();
  const Item<T>& item = tile.item;
  start_tile(tile, mixture, middle, batch, true);
  const int64_t first_query = query_tile * kTile;
  Stage<T, LC, kSlabs> stage{tile, first_query};
  if (threadIdx.x < kTile) {
    const int64_t i = first_query + threadIdx.x;
    tile.exclude[threadIdx.x] = item.exclude != nullptr && i < item.n ? item.exclude[i] : -1;
  }

  T centers[kSlabs][kMicro][LC] = {};
  const T none = -T(INFINITY);
  tile.row_sums[threadIdx.x] = {{none, none, none, none}, {}, {}};
  for (int64_t center_tile = first_tile; center_tile < end_tile; ++center_tile) {
    stage.first_column = center_tile * kTile;
    T pairs[kMicro][kMicro], factor[kMicro];
    squared_distances(stage, center_tile + 1 < end_tile ? stage.first_column + kTile : -1, pairs,
                      [&] { load_centers(tile, stage.first_column); });
    forward_weights(tile, stage.first_column, pairs, factor);
    if (partials.sum_centers == nullptr) continue;
    store_pairs(tile, pairs);
    __syncthreads();
    add_weighted_sums(stage, group * plan.chunks, plan.chunks, factor, centers);
  }

  const int64_t rows = mixture.batch * item.n;
  const int64_t first_row = (split * rows + batch * item.n) + first_query + kMicro * (threadIdx.x / kSide);
  const int64_t end_row = split * rows + (batch + 1) * item.n;
  if (group == 0) write_row_sums(tile.row_sums[threadIdx.x], partials, first_row, end_row);
  if (partials.sum_centers == nullptr) return;
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    if (slab >= plan.chunks) break;
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
#pragma unroll
      for (int c = 0; c < LC; ++c) {
        const int64_t k =
            static_cast<int64_t>(group * plan.chunks + slab) * Tile<T, LC>::kChunk + LC * (threadIdx.x % kSide) + c;
        if (first_row + a < end_row && k < item.l)
          partials.sum_centers[(first_row + a) * item.l + k] = centers[slab][a][c];
      }
    }
  }
}

// A query's sums over all splits.
template <typename T>
struct MergedRow {
  LogSumExp2<T> exponents;
  T moment;
};

template <typename T>
__device__ MergedRow<T> merge_splits(const Partials<T>& partials, int64_t splits, int64_t row, int64_t rows) {
  const int lane = threadIdx.x % kWarp;
  T max = -T(INFINITY);
  for (int64_t split = lane; split < splits; split += kWarp) max = std::fmax(max, partials.max[split * rows + row]);
  max = max_over<kWarp>(max);
  T sum = T(0), moment = T(0);
  for (int64_t split = lane; split < splits; split += kWarp) {
    const int64_t at = split * rows + row;
    const T factor = rescale_factor(partials.max[at], max);
    sum += factor * partials.sum[at];
    if (partials.moment != nullptr) moment += factor * partials.moment[at];
  }
  return {{max, sum_over<kWarp>(sum)}, sum_over<kWarp>(moment)};
}

template <typename T>
__device__ double squared_norm(const T* query /* [l] */, int64_t l) {
  double sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < l; k += kWarp) {
    sum = std::fma(static_cast<double>(query[k]), static_cast<double>(query[k]), sum);
  }
  return sum_over<kWarp>(sum);
}

// dquery = weight (s_e + query * pull), s_e = (sum of centers - query sum of precisions) / (sum of weights) / h0^2,
// both scaled. Lanes are coordinates, and where l is small what remains of the lanes are splits. dquery may be where
// the only split has left its sums.
template <typename T>
__device__ void write_dquery(const Item<T>& item, const Partials<T>& partials, const MergedRow<T>& merged,
                             int64_t splits, int64_t row, int64_t rows, const T* query /* [l] */, T weight, T pull,
                             T* dquery /* [batch n, l] */) {
  int width = 1;
  while (width < item.l && width < kWarp) width *= 2;
  const int lane = threadIdx.x % kWarp;
  const T inverse = T(1) / (item.scale * item.h0);  // that of a subnormal h0 itself is infinite
  const T precision = (item.per_center ? merged.moment : merged.exponents.sum) / merged.exponents.sum;
  for (int64_t first = 0; first < item.l; first += width) {
    const int64_t k = first + lane % width;
    T sum = T(0);
    for (int64_t split = lane / width; k < item.l && split < splits; split += kWarp / width) {
      const int64_t at = split * rows + row;
      sum += rescale_factor(partials.max[at], merged.exponents.max) * partials.sum_centers[at * item.l + k];
    }
    for (int other = width; other < kWarp; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
    if (lane >= width || k >= item.l) continue;
    const T scaled_query = (query[k] - shift_of(item, k)) * item.scale;
    const T score = (sum / merged.exponents.sum - scaled_query * precision) * inverse / item.h0;
    dquery[row * item.l + k] = weight * (score + query[k] * pull);
  }
}

// One warp per query: merges the splits and writes value and gradients.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    kde_merge_kernel(const KdeForward args, const T* middle, const Partials<T> partials, int64_t splits) {
  const KdeMixture& mixture = args.mixture;
  const int64_t rows = mixture.batch * mixture.n;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int64_t i = row % mixture.n;
  const Item<T> item = batch_item(mixture, middle, row / mixture.n);
  const T* query = item.query + i * item.l;

  const MergedRow<T> merged = merge_splits(partials, splits, row, rows);
  const int64_t exclude = item.exclude != nullptr ? item.exclude[i] : -1;
  const int64_t count = kde_count(item.m, item.log_weights == nullptr, exclude);
  const double h0 = static_cast<double>(item.h0);
  const bool infinite = merged.exponents.sum == T(INFINITY);  // by a log-weight
  const double log_prob =
      infinite ? static_cast<double>(NAN) : kde_log_prob(merged.exponents, kde_log_constant(count, item.l, h0));
  const bool plain = args.value_kind == KdeValue::kLogProb;
  const double variance = args.target_variance;
  const double log_target = plain ? 0.0 : normal_log_prob(squared_norm(query, item.l), item.l, variance);
  const KdeTerm term = kde_term(args.value_kind, log_prob, log_target);

  if (args.dquery != nullptr) {
    write_dquery(item, partials, merged, splits, row, rows, query, static_cast<T>(term.weight),
                 plain ? T(0) : static_cast<T>(1 / variance), static_cast<T*>(args.dquery));
  }
  if (threadIdx.x % kWarp != 0) return;
  args.value[row] = term.value;
  if (args.dbandwidth != nullptr) {  // sum pi d2 / h^3 - l / h
    const double scaled = static_cast<double>(item.scale) * h0;
    const double mean = static_cast<double>(merged.moment) / static_cast<double>(merged.exponents.sum);
    args.dbandwidth[row] = (mean / (scaled * scaled) - static_cast<double>(item.l)) / h0;
  }
}

// ----------------------------------------------------------------------------------------------------------------
// Backward

// How a backward call is cut into blocks, as in ForwardPlan. Each split of the queries leaves gradients of its own, one
// array after the other as in KdeBackward; those of a single split are the results.
struct BackwardPlan {
  int lc, slabs, groups, chunks;
  int64_t center_tiles, query_tiles, splits, tiles_per_split;
  int64_t elements;  // that a split leaves

  int64_t blocks(int64_t batch) const { return center_tiles * groups * splits * batch; }
};

// Where gradients are to go, [batch, m, l], [batch, m] and [batch, m]; or null.
template <typename T>
struct BackwardOutputs {
  T* dcenters;
  T* dlog_weights;
  T* dbandwidth;

  __host__ __device__ explicit BackwardOutputs(const KdeBackward& args)
      : dcenters(static_cast<T*>(args.dcenters)),
        dlog_weights(static_cast<T*>(args.dlog_weights)),
        dbandwidth(static_cast<T*>(args.dbandwidth)) {}

  __device__ BackwardOutputs of_split(int64_t offset) const {
    BackwardOutputs moved = *this;
    if (dcenters != nullptr) moved.dcenters += offset;
    if (dlog_weights != nullptr) moved.dlog_weights += offset;
    if (dbandwidth != nullptr) moved.dbandwidth += offset;
    return moved;
  }
};

// The queries' part of w[i, j] = grad[i] 2^(x[i, j] - log2_prob[i]).
template <typename T, int LC>
__device__ void load_queries(Tile<T, LC>& tile, const Item<T>& item, int64_t first_center, int64_t first,
                             const T* grad /* [n] */, const double* log_prob /* [n] */) {
  if (threadIdx.x >= kTile) return;
  const int64_t i = first + threadIdx.x;
  const bool inside = i < item.n;
  const int64_t exclude = inside && item.exclude != nullptr ? item.exclude[i] : -1;
  const bool in_tile = exclude >= first_center && exclude < first_center + kTile;
  tile.excluded_row[threadIdx.x] = in_tile ? static_cast<int>(exclude - first_center) : -1;
  if (!inside) {  // weight 0 2^-inf
    tile.grad[threadIdx.x] = T(0);
    tile.log2_prob[threadIdx.x] = T(INFINITY);
    return;
  }
  const bool one_less = exclude >= 0 && exclude < item.m;
  const double log2_prob = kLog2E * (log_prob[i] - tile.log_constant[one_less]);
  const T rounded = static_cast<T>(log2_prob);
  // What rounding took from the exponent is given back to the factor: 2^r = 1 + r ln 2 for so small an r.
  const double correction = 1 + kLn2 * (static_cast<double>(rounded) - log2_prob);
  tile.log2_prob[threadIdx.x] = rounded;
  tile.grad[threadIdx.x] = static_cast<T>(static_cast<double>(grad[i]) * correction);
}

// Turns squared distances into weights, and adds them to the rows' sums, times d2 to the moments.
template <typename T, int LC>
__device__ void backward_weights(Tile<T, LC>& tile, T (&pairs)[kMicro][kMicro]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  RowSums<T> sums = tile.row_sums[threadIdx.x];
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const CenterTerms<T>& center = tile.centers[kMicro * ty + a];
    T sum = T(0), moment = T(0);
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      const int i = tx + kSide * b;
      const bool excluded = tile.excluded_row[i] == kMicro * ty + a;
      const T x = excluded ? -T(INFINITY) : std::fma(-center.gain, pairs[a][b], center.offset);
      const T weight = tile.grad[i] * std::exp2(x - tile.log2_prob[i]);
      sum += weight;
      moment += weight == T(0) ? T(0) : weight * pairs[a][b];
      pairs[a][b] = weight;
    }
    sums.sum[a] += sum;
    sums.moment[a] += moment;
  }
  tile.row_sums[threadIdx.x] = sums;
}

// dlog_weights[j] = sum w,  dbandwidth[j] = sum w (d2 / h^3 - l / h)
template <typename T>
__device__ void write_dcenter_scalars(const Item<T>& item, int64_t j, int64_t at, T sum, T moment,
                                      T* dlog_weights /* [batch, m] or null */,
                                      T* dbandwidth /* [batch, m] or null */) {
  if (dlog_weights != nullptr) dlog_weights[at] = sum;
  if (dbandwidth == nullptr) return;
  const T h = checked_bandwidth(item.bandwidth[item.per_center ? j : 0]);
  const T scaled = item.scale * h;
  dbandwidth[at] = (moment / (scaled * scaled) - static_cast<T>(item.l) * sum) / h;
}

// dcenters[j] = sum w (query - center) / h^2
template <typename T, int LC, int kSlabs>
__device__ void write_dcenter(const Item<T>& item, int64_t j, int first_chunk, int chunks, int a, T sum,
                              const T (&queries)[kSlabs][kMicro][LC], T* dcenter /* [l] */) {
  const T h = checked_bandwidth(item.bandwidth[item.per_center ? j : 0]);
  const T inverse = T(1) / (item.scale * h);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    if (slab >= chunks) break;
#pragma unroll
    for (int c = 0; c < LC; ++c) {
      const int64_t k = static_cast<int64_t>(first_chunk + slab) * Tile<T, LC>::kChunk + LC * (threadIdx.x % kSide) + c;
      if (k >= item.l) continue;
      const T center = (item.centers[j * item.l + k] - shift_of(item, k)) * item.scale;
      dcenter[k] = (queries[slab][a][c] - center * sum) * inverse / h;
    }
  }
}

template <typename T, int LC, int kSlabs>
__global__ void __launch_bounds__(kThreads, kSlabs == 1 ? kBlocksPerMultiprocessor<T> : 1)
    kde_backward_kernel(const KdeBackward args, const T* middle, const BackwardPlan plan) {
  int64_t block = blockIdx.x;
  const int64_t center_tile = block % plan.center_tiles;
  block /= plan.center_tiles;
  const int group = static_cast<int>(block % plan.groups);
  block /= plan.groups;
  const int64_t split = block % plan.splits;
  const int64_t batch = block / plan.splits;
  const int64_t first_tile = split * plan.tiles_per_split;
  const int64_t end_tile =
      first_tile + plan.tiles_per_split < plan.query_tiles ? first_tile + plan.tiles_per_split : plan.query_tiles;
  Tile<T, LC>& tile = shared_tile<T, LC>();
  const Item<T>& item = tile.item;
  start_tile(tile, args.mixture, middle, batch, false);
  const int64_t first_center = center_tile * kTile;
  const T* grad = static_cast<const T*>(args.grad) + batch * item.n;  // [n]
  const double* log_prob = args.log_prob + batch * item.n;            // [n]
  Stage<T, LC, kSlabs> stage{tile, first_center};
  load_centers(tile, first_center);
  if (threadIdx.x < 2) {
    const int64_t count = kde_count(item.m, item.log_weights == nullptr, static_cast<int>(threadIdx.x) - 1);
    tile.log_constant[threadIdx.x] = kde_log_constant(count, item.l, static_cast<double>(item.h0));
  }

  tile.row_sums[threadIdx.x] = {};
  T queries[kSlabs][kMicro][LC] = {};
  const T same[kMicro] = {T(1), T(1), T(1), T(1)};
  for (int64_t query_tile = first_tile; query_tile < end_tile; ++query_tile) {
    const int64_t first_query = query_tile * kTile;
    stage.first_column = first_query;
    T pairs[kMicro][kMicro];
    squared_distances(stage, query_tile + 1 < end_tile ? first_query + kTile : -1, pairs,
                      [&] { load_queries(tile, item, first_center, first_query, grad, log_prob); });
    backward_weights(tile, pairs);
    if (args.dcenters == nullptr) continue;
    store_pairs(tile, pairs);
    __syncthreads();
    add_weighted_sums(stage, group * plan.chunks, plan.chunks, same, queries);
  }

  const BackwardOutputs<T> to = BackwardOutputs<T>(args).of_split(split * plan.elements);
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const T sum = sum_over<kSide>(tile.row_sums[threadIdx.x].sum[a]);
    const T moment = sum_over<kSide>(tile.row_sums[threadIdx.x].moment[a]);
    const int64_t j = first_center + kMicro * (threadIdx.x / kSide) + a;
    const int64_t at = batch * item.m + j;
    if (j >= item.m) continue;
    if (group == 0 && threadIdx.x % kSide == 0) {
      write_dcenter_scalars(item, j, at, sum, moment, to.dlog_weights, to.dbandwidth);
    }
    if (to.dcenters == nullptr) continue;
    write_dcenter<T, LC, kSlabs>(item, j, group * plan.chunks, plan.chunks, a, sum, queries, to.dcenters + at * item.l);
  }
}

// Adds up what the splits have left, in their order: [splits, elements] to the arrays of a KdeBackward.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    kde_backward_merge_kernel(const KdeBackward args, const T* parts, int64_t splits, int64_t elements) {
  int64_t e = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (e >= elements) return;
  T sum = T(0);
  for (int64_t split = 0; split < splits; ++split) sum += parts[split * elements + e];
  const BackwardOutputs<T> to(args);
  const int64_t centers = args.mixture.batch * args.mixture.m, coordinates = centers * args.mixture.l;
  if (to.dcenters != nullptr) {
    if (e < coordinates) to.dcenters[e] = sum;
    e -= coordinates;
  }
  if (to.dlog_weights != nullptr) {
    if (e >= 0 && e < centers) to.dlog_weights[e] = sum;
    e -= centers;
  }
  if (to.dbandwidth != nullptr && e >= 0) to.dbandwidth[e] = sum;
}

// ----------------------------------------------------------------------------------------------------------------
// Launchers

// The chunks of l that the blocks sum: how wide they are, and how many blocks share them. Where nothing is summed over
// coordinates, one block goes through all of them.
template <typename T, typename Plan>
void plan_chunks(int64_t l, bool with_sums, Plan* plan) {
  const int64_t widest = kVector<T>;
  const int64_t lc = l <= kSide ? 1 : l <= 2 * kSide ? 2 : widest;
  const int64_t chunks = with_sums ? ceil_div(l, kSide * lc) : 1;
  plan->lc = static_cast<int>(lc);
  plan->slabs = chunks == 1 ? 1 : chunks == 2 ? 2 : 4;
  plan->groups = static_cast<int>(ceil_div(chunks, plan->slabs));
  plan->chunks = static_cast<int>(ceil_div(chunks, plan->groups));
}

// Splits a pass over `tiles` tiles so that the device is full, in one wave of blocks or in up to four where that leaves
// less of the last one empty. A block takes a step for each of its tiles and about one more to start and end.
template <typename Plan>
void plan_splits(int64_t blocks, int64_t slots, int64_t tiles, Plan* plan) {
  int64_t fewest = INT64_MAX;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t most = std::max<int64_t>(1, std::min(tiles, waves * slots / blocks));
    const int64_t each = ceil_div(tiles, most), splits = ceil_div(tiles, each);
    const int64_t steps = ceil_div(blocks * splits, slots) * (each + 1);
    if (steps >= fewest) continue;
    fewest = steps;
    plan->tiles_per_split = each;
    plan->splits = splits;
  }
}

template <typename T>
ForwardPlan plan_forward(const KdeForward& args, int device) {
  const KdeMixture& mixture = args.mixture;
  ForwardPlan plan = {};
  plan.tensor_width = tensor::width_for(args, device);
  int64_t slots = multiprocessor_count(device);  // blocks at a time
  if (plan.tensor_width > 0) {
    plan.groups = 1;
    plan.largest_parts = tensor::largest_parts(mixture.l, args.products == KdeProducts::kSplit);
    plan.query_tiles = ceil_div(mixture.n, tensor::queries_of(plan.tensor_width));
    plan.center_tiles = ceil_div(mixture.m, tensor::centers_of(plan.tensor_width));
    slots *= tensor::kBlocksPerMultiprocessor;
  } else {
    plan_chunks<T>(mixture.l, args.dquery != nullptr, &plan);
    plan.query_tiles = ceil_div(mixture.n, kTile);
    plan.center_tiles = ceil_div(mixture.m, kTile);
    slots *= kBlocksPerMultiprocessor<T>;
  }
  plan_splits(mixture.batch * plan.query_tiles * plan.groups, slots, plan.center_tiles, &plan);
  const int64_t each = plan.splits * mixture.batch * mixture.n;
  plan.sum = plan.max + each;
  plan.moment = plan.sum + each;
  plan.sum_centers = plan.moment + (mixture.per_center || args.dbandwidth != nullptr ? each : 0);
  const bool in_dquery = args.dquery == nullptr || plan.splits == 1;  // the sums of a single split lie in dquery
  plan.middle = plan.sum_centers + (in_dquery ? 0 : each * mixture.l);
  plan.elements = plan.middle + middle_count(mixture);
  return plan;
}

template <typename T>
BackwardPlan plan_backward(const KdeBackward& args, int device) {
  const KdeMixture& mixture = args.mixture;
  BackwardPlan plan = {};
  plan_chunks<T>(mixture.l, args.dcenters != nullptr, &plan);
  plan.center_tiles = ceil_div(mixture.m, kTile);
  plan.query_tiles = ceil_div(mixture.n, kTile);
  const int64_t slots = multiprocessor_count(device) * (plan.slabs == 1 ? kBlocksPerMultiprocessor<T> : 1);
  plan_splits(mixture.batch * plan.center_tiles * plan.groups, slots, plan.query_tiles, &plan);
  const int64_t centers = mixture.batch * mixture.m;
  if (args.dcenters != nullptr) plan.elements += centers * mixture.l;
  if (args.dlog_weights != nullptr) plan.elements += centers;
  if (args.dbandwidth != nullptr) plan.elements += centers;
  return plan;
}

template <typename T>
using ForwardKernel = void (*)(KdeMixture, const T*, ForwardPlan, Partials<T>);
template <typename T>
using BackwardKernel = void (*)(KdeBackward, const T*, BackwardPlan);

template <typename T>
ForwardKernel<T> forward_kernel(int lc, int slabs) {
  constexpr int kWidest = kVector<T>;
  if (lc == 1) return kde_forward_kernel<T, 1, 1>;
  if (lc < kWidest) return kde_forward_kernel<T, 2, 1>;
  if (slabs == 1) return kde_forward_kernel<T, kWidest, 1>;
  return slabs == 2 ? kde_forward_kernel<T, kWidest, 2> : kde_forward_kernel<T, kWidest, 4>;
}

template <typename T>
BackwardKernel<T> backward_kernel(int lc, int slabs) {
  constexpr int kWidest = kVector<T>;
  if (lc == 1) return kde_backward_kernel<T, 1, 1>;
  if (lc < kWidest) return kde_backward_kernel<T, 2, 1>;
  if (slabs == 1) return kde_backward_kernel<T, kWidest, 1>;
  return slabs == 2 ? kde_backward_kernel<T, kWidest, 2> : kde_backward_kernel<T, kWidest, 4>;
}

template <typename T>
int shared_bytes(int lc) {
  return static_cast<int>(lc == 1 ? sizeof(Tile<T, 1>) : lc == 2 ? sizeof(Tile<T, 2>) : sizeof(Tile<T, kVector<T>>));
}

template <typename T>
void launch_forward(const KdeForward& args, void* workspace, int device, cudaStream_t stream) {
  const KdeMixture& mixture = args.mixture;
  const int64_t rows = mixture.batch * mixture.n;
  const ForwardPlan plan = plan_forward<T>(args, device);
  T* elements = static_cast<T*>(workspace);
  Partials<T> partials = {elements + plan.max, elements + plan.sum, nullptr, nullptr};
  if (mixture.per_center || args.dbandwidth != nullptr) partials.moment = elements + plan.moment;
  if (args.dquery != nullptr) {
    partials.sum_centers = plan.splits == 1 ? static_cast<T*>(args.dquery) : elements + plan.sum_centers;
  }

  const T* middle = launch_middle(mixture, elements + plan.middle, stream);
  const int64_t blocks = plan.blocks(mixture.batch);
  if constexpr (std::is_same_v<T, float>) {
    if (plan.tensor_width > 0) {
      launch("kde_tensor_kernel", tensor::kernel(plan.tensor_width, args.products == KdeProducts::kSplit), blocks,
             tensor::kThreads, tensor::shared_bytes(plan.tensor_width, mixture.l), stream, mixture, middle, plan,
             partials);
    }
  }
  if (plan.tensor_width == 0) {
    launch("kde_forward_kernel", forward_kernel<T>(plan.lc, plan.slabs), blocks, kThreads, shared_bytes<T>(plan.lc),
           stream, mixture, middle, plan, partials);
  }
  launch("kde_merge_kernel", kde_merge_kernel<T>, ceil_div(rows, kMergeThreads / kWarp), kMergeThreads, 0, stream, args,
         middle, partials, plan.splits);
}

void write_zeros(void* to, int64_t bytes, cudaStream_t stream) {
  if (to != nullptr) check(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
}

template <typename T>
void launch_backward(const KdeBackward& args, void* workspace, int device, cudaStream_t stream) {
  const KdeMixture& mixture = args.mixture;
  if (mixture.n == 0) {  // sums of nothing, whatever the centers hold
    const int64_t bytes = mixture.batch * mixture.m * static_cast<int64_t>(sizeof(T));
    write_zeros(args.dcenters, bytes * mixture.l, stream);
    write_zeros(args.dlog_weights, bytes, stream);
    write_zeros(args.dbandwidth, bytes, stream);
    return;
  }
  const BackwardPlan plan = plan_backward<T>(args, device);
  if (plan.elements == 0) return;
  T* elements = static_cast<T*>(workspace);
  const T* middle = launch_middle(mixture, elements, stream);
  elements += middle_count(mixture);
  KdeBackward parts = args;
  if (plan.splits > 1) {
    T* next = elements;
    const int64_t centers = mixture.batch * mixture.m;
    if (args.dcenters != nullptr) parts.dcenters = std::exchange(next, next + centers * mixture.l);
    if (args.dlog_weights != nullptr) parts.dlog_weights = std::exchange(next, next + centers);
    if (args.dbandwidth != nullptr) parts.dbandwidth = next;
  }
  launch("kde_backward_kernel", backward_kernel<T>(plan.lc, plan.slabs), plan.blocks(mixture.batch), kThreads,
         shared_bytes<T>(plan.lc), stream, parts, middle, plan);
  if (plan.splits == 1) return;
  launch("kde_backward_merge_kernel", kde_backward_merge_kernel<T>, ceil_div(plan.elements, kMergeThreads),
         kMergeThreads, 0, stream, args, static_cast<const T*>(elements), plan.splits, plan.elements);
}

template <typename T>
int64_t backward_bytes(const KdeBackward& args, int device) {
  const BackwardPlan plan = plan_backward<T>(args, device);
  const int64_t elements = middle_count(args.mixture) + (plan.splits == 1 ? 0 : plan.splits * plan.elements);
  return elements * static_cast<int64_t>(sizeof(T));
}

bool is_empty(const KdeMixture& mixture) { return mixture.batch == 0 || mixture.n == 0; }

}  // namespace

int64_t kde_forward_workspace(const KdeForward& args, int device) {
  if (is_empty(args.mixture)) return 0;
  if (args.mixture.dtype == DType::kFloat32) {
    return plan_forward<float>(args, device).elements * static_cast<int64_t>(sizeof(float));
  }
  return plan_forward<double>(args, device).elements * static_cast<int64_t>(sizeof(double));
}

void kde_forward(const KdeForward& args, void* workspace, int device, uintptr_t stream) {
  if (is_empty(args.mixture)) return;
  const DeviceGuard guard(device);
  if (args.mixture.dtype == DType::kFloat32) {
    launch_forward<float>(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
  } else {
    launch_forward<double>(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
  }
}

int64_t kde_backward_workspace(const KdeBackward& args, int device) {
  if (is_empty(args.mixture)) return 0;
  return args.mixture.dtype == DType::kFloat32 ? backward_bytes<float>(args, device)
                                               : backward_bytes<double>(args, device);
}

void kde_backward(const KdeBackward& args, void* workspace, int device, uintptr_t stream) {
  if (args.mixture.batch == 0) return;
  const DeviceGuard guard(device);
  if (args.mixture.dtype == DType::kFloat32) {
    launch_backward<float>(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
  } else {
    launch_backward<double>(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
  }
}

}  // namespace cuda
}  // namespace kdejsd
