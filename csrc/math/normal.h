// The normal law's upper tail Q(x) = 1 - Phi(x) as functions of its surprise s = -log Q(x) at Q <= 1/2, and the class
// radius bound F(p) = p z + phi(z), z = Phi^-1(p), that the CPU and the CUDA half of the radius op build from them.
//
//   excess(s) = phi/Q - x      F(p) = p excess(-log p)                    dF/dp = mills(-log p)          for p <= 1/2
//   mills(s)  = Q/phi          F(p) = quantile(-log q) + q excess(-log q) dF/dp = p mills(-log q) / q    for q = 1 - p
//   quantile(s) = x
//
// None of the sums cancels. All three are minimax rational functions of t = sqrt(s), which stays small (27.3 where Q is
// the smallest double) and in which they are smooth: relative errors below 5e-17 in double and 3e-8 in float. V is T or
// a vector of T.
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
  V excess, mills;
};

template <class T>
struct NormalTail;

template <>
struct NormalTail<double> {
  static constexpr double kNear = 3.8813653655321277;  // t up to which `near` holds, and from which `far` does: x = 5
  static constexpr double kHalf = 0.8325546111576978;  // t at Q = 1/2
  static constexpr double kMost = 746.0;               // s beyond which Q is 0 in this type; `far` holds there

  template <class V>
  KDEJSD_HD static inline TailRatios<V> near(V t) {
    const V excess = polynomial(t, 3.8673326166106001, 81.391281662958349, 297.92097088780287, 288.75507324818767,
                                167.23482103393687, 54.75346698389054, 10.500395230300789, 0.51960025656913023) /
                     polynomial(t, 1.0, 31.598312202890114, 190.48479168005323, 389.63556027738542, 387.17705372109504,
                                225.65530300124215, 76.235292239833001, 14.842102885553949, 0.73488055123674245);
    const V mills = polynomial(t, 1781.5910777842664, 17272.841395416111, 49743.550526554733, 63533.733624790322,
                               43300.750192845459, 16494.313783372523, 3303.4683603733552, 198.17226099636611,
                               0.00048673297964085951) /
                    polynomial(t, -1.0, 47.206450067034147, 5879.870233703642, 38822.773592307829, 72222.105480698709,
                               55715.167495148176, 22769.791261600341, 4667.4663744285326, 280.32139712141958);
    return {excess, mills};
  }

  template <class V>
  KDEJSD_HD static inline TailRatios<V> far(V t) {
    const V excess = polynomial(t, 2.854479419318531, 3.6194888803926792, 3.1708595464496367, 1.4665515912621629,
                                0.51843592051809306, 0.095965573784097799, 0.0068742591271453617,
                                0.00016809567516981786, 1.05385436574499e-06) /
                     polynomial(t, 1.0, 4.0851453291727822, 4.872684912099996, 4.2775196071296229, 1.9784117562138979,
                                0.72143515498819577, 0.13529058612905698, 0.0097177497506651823, 0.00023772093507432097,
                                1.4903776893520828e-06);
    const V mills = polynomial(t, 168.38379261560465, 442.59008458928912, 432.06984795584771, 227.61644786373412,
                               60.108841019710802, 6.3413306065874053, 0.23551944030878683, 0.0023568031707286979,
                               3.3773540015650966e-11) /
                    polynomial(t, -1.0, 17.731549119520807, 427.06683775776901, 524.21537978917183, 308.37505520438253,
                               84.317258889084201, 8.95840389369687, 0.333065887555137, 0.0033330465353528281);
    return {excess, mills};
  }

  template <class V>
  KDEJSD_HD static inline V quantile(V t) {
    const V u = t - kHalf;
    return polynomial(u, 9.1374687725158221e-17, 2.0869049285023045, 8.5208725401003598, 14.39548621012411,
                      13.23378354756364, 7.3433939394478269, 2.5702594368114942, 0.56870640075188028,
                      0.076617579114477696, 0.0058493351231401185, 0.00022759875736133676, 3.8165811668119494e-06,
                      1.9323402119058755e-08) /
           polynomial(u, 1.0, 4.3150124383096697, 7.7111019585574052, 7.4844917122314758, 4.3646493110738644,
                      1.5965652684301452, 0.36753829945829131, 0.051219112296801053, 0.0040117688454257517,
                      0.00015874985100873751, 2.6873732762735166e-06, 1.3663688213202726e-08);
  }
};

template <>
struct NormalTail<float> {
  static constexpr float kNear = 1e30f;  // `near` holds everywhere
  static constexpr float kHalf = 0.83255464f;
  static constexpr float kMost = 104.0f;

  template <class V>
  KDEJSD_HD static inline TailRatios<V> near(V t) {
    const V excess = polynomial(t, -2.52520823f, 20.1716614f, 13.4370594f, 7.34691811f, 0.356078535f) /
                     polynomial(t, -1.0f, 5.04945183f, 23.4955616f, 18.0228996f, 10.3917665f, 0.503462791f);
    const V mills = polynomial(t, 400.521942f, 1241.6947f, 1204.34521f, 556.69635f, 53.6606216f) /
                    polynomial(t, -1.0f, 27.9392223f, 1089.23059f, 1563.24451f, 785.986938f, 75.9008026f);
    return {excess, mills};
  }

  template <class V>
  KDEJSD_HD static inline TailRatios<V> far(V t) {
    return near(t);
  }

  template <class V>
  KDEJSD_HD static inline V quantile(V t) {
    const V u = t - kHalf;
    return polynomial(u, 5.42389067e-08f, 2.086905f, 3.80843759f, 2.19043803f, 0.462906331f, 0.0283062458f) /
           polynomial(u, 1.0f, 2.05691266f, 1.33886218f, 0.310978144f, 0.0200121272f);
  }
};

// F and a derivative of it: for p, or p times that, for log p.
template <class V>
struct RadiusTerm {
  V value, slope;
};

// p <= 1/2, with the ratios at -log p.
template <class V>
KDEJSD_HD inline RadiusTerm<V> lower_radius(V p, TailRatios<V> tail) {
  return {p * tail.excess, tail.mills};
}

// p > 1/2, q = 1 - p, with t, the square root of -log q, and the ratios there.
template <class T, class V>
KDEJSD_HD inline RadiusTerm<V> upper_radius(V p, V q, V t, TailRatios<V> tail) {
  return {NormalTail<T>::quantile(t) + q * tail.excess, p * tail.mills / q};
}

}  // namespace
}  // namespace kdejsd
