// The radius op on the CPU. Compiled once per instruction set (KDEJSD_LEVEL is base, v3 or v4); dispatch.cpp chooses.
//
// Lanes hold the classes of one row. A vector of masses of at most 1/2 (all but one entry of a distribution) takes the
// short way through the kernel; what greater masses or, in double, very small ones need beside it is computed where a
// lane asks for it. Rows are cut into pieces of kPiece classes, summed with the rounding errors carried along, so that
// neither their length nor the number of threads shows in the result.

#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/tile_sizes.h"
#include "kernels.h"
#include "math/normal.h"

namespace {

using kdejsd::NormalTail;
using kdejsd::Radius;
using kdejsd::RadiusTerm;
using kdejsd::TailRatios;

constexpr int64_t kPiece = 1 << 14;       // classes
constexpr int64_t kSerialWork = 1 << 12;  // classes of all rows below which a second thread costs more than it brings

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// A running sum and what its roundings lost. V is a vector or its element.
template <class V>
struct Sum {
  V high{}, low{};

  void add(V x) {
    const V sum = high + x, part = sum - high;
    low += (high - (sum - part)) + (x - part);
    high = sum;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// One vector of masses

template <class T>
TailRatios<Vec<T>> tail_ratios(Vec<T> t) {
  TailRatios<Vec<T>> tail = NormalTail<T>::near(t);
  const Mask<T> is_far = t > NormalTail<T>::kNear;
  if (any<T>(is_far)) {
    const TailRatios<Vec<T>> far = NormalTail<T>::far(t);
    tail.excess = is_far ? far.excess : tail.excess;
    tail.mills = is_far ? far.mills : tail.mills;
  }
  return tail;
}

// F, and its derivative for the masses as they are given: p or log p.
template <class T, bool kIsLog>
RadiusTerm<Vec<T>> radius_term(Vec<T> mass) {
  const Vec<T> p = kIsLog ? exp_negative<T>(mass) : mass + T(0);  // -0 becomes 0, of which log makes a number
  // Beyond kMost p is 0, and so are value and derivative whatever the ratios are.
  Vec<T> surprise = kIsLog ? -mass : -log<T>(p);
  surprise = surprise < NormalTail<T>::kMost ? surprise : broadcast(NormalTail<T>::kMost);
  const Vec<T> t = sqrt<T>(surprise);
  RadiusTerm<Vec<T>> term = kdejsd::lower_radius(p, t, tail_ratios<T>(t));

  const Mask<T> upper = p > T(0.5);
  if (any<T>(upper)) {
    const Vec<T> q = kIsLog ? -expm1_small<T>(upper ? mass : Vec<T>{}) : T(1) - p;
    const Vec<T> log_2q = log<T>(upper ? T(2) * q : broadcast(T(1)));
    const Vec<T> tq = sqrt<T>(NormalTail<T>::kLn2 - log_2q);
    RadiusTerm<Vec<T>> above = kdejsd::upper_radius<T>(kIsLog ? T(1) - q : p, q, log_2q, tq, tail_ratios<T>(tq));
    above.value = q == T(0) ? broadcast(kInfinity<T>) : above.value;
    above.slope = q == T(0) ? broadcast(kInfinity<T>) : above.slope;
    term.value = upper ? above.value : term.value;
    term.slope = upper ? above.slope : term.slope;
  }

  const Mask<T> valid = kIsLog ? mass <= T(0) : (mass >= T(0)) & (mass <= T(1));
  const Vec<T> slope = kIsLog ? p * term.slope : p > T(0) ? term.slope : Vec<T>{};
  const Vec<T> nan = broadcast(std::numeric_limits<T>::quiet_NaN());
  return {valid ? term.value : nan, valid ? slope : nan};
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

// The sum of F over `count` masses; their derivatives go to `dmasses` unless that is null.
template <class T, bool kIsLog>
Sum<T> radius_piece(const T* masses, int64_t count, T* dmasses) {
  Sum<Vec<T>> sums;
  for (int64_t k = 0; k < count; k += kLanes<T>) {
    const int64_t left = count - k;
    const size_t bytes = (left < kLanes<T> ? left : kLanes<T>)*sizeof(T);
    Vec<T> mass = broadcast(kIsLog ? -kInfinity<T> : T(0));  // the lanes after the last class add nothing
    if (left < kLanes<T>) {
      std::memcpy(&mass, masses + k, bytes);
    } else {
      std::memcpy(&mass, masses + k, sizeof mass);
    }
    const RadiusTerm<Vec<T>> term = radius_term<T, kIsLog>(mass);
    sums.add(term.value);
    if (!dmasses) continue;
    if (left < kLanes<T>) {
      std::memcpy(dmasses + k, &term.slope, bytes);
    } else {
      std::memcpy(dmasses + k, &term.slope, sizeof mass);
    }
  }
  Sum<T> total;
  for (int lane = 0; lane < kLanes<T>; lane++) total.add(sums.high[lane]);
  for (int lane = 0; lane < kLanes<T>; lane++) total.low += sums.low[lane];
  return total;
}

// An infinite or NaN sum has no error to add: inf - inf would make NaN of it.
template <class T>
T rounded(Sum<T> sum) {
  const T total = sum.high + sum.low;
  return total - total == T(0) ? total : sum.high;
}

template <class T, bool kIsLog>
void radius_rows(const Radius& args, int requested_threads) {
  const T* masses = static_cast<const T*>(args.masses);
  T* value = static_cast<T*>(args.value);
  T* dmasses = static_cast<T*>(args.dmasses);
  const int64_t pieces = (args.classes + kPiece - 1) / kPiece, units = args.rows * pieces;
  const int threads = units * (args.classes / pieces) < kSerialWork ? 1 : requested_threads;
  Sum<T>* partial = static_cast<Sum<T>*>(pieces == 1 ? nullptr : std::malloc(units * sizeof(Sum<T>)));
  if (pieces > 1 && !partial) throw std::bad_alloc();
  const auto take = [&](int64_t unit) {
    const int64_t row = unit / pieces, first = unit % pieces * kPiece, left = args.classes - first;
    const int64_t offset = row * args.classes + first;
    const Sum<T> sum =
        radius_piece<T, kIsLog>(masses + offset, left < kPiece ? left : kPiece, dmasses ? dmasses + offset : nullptr);
    if (partial) {
      partial[unit] = sum;
    } else {
      value[row] = rounded(sum);
    }
  };
  Team::run(threads, [&](Team::Part& part) {
    part.ranges(units, threads, [&](int64_t unit, int64_t end) {
      for (; unit < end; unit++) take(unit);
    });
  });
  for (int64_t row = 0; partial && row < args.rows; row++) {
    Sum<T> total;
    for (int64_t unit = row * pieces; unit < (row + 1) * pieces; unit++) {
      total.add(partial[unit].high);
      total.low += partial[unit].low;
    }
    value[row] = rounded(total);
  }
  std::free(partial);
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Entry point of this instruction set

namespace kdejsd::cpu::KDEJSD_LEVEL {

extern const TileSize radius_sizes[] = {{"radius_classes", "float32 lanes", kLanes<float>},
                                        {"radius_classes", "float64 lanes", kLanes<double>},
                                        {"radius_classes", "piece", kPiece},
                                        {nullptr, nullptr, 0}};

void radius(const Radius& args, int threads) {
  if (args.dtype == DType::kFloat64) {
    args.is_log ? radius_rows<double, true>(args, threads) : radius_rows<double, false>(args, threads);
  } else {
    args.is_log ? radius_rows<float, true>(args, threads) : radius_rows<float, false>(args, threads);
  }
}

}  // namespace kdejsd::cpu::KDEJSD_LEVEL
