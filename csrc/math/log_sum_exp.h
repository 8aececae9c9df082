// The formulas that the CPU and the CUDA kernels share: the streamed log-sum-exp and what becomes of it at the end.
//
// All functions have internal linkage: the including files are compiled for several instruction sets, and a copy made
// for one must not be linked for another.
#pragma once

#include <cmath>

#include "../kernels.h"

#ifdef __CUDACC__
#define KDEJSD_HD __host__ __device__
#else
#define KDEJSD_HD
#endif

namespace kdejsd {
namespace {

constexpr double kLog2E = 1.4426950408889634074;   // 1 / log 2
constexpr double kLn2 = 0.69314718055994530942;    // log 2
constexpr double kLog2Pi = 1.8378770664093454836;  // log(2 pi)

// A bandwidth as the mixture counts it: NaN unless positive and finite.
KDEJSD_HD inline double valid_bandwidth(double h) { return h > 0 && h < HUGE_VAL ? h : static_cast<double>(NAN); }

// sum 2^max, a partial sum of powers of 2 whose exponents may be out of any float's range. A sum that has met no term
// has a very low but finite max, so that differences of two are never inf - inf.
struct LogSumExp {
  double max, sum;

  // What a part with this max is to be multiplied with, to be added to this sum.
  KDEJSD_HD inline double share(double part_max) const { return exp2(part_max - max); }

  KDEJSD_HD inline void merge(const LogSumExp& part) {
    if (part.max > max) {
      sum *= exp2(max - part.max);
      max = part.max;
    }
    sum += part.sum * share(part.max);
  }

  KDEJSD_HD inline double nats() const { return kLn2 * (max + log2(sum)); }
};

// log(1 + e^x) and 1 / (1 + e^-x), of full accuracy at both ends; NaN stays NaN.
KDEJSD_HD inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
KDEJSD_HD inline double sigmoid(double x) {
  const double e = exp(x > 0 ? -x : x);
  return (x > 0 ? 1.0 : e) / (1.0 + e);
}

// From e = log p_e(query) to what is asked for. The target is N(0, variance I), t its log-density:
//   kLogProb         e                         gradient s_e
//   kJensenShannon   log 2 - softplus(t - e)   gradient sigmoid(t - e) (s_e - s_t)
//   kLogRatio        e - t                     gradient s_e - s_t
// with the scores s_e = d e / d query and s_t = -query / variance.
struct KdeEpilogue {
  double value, weight, target_precision;

  KDEJSD_HD inline KdeEpilogue(KdeValue kind, double log_prob, double squared_norm, int64_t l, double variance)
      : value(log_prob), weight(1), target_precision(0) {
    if (kind == KdeValue::kLogProb) return;
    const double log_target = -0.5 * (squared_norm / variance + static_cast<double>(l) * (kLog2Pi + log(variance)));
    const double gap = log_target - log_prob;
    target_precision = 1 / variance;
    value = kind == KdeValue::kLogRatio ? -gap : kLn2 - softplus(gap);
    if (kind == KdeValue::kJensenShannon) weight = sigmoid(gap);
  }

  KDEJSD_HD inline double gradient(double score, double query) const {
    return weight * (score + query * target_precision);
  }
};

}  // namespace
}  // namespace kdejsd
