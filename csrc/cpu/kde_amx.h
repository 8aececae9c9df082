// The products of kde_tile.h by AMX, the matrix instructions of Intel server processors, for float32.
//
// They multiply bfloat16 numbers and sum in float32. A number is taken as the sum of two bfloat16 ones, a big part and
// a small one, and a product of two numbers as three products of parts, with an error of about 2^-16: for callers who
// allow that. (Three parts and six products have float32's error, and cost the gain.) The parts of the centers, the
// queries and the weights are laid out so that what the instructions write is what kde_tile.h writes: rows are tile
// points, or dimensions, and the columns of 16 are vectors of lanes.
//
//   pairs[tile point][lane]  = sum over dimensions of  point parts [point][dimension] * lane parts [dimension][lane]
//   sums[dimension][lane]    = sum over points of      point parts [dimension][point] * weight parts [point][lane]
//
// A matrix register has 16 rows of 64 bytes: 16 x 32 bfloat16 of a left factor, 16 pairs x 16 x 2 of a right one, in
// which neighbours in the summed direction lie together.
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace {

constexpr int kMatrix = 1024;  // bytes of a register
constexpr int kInner = 32;     // bfloat16 numbers along a row of a left factor
constexpr int kSide = 16;      // rows of a register; 32-bit numbers along them

// The registers of the calling thread, configured while it lives.
class MatrixRegisters {
 public:
  MatrixRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int r = 0; r < 8; r++) config.row_bytes[r] = 64, config.rows[r] = kSide;
    _tile_loadconfig(&config);
  }
  ~MatrixRegisters() { _tile_release(); }
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;
};

constexpr int kParts = 2;  // of a number: the big one, the small one
// Which parts are multiplied. Each pair shares a part with the one before, so half the loads are saved; the largest
// product comes last.
constexpr int kProducts = 3, kLeft[kProducts] = {0, 1, 0}, kRight[kProducts] = {1, 0, 0};

// ---------------------------------------------------------------------------------------------------------------------
// Parts

inline __m512i as_int(Vec<float> x) { return reinterpret_cast<__m512i>(x); }
inline Vec<float> as_float(__m512i x) { return reinterpret_cast<Vec<float>>(x); }

// x as a sum of floats whose low halves are 0. They are rounded, not cut off: what the product of the small parts
// leaves out is then of either sign. A NaN may be lost here; norms and sums of weights carry it.
inline void split_in_parts(Vec<float> x, __m512i (&parts)[kParts]) {
  for (int p = 0; p < kParts; p++) {
    const __m512i rounded = _mm512_add_epi32(as_int(x), _mm512_set1_epi32(0x8000));
    parts[p] = _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    x -= as_float(parts[p]);
  }
}

// [16 pairs of bfloat16]: the first's in the low halves.
inline __m512i interleave(__m512i first, __m512i second) {
  return _mm512_or_si512(_mm512_maskz_srli_epi32(0xFFFF, first, 16), second);
}

// 16 bfloat16 numbers in a row.
inline __m256i narrow(__m512i part) {
  return _mm512_maskz_cvtepi32_epi16(0xFFFF, _mm512_maskz_srli_epi32(0xFFFF, part, 16));
}

// Up to 16 floats; 0 beyond.
inline Vec<float> load_some(const float* from, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1);
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(mask, from));
}

