// The merge of a forward pass: what the splits of the centers left becomes value and gradients.
#include "cuda/kde_passes.h"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

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
#pragma unroll 4
  for (int64_t split = lane; split < splits; split += kWarp) max = std::fmax(max, partials.max[split * rows + row]);
  max = max_over<kWarp>(max);
  T sum = T(0), moment = T(0);
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
  for (int64_t split = lane; split < splits; split += kWarp) {
    const int64_t at = split * rows + row;
    const T factor = rescale_factor(partials.max[at], max);
    sum += factor * partials.sum[at];
    if (partials.moment != nullptr) moment += factor * partials.moment[at];
  }
  return {{max, sum_over<kWarp>(sum)}, sum_over<kWarp>(moment)};
}

// The squared norm of a vector of l coordinates, by the lanes of a warp.
template <typename Coordinate>
__device__ double squared_norm(int64_t l, const Coordinate& coordinate) {
  double sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < l; k += kWarp) sum = std::fma(coordinate(k), coordinate(k), sum);
  return sum_over<kWarp>(sum);
}

// How the warps of a row share its sums of centers. Lanes are coordinates, and where l is small what remains of them
// are splits; so are the warps that remain where l has fewer chunks of coordinates than the row has warps.
struct Sharing {
  int width;        // lanes that are coordinates: those of a chunk
  int rounds;       // chunks that a warp takes one after the other
  int sharers;      // warps that share a chunk
  int chunk, part;  // of this warp in the first round: which chunk, and which of its sharers it is
  int step;         // chunks from one round to the next

  __device__ Sharing(int64_t l, int warps, int warp) {
    width = 1;
    while (width < l && width < kWarp) width *= 2;
    const int64_t chunks = ceil_div(l, width);
    step = 1;
    while (step < chunks && step < warps) step *= 2;
    sharers = warps / step;
    rounds = static_cast<int>(ceil_div(chunks, step));
    chunk = warp % step;
    part = warp / step;
  }
};

