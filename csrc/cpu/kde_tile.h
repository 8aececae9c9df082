// A tile of points against a block of lanes: packing, squared distances, and sums of weighted differences. In each of
// the last two a multiply-add per coordinate and pair is the least that can be done, and only done where it loses no
// digits.
//
// Packed points are in units of a power of two near the bandwidth, so packing rounds nothing. They are packed twice: as
// they are, and moved by a point amid the centers (`Frame`), which does round. Then
//   squared distances   as they are: |x - c|^2, a subtraction and a multiply-add, exact to float rounding anywhere
//                       moved:       |x|^2 + |c|^2 - 2 x.c, a multiply-add; the error is that of the three parts
//   weighted sums       as they are: sum of w (c - x), likewise
//                       moved:       (sum of w c) - x (sum of w); the error is that of x and c
// The moved points serve where the parts of a pair's exponent are at most `most_parts` for all pairs of the tile and
// the block; see there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/kde_amx.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"
#include "kernels.h"

namespace {

#if defined(__AMX_BF16__)
constexpr int kTile = 16 * kRows;  // tile points: whole matrix registers of them in both directions
static_assert(kTile % (2 * kSide) == 0 && kTile % kInner == 0, "see kde_amx.h");
#else
constexpr int kTile = 8 * kRows;  // tile points; pairs and tile stay in the first-level cache for small l
#endif
constexpr int kShiftSample = 15;  // centers whose median is the shift

// Dimensions that a distance sums in registers: of squared differences, and of products.
constexpr int64_t kDifferenceDims = 32, kProductDims = 64;

// Dimensions from which distances are taken from products. Below, the subtractions cost little beside the exponential,
// and the roundings of the three parts are not small beside those of a distance.
constexpr int64_t kProductsFrom = 16;

// The parts of an exponent, in log2 units, are slope (|x|^2 + |c|^2). A product's error is about 2^-25 of them, and
// that of l squared differences grows with l likewise: up to 12 l, 2.4 times what typical points have at the bandwidths
// in use, the two are alike.
inline double most_parts_of_products(int64_t l) {
#if defined(__AMX_BF16__)
  return static_cast<double>(smaller(512, 12 * l));  // of bfloat16 parts: 2^-17 of them
#endif
  return static_cast<double>(12 * l);
}

// A moved sum's error is 2^-24 of |x|, which is sqrt(parts) bandwidths or less. The score is of the order of a
// bandwidth's inverse, and sums of differences err by some 2^-22 of it.
inline double most_parts_of_sums(int64_t l) { return larger(512, 12 * l); }

// ---------------------------------------------------------------------------------------------------------------------
// The frame of one batch item

template <class T>
struct Frame {
  int64_t l;
  T scale;         // a power of two near 1 / bandwidth
  const T* shift;  // [l + kLanes<T>], repeated so that rows of any length are packed by whole vectors
  bool is_moved;   // whether the shift is not 0

  static int64_t bytes(int64_t l) { return Arena::bytes<T>(l + kLanes<T>); }
  Frame(Arena arena, const T* centers, int64_t m, int64_t l, T scale) : l(l), scale(scale) {
    T* found = arena.take<T>(l + kLanes<T>);
    is_moved = find_shift(centers, m, l, found);
    shift = found;
  }

 private:
  // The shift is the median, coordinate by coordinate, of some centers: it is amid most of them wherever a few of them
  // are. It is 0 where that is amid them too, so that points need not be packed twice; and where it is not finite.
  static bool find_shift(const T* centers, int64_t m, int64_t l, T* shift /* [l + kLanes<T>] */) {
    const int64_t count = smaller(m, kShiftSample);
    const auto center = [&](int64_t s) { return centers + m * s / count * l; };
    T sample[kShiftSample] = {};
    // Sorted by hand: an algorithm of the standard library would have external linkage.
    const auto median = [&] {
      for (int64_t s = 1; s < count; s++) {
        const T x = sample[s];
        int64_t to = s;
        for (; to > 0 && x < sample[to - 1]; to--) sample[to] = sample[to - 1];
        sample[to] = x;
      }
      return sample[count / 2];
    };
    T length = 0;  // by magnitudes, whose sums hold small numbers whose squares would be 0
    for (int64_t k = 0; k < l; k++) {
      for (int64_t s = 0; s < count; s++) sample[s] = std::isnan(center(s)[k]) ? T(0) : center(s)[k];
      const T middle = median();
      shift[k] = std::isfinite(middle) ? middle : T(0);
      length += std::fabs(shift[k]);
    }
    for (int64_t s = 0; s < count; s++) {
      sample[s] = 0;
      for (int64_t k = 0; k < l; k++) sample[s] += std::fabs(center(s)[k] - shift[k]);
      if (std::isnan(sample[s])) sample[s] = 0;
    }
    const bool is_moved = length > median();
    for (int64_t k = 0; k < l; k++) shift[k] = is_moved ? shift[k] : T(0);
    for (int64_t k = l; k < l + kLanes<T>; k++) shift[k] = shift[k - l];
    return is_moved;
  }
};

// Packed points: `moved` is `as_is` where the frame is not moved.
template <class T, class Value>
struct Packed {
  Value *as_is, *moved;
};

// ---------------------------------------------------------------------------------------------------------------------
// Lanes

// A block's lanes: points as [l][QV], and of the moved ones the squared norms [QV] and their largest.
template <class T>
struct Lanes {
  Packed<T, Vec<T>> points;
  Vec<T>* norms;
  double largest_norm;
  const char* parts;  // of the moved points; see kde_amx.h
};

// What a chunk of vectors of lanes takes; a block of it that starts at vector f has its points at f * l and its norms
// at f, and `largest_norm[f]` is the block's.
template <class T>
struct ChunkLanes {
  Packed<T, Vec<T>> points;  // [vectors * l]
  Vec<T>* norms;             // [vectors]
  double* largest_norm;      // [vectors]
  int64_t part_bytes = 0;    // of a vector's parts
  char* parts = nullptr;     // [vectors, part_bytes]