inline void transpose(Vec<float> (&rows)[16]) {
  Vec<float> turned[16];
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < 16; k++) turned[k][i] = rows[i][k];
  }
  for (int i = 0; i < 16; i++) rows[i] = turned[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// How the dimensions lie in registers. 32 of them fill a row, and each of their parts a register. What is left of the
// dimensions would leave these mostly empty: all its products are put in a row one behind the other, as if they were
// dimensions of their own.

struct Layout {
  int64_t l, whole, rest, rest_matrices;

  explicit Layout(int64_t l)
      : l(l), whole(l / kInner), rest((l % kInner + 1) / 2 * 2), rest_matrices(ceil_div(kProducts * rest, kInner)) {}
  int64_t matrices() const { return whole * kParts + rest_matrices; }  // of 16 points or lanes
  int64_t dim_matrices() const { return ceil_div(l, kSide); }          // of 16 dimensions
};

// Lanes as right factors: [vectors][matrices], from points [l][vectors].
void pack_lane_parts(const Vec<float>* points, int64_t l, int vectors, char* to) {
  const Layout layout(l);
  for (int v = 0; v < vectors; v++) {
    char* own = to + v * layout.matrices() * kMatrix;
    std::memset(own + layout.whole * kParts * kMatrix, 0, layout.rest_matrices * kMatrix);
    for (int64_t k = 0; k < l; k += 2) {
      __m512i first[kParts], second[kParts];
      split_in_parts(points[k * vectors + v], first);
      split_in_parts(k + 1 < l ? points[(k + 1) * vectors + v] : Vec<float>{}, second);
      if (k < layout.whole * kInner) {
        for (int p = 0; p < kParts; p++) {
          char* row = own + (k / kInner * kParts + p) * kMatrix + k % kInner / 2 * 64;
          _mm512_store_si512(row, interleave(first[p], second[p]));
        }
      } else {
        for (int i = 0; i < kProducts; i++) {
          const int64_t row = (i * layout.rest + k - layout.whole * kInner) / 2;
          const int p = kRight[i];
          _mm512_store_si512(own + layout.whole * kParts * kMatrix + row * 64, interleave(first[p], second[p]));
        }
      }
    }
  }
}

// Tile points as left factors, from rows [count][l]: for the distances [kTile / 16][matrices], with points in the rows,
// and for the sums [kTile / 32][dim_matrices][kParts], with dimensions in the rows.
void pack_point_parts(const float* rows, int count, int points, int64_t l, char* for_distances, char* for_sums) {
  const Layout layout(l);
  for (int j = 0; j < points; j++) {
    char* own = for_distances + j / kSide * layout.matrices() * kMatrix + j % kSide * 64;
    alignas(64) char rest[kProducts * kInner * 2 + 64] = {};
    for (int64_t k = 0; k < l; k += kInner) {
      __m512i low[kParts], high[kParts];
      split_in_parts(j < count ? load_some(rows + j * l + k, l - k) : Vec<float>{}, low);
      split_in_parts(j < count && l - k > 16 ? load_some(rows + j * l + k + 16, l - k - 16) : Vec<float>{}, high);
      alignas(64) char row[kParts][64];
      for (int p = 0; p < kParts; p++) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(row[p]), narrow(low[p]));
        _mm256_store_si256(reinterpret_cast<__m256i*>(row[p] + 32), narrow(high[p]));
      }
      if (k < layout.whole * kInner) {
        for (int p = 0; p < kParts; p++) std::memcpy(own + (k / kInner * kParts + p) * kMatrix, row[p], 64);
      } else {
        for (int i = 0; i < kProducts; i++) {
          std::memcpy(rest + i * layout.rest * 2, row[kLeft[i]], 64);
        }
      }
    }
    for (int64_t r = 0; r < layout.rest_matrices; r++) {
      std::memcpy(own + (layout.whole * kParts + r) * kMatrix, rest + r * 64, 64);
    }
  }
  for (int j = 0; j < points; j += kSide) {
    for (int64_t d = 0; d < layout.dim_matrices(); d++) {
      Vec<float> square[16];
      for (int r = 0; r < 16; r++) {
        square[r] = j + r < count ? load_some(rows + (j + r) * l + d * kSide, l - d * kSide) : Vec<float>{};
      }
      transpose(square);
      char* to = for_sums + (j / kInner * layout.dim_matrices() + d) * kParts * kMatrix + j % kInner * 2;
      for (int r = 0; r < 16; r++) {
        __m512i parts[kParts];
        split_in_parts(square[r], parts);
        for (int p = 0; p < kParts; p++) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + p * kMatrix + r * 64), narrow(parts[p]));
        }
      }
    }
  }
}

