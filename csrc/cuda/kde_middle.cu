// The middle one of a batch item's bandwidths, where each center has its own: the unit of its distances. And the least
// one, which says how sharp the differences are that matter.
#include "cuda/kde_passes.h"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kThreads = 1024;

// One block per batch item.
template <typename T>
__global__ void __launch_bounds__(kThreads) kde_middle_kernel(const KdeMixture mixture, T* middle /* [2, batch] */) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T least[kWarps], greatest[kWarps];
  const T* bandwidth = static_cast<const T*>(mixture.bandwidth) + blockIdx.x * mixture.bandwidth_stride;
  T low = T(INFINITY), high = T(0);
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < mixture.m; j += kThreads) {
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
  middle[mixture.batch + blockIdx.x] = low;
}

}  // namespace

template <typename T>
const T* launch_middle(const KdeMixture& mixture, T* at, cudaStream_t stream) {
  if (!mixture.per_center) return nullptr;
  launch("kde_middle_kernel", kde_middle_kernel<T>, mixture.batch, kThreads, 0, stream, mixture, at);
  return at;
}

template const float* launch_middle<float>(const KdeMixture&, float*, cudaStream_t);
template const double* launch_middle<double>(const KdeMixture&, double*, cudaStream_t);

}  // namespace cuda
}  // namespace kdejsd
