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

inline float tf32(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }

// Four products and a number before them, as a tensor core adds them at the worst: exact products, all cut to a bit
// more than float32 has below the largest of them, their sum cut to float32.
inline float add_four(float sum, const double (&products)[4]) {
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

inline void add_product_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  const auto* values = host::block.show(Factors{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const auto of = [&](int lane) { return reinterpret_cast<const Factors*>(values[lane]); };
  const int g = threadIdx.x % host::kWarp / 4, t = threadIdx.x % 4;
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * t + e % 2;
    for (int k = 0; k < 8; k += 4) {
      double products[4];
      for (int i = 0; i < 4; ++i) {
        const double left = tf32(of(4 * g + i)->a[k / 2 + e / 2]), right = tf32(of(4 * column + i)->b[k / 4]);
        products[i] = left * right;
      }
      sum[e] = add_four(sum[e], products);
    }
  }
}

inline void product_tf32(float (&product)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  for (float& sum : product) sum = 0;
  add_product_tf32(product, a, b);
}

inline float fast_exp2(float x) { return x < -126 ? 0.0f : std::exp2(x); }

}  // namespace cuda
}  // namespace kdejsd
