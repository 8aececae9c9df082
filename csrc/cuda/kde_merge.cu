// The merge of a forward pass: what the splits of the centers left becomes value and gradients.
#include "cuda/kde_passes.h"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kThreads = 256;

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
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
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
__global__ void __launch_bounds__(kThreads)
    kde_merge_kernel(const KdeForward args, const T* middle, const Partials<T> partials, int64_t splits) {
  const KdeMixture& mixture = args.mixture;
  const int64_t rows = mixture.batch * mixture.n;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
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

}  // namespace

template <typename T>
void launch_merge(const KdeForward& args, const T* middle, const Partials<T>& partials, int64_t splits,
                  cudaStream_t stream) {
  const int64_t rows = args.mixture.batch * args.mixture.n;
  launch("kde_merge_kernel", kde_merge_kernel<T>, ceil_div(rows, kThreads / kWarp), kThreads, 0, stream, args, middle,
         partials, splits);
}

template void launch_merge<float>(const KdeForward&, const float*, const Partials<float>&, int64_t, cudaStream_t);
template void launch_merge<double>(const KdeForward&, const double*, const Partials<double>&, int64_t, cudaStream_t);

}  // namespace cuda
}  // namespace kdejsd