// Weights as right factors: [points / 32][vectors][kParts], from pairs [points][vectors].
template <int QV>
void pack_weight_parts(const Vec<float>* pairs, int count, int points, char* to) {
  for (int j = 0; j < points; j += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) {
      __m512i first[kParts], second[kParts];
      split_in_parts(j < count ? pairs[j * QV + v] : Vec<float>{}, first);
      split_in_parts(j + 1 < count ? pairs[(j + 1) * QV + v] : Vec<float>{}, second);
      char* row = to + (j / kInner * QV + v) * kParts * kMatrix + j % kInner / 2 * 64;
#pragma GCC unroll 3
      for (int p = 0; p < kParts; p++) _mm512_store_si512(row + p * kMatrix, interleave(first[p], second[p]));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of up to 2 x 2 registers. The numbers of registers are parts of the instructions: sums are in 0 to 3, left
// factors in 4 and 5, right ones in 6 and 7. The loads do not tell the compiler that they read memory.

template <int Rows, int Columns>
inline void clear_sums() {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  if (Columns > 1) _tile_zero(1);
  if (Rows > 1) _tile_zero(2);
  if (Rows > 1 && Columns > 1) _tile_zero(3);
}

template <int Rows, int Columns>
inline void store_sums(char* to, int64_t row_bytes) {
  _tile_stored(0, to, row_bytes);
  if (Columns > 1) _tile_stored(1, to + 64, row_bytes);
  if (Rows > 1) _tile_stored(2, to + kSide * row_bytes, row_bytes);
  if (Rows > 1 && Columns > 1) _tile_stored(3, to + kSide * row_bytes + 64, row_bytes);
  asm volatile("" ::: "memory");
}

template <int Rows>
inline void load_left(const char* at, int64_t next) {
  _tile_loadd(4, at, 64);
  if (Rows > 1) _tile_loadd(5, at + next, 64);
}

template <int Columns>
inline void load_right(const char* at, int64_t next) {
  _tile_loadd(6, at, 64);
  if (Columns > 1) _tile_loadd(7, at + next, 64);
}

template <int Rows, int Columns>
inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if (Columns > 1) _tile_dpbf16ps(1, 4, 7);
  if (Rows > 1) _tile_dpbf16ps(2, 5, 6);
  if (Rows > 1 && Columns > 1) _tile_dpbf16ps(3, 5, 7);
}

// All pairs of parts, which lie one behind the other; `left_next` and `right_next` are the ways to the second factors.
template <int Rows, int Columns>
inline void multiply_parts(const char* left, int64_t left_next, const char* right, int64_t right_next) {
#pragma GCC unroll 6
  for (int i = 0; i < kProducts; i++) {
    if (i == 0 || kLeft[i] != kLeft[i - 1]) load_left<Rows>(left + kLeft[i] * kMatrix, left_next);
    if (i == 0 || kRight[i] != kRight[i - 1]) load_right<Columns>(right + kRight[i] * kMatrix, right_next);
    multiply<Rows, Columns>();
  }
}

// f.run<rows, columns>(row, column) over registers [rows][columns], by two and two where that goes.
template <class F>
void for_squares(int64_t rows, int64_t columns, F f) {
  for (int64_t row = 0; row < rows; row += 2) {
    for (int64_t column = 0; column < columns; column += 2) {
      if (row + 1 < rows && column + 1 < columns) {
        f.template run<2, 2>(row, column);
      } else if (row + 1 < rows) {
        f.template run<2, 1>(row, column);
      } else if (column + 1 < columns) {
        f.template run<1, 2>(row, column);
      } else {
        f.template run<1, 1>(row, column);
      }
    }
  }
}

// pairs[16 rows][QV] = points times lanes.
template <int QV>
struct ScalarProducts {
  Layout layout;
  const char *points, *lanes;
  Vec<float>* pairs;

  template <int Rows, int Columns>
  void run(int64_t row, int64_t column) const {
    const int64_t next = layout.matrices() * kMatrix;
    const char *left = points + row * next, *right = lanes + column * next;
    clear_sums<Rows, Columns>();
    for (int64_t s = 0; s < layout.whole; s++) {
      multiply_parts<Rows, Columns>(left + s * kParts * kMatrix, next, right + s * kParts * kMatrix, next);
    }
    for (int64_t s = layout.whole * kParts; s < layout.matrices(); s++) {
      load_left<Rows>(left + s * kMatrix, next);
      load_right<Columns>(right + s * kMatrix, next);
      multiply<Rows, Columns>();
    }
    store_sums<Rows, Columns>(reinterpret_cast<char*>(pairs + row * kSide * QV + column), QV * 64);
  }
};

// sums[dimensions, to whole registers][QV] = points times weights.
template <int QV>
struct WeightedPoints {
  Layout layout;
  int groups;  // of 32 points
  const char *points, *weights;
  Vec<float>* sums;

  template <int Rows, int Columns>
  void run(int64_t row, int64_t column) const {
    clear_sums<Rows, Columns>();
    for (int g = 0; g < groups; g++) {
      multiply_parts<Rows, Columns>(points + (g * layout.dim_matrices() + row) * kParts * kMatrix, kParts * kMatrix,
                                    weights + (g * QV + column) * kParts * kMatrix, kParts * kMatrix);
    }
    store_sums<Rows, Columns>(reinterpret_cast<char*>(sums + row * kSide * QV + column), QV * 64);
  }
};

}  // namespace

#endif
