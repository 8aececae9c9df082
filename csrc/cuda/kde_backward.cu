// The transposed pass of the kde op: gradients for centers, log-weights and a bandwidth of each center's own. Blocks
// sum over the queries in a fixed order; nothing is added by two of them.
#include <utility>

#include "cuda/kde_passes.h"
#include "cuda/kde_tile.cuh"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kMergeThreads = 256;

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
  tile.excluded_row[threadIdx.x] = among(exclude, first_center, first_center + kTile);
  if (!inside) {  // weight 0 2^-inf
    tile.grad[threadIdx.x] = tile.log2_rest[threadIdx.x] = T(0);
    tile.log2_prob[threadIdx.x] = T(INFINITY);
    return;
  }
  const bool one_less = exclude >= 0 && exclude < item.m;
  const double log2_prob = kLog2E * (log_prob[i] - tile.log_constant[one_less]);
  tile.log2_prob[threadIdx.x] = static_cast<T>(log2_prob);
  tile.log2_rest[threadIdx.x] = static_cast<T>(log2_prob - static_cast<double>(tile.log2_prob[threadIdx.x]));
  tile.grad[threadIdx.x] = grad[i];
}

// Turns squared distances into weights, and adds them to the rows' sums, times d2 to the moments.
template <typename T, int LC>
__device__ void backward_weights(Tile<T, LC>& tile, MicroTile<T>& pairs) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  RowSums<T> sums = tile.row_sums[threadIdx.x];
  T grad[kMicro], log2_prob[kMicro], log2_rest[kMicro];
  int excluded_row[kMicro];
#pragma unroll
  for (int b = 0; b < kMicro; ++b) {
    const int i = tx + kSide * b;
    grad[b] = tile.grad[i];
    log2_prob[b] = tile.log2_prob[i];
    log2_rest[b] = tile.log2_rest[i];
    excluded_row[b] = tile.excluded_row[i];
  }
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    const CenterTerms<T> center = tile.centers[kMicro * ty + a];
    T sum = T(0), moment = T(0);
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      const bool excluded = excluded_row[b] == kMicro * ty + a;
      const T x = excluded ? -T(INFINITY) : std::fma(-center.gain, pairs[a][b], center.offset);
      const T weight = grad[b] * std::exp2((x - log2_prob[b]) - log2_rest[b]);
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
  const T h = bandwidth_of(item, j);
  const T scaled = item.scale * h;
  dbandwidth[at] = (moment / (scaled * scaled) - static_cast<T>(item.l) * sum) / h;
}

// dcenters[j] = sum w (query - center) / h^2 for a thread's rows, the first of which is `first`. `near`: the sums are
// of the queries, else of the differences.
template <typename T, int LC, int kSlabs>
__device__ void write_dcenters(const Item<T>& item, bool near, int64_t first, int first_chunk, int chunks,
                               const T (&mass)[kMicro], const T (&sums)[kSlabs][kMicro][LC], T* dcenters /* [m, l] */) {
  T h[kMicro];
#pragma unroll
  for (int a = 0; a < kMicro; ++a) h[a] = first + a < item.m ? bandwidth_of(item, first + a) : T(1);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    if (slab >= chunks) break;
#pragma unroll
    for (int c = 0; c < LC; ++c) {
      const int64_t k = static_cast<int64_t>(first_chunk + slab) * Tile<T, LC>::kChunk + LC * (threadIdx.x % kSide) + c;
      if (k >= item.l) continue;
#pragma unroll
      for (int a = 0; a < kMicro; ++a) {
        const int64_t at = (first + a) * item.l + k;
        if (first + a >= item.m) break;
        T sum = sums[slab][a][c];
        if (near) sum -= item.centers[at] * item.scale * mass[a];
        dcenters[at] = sum * (T(1) / (item.scale * h[a])) / h[a];
      }
    }
  }
}

