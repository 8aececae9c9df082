// Numbers under the smallest normal one, which many processors take a hundred cycles and more to compute with.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// While it lives, the calling thread's results under the smallest normal number are 0, whatever its setting was before.
// The barriers keep the compiler from moving arithmetic past the switch.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { set(before_ | 0x8000); }
  ~FlushSubnormals() { set(before_); }

 private:
  static void set(uint32_t control) {
    asm volatile("" ::: "memory");
    _mm_setcsr(control);
    asm volatile("" ::: "memory");
  }
  uint32_t before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | (uint64_t{1} << 24));
  }
  ~FlushSubnormals() { set(before_); }

 private:
  static void set(uint64_t control) { asm volatile("msr fpcr, %0" ::"r"(control) : "memory"); }
  uint64_t before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}  // not trivial, so that an object of it counts as used
#endif

  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace
