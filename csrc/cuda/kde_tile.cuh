// A tile of pairs of the kde op in shared memory: 64 rows times 64 columns (forward: queries times centers; backward:
// centers times queries), worked on in three steps:
//   1. squared distances, from differences of coordinates; these pass through shared memory in chunks of 16 LC
//   2. weights 2^x, which the block exchanges through shared memory
//   3. weighted sums of differences: rows 4 ty + {0..3}, coordinates LC tx + {0..LC-1} of up to kSlabs chunks; of the
//      column points where the rows are near the origin, of which the rows are to be subtracted at the end
// Thread (ty, tx) has the 16 pairs of rows 4 ty + {0..3} and columns tx + {0, 16, 32, 48}. A tile is summed by itself
// before it is added to the running sums, so long sums have two levels.
#pragma once

#include "cuda/kde_mixture.cuh"
#include "cuda/micro_tile.cuh"
#include "cuda/ptx.cuh"

namespace kdejsd {
namespace cuda {

static_assert(kTile == kPlainTile && kSide == kPlainSide, "what kde_plan.h counts with");

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
  RowSums<T> row_sums[kTileThreads];                       // here rather than in registers, of which there are few
  CenterTerms<T> centers[kTile];
  int exclude[kTile];       // of the queries, counted from the block's first center, or -1; forward only
  int excluded_row[kTile];  // of the queries, the row of this tile that is left out, or -1; backward only
  T grad[kTile];            // of the queries; backward only
  T log2_prob[kTile];       // of the queries, in the units of x, and what its rounding left; backward only
  T log2_rest[kTile];
  int first_chunk;         // of those that the block sums; here, that no addresses wait in registers for their turn
  double log_constant[2];  // of a query that counts all centers, and of one that excludes one; backward only
};

template <typename T, int LC>
__device__ Tile<T, LC>& shared_tile() {
  static_assert(sizeof(Tile<T, LC>) <= 99 * 1024, "what a block may have at most, from compute capability 8.0 on");
  return *reinterpret_cast<Tile<T, LC>*>(dynamic_shared_memory());
}

template <typename T>
int tile_bytes(int lc) {
  return static_cast<int>(lc == 1 ? sizeof(Tile<T, 1>) : lc == 2 ? sizeof(Tile<T, 2>) : sizeof(Tile<T, kVector<T>>));
}

template <typename T, int LC>
__device__ void load_centers(Tile<T, LC>& tile, const Item<T>& item, int64_t first) {
  if (threadIdx.x < kTile) tile.centers[threadIdx.x] = center_terms(item, first + threadIdx.x);
}

// Brings chunks of the points of a tile's two sides into shared memory, and remembers what is there.
template <typename T, int LC, int kSlabs>
struct Stage {
  static constexpr int kChunk = Tile<T, LC>::kChunk;
  static constexpr int kLoads = 8 / kSlabs;  // in flight per thread, as many as the registers have room for

  Tile<T, LC>& tile;
  const Item<T>& item;
  Points<T> row_points, column_points;
  int64_t first_row;
  int64_t first_column = 0;
  int present = -1;    // the chunk that was loaded last, -1 before the first
  bool ahead = false;  // the columns have been asked for

  __device__ int chunks() const { return static_cast<int>(ceil_div(item.l, kChunk)); }

  // To be called between two barriers. Where l has one chunk only, the rows need loading but once.
  __device__ void load(int chunk, bool with_rows) {
    const bool first = present < 0;
    present = chunk;
    if (with_rows && (first || chunks() > 1)) load_points(tile.rows, row_points, first_row);
    if (ahead) {
      take_columns();
    } else {
      load_points(tile.columns, column_points, first_column);
    }
    ahead = false;
  }

  // Asks for the columns of the next tile, to be copied while this one is worked on. Where there is room for them, l
  // has but one chunk.
  __device__ void load_ahead(int64_t first) {
    if constexpr (Tile<T, LC>::kAhead) {
      const int64_t l = item.l, k = coordinate(0);
      const T* from = column_points.points + first * l + k;
      for (int row = threadIdx.x / kChunk; row < rows_inside(column_points, first, k); row += kStep) {
        copy_async<sizeof(T)>(&tile.next_columns[row][threadIdx.x % kChunk], from + row * l);
      }
      ahead = true;
    }
  }

