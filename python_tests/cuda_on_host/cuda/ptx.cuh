// In the place of csrc/cuda/ptx.cuh: what those instructions do, on the host.
#pragma once

#include <cuda_runtime.h>

namespace kdejsd {
namespace cuda {

template <int kBytes>
void copy_async(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what the device can copy so");
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 || reinterpret_cast<uintptr_t>(from) % kBytes != 0) std::abort();
  host::block.thread().copies.push_back({to, from, kBytes});
}

inline void wait_for_copies() {
  for (const host::Copy& copy : host::block.thread().copies) std::memcpy(copy.to, copy.from, copy.bytes);
  host::block.thread().copies.clear();
}

// float16, from a number that is rounded to the nearest, ties to even.
inline uint16_t half_of(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7fff;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const int count = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // of units in the last place
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + count));
}

inline float float_of(uint16_t half) {
  const int exponent = half >> 10 & 31, digits = half & 1023;
  float size = exponent == 0    ? std::ldexp(static_cast<float>(digits), -24)
               : exponent == 31 ? (digits == 0 ? INFINITY : NAN)
                                : std::ldexp(static_cast<float>(1024 + digits), exponent - 25);
  return half & 0x8000 ? -size : size;
}

inline float float_of(uint32_t halves, int which) { return float_of(static_cast<uint16_t>(halves >> 16 * which)); }

inline uint32_t halves_of(float first, float second) {
  return static_cast<uint32_t>(half_of(second)) << 16 | half_of(first);
}

inline void floats_of(uint32_t halves, float& first, float& second) {
  first = float_of(halves, 0);
  second = float_of(halves, 1);
}

inline void load_rows(uint32_t (&numbers)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  const auto* values = host::block.show(row);
  const auto number = [&](int matrix, int line, int column) {
    const uint16_t* from;
    std::memcpy(&from, values[8 * matrix + line], sizeof(from));
    return static_cast<uint32_t>(from[column]);
  };
  const int g = threadIdx.x % host::kWarp / 4, t = threadIdx.x % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto at = [&](int e) { return transposed ? number(matrix, 2 * t + e, g) : number(matrix, g, 2 * t + e); };
    numbers[matrix] = at(1) << 16 | at(0);
  }
  host::block.wait_for_warp();  // what it has read, other lanes may write now
}

inline void load_matrices(uint32_t (&numbers)[4], const void* row) { load_rows(numbers, row, false); }
inline void load_transposed(uint32_t (&numbers)[4], const void* row) { load_rows(numbers, row, true); }

// Eight products and a number before them, as a tensor core adds them at the worst: exact products, all cut to a bit
// more than float32 has below the largest of them, their sum cut to float32.
inline float add_eight(float sum, const double (&products)[8]) {
  double largest = std::fabs(sum), plain = sum;
  for (const double product : products) {
    largest = std::fmax(largest, std::fabs(product));
    plain += product;
  }
  if (!(std::fabs(plain) < INFINITY) || largest == 0) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double total = std::trunc(sum / unit) * unit;
  for (const double product : products) total += std::trunc(product / unit) * unit;
  const float rounded = static_cast<float>(total);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(total) ? std::nextafter(rounded, 0.0f) : rounded;
}

inline void add_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  const auto* values = host::block.show(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto of = [&](int lane) { return reinterpret_cast<const Factors*>(values[lane]); };
  const int g = threadIdx.x % host::kWarp / 4, t = threadIdx.x % 4;
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * t + e % 2;
    for (int k = 0; k < 16; k += 8) {
      double products[8];
      for (int i = 0; i < 8; ++i) {
        const double left = float_of(of(4 * g + i / 2)->a[k / 4 + e / 2], i % 2);
        const double right = float_of(of(4 * column + i / 2)->b[k / 8], i % 2);
        products[i] = left * right;
      }
      sum[e] = add_eight(sum[e], products);
    }
  }
}

inline void start_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (float& one : sum) one = 0;
  add_product(sum, a, b0, b1);
}

inline float fast_exp2(float x) { return x < -126 ? 0.0f : std::exp2(x); }

}  // namespace cuda
}  // namespace kdejsd
