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
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::Type;
template <class T>
using Mask = typename VectorOf<T>::Mask;
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

template <class T>
inline Vec<T> exp2_portable(Vec<T> x) {
  using E = Exp2<T>;
  // At the two ends the exponent field of the scale is all zeros or all ones: the scale is 0 or inf. The comparisons
  // are false for NaN, which therefore passes through to the polynomial.
  x = x < T(-E::kBias) ? broadcast(T(-E::kBias)) : x;
  x = x > T(E::kBias + 1) ? broadcast(T(E::kBias + 1)) : x;
  const Vec<T> shifted = x + E::kRound;
  const Vec<T> r = x - (shifted - E::kRound);
  const Mask<T> bits = (reinterpret_cast<Mask<T>>(shifted) + E::kBias) << E::kMantissa;
  return E::polynomial(r) * reinterpret_cast<Vec<T>>(bits);
}

inline Vec<float> exp2(Vec<float> x) { return exp2_portable<float>(x); }
inline Vec<double> exp2(Vec<double> x) { return exp2_portable<double>(x); }

#endif

}  // namespace