  static int64_t bytes(int64_t vectors, int64_t l) {
    int64_t total =
        2 * Arena::bytes<Vec<T>>(vectors * l) + Arena::bytes<Vec<T>>(vectors) + Arena::bytes<double>(vectors);
#if defined(__AMX_BF16__)
    total += vectors * Layout(l).matrices() * kMatrix;
#endif
    return total;
  }
  ChunkLanes(Arena arena, int64_t vectors, const Frame<T>& frame)
      : points{arena.take<Vec<T>>(vectors * frame.l), arena.take<Vec<T>>(vectors * frame.l)},
        norms(arena.take<Vec<T>>(vectors)),
        largest_norm(arena.take<double>(vectors)) {
    if (!frame.is_moved) points.moved = points.as_is;
#if defined(__AMX_BF16__)
    part_bytes = Layout(frame.l).matrices() * kMatrix;
    parts = arena.next;
#endif
  }

  Lanes<T> block(int64_t vector, int64_t l) const {
    return {{points.as_is + vector * l, points.moved + vector * l},
            norms + vector,
            largest_norm[vector],
            parts + vector * part_bytes};
  }

  // `width` vectors of lanes, the first lane being point `first`; the lanes after the last point repeat it.
  void pack(const T* from, int64_t first, int64_t count, const Frame<T>& frame, int width, int64_t vector) const {
    const int64_t l = frame.l, lanes = width * kLanes<T>;
    const Lanes<T> to = block(vector, l);
    T* as_is = reinterpret_cast<T*>(to.points.as_is);
    T* moved = reinterpret_cast<T*>(to.points.moved);
    double largest = 0;
    for (int64_t lane = 0; lane < lanes; lane++) {
      const T* point = from + smaller(first + lane, count - 1) * l;
      double norm = 0;
      for (int64_t k = 0; k < l; k++) {
        const T x = (point[k] - frame.shift[k]) * frame.scale;
        if (frame.is_moved) as_is[k * lanes + lane] = point[k] * frame.scale;
        moved[k * lanes + lane] = x;
        norm += static_cast<double>(x) * static_cast<double>(x);
      }
      reinterpret_cast<T*>(to.norms)[lane] = static_cast<T>(norm);
      largest = norm > largest ? norm : largest;
    }
    largest_norm[vector] = largest;
#if defined(__AMX_BF16__)
    pack_lane_parts(to.points.moved, l, width, parts + vector * part_bytes);
#endif
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The tile that one thread is working on

template <class T>
struct Tile {
  Packed<T, T> rows;    // [kTile, l]
  T* norms;             // [kTile], squared, of the moved rows; only for products
  double largest_norm;  // of the moved rows, or more; NaN counts for nothing, and comes through in any case
  int* all;             // [kTile], the numbers of all rows, for weighted sums that leave none out
  Vec<T>* pairs;        // [kTile, kQV]
#if defined(__AMX_BF16__)
  char *row_parts, *column_parts;  // of the moved rows, for distances and for sums; see kde_amx.h
  char* weight_parts;              // [kTile / kInner, kQV, kParts]
  Vec<T>* matrix_sums;             // [l, to whole registers, kQV]
#endif

  static int64_t bytes(int64_t l) {
    int64_t total = 2 * Arena::bytes<T>(kTile * l) + Arena::bytes<T>(kTile) + Arena::bytes<int>(kTile) +
                    Arena::bytes<Vec<T>>(kTile * kQV);
#if defined(__AMX_BF16__)
    const Layout layout(l);
    total += (kTile / kSide * layout.matrices() + kTile / kInner * kParts * (layout.dim_matrices() + kQV)) * kMatrix +
             Arena::bytes<Vec<T>>(layout.dim_matrices() * kSide * kQV);
#endif
    return total;
  }
  Tile(Arena arena, const Frame<T>& frame)
      : rows{arena.take<T>(kTile * frame.l), arena.take<T>(kTile * frame.l)},
        norms(arena.take<T>(kTile)),
        largest_norm(0),
        all(arena.take<int>(kTile)),
        pairs(arena.take<Vec<T>>(kTile * kQV)) {
    if (!frame.is_moved) rows.moved = rows.as_is;
    for (int j = 0; j < kTile; j++) all[j] = j;
#if defined(__AMX_BF16__)
    const Layout layout(frame.l);
    row_parts = arena.take<char>(kTile / kSide * layout.matrices() * kMatrix);
    column_parts = arena.take<char>(kTile / kInner * kParts * layout.dim_matrices() * kMatrix);
    weight_parts = arena.take<char>(kTile / kInner * kParts * kQV * kMatrix);
    matrix_sums = arena.take<Vec<T>>(layout.dim_matrices() * kSide * kQV);
#endif
  }

  // Points first ... first + count; rows after the last are 0 and take part in nothing but the distances.
  void pack(const T* points, int64_t first, int64_t count, const Frame<T>& frame, bool with_norms) {
    const int64_t l = frame.l, total = count * l, padded = ceil_div(count, kRows) * kRows * l;
    const T* from = points + first * l;
    if (frame.is_moved) {
      for (int64_t i = 0; i < total; i++) rows.as_is[i] = from[i] * frame.scale;
      for (int64_t i = total; i < padded; i++) rows.as_is[i] = 0;
    }
    const int64_t whole = total / kLanes<T> * kLanes<T>, step = kLanes<T> % l;
    Vec<T> furthest = {};
    for (int64_t i = 0, k = 0; i < whole; i += kLanes<T>) {
      Vec<T> point, origin;
      std::memcpy(&point, from + i, sizeof point);
      std::memcpy(&origin, frame.shift + k, sizeof origin);
      point = (point - origin) * frame.scale;
      std::memcpy(rows.moved + i, &point, sizeof point);
      point *= point;
      furthest = point > furthest ? point : furthest;
      k = k + step < l ? k + step : k + step - l;
    }
    T largest = 0;
    for (int lane = 0; lane < kLanes<T>; lane++) largest = furthest[lane] > largest ? furthest[lane] : largest;
    for (int64_t i = whole; i < total; i++) {
      const T x = (from[i] - frame.shift[i % l]) * frame.scale;
      rows.moved[i] = x;
      largest = x * x > largest ? x * x : largest;
    }
    for (int64_t i = total; i < padded; i++) rows.moved[i] = 0;
    largest_norm = static_cast<double>(l) * static_cast<double>(largest);
    if (with_norms) find_norms(static_cast<int>(count), l);
#if defined(__AMX_BF16__)
    pack_point_parts(rows.moved, static_cast<int>(count), kTile, l, row_parts, column_parts);
#endif
  }

  void find_norms(int count, int64_t l) {
    largest_norm = 0;
    for (int j = 0; j < count; j++) {
      const T* row = rows.moved + j * l;
      Vec<T> sums = {};
      int64_t k = 0;
      for (; k + kLanes<T> <= l; k += kLanes<T>) {
        Vec<T> x;
        std::memcpy(&x, row + k, sizeof x);
        sums += x * x;
      }
      double norm = 0;
      for (int lane = 0; lane < kLanes<T>; lane++) norm += static_cast<double>(sums[lane]);
      for (; k < l; k++) norm += static_cast<double>(row[k]) * static_cast<double>(row[k]);
      norms[j] = static_cast<T>(norm);
      largest_norm = norm > largest_norm ? norm : largest_norm;
    }
    for (int j = count; j < kTile; j++) norms[j] = 0;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Squared distances: pairs[kTile][QV]

enum class Terms { kSquaredDifferences, kProducts };

// Sums over the dimensions, in registers over some of them and then over these sums, so that roundings do not pile up.
// They do most where all terms have one sign.
template <Terms terms, class T, int QV>
void sum_over_dims(const T* rows, int count, int64_t l, const Vec<T>* lanes, Vec<T>* pairs) {
  constexpr int64_t kDims = terms == Terms::kProducts ? kProductDims : kDifferenceDims;
  for (int j = 0; j < count; j += kRows) {
    for (int64_t begin = 0; begin < l; begin += kDims) {
      Vec<T> sums[kRows][QV] = {};
      for (int64_t k = begin; k < smaller(l, begin + kDims); k++) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
          const Vec<T> x = broadcast(rows[(j + r) * l + k]);
#pragma GCC unroll 4
          for (int v = 0; v < QV; v++) {
            if (terms == Terms::kProducts) {
              sums[r][v] += lanes[k * QV + v] * x;
            } else {
              const Vec<T> difference = lanes[k * QV + v] - x;
              sums[r][v] += difference * difference;
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < QV; v++) {
          Vec<T>& sum = pairs[(j + r) * QV + v];
          sum = begin == 0 ? sums[r][v] : sum + sums[r][v];
        }
    }
  }
}

template <class T, int QV>
void distances_from_differences(const Tile<T>& tile, int count, int64_t l, const Lanes<T>& lanes) {
  sum_over_dims<Terms::kSquaredDifferences, T, QV>(tile.rows.as_is, count, l, lanes.points.as_is, tile.pairs);
}

// The products are summed by themselves: between typical points they cancel, so their roundings are small.
template <class T, int QV>
void distances_from_products(const Tile<T>& tile, int count, int64_t l, const Lanes<T>& lanes) {
#if defined(__AMX_BF16__)
  for_squares(kTile / kSide, QV, ScalarProducts<QV>{Layout(l), tile.row_parts, lanes.parts, tile.pairs});
#else
  sum_over_dims<Terms::kProducts, T, QV>(tile.rows.moved, count, l, lanes.points.moved, tile.pairs);
#endif
  for (int j = 0; j < count; j++) {
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) {
      Vec<T>& pair = tile.pairs[j * QV + v];
      pair = (lanes.norms[v] + tile.norms[j]) - T(2) * pair;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Weighted sums: sums[l][QV] += sum over some rows of weight * (row - lane)

// The rows whose numbers are in `rows`, with their sum of weights.
template <class T, int QV>
struct WeightedRows {
  const Tile<T>& tile;
  const int* rows;
  int count;
  int64_t l;
  const Lanes<T>& lanes;
  const Vec<T>* mass;  // [QV], the sum of these rows' weights; null: the sums are taken from differences
  Vec<T>* sums;

  void add() const {
    int64_t k = 0;
    for (; k + kColumns <= l; k += kColumns) add_columns<kColumns>(k);
    switch (l - k) {
      case 3:
        return add_columns<3>(k);
      case 2:
        return add_columns<2>(k);
      case 1:
        return add_columns<1>(k);
    }
  }

  template <int Columns>
  void add_columns(int64_t k) const {
    mass ? add_columns<Columns, false>(k) : add_columns<Columns, true>(k);
  }

  template <int Columns, bool differences>
  void add_columns(int64_t k) const {
    const T* points = differences ? tile.rows.as_is : tile.rows.moved;
    const Vec<T>* own = (differences ? lanes.points.as_is : lanes.points.moved) + k * QV;
    Vec<T> tile_sums[Columns][QV] = {};
    for (int i = 0; i < count; i++) {
      const T* row = points + rows[i] * l + k;
      const Vec<T>* weight = tile.pairs + rows[i] * QV;
#pragma GCC unroll 4
      for (int c = 0; c < Columns; c++) {
        const Vec<T> x = broadcast(row[c]);
#pragma GCC unroll 4
        for (int v = 0; v < QV; v++) tile_sums[c][v] += weight[v] * (differences ? x - own[c * QV + v] : x);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < Columns; c++)
#pragma GCC unroll 4
      for (int v = 0; v < QV; v++)
        sums[(k + c) * QV + v] += differences ? tile_sums[c][v] : tile_sums[c][v] - mass[v] * own[c * QV + v];
  }
};

#if defined(__AMX_BF16__)
// The same for all rows of the tile, with their sum of weights.
template <int QV>
void add_weighted_rows_by_matrices(const Tile<float>& tile, int count, int64_t l, const Lanes<float>& lanes,
                                   const Vec<float>* mass, Vec<float>* sums) {
  pack_weight_parts<QV>(tile.pairs, count, kTile, tile.weight_parts);
  const Layout layout(l);
  for_squares(layout.dim_matrices(), QV,
              WeightedPoints<QV>{layout, kTile / kInner, tile.column_parts, tile.weight_parts, tile.matrix_sums});
  for (int64_t k = 0; k < l; k++) {
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) {
      sums[k * QV + v] += tile.matrix_sums[k * QV + v] - mass[v] * lanes.points.moved[k * QV + v];
    }
  }
}
#endif

}  // namespace