template <typename T, int LC, int kSlabs>
__global__ void __launch_bounds__(kTileThreads, kSlabs == 1 && sizeof(T) == 4 ? 2 : 1)
    kde_backward_kernel(const KdeBackward args, const T* middle, const BackwardPlan plan) {
  const auto [center_tile, group, split, batch, first_tile, end_tile] =
      block_share(plan, plan.center_tiles, plan.query_tiles);
  const Item<T> item = batch_item(args.mixture, middle, batch);
  Tile<T, LC>& tile = shared_tile<T, LC>();
  const int64_t first_center = center_tile * kTile;
  const T* grad = static_cast<const T*>(args.grad) + batch * item.n;  // [n]
  const double* log_prob = args.log_prob + batch * item.n;            // [n]
  Stage<T, LC, kSlabs> stage{tile, item, {item.centers, item.m}, {item.query, item.n}, first_center};
  load_centers(tile, item, first_center);
  if (threadIdx.x == 0) tile.first_chunk = group * plan.chunks;
  if (threadIdx.x < 2) {
    const int64_t count = kde_count(item.m, item.log_weights == nullptr, static_cast<int>(threadIdx.x) - 1);
    tile.log_constant[threadIdx.x] = kde_log_constant(count, item.l, static_cast<double>(item.h0));
  }

  tile.row_sums[threadIdx.x] = {};
  const bool near = args.dcenters == nullptr || stage.rows_are_near([&](int row) {
    return item.per_center ? center_terms(item, first_center + row).gain : item.gain;
  });
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
    add_weighted_sums(stage, near, plan.chunks, same, queries);
  }

  const BackwardOutputs<T> to = BackwardOutputs<T>(args).of_split(split * plan.elements);
  const int64_t first_row = first_center + kMicro * (threadIdx.x / kSide);
  T sums[kMicro];
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
    sums[a] = sum_over<kSide>(tile.row_sums[threadIdx.x].sum[a]);
    const T moment = sum_over<kSide>(tile.row_sums[threadIdx.x].moment[a]);
    const int64_t j = first_row + a;
    if (group != 0 || threadIdx.x % kSide != 0 || j >= item.m) continue;
    write_dcenter_scalars(item, j, batch * item.m + j, sums[a], moment, to.dlog_weights, to.dbandwidth);
  }
  if (to.dcenters == nullptr) return;
  write_dcenters<T, LC, kSlabs>(item, near, first_row, group * plan.chunks, plan.chunks, sums, queries,
                                to.dcenters + batch * item.m * item.l);
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

template <typename T>
using Kernel = void (*)(KdeBackward, const T*, BackwardPlan);

template <typename T>
Kernel<T> kernel_of(const BackwardPlan& plan) {
  constexpr int kWidest = kVector<T>;
  if (plan.lc == 1) return kde_backward_kernel<T, 1, 1>;
  if (plan.lc < kWidest) return kde_backward_kernel<T, 2, 1>;
  if (plan.slabs == 1) return kde_backward_kernel<T, kWidest, 1>;
  return plan.slabs == 2 ? kde_backward_kernel<T, kWidest, 2> : kde_backward_kernel<T, kWidest, kMostSlabs>;
}

}  // namespace

template <typename T>
int backward_resident(const BackwardPlan& plan, int device) {
  return resident_blocks(kernel_of<T>(plan), kTileThreads, tile_bytes<T>(plan.lc), device);
}

template <typename T>
void launch_backward(const KdeBackward& args, const T* middle, const BackwardPlan& plan, T* parts,
                     cudaStream_t stream) {
  const KdeMixture& mixture = args.mixture;
  KdeBackward to = args;
  if (plan.splits > 1) {
    T* next = parts;
    const int64_t centers = mixture.batch * mixture.m;
    if (args.dcenters != nullptr) to.dcenters = std::exchange(next, next + centers * mixture.l);
    if (args.dlog_weights != nullptr) to.dlog_weights = std::exchange(next, next + centers);
    if (args.dbandwidth != nullptr) to.dbandwidth = next;
  }
  launch("kde_backward_kernel", kernel_of<T>(plan), plan.blocks(mixture.batch), kTileThreads, tile_bytes<T>(plan.lc),
         stream, to, middle, plan);
  if (plan.splits == 1) return;
  launch("kde_backward_merge_kernel", kde_backward_merge_kernel<T>, ceil_div(plan.elements, kMergeThreads),
         kMergeThreads, 0, stream, args, static_cast<const T*>(parts), plan.splits, plan.elements);
}

template int backward_resident<float>(const BackwardPlan&, int);
template int backward_resident<double>(const BackwardPlan&, int);
template void launch_backward<float>(const KdeBackward&, const float*, const BackwardPlan&, float*, cudaStream_t);
template void launch_backward<double>(const KdeBackward&, const double*, const BackwardPlan&, double*, cudaStream_t);

}  // namespace cuda
}  // namespace kdejsd