// The sum over the splits of a query's weighted sums of coordinate k, in every lane that has the coordinate of the
// first of the warps that share it. All threads of the block call this as often: it has barriers.
template <typename T>
__device__ T sum_of_centers(const Partials<T>& partials, T max, int64_t splits, int64_t row, int64_t rows, int64_t k,
                            int64_t l, const Sharing& sharing, T (&scratch)[kWarps][kWarp]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first = sharing.part * (kWarp / sharing.width) + lane / sharing.width;
  const int step = sharing.sharers * (kWarp / sharing.width);
  T sum = T(0);
  if (k < l) {
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
    for (int64_t split = first; split < splits; split += step) {
      const int64_t at = split * rows + row;
      sum += rescale_factor(partials.max[at], max) * partials.sum_centers[at * l + k];
    }
  }
  for (int other = sharing.width; other < kWarp; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
  if (sharing.sharers == 1) return sum;
  __syncthreads();  // before scratch is written: it may be in use
  scratch[warp][lane] = sum;
  __syncthreads();
  for (int other = 1; other < sharing.sharers; ++other) {
    if (sharing.part == 0) sum += scratch[warp + other * sharing.step][lane];
  }
  return sum;
}

// `warps` warps per query, a power of two: they merge the splits and write value and gradients,
//   dquery = weight (s_e + query * pull), s_e = (sum of centers - query sum of precisions) / (sum of weights) / h0^2,
// both scaled; a center of the query's own takes its share of s_e. dquery may be where the only split has left its
// sums: the lane that writes a number is the one that has read it.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    kde_merge_kernel(const KdeForward args, const T* middle, const Partials<T> partials, int64_t splits, int warps) {
  __shared__ T scratch[kWarps][kWarp];
  const KdeMixture& mixture = args.mixture;
  const int64_t rows = mixture.batch * mixture.n;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kWarps / warps) + warp / warps;
  const bool inside = row < rows;
  if (!inside) row = rows - 1;
  const int64_t i = row % mixture.n;
  const Item<T> item = batch_item(mixture, middle, row / mixture.n);
  const T* query = item.query + i * item.l;

  const MergedRow<T> merged = merge_splits(partials, splits, row, rows);
  const int64_t exclude = item.exclude != nullptr ? item.exclude[i] : -1;
  const int64_t count = kde_count(item.m, item.log_weights == nullptr, exclude) + (args.own != nullptr);
  const double h0 = static_cast<double>(item.h0);
  const auto own_step = [&](int64_t k) {
    const T own = static_cast<const T*>(args.own)[row * item.l + k];
    return (static_cast<double>(own) - static_cast<double>(query[k])) / h0;
  };
  KdeShares shares = {{static_cast<double>(merged.exponents.max), static_cast<double>(merged.exponents.sum)}, 0.0, 1.0};
  if (args.own != nullptr) shares = with_own_center(shares.sum, squared_norm(item.l, own_step));
  const bool infinite = merged.exponents.sum == T(INFINITY);  // by a log-weight
  const double log_prob =
      infinite ? static_cast<double>(NAN) : kde_log_prob(shares.sum, kde_log_constant(count, item.l, h0));
  const bool plain = args.value_kind == KdeValue::kLogProb;
  const double variance = args.target_variance;
  const auto coordinate = [&](int64_t k) { return static_cast<double>(query[k]); };
  const double log_target = plain ? 0.0 : normal_log_prob(squared_norm(item.l, coordinate), item.l, variance);
  const KdeTerm term = kde_term(args.value_kind, log_prob, log_target);

  if (args.dquery != nullptr) {
    const T weight = static_cast<T>(term.weight), pull = plain ? T(0) : static_cast<T>(1 / variance);
    const T inverse = T(1) / (item.scale * item.h0);  // that of a subnormal h0 itself is infinite
    const T precision = (item.per_center ? merged.moment : merged.exponents.sum) / merged.exponents.sum;
    T* dquery = static_cast<T*>(args.dquery) + row * item.l;
    const Sharing sharing(item.l, warps, warp % warps);
    for (int round = 0; round < sharing.rounds; ++round) {
      const int64_t k =
          static_cast<int64_t>(sharing.chunk + round * sharing.step) * sharing.width + lane % sharing.width;
      const T sum = sum_of_centers(partials, merged.exponents.max, splits, row, rows, k, item.l, sharing, scratch);
      if (!inside || k >= item.l || lane >= sharing.width || sharing.part != 0) continue;
      const T scaled_query = (query[k] - shift_of<3>(item, k)) * item.scale;
      T score = (sum / merged.exponents.sum - scaled_query * precision) * inverse / item.h0;
      if (args.own != nullptr) {
        score = static_cast<T>(merged_score(shares, own_step(k) / h0, static_cast<double>(score)));
      }
      dquery[k] = weight * (score + query[k] * pull);
    }
  }
  if (!inside || lane != 0 || warp % warps != 0) return;
  args.value[row] = term.value;
  if (args.dbandwidth != nullptr) {  // sum pi d2 / h^3 - l / h
    const double scaled = static_cast<double>(item.scale) * h0;
    const double mean = static_cast<double>(merged.moment) / static_cast<double>(merged.exponents.sum);
    args.dbandwidth[row] = (mean / (scaled * scaled) - static_cast<double>(item.l)) / h0;
  }
}

// As many warps per query as the device has room for at a time, 16 a multiprocessor, and as there are splits for.
int warps_per_row(int64_t rows, int64_t splits, int multiprocessors) {
  int warps = 1;
  while (warps < kWarps && 2 * warps <= splits && rows * 2 * warps <= 16ll * multiprocessors) warps *= 2;
  return warps;
}

}  // namespace

template <typename T>
void launch_merge(const KdeForward& args, const T* middle, const Partials<T>& partials, int64_t splits, int device,
                  cudaStream_t stream) {
  const int64_t rows = args.mixture.batch * args.mixture.n;
  const int warps = warps_per_row(rows, splits, multiprocessor_count(device));
  launch("kde_merge_kernel", kde_merge_kernel<T>, ceil_div(rows, kWarps / warps), kThreads, 0, stream, args, middle,
         partials, splits, warps);
}

template void launch_merge<float>(const KdeForward&, const float*, const Partials<float>&, int64_t, int, cudaStream_t);
template void launch_merge<double>(const KdeForward&, const double*, const Partials<double>&, int64_t, int,
                                   cudaStream_t);

}  // namespace cuda
}  // namespace kdejsd
