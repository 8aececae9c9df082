// Points as the kernels see them: some in the lanes of vectors, the others streamed past them in tiles that are only
// ever broadcast. What the ops on pairs of points share: how many of each are in registers at once, blocks of vectors,
// and memory. Included by files that are compiled once per instruction set: everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/simd.h"

namespace {

constexpr int kQV = kRegisters == 32 ? 4 : 2;  // vectors of lanes in a full block
constexpr int kRows = 6;                       // tile points whose distances are in registers at once
constexpr int kColumns = 4;                    // dimensions whose sums are in registers at once

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of at most kQV vectors

inline int64_t block_count(int64_t vectors) { return ceil_div(vectors, kQV); }

// f(width, first vector) of one of the blocks of a chunk, the widths as even as they can be.
template <class F>
void at_block(int64_t vectors, int64_t block, F f) {
  const int64_t blocks = block_count(vectors), first = vectors * block / blocks;
  f(static_cast<int>(vectors * (block + 1) / blocks - first), first);
}

// The same of all of them.
template <class F>
void for_blocks(int64_t vectors, F f) {
  for (int64_t block = 0; block < block_count(vectors); block++) at_block(vectors, block, f);
}

// Calls f.run<width>() with the width as a compile-time constant.
template <class F>
void with_width(int width, F f) {
  switch (width) {
    case 1:
      return f.template run<1>();
    case 2:
      return f.template run<2>();
    case 3:
      return f.template run<kQV >= 3 ? 3 : 1>();
    case 4:
      return f.template run<kQV >= 4 ? 4 : 1>();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: one allocation per call, cut into pieces that are whole vectors

struct Arena {
  char* next;

  template <class U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(next);
    next += bytes<U>(count);
    return piece;
  }
  Arena cut(int64_t bytes) { return {take<char>(bytes)}; }
  template <class U>
  static int64_t bytes(int64_t count) {
    return ceil_div(count * static_cast<int64_t>(sizeof(U)), 64) * 64;
  }
};

struct Memory {
  char* base;
  explicit Memory(int64_t bytes) : base(static_cast<char*>(std::aligned_alloc(64, ceil_div(bytes, 64) * 64))) {
    if (!base) throw std::bad_alloc();
  }
  ~Memory() { std::free(base); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

}  // namespace
