// The radius op on CUDA devices: sum_k F(p[i, k]) of every row with its gradient, in one pass.
//
// A warp takes a row of up to kRadiusWarpClasses classes, a block one that is longer. Each thread sums its classes, a
// stride apart, with what the roundings lose carried along; the threads' sums are added in a fixed order.
#include "cuda/launch.cuh"
#include "cuda/steps.h"
#include "cuda/warp.cuh"
#include "kernels.h"
#include "math/normal.h"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A running sum and what its roundings lost.
template <typename T>
struct Sum {
  T high, low;

  __device__ void add(T x) {
    const T sum = high + x, part = sum - high;
    low += (high - (sum - part)) + (x - part);
    high = sum;
  }
  __device__ void add(Sum other) {
    add(other.high);
    low += other.low;
  }
  // An infinite or NaN sum has no error to add: inf - inf would make NaN of it.
  __device__ T rounded() const {
    const T total = high + low;
    return total - total == T(0) ? total : high;
  }
};

template <typename T>
__device__ TailRatios<T> tail_ratios(T t) {
  return t > NormalTail<T>::kNear ? NormalTail<T>::far(t) : NormalTail<T>::near(t);
}

// F, and its derivative for the mass as it is given: p or log p.
template <typename T, bool kIsLog>
__device__ RadiusTerm<T> radius_term(T mass) {
  if (!(kIsLog ? mass <= T(0) : mass >= T(0) && mass <= T(1))) return {T(NAN), T(NAN)};
  const T p = kIsLog ? std::exp(mass) : mass;
  if (p == T(0)) return {T(0), T(0)};
  RadiusTerm<T> term;
  if (p <= T(0.5)) {
    const T t = std::sqrt(kIsLog ? -mass : -std::log(p));
    term = lower_radius(p, t, tail_ratios(t));
  } else {
    const T q = kIsLog ? -std::expm1(mass) : T(1) - p;
    if (q == T(0)) return {T(INFINITY), T(INFINITY)};
    const T log_2q = std::log(T(2) * q);
    const T t = std::sqrt(NormalTail<T>::kLn2 - log_2q);
    term = upper_radius<T>(kIsLog ? T(1) - q : p, q, log_2q, t, tail_ratios(t));
  }
  return {term.value, kIsLog ? p * term.slope : term.slope};
}

template <typename T, bool kIsLog>
__device__ Sum<T> radius_row(const Radius& args, int64_t row, int64_t first, int step) {
  const T* masses = static_cast<const T*>(args.masses) + row * args.classes;
  T* dmasses = static_cast<T*>(args.dmasses);
  if (dmasses != nullptr) dmasses += row * args.classes;
  Sum<T> sum = {T(0), T(0)};
  for (int64_t k = first; k < args.classes; k += step) {
    const RadiusTerm<T> term = radius_term<T, kIsLog>(masses[k]);
    sum.add(term.value);
    if (dmasses != nullptr) dmasses[k] = term.slope;
  }
  return sum;
}

template <typename T>
__device__ Sum<T> sum_over_warp(Sum<T> sum) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    sum.add(Sum<T>{__shfl_down_sync(kAllLanes, sum.high, lane), __shfl_down_sync(kAllLanes, sum.low, lane)});
  }
  return sum;
}

template <typename T, bool kIsLog>
__global__ void __launch_bounds__(kThreads) radius_warp_kernel(Radius args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= args.rows) return;  // the whole warp
  const int lane = threadIdx.x % kWarp;
  const Sum<T> sum = sum_over_warp(radius_row<T, kIsLog>(args, row, lane, kWarp));
  if (lane == 0) static_cast<T*>(args.value)[row] = sum.rounded();
}

template <typename T, bool kIsLog>
__global__ void __launch_bounds__(kThreads) radius_block_kernel(Radius args) {
  __shared__ T high[kWarps], low[kWarps];
  const int64_t row = blockIdx.x;
  Sum<T> sum = sum_over_warp(radius_row<T, kIsLog>(args, row, threadIdx.x, kThreads));
  if (threadIdx.x % kWarp == 0) {
    high[threadIdx.x / kWarp] = sum.high;
    low[threadIdx.x / kWarp] = sum.low;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum.add(Sum<T>{high[warp], low[warp]});
  static_cast<T*>(args.value)[row] = sum.rounded();
}

template <typename T, bool kIsLog>
void launch_rows(const Radius& args, cudaStream_t stream) {
  if (args.classes <= kRadiusWarpClasses) {
    launch("radius_warp_kernel", radius_warp_kernel<T, kIsLog>, ceil_div(args.rows, kWarps), kThreads, 0, stream, args);
  } else {
    launch("radius_block_kernel", radius_block_kernel<T, kIsLog>, args.rows, kThreads, 0, stream, args);
  }
}

}  // namespace

int64_t radius_workspace(const Radius&, int) { return 0; }

void radius(const Radius& args, void*, int, uintptr_t stream) {
  if (args.rows == 0) return;
  const cudaStream_t queue = reinterpret_cast<cudaStream_t>(stream);
  if (args.dtype == DType::kFloat64) {
    args.is_log ? launch_rows<double, true>(args, queue) : launch_rows<double, false>(args, queue);
  } else {
    args.is_log ? launch_rows<float, true>(args, queue) : launch_rows<float, false>(args, queue);
  }
}

}  // namespace cuda
}  // namespace kdejsd
