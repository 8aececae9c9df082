// The formulas that the CPU and the CUDA half of the kde op share, each written once for host and device.
//
// A sum of weights is streamed as (max, sum), the number 2^max * sum, so that neither a far query nor a high dimension
// overflows it. Infinite and missing numbers take part as follows: `max` is -inf while nothing has been added, and it
// never takes up a NaN (fmax drops it), but `sum` does, so a NaN anywhere reaches the result.
#pragma once

#include <cmath>

#include "kernels.h"
#include "math/host_device.h"

namespace kdejsd {
// Unnamed: files that include this are compiled for several instruction sets, and the linker must not mix their copies.
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLog2Pi = 1.83787706640934548356;  // log(2 pi)

// ----------------------------------------------------------------------------------------------------------------
// Streaming log-sum-exp, in powers of two

template <typename T>
struct LogSumExp2 {
  T max;  // the largest exponent so far, -inf before the first
  T sum;  // sum of 2^(x - exponent_base(max))
};

// What is subtracted from the exponents: their maximum, or 0 where that is infinite and inf - inf would be NaN.
template <typename T>
KDEJSD_HD inline T exponent_base(T max) {
  return std::fabs(max) < T(INFINITY) ? max : T(0);
}

// The factor that takes sums from the base of `max` to the base of the larger `new_max`; 0 for a sum of nothing.
template <typename T>
KDEJSD_HD inline T rescale_factor(T max, T new_max) {
  return std::exp2(max - exponent_base(new_max));
}

template <typename T>
KDEJSD_HD inline LogSumExp2<T> merge(LogSumExp2<T> a, LogSumExp2<T> b) {
  const T max = std::fmax(a.max, b.max);
  return {max, a.sum * rescale_factor(a.max, max) + b.sum * rescale_factor(b.max, max)};
}

// ----------------------------------------------------------------------------------------------------------------
// From the sums to what the op returns, always in double

// log(1 + exp(x))
KDEJSD_HD inline double softplus(double x) { return (x > 0 ? x : 0.0) + std::log1p(std::exp(-std::fabs(x))); }

// 1 / (1 + exp(-x))
KDEJSD_HD inline double sigmoid(double x) {
  const double small = std::exp(-std::fabs(x));
  return (x >= 0 ? 1.0 : small) / (1.0 + small);
}

// A bandwidth that is not positive and finite counts as NaN.
template <typename T>
KDEJSD_HD inline T checked_bandwidth(T h) {
  return h > T(0) && h < T(INFINITY) ? h : T(NAN);
}

// The unit of distances where each center has a bandwidth of its own: the geometric mean of the least and the greatest.
// NaN where their ratio is so large that the square of its root nears the ends of T's range.
template <typename T>
KDEJSD_HD inline double middle_bandwidth(T least, T greatest) {
  const double low = static_cast<double>(least), high = static_cast<double>(greatest);
  return high / low <= (sizeof(T) == 4 ? 1e30 : 1e300) ? std::sqrt(low) * std::sqrt(high) : static_cast<double>(NAN);
}

// By how many equal weights a sum over the centers is divided; one that is left out does not count.
KDEJSD_HD inline int64_t kde_count(int64_t m, bool equal_weights, int64_t exclude) {
  return equal_weights ? m - (exclude >= 0 && exclude < m) : 1;
}

// What log p_e has beside ln 2 (max + log2 sum), where the exponents are relative to the bandwidth h. A count of 0 (the
// only center is left out) is taken as 1: the sum is 0, and its logarithm shall be -inf rather than NaN.
KDEJSD_HD inline double kde_log_constant(int64_t count, int64_t l, double h) {
  return -std::log(static_cast<double>(count > 1 ? count : 1)) - static_cast<double>(l) * (std::log(h) + 0.5 * kLog2Pi);
}

template <typename T>
KDEJSD_HD inline double kde_log_prob(LogSumExp2<T> exponents, double log_constant) {
  const double max = exponent_base(static_cast<double>(exponents.max));
  return kLn2 * (max + std::log2(static_cast<double>(exponents.sum))) + log_constant;
}

// A query's sum of weights where it has a center of its own too, which counts as one more of the equal ones; and the
// shares of that sum that its own center and the others have.
struct KdeShares {
  LogSumExp2<double> sum;
  double own, others;
};

KDEJSD_HD inline KdeShares with_own_center(LogSumExp2<double> others, double squared_distance /* over h^2 */) {
  const LogSumExp2<double> own = {-0.5 * kLog2E * squared_distance, 1.0};
  const LogSumExp2<double> sum = merge(own, others);
  return {sum, rescale_factor(own.max, sum.max) / sum.sum, others.sum * rescale_factor(others.max, sum.max) / sum.sum};
}

// A coordinate of the gradient of log p_e from those of its two shares. One of no weight takes no part: where its sum
// is empty its gradient is NaN.
KDEJSD_HD inline double merged_score(const KdeShares& shares, double own, double others) {
  return (shares.own == 0 ? 0.0 : shares.own * own) + (shares.others == 0 ? 0.0 : shares.others * others);
}

// log N(query; 0, variance I) of a query with this squared norm.
KDEJSD_HD inline double normal_log_prob(double squared_norm, int64_t l, double variance) {
  return -0.5 * (squared_norm / variance + static_cast<double>(l) * (kLog2Pi + std::log(variance)));
}

struct KdeTerm {
  double value;
  double weight;  // d value / d (log p_e - log p_t); for kLogProb d value / d log p_e
};

KDEJSD_HD inline KdeTerm kde_term(KdeValue kind, double log_prob, double log_target) {
  if (kind == KdeValue::kLogProb) return {log_prob, 1.0};
  const double log_ratio = log_prob - log_target;
  if (kind == KdeValue::kLogRatio) return {log_ratio, 1.0};
  return {kLn2 - softplus(-log_ratio), sigmoid(-log_ratio)};
}

}  // namespace
}  // namespace kdejsd
