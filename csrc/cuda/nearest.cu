// The nearest op on CUDA devices: all pairs compared, tile by tile, nothing of size n x n stored.
//
// Blocks of 16 x 16 threads work on tiles of 64 queries (rows) times 64 candidates (columns), both of them samples.
// Thread (ty, tx) has rows 4 ty + {0..3} and columns 4 tx + {0..3}; it keeps for each of its rows the nearest of the
// candidates that it has seen. Coordinates pass through shared memory in chunks of kNearestChunk; a pair's sum stays in
// a register and runs over the dimensions in order, one multiply-add each, as on the CPU. Where there are too few row
// tiles to fill the device, the candidates are split among blocks, and a second kernel merges what these found.
//
// A thread's candidates come in rising order, so a later one must be strictly nearer; wherever two results meet, the
// lower index wins a tie. Hence the result does not depend on how the work is cut.
#include <algorithm>

#include "cuda/micro_tile.cuh"
#include "cuda/steps.h"
#include "cuda/warp.cuh"
#include "kernels.h"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kMergeThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;  // wanted in the grid, for an even load

struct Plan {
  int64_t row_tiles, column_tiles, splits;
};

// The nearest so far; index INT32_MAX before any.
template <typename T>
struct Best {
  T square;
  int32_t index;
};

template <typename T>
__device__ Best<T> nothing_found() {
  return {T(INFINITY), INT32_MAX};
}

template <typename T>
__device__ Best<T> nearer(Best<T> a, Best<T> b) {
  return b.square < a.square || (b.square == a.square && b.index < a.index) ? b : a;
}

template <typename T>
__device__ int64_t index_of(Best<T> best) {
  return best.square < T(INFINITY) ? best.index : -1;
}

// What the splits found, [splits, batch n] each; not there for a single split.
template <typename T>
struct Partials {
  T* squares;
  int32_t* indices;
};

// Coordinates of 64 samples, [coordinate][sample]. Rows of 68 numbers: a thread's four lie in one aligned vector.
template <typename T>
using Coordinates = T[kNearestChunk][kTile + 4];

// Samples first ... first + 63, coordinates chunk ... chunk + kNearestChunk - 1. Beyond the last sample they are NaN,
// which is nearer than nothing.
template <typename T>
__device__ void load(Coordinates<T>& to, const T* samples, int64_t n, int64_t d, int64_t first, int64_t chunk) {
  const int k = threadIdx.x % kNearestChunk;
  if (chunk + k >= d) return;
#pragma unroll
  for (int step = 0; step < kTile; step += kTileThreads / kNearestChunk) {
    const int row = step + threadIdx.x / kNearestChunk;
    to[k][row] = first + row < n ? samples[(first + row) * d + chunk + k] : T(NAN);
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) nearest_kernel(NearestSearch args, Plan plan, Partials<T> partials) {
  __shared__ __align__(16) Coordinates<T> rows;
  __shared__ __align__(16) Coordinates<T> columns;
  __shared__ int64_t column_labels[kTile];

  const int64_t n = args.n, d = args.d;
  const int64_t split = blockIdx.x % plan.splits, tile = blockIdx.x / plan.splits % plan.row_tiles;
  const int64_t item = blockIdx.x / plan.splits / plan.row_tiles;
  const T* samples = static_cast<const T*>(args.latents) + item * n * d;
  const int64_t* labels = args.labels + item * n;
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  const int64_t first_row = tile * kTile;
  const bool rows_stay = d <= kNearestChunk;

  int64_t row_labels[kMicro];
  Best<T> best[kMicro];
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const int64_t row = first_row + kMicro * ty + a;
    row_labels[a] = labels[row < n ? row : n - 1];
    best[a] = nothing_found<T>();
  }

  const int64_t end = plan.column_tiles * (split + 1) / plan.splits;
  bool rows_present = false;
  for (int64_t column_tile = plan.column_tiles * split / plan.splits; column_tile < end; ++column_tile) {
    const int64_t first_column = column_tile * kTile;
    MicroTile<T> squares = {};
    for (int64_t chunk = 0; chunk < d; chunk += kNearestChunk) {
      __syncthreads();
      if (!rows_present) load(rows, samples, n, d, first_row, chunk);
      rows_present = rows_stay;
      load(columns, samples, n, d, first_column, chunk);
      if (chunk == 0 && threadIdx.x < kTile) {
        const int64_t column = first_column + threadIdx.x;
        column_labels[threadIdx.x] = column < n ? labels[column] : 0;
      }
      __syncthreads();
      const int width = static_cast<int>(d - chunk < kNearestChunk ? d - chunk : kNearestChunk);
#pragma unroll 4
      for (int k = 0; k < width; ++k) {
        const Vector<T, kMicro> row = load_vector<kMicro>(&rows[k][kMicro * ty]);
        const Vector<T, kMicro> column = load_vector<kMicro>(&columns[k][kMicro * tx]);
        add_squared_differences(row.at, column.at, squares);
      }
    }
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      const int64_t label = column_labels[kMicro * tx + b];
      const int32_t index = static_cast<int32_t>(first_column + kMicro * tx + b);  // beyond n, perhaps, of no use
#pragma unroll
      for (int a = 0; a < kMicro; ++a) {
        if (squares[a][b] < best[a].square && label != row_labels[a]) best[a] = Best<T>{squares[a][b], index};
      }
    }
  }

