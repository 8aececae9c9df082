// Vectors of floats or doubles, as wide as the instruction set this file is compiled for, by the vector extensions that
// GCC and Clang share. Included by files that are compiled once per instruction set: everything has internal linkage,
// so that no function built for one set can stand in for its namesake of another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::Type;
template <class T>
using Mask = typename VectorOf<T>::Mask;
template <class T>
using Bits = typename VectorOf<T>::Bits;  // for sums and left shifts, which may pass the ends of a signed number
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
inline bool any(Mask<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  int64_t words[kVectorBytes / 8], all = 0;
  std::memcpy(words, &mask, sizeof words);
  for (int64_t word : words) all |= word;
  return all != 0;
#endif
}

// 2^x to float or double accuracy (relative error 1e-7, 2e-16): x = n + r with |r| <= 1/2, the polynomials in r are
// minimax for the relative error. NaN stays NaN; results under the smallest normal number are 0, over the largest inf.
template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissa = 23, kBias = 127;
  static Vec<float> polynomial(Vec<float> r) {
    Vec<float> p = broadcast(0.0013276471992255f);
    p = p * r + 0.0096755413344455f;
    p = p * r + 0.0555071327349882f;
    p = p * r + 0.2402211972384018f;
    p = p * r + 0.6931469670647601f;
    return p * r + 1.0000000716546849f;
  }
};

template <>
struct Exp2<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  static Vec<double> polynomial(Vec<double> r) {
    Vec<double> p = broadcast(4.4352807903093024815e-10);
    p = p * r + 7.0741056308540771721e-9;
    p = p * r + 1.0178198034321820689e-7;
    p = p * r + 1.3215433089567241317e-6;
    p = p * r + 1.5252733489958515696e-5;
    p = p * r + 1.5403530462514668386e-4;
    p = p * r + 1.3333558146789952575e-3;
    p = p * r + 9.6181291075883350393e-3;
    p = p * r + 0.055504108664819921475;
    p = p * r + 0.24022650695910156205;
    p = p * r + 0.69314718055994533046;
    return p * r + 1.0;
  }
};

#if defined(__AVX512F__)

// The full masks say what the plain intrinsics say, without the warnings that GCC 12 gives inside those.
inline Vec<float> exp2(Vec<float> x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 n = _mm512_maskz_roundscale_ps(0xFFFF, reinterpret_cast<__m512>(x), kNearest);
  const Vec<float> p = Exp2<float>::polynomial(x - reinterpret_cast<Vec<float>>(n));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_scalef_ps(0xFFFF, reinterpret_cast<__m512>(p), n));
}

inline Vec<double> exp2(Vec<double> x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512d n = _mm512_maskz_roundscale_pd(0xFF, reinterpret_cast<__m512d>(x), kNearest);
  const Vec<double> p = Exp2<double>::polynomial(x - reinterpret_cast<Vec<double>>(n));
  return reinterpret_cast<Vec<double>>(_mm512_maskz_scalef_pd(0xFF, reinterpret_cast<__m512d>(p), n));
}

#else

// x between two bounds; NaN stays NaN, since the instructions return their second operand where either is NaN.
template <class T>
inline Vec<T> clamp(T low, Vec<T> x, T high) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256 raised = _mm256_max_ps(reinterpret_cast<__m256>(broadcast(low)), reinterpret_cast<__m256>(x));
    return reinterpret_cast<Vec<T>>(_mm256_min_ps(reinterpret_cast<__m256>(broadcast(high)), raised));
  } else {
    const __m256d raised = _mm256_max_pd(reinterpret_cast<__m256d>(broadcast(low)), reinterpret_cast<__m256d>(x));
    return reinterpret_cast<Vec<T>>(_mm256_min_pd(reinterpret_cast<__m256d>(broadcast(high)), raised));
  }
#else
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
#endif
}

template <class T>
inline Vec<T> exp2_portable(Vec<T> x) {
  using E = Exp2<T>;
  // At the two ends the exponent field of the scale is all zeros or all ones: the scale is 0 or inf.
  x = clamp(T(-E::kBias), x, T(E::kBias + 1));
  const Vec<T> shifted = x + E::kRound;
  const Vec<T> r = x - (shifted - E::kRound);
  const Bits<T> bits = (reinterpret_cast<Bits<T>>(shifted) + E::kBias) << E::kMantissa;
  return E::polynomial(r) * reinterpret_cast<Vec<T>>(bits);
}

inline Vec<float> exp2(Vec<float> x) { return exp2_portable<float>(x); }
inline Vec<double> exp2(Vec<double> x) { return exp2_portable<double>(x); }

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Elementary functions to about an ulp, where exp2 above gives up digits for speed

template <class T>
inline Vec<T> sqrt(Vec<T> x) {
  for (int lane = 0; lane < kLanes<T>; lane++) x[lane] = __builtin_sqrt(x[lane]);
  return x;
}

template <class T>
struct Elementary;

