// The normal law's upper tail Q(x) = 1 - Phi(x) as functions of its surprise s = -log Q(x) at Q <= 1/2, and the class
// radius bound F(p) = p z + phi(z), z = Phi^-1(p), that the CPU and the CUDA half of the radius op build from them.
//
//   excess(s) = phi/Q - x      F(p) = p excess(-log p)                    dF/dp = mills(-log p)          for p <= 1/2
//   mills(s)  = Q/phi          F(p) = quantile(-log q) + q excess(-log q) dF/dp = p mills(-log q) / q    for q = 1 - p
//   quantile(s) = x
//
// None of the sums cancels. They are minimax rational functions of t = sqrt(s), which stays small (27.3 where Q is the
// smallest double) and in which they are smooth; the last is one of u = t - sqrt(log 2). Relative errors are below
// 3e-17 in double and 1e-8 in float. t excess, t mills and x/u lie within a third of a constant, to which the quotient
// is added: its roundings hardly show in the sum. V is T or a vector of T.
#pragma once

#include "math/host_device.h"

namespace kdejsd {
// Unnamed: files that include this are compiled for several instruction sets, and the linker must not mix their copies.
namespace {

// last + ... + x^n: the coefficients from the constant on.
template <class V, class T>
KDEJSD_HD inline V polynomial(V, T last) {
  return last + V{};
}
template <class V, class T, class... More>
KDEJSD_HD inline V polynomial(V x, T first, More... more) {
  return first + x * polynomial(x, more...);
}

template <class V>
struct TailRatios {
  V excess, mills;  // both times t
};

template <class T>
struct NormalTail;

template <>
struct NormalTail<double> {
  static constexpr double kNear = 3.8813653655321277;  // t up to which `near` holds, and from which `far` does: x = 5
  static constexpr double kHalf = 0.8325546111576978;  // t at Q = 1/2
  static constexpr double kLn2 = 0.69314718055994531;
  static constexpr double kMost = 746.0;  // s beyond which Q is 0 in this type; `far` holds there

  template <class V>
  KDEJSD_HD static inline TailRatios<V> near(V t) {
    return {
        0.6875 + polynomial(t, -0.6881003172958674, -18.349491390748963, -51.367215105689965, 31.04205596059186,
                            23.331668238424722, 12.516475554512226, 2.4239770640459675, 0.30694727186647164,
                            0.014888721489838226) /
                     polynomial(t, 1.0, 32.352034259241286, 196.30792862042875, 402.39785674920762, 400.20612173473143,
                                233.39668885246519, 78.882101222913704, 15.367237900744698, 0.76141867181811318),
        0.8125 + polynomial(t, 126.18349145797272, 2384.1059603146105, 9473.0875818856257, 9977.570178183385,
                            2099.4193061042729, -1326.973401088213, -1077.1632882495458, -250.38396356375952,
                            -15.257908323332776) /
                     polynomial(t, 1.0, 478.35161765605375, 7634.8672276207508, 30830.928765081433, 45386.920405762212,
                                31689.570955399678, 12134.570734407711, 2391.2967754085557, 144.53240941489688,
                                0.0027574191624468534)};
  }

  template <class V>
  KDEJSD_HD static inline TailRatios<V> far(V t) {
    return {0.6875 + polynomial(t, -0.61284232384354309, 0.16426387869239986, 0.23765445569058871, 0.15541667166695797,
                                0.041675490960959981, 0.0064553926467775854, 0.00057059478357456711,
                                2.0181020781559916e-05, 1.9543750968722965e-07) /
                         polynomial(t, 1.0, 3.2186401795403707, 3.8964325781007951, 2.6923914016504757,
                                    1.0909031656537616, 0.2705192569523166, 0.028240463015240792, 0.0010283644709085243,
                                    9.970195357631435e-06, -4.5568545722633466e-12),
            0.8125 + polynomial(t, 8.679321393528685, -16.528148019827459, -13.292335542160615, -2.7619526024981931,
                                2.5433245920539584, 1.2798606226751916, 0.18422708074885388, 0.0097797549037851924,
                                0.00018445310999769214, 9.3048782512901277e-07) /
                         polynomial(t, 1.0, 21.626376602834366, -30.748510870536585, -57.647611022858541,
                                    -40.548906361785988, -13.299441037802545, -1.7762692750008335,
                                    -0.092984352874793591, -0.0017502164839256372, -8.8286536324122579e-06)};
  }

  template <class V>
  KDEJSD_HD static inline V quantile(V u) {
    return 1.375 * u + polynomial(u, 3.7091053083941565e-18, 0.71190492850230158, 2.6543001987643167,
                                  4.0234664752512925, 3.2611841873538325, 1.5710801658500901, 0.46978113244115438,
                                  0.086707867771801408, 0.0095283885084053582, 0.00059316851385723273,
                                  1.967655042362854e-05, 3.137657244030785e-07, 1.8052948596810162e-09) /
                           polynomial(u, 1.0, 4.4085217801815313, 8.0988192297072032, 8.1441441945080637,
                                      4.9667194355071294, 1.9212705586702603, 0.47493258106047304, 0.072861253839129794,
                                      0.0065185813039535835, 0.00030876928380070323, 6.6229171240636041e-06,
                                      4.6029079994664752e-08, 1.482475348476819e-14);
  }
};

template <>
struct NormalTail<float> {
  static constexpr float kNear = 1e30f;  // `near` holds everywhere
  static constexpr float kHalf = 0.83255464f;
  static constexpr float kLn2 = 0.693147181f;
  static constexpr float kMost = 104.0f;

  template <class V>
  KDEJSD_HD static inline TailRatios<V> near(V t) {
    return {0.6875f + polynomial(t, -0.637009025f, 0.456055284f, 0.130815014f, 0.0414341018f, 0.00381921162f,
                                 0.000372473005f) /
                          polynomial(t, 1.0f, 2.98486114f, 2.48123813f, 1.32397306f, 0.178052366f, 0.0192028601f),
            0.8125f + polynomial(t, 19.8065681f, 23.7328281f, -3.85521603f, -5.16980982f, -0.48579976f) /
                          polynomial(t, 1.0f, 58.3026581f, 94.454422f, 49.5455856f, 4.6048317f)};
  }

  template <class V>
  KDEJSD_HD static inline TailRatios<V> far(V t) {
    return near(t);
  }

  template <class V>
  KDEJSD_HD static inline V quantile(V u) {
    return 1.375f * u +
           polynomial(u, 2.45059906e-09f, 0.711904585f, 0.965735555f, 0.336140752f, 0.0332052559f, 0.000735869631f) /
               polynomial(u, 1.0f, 2.03661489f, 1.30631161f, 0.297003984f, 0.0186554193f);
  }
};

// F and a derivative of it: for p, or p times that, for log p.
template <class V>
struct RadiusTerm {
  V value, slope;
};

// p <= 1/2, with t at p.
template <class V>
KDEJSD_HD inline RadiusTerm<V> lower_radius(V p, V t, TailRatios<V> tail) {
  return {p * (tail.excess / t), tail.mills / t};
}

// p > 1/2, q = 1 - p, with log(2q), t at q. Near q = 1/2 the former has digits that t has not.
template <class T, class V>
KDEJSD_HD inline RadiusTerm<V> upper_radius(V p, V q, V log_2q, V t, TailRatios<V> tail) {
  const V u = -log_2q / (t + NormalTail<T>::kHalf);
  return {NormalTail<T>::quantile(u) + q * (tail.excess / t), p * (tail.mills / (t * q))};
}

}  // namespace
}  // namespace kdejsd
