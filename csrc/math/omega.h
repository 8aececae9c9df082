// The ratio of one pair, and which of two pairs has the larger one.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace kdejsd {
// Unnamed: files that include this are compiled for several instruction sets, and the linker must not mix their copies.
namespace {

template <class T>
struct OmegaTerms {
  T ratio;
  // The factors of the pair's differences in the gradients of the ratio for one of the two samples.
  T input_weight, code_weight;
};

// From the squared distances. Equal inputs have no part in anything, unless the codes are NaN: those are not to vanish.
template <class T>
KDEJSD_HD inline OmegaTerms<T> omega_terms(T distance, T code_distance) {
  if (distance == 0 && code_distance == code_distance) return {T(0), T(0), T(0)};
  const T ratio = code_distance / distance, weight = T(2) / distance;
  return {ratio, -ratio * weight, weight};
}

// A pair i < j; NaN before all numbers, and of equal ratios the pair that comes first.
struct OmegaLargest {
  double ratio;
  int64_t i, j;

  KDEJSD_HD static OmegaLargest none() { return {-1.0, -1, -1}; }  // less than any pair

  KDEJSD_HD void consider(const OmegaLargest& other) {
    const bool nan = ratio != ratio, other_nan = other.ratio != other.ratio;
    const bool larger = nan != other_nan ? other_nan : other.ratio > ratio;
    const bool equal = nan ? other_nan : other.ratio == ratio;
    if (larger || (equal && (other.i < i || (other.i == i && other.j < j)))) *this = other;
  }
};

}  // namespace
}  // namespace kdejsd
