// The forward pass of the kde op without tensor cores: log-sum-exp over the centers and the weighted sums of them, for
// float64, for more dimensions than the tensor cores' kernel takes, and for what the transposed pass builds on.
#include "cuda/kde_passes.h"
#include "cuda/kde_tile.cuh"

namespace kdejsd {
namespace cuda {
namespace {

// Turns squared distances into weights relative to the rows' new maxima; factor brings the old sums there.
// `first_center`: of the tile, counted from the block's first.
template <typename T, int LC>
__device__ void forward_weights(Tile<T, LC>& tile, bool per_center, int first_center, MicroTile<T>& pairs,
                                T (&factor)[kMicro]) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  RowSums<T> sums = tile.row_sums[threadIdx.x];
  CenterTerms<T> center[kMicro];
#pragma unroll
  for (int b = 0; b < kMicro; ++b) center[b] = tile.centers[tx + kSide * b];
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const int excluded = tile.exclude[kMicro * ty + a] - first_center;
    T x[kMicro], top = -T(INFINITY);
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      x[b] = excluded == tx + kSide * b ? -T(INFINITY) : std::fma(-center[b].gain, pairs[a][b], center[b].offset);
      top = std::fmax(top, x[b]);
    }
    const T max = std::fmax(sums.max[a], max_over<kSide>(top)), base = exponent_base(max);
    factor[a] = rescale_factor(sums.max[a], max);
    T sum = T(0), moment = T(0);
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      const T weight = std::exp2(x[b] - base);
      sum += weight;
      const T scaled = weight * center[b].precision;
      const T distance = weight == T(0) ? T(0) : weight * pairs[a][b];  // d2 may be infinite where the weight is 0
      moment += per_center ? scaled : distance;
      pairs[a][b] = scaled;
    }
    sums.max[a] = max;
    sums.sum[a] = std::fma(sums.sum[a], factor[a], sum);
    sums.moment[a] = std::fma(sums.moment[a], factor[a], moment);
  }
  tile.row_sums[threadIdx.x] = sums;
}

// Writes a thread's rows' sums over its block's columns, and leaves in `mass` those of the factors of differences.
template <typename T>
__device__ void write_row_sums(const RowSums<T>& sums, const Partials<T>& partials, int64_t first_row, int64_t end_row,
                               bool writes, bool per_center, T (&mass)[kMicro]) {
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const T sum = sum_over<kSide>(sums.sum[a]);
    const T moment = sum_over<kSide>(sums.moment[a]);
    const int64_t row = first_row + a;
    mass[a] = per_center ? moment : sum;
    if (!writes || threadIdx.x % kSide != 0 || row >= end_row) continue;
    partials.max[row] = sums.max[a];
    partials.sum[row] = sum;
    if (partials.moment != nullptr) partials.moment[row] = moment;
  }
}

template <typename T, int LC, int kSlabs>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 ? 2 : 1)
    kde_forward_kernel(const KdeMixture mixture, const T* middle, const ForwardPlan plan, const Partials<T> partials) {
  const auto [query_tile, group, split, batch, first_tile, end_tile] =
      block_share(plan, plan.query_tiles, plan.center_tiles);
  const Item<T> item = batch_item(mixture, middle, batch);
  Tile<T, LC>& tile = shared_tile<T, LC>();
  const int64_t first_query = query_tile * kTile;
  Stage<T, LC, kSlabs> stage{tile, item, {item.query, item.n}, {item.centers, item.m}, first_query};
  if (threadIdx.x == 0) tile.first_chunk = group * plan.chunks;
  if (threadIdx.x < kTile) {
    const int64_t i = first_query + threadIdx.x;
    const int64_t exclude = item.exclude != nullptr && i < item.n ? item.exclude[i] : -1;
    tile.exclude[threadIdx.x] = among(exclude, first_tile * kTile, end_tile * kTile);
  }

  const T gain = largest_gain(item);
  const bool near = partials.sum_centers == nullptr || stage.rows_are_near([&](int) { return gain; });
  T centers[kSlabs][kMicro][LC] = {};
  const T none = -T(INFINITY);
  tile.row_sums[threadIdx.x] = {{none, none, none, none}, {}, {}};
  for (int64_t center_tile = first_tile; center_tile < end_tile; ++center_tile) {
    stage.first_column = center_tile * kTile;
    T pairs[kMicro][kMicro], factor[kMicro];
    squared_distances(stage, center_tile + 1 < end_tile ? stage.first_column + kTile : -1, pairs,
                      [&] { load_centers(tile, item, stage.first_column); });
    forward_weights(tile, item.per_center, static_cast<int>(center_tile - first_tile) * kTile, pairs, factor);
    if (partials.sum_centers == nullptr) continue;
    store_pairs(tile, pairs);
    __syncthreads();
    add_weighted_sums(stage, near, plan.chunks, factor, centers);
  }

  const int64_t rows = mixture.batch * item.n;
  const int64_t first_row = (split * rows + batch * item.n) + first_query + kMicro * (threadIdx.x / kSide);
  const int64_t end_row = split * rows + (batch + 1) * item.n;
  T mass[kMicro];
  write_row_sums(tile.row_sums[threadIdx.x], partials, first_row, end_row, group == 0, item.per_center, mass);
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
        if (first_row + a >= end_row || k >= item.l) continue;
        T sum = centers[slab][a][c];
        if (near)
          sum -= item.query[(first_query + kMicro * (threadIdx.x / kSide) + a) * item.l + k] * item.scale * mass[a];
        partials.sum_centers[(first_row + a) * item.l + k] = sum;
      }
    }
  }
}

template <typename T>
using Kernel = void (*)(KdeMixture, const T*, ForwardPlan, Partials<T>);

template <typename T>
Kernel<T> kernel_of(const ForwardPlan& plan) {
  constexpr int kWidest = kVector<T>;
  if (plan.lc == 1) return kde_forward_kernel<T, 1, 1>;
  if (plan.lc < kWidest) return kde_forward_kernel<T, 2, 1>;
  if (plan.slabs == 1) return kde_forward_kernel<T, kWidest, 1>;
  return plan.slabs == 2 ? kde_forward_kernel<T, kWidest, 2> : kde_forward_kernel<T, kWidest, kMostSlabs>;
}

}  // namespace

template <typename T>
int forward_resident(const ForwardPlan& plan, int device) {
  return resident_blocks(kernel_of<T>(plan), kTileThreads, tile_bytes<T>(plan.lc), device);
}

template <typename T>
void launch_forward(const KdeForward& args, const T* middle, const ForwardPlan& plan, const Partials<T>& partials,
                    cudaStream_t stream) {
  launch("kde_forward_kernel", kernel_of<T>(plan), plan.blocks(args.mixture.batch), kTileThreads,
         tile_bytes<T>(plan.lc), stream, args.mixture, middle, plan, partials);
}

template int forward_resident<float>(const ForwardPlan&, int);
template int forward_resident<double>(const ForwardPlan&, int);
template void launch_forward<float>(const KdeForward&, const float*, const ForwardPlan&, const Partials<float>&,
                                    cudaStream_t);
template void launch_forward<double>(const KdeForward&, const double*, const ForwardPlan&, const Partials<double>&,
                                     cudaStream_t);

}  // namespace cuda
}  // namespace kdejsd