  // Whether all rows are near the origin, see most_parts_of_sums, and not so near each other beside it that this would
  // be the greater loss: the shift, which is 0 for centers about the origin, stands for the others. A barrier.
  template <typename Gain>
  __device__ bool rows_are_near(const Gain& gain) const {
    const int first = threadIdx.x / kSide;
    T norm[kMicro] = {}, spread[kMicro] = {};
    for (int64_t k = threadIdx.x % kSide; k < item.l; k += kSide) {
      const T shift = shift_of<3>(item, k);
      const int end = rows_inside(row_points, first_row, k);
#pragma unroll
      for (int a = 0; a < kMicro; ++a) {
        const int row = first + kSide * a;
        const T point = row < end ? row_points.points[(first_row + row) * item.l + k] : T(0);
        const T x = point * item.scale, moved = (point - shift) * item.scale;
        norm[a] = std::fma(x, x, norm[a]);
        spread[a] = std::fma(moved, moved, spread[a]);
      }
    }
    bool far = false;
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
      const T slope = gain(first + kSide * a), parts = slope * sum_over<kSide>(norm[a]);
      const T parts_moved = slope * sum_over<kSide>(spread[a]);
      far = far || !(parts <= most_parts_of_sums(item) && parts <= 16 * parts_moved + 8);  // NaN is
    }
    return __syncthreads_or(far) == 0;
  }

 private:
  static constexpr int kStep = kTileThreads / kChunk;  // rows that the block loads at once

  __device__ int64_t coordinate(int chunk) const { return static_cast<int64_t>(chunk) * kChunk + threadIdx.x % kChunk; }

  // How many of a tile's rows from `first` on have a coordinate k.
  __device__ int rows_inside(const Points<T>& source, int64_t first, int64_t k) const {
    const int64_t left = k < item.l ? source.count - first : 0;
    return static_cast<int>(left < kTile ? left : kTile);
  }

  __device__ void load_points(typename Tile<T, LC>::Chunk& to, const Points<T>& source, int64_t first) const {
    const int start = threadIdx.x / kChunk, end = rows_inside(source, first, coordinate(present));
    const T scale = item.scale;
    const T* from = source.points + (first + start) * item.l + coordinate(present);
#pragma unroll kLoads
    for (int step = 0; step < kTile / kStep; ++step) {
      const int row = start + step * kStep;
      to[row][threadIdx.x % kChunk] = row < end ? *from * scale : T(0);
      from += kStep * item.l;
    }
  }

  // Each thread takes what it has asked for itself.
  __device__ void take_columns() {
    const int end = rows_inside(column_points, first_column, coordinate(0));
    wait_for_copies();
#pragma unroll
    for (int row = threadIdx.x / kChunk; row < kTile; row += kStep) {
      const T point = row < end ? tile.next_columns[row][threadIdx.x % kChunk] * item.scale : T(0);
      tile.columns[row][threadIdx.x % kChunk] = point;
    }
  }
};

// A thread's 16 pairs to and from the block's 64 x 64.
template <typename T, int LC>
__device__ void store_pairs(Tile<T, LC>& tile, const MicroTile<T>& pairs) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
#pragma unroll
  for (int b = 0; b < kMicro; ++b) {
    const Vector<T, kMicro> column = {{pairs[0][b], pairs[1][b], pairs[2][b], pairs[3][b]}};
    store_vector(&tile.pairs[tx + kSide * b][kMicro * ty], column);
  }
}

template <typename T, int LC>
__device__ void add_stored_pairs(const Tile<T, LC>& tile, MicroTile<T>& pairs) {
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
__device__ void add_squared_distances(const Tile<T, LC>& tile, int width, MicroTile<T>& d2) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  for (int k = 0; k < width; k += kVector<T>) {  // the tile is 0 beyond l
    Vector<T, kVector<T>> row[kMicro], column[kMicro];
#pragma unroll
    for (int b = 0; b < kMicro; ++b) column[b] = load_vector<kVector<T>>(&tile.columns[tx + kSide * b][k]);
#pragma unroll
    for (int a = 0; a < kMicro; ++a) row[a] = load_vector<kVector<T>>(&tile.rows[kMicro * ty + a][k]);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) {
      const T at_row[kMicro] = {row[0].at[v], row[1].at[v], row[2].at[v], row[3].at[v]};
      const T at_column[kMicro] = {column[0].at[v], column[1].at[v], column[2].at[v], column[3].at[v]};
      add_squared_differences(at_row, at_column, d2);
    }
  }
}