#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
#pragma unroll
    for (int lane = kSide / 2; lane > 0; lane /= 2) {  // over the 16 threads that share the row
      const T square = __shfl_xor_sync(kAllLanes, best[a].square, lane);
      const int32_t index = __shfl_xor_sync(kAllLanes, best[a].index, lane);
      best[a] = nearer(best[a], Best<T>{square, index});
    }
    const int64_t row = first_row + kMicro * ty + a;
    if (tx != 0 || row >= n) continue;
    if (plan.splits == 1) {
      args.index[item * n + row] = index_of(best[a]);
    } else {
      const int64_t place = (split * args.batch + item) * n + row;
      partials.squares[place] = best[a].square;
      partials.indices[place] = best[a].index;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    nearest_merge_kernel(NearestSearch args, int64_t splits, Partials<T> partials) {
  const int64_t queries = args.batch * args.n, i = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i >= queries) return;
  Best<T> best = nothing_found<T>();
  for (int64_t split = 0; split < splits; ++split) {
    best = nearer(best, {partials.squares[split * queries + i], partials.indices[split * queries + i]});
  }
  args.index[i] = index_of(best);
}

Plan plan_search(const NearestSearch& args, int device) {
  Plan plan = {};
  plan.row_tiles = plan.column_tiles = ceil_div(args.n, kTile);
  const int64_t wanted = static_cast<int64_t>(kBlocksPerMultiprocessor) * multiprocessor_count(device);
  plan.splits = std::min(plan.column_tiles, ceil_div(wanted, args.batch * plan.row_tiles));
  return plan;
}

int64_t partial_count(const NearestSearch& args, const Plan& plan) {
  return plan.splits == 1 ? 0 : plan.splits * args.batch * args.n;
}

template <typename T>
void launch_search(const NearestSearch& args, void* workspace, int device, cudaStream_t stream) {
  const Plan plan = plan_search(args, device);
  T* squares = static_cast<T*>(workspace);
  const Partials<T> partials = {squares, reinterpret_cast<int32_t*>(squares + partial_count(args, plan))};

  launch("nearest_kernel", nearest_kernel<T>, args.batch * plan.row_tiles * plan.splits, kTileThreads, 0, stream, args,
         plan, partials);
  if (plan.splits == 1) return;
  launch("nearest_merge_kernel", nearest_merge_kernel<T>, ceil_div(args.batch * args.n, kMergeThreads), kMergeThreads,
         0, stream, args, plan.splits, partials);
}

bool is_empty(const NearestSearch& args) { return args.batch == 0 || args.n == 0; }

}  // namespace

int64_t nearest_workspace(const NearestSearch& args, int device) {
  if (is_empty(args)) return 0;
  const size_t number = args.dtype == DType::kFloat32 ? sizeof(float) : sizeof(double);
  return partial_count(args, plan_search(args, device)) * static_cast<int64_t>(number + sizeof(int32_t));
}

void nearest(const NearestSearch& args, void* workspace, int device, uintptr_t stream) {
  if (is_empty(args)) return;
  if (args.dtype == DType::kFloat32) {
    launch_search<float>(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
  } else {
    launch_search<double>(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
  }
}

}  // namespace cuda
}  // namespace kdejsd