template <>
struct Elementary<float> {
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first times an exponent is exact
  static constexpr float kSmallest = 1.17549435e-38f, kScale = 16777216.0f;   // the smallest normal number; 2^24
  static constexpr int kScaleBits = 24;
  // (expm1(r) - r) / r^2 for r from -log(2) to log(2)/2
  static Vec<float> expm1_series(Vec<float> r) {
    Vec<float> p = broadcast(2.17985345e-05f);
    p = p * r + 0.000198091769f;
    p = p * r + 0.00138946145f;
    p = p * r + 0.00833344392f;
    p = p * r + 0.0416666367f;
    p = p * r + 0.166666663f;
    return p * r + 0.5f;
  }
  // (log((1 + r) / (1 - r)) / r - 2) / z in z = r^2 for r up to (sqrt(2) - 1)^2
  static Vec<float> log_series(Vec<float> z) {
    Vec<float> p = broadcast(0.233316145f);
    p = p * z + 0.285507786f;
    p = p * z + 0.400001222f;
    return p * z + 0.666666666f;
  }
};

template <>
struct Elementary<double> {
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kSmallest = 2.2250738585072014e-308, kScale = 18014398509481984.0;  // 2^54
  static constexpr int kScaleBits = 54;
  static Vec<double> expm1_series(Vec<double> r) {
    Vec<double> p = broadcast(9.9108852906171386e-12);
    p = p * r + 1.596305740645172e-10;
    p = p * r + 2.0878271938522375e-09;
    p = p * r + 2.5052452449782284e-08;
    p = p * r + 2.7557324875724576e-07;
    p = p * r + 2.7557318827134605e-06;
    p = p * r + 2.4801587291101867e-05;
    p = p * r + 0.00019841269841463783;
    p = p * r + 0.0013888888888894844;
    p = p * r + 0.0083333333333332933;
    p = p * r + 0.041666666666666657;
    p = p * r + 0.16666666666666666;
    return p * r + 0.5;
  }
  static Vec<double> log_series(Vec<double> z) {
    Vec<double> p = broadcast(0.14617807153417325);
    p = p * z + 0.15331611722055008;
    p = p * z + 0.18182892432536871;
    p = p * z + 0.22222211089379496;
    p = p * z + 0.28571428626253836;
    p = p * z + 0.39999999999898889;
    return p * z + 0.66666666666666696;
  }
};

// e^x - 1 for x from -log(2) to log(2)/2.
template <class T>
inline Vec<T> expm1_small(Vec<T> x) {
  return x + x * x * Elementary<T>::expm1_series(x);
}

// e^x for x <= 0; 0 where that is under the smallest normal number.
template <class T>
inline Vec<T> exp_negative(Vec<T> x) {
  using E = Exp2<T>;
  using L = Elementary<T>;
  constexpr T kLog2E = T(1.44269504088896340736);
  x = x < T(-E::kBias) / kLog2E ? broadcast(T(-E::kBias) / kLog2E) : x;
  const Vec<T> shifted = x * kLog2E + E::kRound;
  const Vec<T> n = shifted - E::kRound;
  const Vec<T> r = (x - n * L::kLn2High) - n * L::kLn2Low;
  const Bits<T> bits = (reinterpret_cast<Bits<T>>(shifted) + E::kBias) << E::kMantissa;
  return (T(1) + expm1_small<T>(r)) * reinterpret_cast<Vec<T>>(bits);
}

// log x for finite x > 0; of anything else some finite number.
template <class T>
inline Vec<T> log(Vec<T> x) {
  using E = Exp2<T>;
  using L = Elementary<T>;
  const Mask<T> tiny = x < L::kSmallest;
  x = tiny ? x * L::kScale : x;
  // x = 2^n m with m from sqrt(1/2) to sqrt(2): the exponent field counts from the bits of sqrt(1/2) on.
  const Vec<T> root = broadcast(T(0.70710678118654752440));
  const Bits<T> from_root = reinterpret_cast<Bits<T>>(x) - reinterpret_cast<Bits<T>>(root);
  const Mask<T> exponent = reinterpret_cast<Mask<T>>(from_root) >> E::kMantissa;
  const Bits<T> power = reinterpret_cast<Bits<T>>(exponent) << E::kMantissa;
  const Vec<T> m = reinterpret_cast<Vec<T>>(reinterpret_cast<Bits<T>>(x) - power);
  const Mask<T> whole = tiny ? exponent - L::kScaleBits : exponent;
  const Vec<T> n = reinterpret_cast<Vec<T>>(whole + reinterpret_cast<Mask<T>>(broadcast(E::kRound))) - E::kRound;
  // log(1 + f) = f - (f^2/2 - r (f^2/2 + z series)) with r = f / (2 + f): the parts after f are small beside it.
  const Vec<T> f = m - T(1);
  const Vec<T> r = f / (T(2) + f), z = r * r, half = T(0.5) * f * f;
  return n * L::kLn2High - ((half - (r * (half + z * L::log_series(z)) + n * L::kLn2Low)) - f);
}

}  // namespace