// Of the tile whose columns start at stage.first_column; those of the next one at next_column, or -1: there is none.
// Chunks from the last to the first, so that the weighted sums find the first one still present. What else the tile
// needs is loaded beside the first of them. Between chunks the sums wait in shared memory: so there are two levels of
// them, and registers for what goes on.
template <typename T, int LC, int kSlabs, typename Load>
__device__ void squared_distances(Stage<T, LC, kSlabs>& stage, int64_t next_column, MicroTile<T>& d2,
                                  const Load& load_beside) {
  constexpr int kChunk = Tile<T, LC>::kChunk;
  const int last = stage.chunks() - 1;
  for (int chunk = last; chunk >= 0; --chunk) {
    const int64_t left = stage.item.l - static_cast<int64_t>(chunk) * kChunk;
    __syncthreads();
    if (chunk == last) load_beside();
    stage.load(chunk, true);
    __syncthreads();
    if (next_column >= 0) stage.load_ahead(next_column);
    clear(d2);
    add_squared_distances(stage.tile, static_cast<int>(left < kChunk ? left : kChunk), d2);
    if (chunk < last) add_stored_pairs(stage.tile, d2);
    if (chunk > 0) store_pairs(stage.tile, d2);
  }
}

// total[a][c] = total[a][c] * factor[a] + sum over the tile's columns of weight[row 4 ty + a] * coordinate LC tx + c of
// the chunk that is present, of the column or of its difference to the row; for a = first + {0..kRows-1}.
template <int kRows, bool kDifferences, typename T, int LC>
__device__ void add_weighted_sums(const Tile<T, LC>& tile, int first, const T (&factor)[kMicro],
                                  T (&total)[kMicro][LC]) {
  const int tx = threadIdx.x % kSide, first_row = kMicro * (threadIdx.x / kSide) + first;
  T sums[kRows][LC] = {};
  Vector<T, LC> row[kRows] = {};
  if constexpr (kDifferences) {
#pragma unroll
    for (int a = 0; a < kRows; ++a) row[a] = load_vector<LC>(&tile.rows[first_row + a][LC * tx]);
  }
#pragma unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vector<T, kRows> weight = load_vector<kRows>(&tile.pairs[j][first_row]);
    const Vector<T, LC> point = load_vector<LC>(&tile.columns[j][LC * tx]);
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
#pragma unroll
      for (int c = 0; c < LC; ++c) {
        const T from_row = kDifferences ? point.at[c] - row[a].at[c] : point.at[c];
        sums[a][c] = std::fma(weight.at[a], from_row, sums[a][c]);
      }
    }
  }
#pragma unroll
  for (int a = 0; a < kRows; ++a) {
#pragma unroll
    for (int c = 0; c < LC; ++c) total[first + a][c] = std::fma(total[first + a][c], factor[first + a], sums[a][c]);
  }
}

// total = total * factor + the tile's weighted sums, for the first `slabs` of the block's chunks, at most kSlabs.
// `near`: of columns, else of differences.
template <typename T, int LC, int kSlabs>
__device__ void add_weighted_sums(Stage<T, LC, kSlabs>& stage, bool near, int slabs, const T (&factor)[kMicro],
                                  T (&total)[kSlabs][kMicro][LC]) {
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    const int chunk = stage.tile.first_chunk + slab;
    if (slab >= slabs || chunk >= stage.chunks()) break;
    if (chunk != stage.present) {
      __syncthreads();
      stage.load(chunk, !near);
      __syncthreads();
    }
    if (near) {
      add_weighted_sums<kMicro, false>(stage.tile, 0, factor, total[slab]);
    } else {  // the rows take registers, too many for all four at a time
      add_weighted_sums<kMicro / 2, true>(stage.tile, 0, factor, total[slab]);
      add_weighted_sums<kMicro / 2, true>(stage.tile, kMicro / 2, factor, total[slab]);
    }
  }
}

}  // namespace cuda
}  // namespace kdejsd
