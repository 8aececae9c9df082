// Points as the kernels see them: some in the lanes of vectors, the others streamed past them in tiles of kTile points
// that are only ever broadcast. What the ops on pairs of points share: packing, squared distances, weighted sums, and
// the memory for them. Included by files that are compiled once per instruction set: everything has internal linkage.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/simd.h"

namespace {

constexpr int kQV = kRegisters == 32 ? 4 : 2;  // vectors of lanes in a full block
constexpr int kRows = 6;                       // tile points whose distances are in registers at once
constexpr int kTile = 8 * kRows;               // tile points; pairs and tile stay in the first-level cache for small l
constexpr int kColumns = 4;                    // dimensions whose sums are in registers at once

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------------------------------
// Packing

// `vectors` vectors of lanes [first lane ...), as [l][vectors]; the lanes after the last point repeat it.
template <class T>
void pack_lanes(const T* points, int64_t first, int64_t count, int64_t l, const T* shift, T scale, int vectors,
                Vec<T>* packed) {
  T* out = reinterpret_cast<T*>(packed);
  const int lanes = vectors * kLanes<T>;
  for (int lane = 0; lane < lanes; lane++) {
    const T* point = points + smaller(first + lane, count - 1) * l;
    for (int64_t k = 0; k < l; k++) out[k * lanes + lane] = (point[k] - shift[k]) * scale;
  }
}

// Points first ... first + count as rows [kTile][l]; rows after the last are 0 and take part in nothing but step 1. The
// shift is repeated, [l + kLanes<T>], so that rows of any length are packed by whole vectors.
template <class T>
void pack_tile(const T* points, int64_t first, int64_t count, int64_t l, const T* shift, T scale, T* rows) {
  const T* from = points + first * l;
  const int64_t total = count * l, whole = total / kLanes<T> * kLanes<T>, step = kLanes<T> % l;
  for (int64_t i = 0, k = 0; i < whole; i += kLanes<T>) {
    Vec<T> point, origin;
    std::memcpy(&point, from + i, sizeof point);
    std::memcpy(&origin, shift + k, sizeof origin);
    point = (point - origin) * scale;
    std::memcpy(rows + i, &point, sizeof point);
    k = k + step < l ? k + step : k + step - l;
  }
  for (int64_t i = whole; i < total; i++) rows[i] = (from[i] - shift[i % l]) * scale;
  for (int64_t i = total; i < ceil_div(count, kRows) * kRows * l; i++) rows[i] = 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums over a tile

template <class T, int QV>
void squared_distances(const T* rows, int count, int64_t l, const Vec<T>* lanes, Vec<T>* pairs) {
  for (int j = 0; j < count; j += kRows) {
    Vec<T> sums[kRows][QV] = {};
    const T* tile = rows + j * l;
    for (int64_t k = 0; k < l; k++) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        const Vec<T> x = broadcast(tile[r * l + k]);
#pragma GCC unroll 4
        for (int v = 0; v < QV; v++) {
          const Vec<T> difference = lanes[k * QV + v] - x;
          sums[r][v] += difference * difference;
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < QV; v++) pairs[(j + r) * QV + v] = sums[r][v];
  }
}

template <class T, int QV, int Columns>
void add_columns(const T* rows, const int* kept, int count, int64_t l, const Vec<T>* weights, Vec<T>* sums) {
  Vec<T> tile_sums[Columns][QV] = {};
  for (int i = 0; i < count; i++) {
    const T* row = rows + kept[i] * l;
    const Vec<T>* weight = weights + kept[i] * QV;
#pragma GCC unroll 4
    for (int c = 0; c < Columns; c++) {
      const Vec<T> x = broadcast(row[c]);
#pragma GCC unroll 4
      for (int v = 0; v < QV; v++) tile_sums[c][v] += weight[v] * x;
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < Columns; c++)
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) sums[c * QV + v] += tile_sums[c][v];
}

// Adds the weighted sum of the `count` rows of a tile whose numbers are in `kept`.
template <class T, int QV>
void add_weighted_rows(const T* rows, const int* kept, int count, int64_t l, const Vec<T>* weights, Vec<T>* sums) {
  int64_t k = 0;
  for (; k + kColumns <= l; k += kColumns)
    add_columns<T, QV, kColumns>(rows + k, kept, count, l, weights, sums + k * QV);
  switch (l - k) {
    case 3:
      return add_columns<T, QV, 3>(rows + k, kept, count, l, weights, sums + k * QV);
    case 2:
      return add_columns<T, QV, 2>(rows + k, kept, count, l, weights, sums + k * QV);
    case 1:
      return add_columns<T, QV, 1>(rows + k, kept, count, l, weights, sums + k * QV);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of at most kQV vectors

// f(width, first vector) over the blocks of a chunk, the widths as even as they can be.
template <class F>
void for_blocks(int64_t vectors, F f) {
  const int64_t blocks = ceil_div(vectors, kQV);
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t first = vectors * b / blocks;
    f(static_cast<int>(vectors * (b + 1) / blocks - first), first);
  }
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
