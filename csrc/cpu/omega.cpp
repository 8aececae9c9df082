// The omega op on the CPU. Compiled once per instruction set (KDEJSD_LEVEL is base, v3 or v4); dispatch.cpp chooses.
//
// All pairs: the points are packed once, in panels [dims][kPanel], of which each serves both as lanes of vectors and as
// points that are broadcast. Two panels that meet go through three steps:
//   1. squared distances of inputs and of codes, from differences  -> tiles [kPanel][kPanel]
//   2. ratios, or the weights of both gradients, in place
//   3. sums[dims][kPanel] += weight * difference, for the one panel and, by the transposed tile, for the other
// So every distance is computed once, and a step of the sums takes differences too: with the weighted mean in their
// place, a close pair's large weight would leave nothing of its gradient but rounding errors.
//
// Both panels' sums are written. Panels therefore stand in blocks that meet in the rounds of a tournament: in a round
// every block meets one other, no two threads write the same sums, and the order of the sums is fixed.

#include "math/omega.h"

#include <cmath>
#include <initializer_list>
#include <new>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/tile_sizes.h"
#include "cpu/tiles.h"
#include "kernels.h"

namespace {

using kdejsd::OmegaAll;
using kdejsd::OmegaHalves;

constexpr int kPanel = 8 * kRows;         // points of a panel
constexpr int kPairs = kPanel * kPanel;   // pairs of two panels
constexpr int kDims = 64;                 // dimensions that are summed in registers; of two panels they stay in cache
constexpr int kBlocksPerThread = 4;       // of the tournament: two meetings per thread and round
constexpr int kHalvesVectors = 4;         // of dimensions that are summed in registers, of a pair of the halves
constexpr int64_t kGroupBytes = 1 << 21;  // of panels and their sums that stay in a cache while others pass by
constexpr int64_t kLeastGroup = 2;        // panels, where they are larger
constexpr int64_t kSerialWork = 1 << 16;  // multiply-adds below which a second thread costs more than it brings

template <class T>
constexpr int kVectors = kPanel / kLanes<T>;  // of a panel
static_assert(kPanel % kLanes<float> == 0 && kPanel % kLanes<double> == 0, "a panel is whole vectors");

// ---------------------------------------------------------------------------------------------------------------------
// Panels

// Points first ... first + kPanel as [dims][kPanel]; the places after the last point repeat it.
template <class T>
void pack_panel(const T* points, int64_t first, int64_t count, int64_t dims, T* panel) {
  for (int64_t start = 0; start < dims; start += kDims) {
    const int64_t end = smaller(start + kDims, dims);
    for (int place = 0; place < kPanel; place++) {
      const T* point = points + smaller(first + place, count - 1) * dims;
      for (int64_t k = start; k < end; k++) panel[k * kPanel + place] = point[k];
    }
  }
}

template <class T>
void unpack_panel(const T* panel, int64_t first, int64_t count, int64_t dims, T* points) {
  const int places = static_cast<int>(smaller(kPanel, count - first));
  for (int64_t start = 0; start < dims; start += kDims) {
    const int64_t end = smaller(start + kDims, dims);
    for (int place = 0; place < places; place++)
      for (int64_t k = start; k < end; k++) points[(first + place) * dims + k] = panel[k * kPanel + place];
  }
}

// Step 1 for QV vectors of lanes and some of the dimensions.
template <class T>
struct SquaredDistances {
  const T* others;      // [dims][kPanel]
  const Vec<T>* lanes;  // [dims][kVectors], from this block's first on
  int64_t dims;
  bool add;       // to the dimensions before
  Vec<T>* pairs;  // [kPanel others][kVectors], from this block's first on

  template <int QV>
  void run() {
    for (int j = 0; j < kPanel; j += kRows) {
      Vec<T> sums[kRows][QV] = {};
      for (int64_t k = 0; k < dims; k++) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
          const Vec<T> x = broadcast(others[k * kPanel + j + r]);
#pragma GCC unroll 4
          for (int v = 0; v < QV; v++) {
            const Vec<T> difference = lanes[k * kVectors<T> + v] - x;
            sums[r][v] += difference * difference;
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < QV; v++) {
          Vec<T>& pair = pairs[(j + r) * kVectors<T> + v];
          pair = add ? pair + sums[r][v] : sums[r][v];
        }
    }
  }
};

template <class T>
void squared_distances(const T* others, const T* lanes, int64_t dims, Vec<T>* pairs) {
  for (int64_t start = 0; start < dims; start += kDims) {
    const Vec<T>* own = reinterpret_cast<const Vec<T>*>(lanes + start * kPanel);
    for_blocks(kVectors<T>, [&](int width, int64_t first) {
      with_width(width, SquaredDistances<T>{others + start * kPanel, own + first, smaller(kDims, dims - start),
                                            start > 0, pairs + first});
    });
  }
}

// Step 3 for QV vectors of lanes: sums += sum over the others of weight * (lane - other).
template <class T>
struct WeightedDifferences {
  const T* others;      // [dims][kPanel]
  const Vec<T>* lanes;  // [dims][kVectors], from this block's first on
  int64_t dims;
  const Vec<T>* weights;  // [kPanel others][kVectors], from this block's first on
  Vec<T>* sums;           // [dims][kVectors], from this block's first on

  template <int QV>
  void run() {
    int64_t k = 0;
    for (; k + kColumns <= dims; k += kColumns) add_columns<QV, kColumns>(k);
    for (; k < dims; k++) add_columns<QV, 1>(k);
  }

  template <int QV, int Columns>
  void add_columns(int64_t first) {
    Vec<T> own[Columns][QV], tile_sums[Columns][QV] = {};
#pragma GCC unroll 4
    for (int c = 0; c < Columns; c++)
#pragma GCC unroll 4
      for (int v = 0; v < QV; v++) own[c][v] = lanes[(first + c) * kVectors<T> + v];
    // The columns after the next are fetched meanwhile: 5 to 9 % of the time. Beyond the last, the hint does nothing.
    for (int64_t line = 0; line < Columns * kPanel; line += 64 / static_cast<int64_t>(sizeof(T))) {
      const int64_t at = (first + 2 * Columns) * kPanel + line;
      __builtin_prefetch(reinterpret_cast<T*>(sums) + at, 1);
      __builtin_prefetch(reinterpret_cast<const T*>(lanes) + at);
      __builtin_prefetch(others + at);
    }
    for (int j = 0; j < kPanel; j++) {
#pragma GCC unroll 4
      for (int c = 0; c < Columns; c++) {
        const Vec<T> x = broadcast(others[(first + c) * kPanel + j]);
#pragma GCC unroll 4
        for (int v = 0; v < QV; v++) tile_sums[c][v] += weights[j * kVectors<T> + v] * (own[c][v] - x);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < Columns; c++)
#pragma GCC unroll 4
      for (int v = 0; v < QV; v++) sums[(first + c) * kVectors<T> + v] += tile_sums[c][v];
  }
};

template <class T>
void add_weighted_differences(const T* others, const T* lanes, int64_t dims, const Vec<T>* weights, T* sums) {
  for_blocks(kVectors<T>, [&](int width, int64_t first) {
    with_width(width, WeightedDifferences<T>{others, reinterpret_cast<const Vec<T>*>(lanes) + first, dims,
                                             weights + first, reinterpret_cast<Vec<T>*>(sums) + first});
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// All pairs

// What a block of panels has found in its meetings.
struct Found {
  double sum = 0;
  kdejsd::OmegaLargest largest = kdejsd::OmegaLargest::none();
};

// The two panels that one thread is working on.
template <class T>
struct Tile {
  Vec<T>* inputs;      // [kPanel][kVectors]: distances, then weights of the inputs' gradient
  Vec<T>* codes;       // likewise of the codes; where no gradient is wanted, the ratios
  Vec<T>* transposed;  // one of them, for the other panel's sums

  static int64_t bytes() { return 3 * Arena::bytes<T>(kPairs); }
  explicit Tile(Arena arena)
      : inputs(arena.take<Vec<T>>(kPanel * kVectors<T>)),
        codes(arena.take<Vec<T>>(kPanel * kVectors<T>)),
        transposed(arena.take<Vec<T>>(kPanel * kVectors<T>)) {}
};

// Panels in order, in blocks of nearly equal size.
struct Tournament {
  int threads;
  int64_t panels, blocks, rounds;

  Tournament(int64_t count, int64_t dims, int requested_threads) {
    threads = count * count * dims < kSerialWork ? 1 : requested_threads;
    panels = ceil_div(count, kPanel);
    blocks = threads == 1 ? 1 : smaller(panels, static_cast<int64_t>(kBlocksPerThread) * threads);
    rounds = blocks - 1 + blocks % 2;  // with an odd number, one block rests in each
  }
  int64_t panel_begin(int64_t block) const { return panels * block / blocks; }
  int64_t meetings() const { return (blocks + 1) / 2; }

  // The two blocks of a meeting: the last one stays in its place, the others move around a circle.
  void meeting(int64_t round, int64_t index, int64_t* low, int64_t* high) const {
    const int64_t one = index == 0 ? rounds : (round + index) % rounds;
    const int64_t other = (round + rounds - index) % rounds;
    *low = smaller(one, other);
    *high = larger(one, other);
  }
};

template <class T>
struct AllPairs {
  const OmegaAll& args;
  Tournament tournament;
  T* inputs = nullptr;      // [panels][d][kPanel]
  T* codes = nullptr;       // [panels][l][kPanel]
  T* input_sums = nullptr;  // [panels][d][kPanel] or null
  T* code_sums = nullptr;   // [panels][l][kPanel] or null
  Found* found = nullptr;   // [blocks]

  bool wants_gradient() const { return input_sums || code_sums; }

  void pack(int64_t panel) const {
    pack_panel(static_cast<const T*>(args.inputs), panel * kPanel, args.b, args.d, inputs + panel * kPanel * args.d);
    pack_panel(static_cast<const T*>(args.codes), panel * kPanel, args.b, args.l, codes + panel * kPanel * args.l);
    for (int64_t k = 0; input_sums && k < kPanel * args.d; k++) input_sums[panel * kPanel * args.d + k] = 0;
    for (int64_t k = 0; code_sums && k < kPanel * args.l; k++) code_sums[panel * kPanel * args.l + k] = 0;
  }

  void unpack(int64_t panel) const {
    if (input_sums)
      unpack_panel(input_sums + panel * kPanel * args.d, panel * kPanel, args.b, args.d, static_cast<T*>(args.dinputs));
    if (code_sums)
      unpack_panel(code_sums + panel * kPanel * args.l, panel * kPanel, args.b, args.l, static_cast<T*>(args.dcodes));
  }

  // Panels low <= high; lanes are points of the lower one.
  void meet(int64_t low, int64_t high, const Tile<T>& tile, Found& to) const {
    squared_distances(inputs + high * kPanel * args.d, inputs + low * kPanel * args.d, args.d, tile.inputs);
    squared_distances(codes + high * kPanel * args.l, codes + low * kPanel * args.l, args.l, tile.codes);
    clear_absent(low, high, tile);
    if (!wants_gradient()) return take_ratios(low, high, tile, to);
    const double sum = weigh(tile);
    to.sum += low == high ? 0.5 * sum : sum;
    if (args.upstream) scale_by_upstream(low, high, tile);
    if (input_sums) add_sums(low, high, inputs, args.d, tile.inputs, tile.transposed, input_sums);
    if (code_sums) add_sums(low, high, codes, args.l, tile.codes, tile.transposed, code_sums);
  }

  // Pairs with a place that holds no point become pairs of equal points.
  void clear_absent(int64_t low, int64_t high, const Tile<T>& tile) const {
    const int64_t lanes = args.b - low * kPanel, rows = args.b - high * kPanel;
    if (rows >= kPanel) return;
    for (T* pairs : {reinterpret_cast<T*>(tile.inputs), reinterpret_cast<T*>(tile.codes)})
      for (int64_t row = 0; row < kPanel; row++)
        for (int64_t lane = row < rows ? lanes : 0; lane < kPanel; lane++) pairs[row * kPanel + lane] = 0;
  }

  // Step 2: omega_terms, on vectors.
  static Mask<T> counts_for_nothing(Vec<T> distance, Vec<T> code_distance) {
    return (distance == Vec<T>{}) & (code_distance == code_distance);
  }

  static double weigh(const Tile<T>& tile) {
    Vec<T> sums[kVectors<T>] = {};
    for (int e = 0; e < kPanel * kVectors<T>; e++) {
      const Vec<T> distance = tile.inputs[e], code_distance = tile.codes[e];
      const Mask<T> nothing = counts_for_nothing(distance, code_distance);
      const Vec<T> ratio = nothing ? Vec<T>{} : code_distance / distance;
      const Vec<T> weight = nothing ? Vec<T>{} : T(2) / distance;
      sums[e % kVectors<T>] += ratio;
      tile.codes[e] = weight;
      tile.inputs[e] = -ratio * weight;
    }
    return total(sums);
  }

  static double total(const Vec<T> (&sums)[kVectors<T>]) {
    double sum = 0;
    for (int lane = 0; lane < kPanel; lane++) sum += static_cast<double>(reinterpret_cast<const T*>(sums)[lane]);
    return sum;
  }

  // Both entries of a pair in the matrix of ratios have a share in it. A pair that counts for nothing stays so, also
  // where the upstream gradient is infinite, as that of a square root is at 0.
  void scale_by_upstream(int64_t low, int64_t high, const Tile<T>& tile) const {
    const T* upstream = static_cast<const T*>(args.upstream);
    T* input_weights = reinterpret_cast<T*>(tile.inputs);
    T* code_weights = reinterpret_cast<T*>(tile.codes);
    for_pairs(low, high, [&](int64_t i, int64_t j, int at) {
      if (code_weights[at] == 0) return;
      const T grad = upstream[i * args.b + j] + upstream[j * args.b + i];
      input_weights[at] *= grad;
      code_weights[at] *= grad;
    });
  }

  // f(point of low, point of high, place in the tile) for every pair of points.
  template <class F>
  void for_pairs(int64_t low, int64_t high, F f) const {
    const int64_t first = low * kPanel, second = high * kPanel;
    for (int64_t j = second; j < smaller(args.b, second + kPanel); j++)
      for (int64_t i = first; i < smaller(args.b, first + kPanel); i++)
        f(i, j, static_cast<int>((j - second) * kPanel + i - first));
  }

  // Step 2 without gradients.
  void take_ratios(int64_t low, int64_t high, const Tile<T>& tile, Found& to) const {
    Vec<T> sums[kVectors<T>] = {}, tops[kVectors<T>] = {};
    for (int e = 0; e < kPanel * kVectors<T>; e++) {
      const Mask<T> nothing = counts_for_nothing(tile.inputs[e], tile.codes[e]);
      const Vec<T> ratio = nothing ? Vec<T>{} : tile.codes[e] / tile.inputs[e];
      Vec<T>& top = tops[e % kVectors<T>];
      top = ratio > top ? ratio : top;
      sums[e % kVectors<T>] += ratio;
      tile.codes[e] = ratio;
    }
    const double sum = total(sums);
    to.sum += low == high ? 0.5 * sum : sum;
    const T* ratios = reinterpret_cast<const T*>(tile.codes);
    if (args.ratios) {
      T* out = static_cast<T*>(args.ratios);
      for_pairs(low, high, [&](int64_t i, int64_t j, int at) {
        out[i * args.b + j] = out[j * args.b + i] = i == j ? T(0) : ratios[at];
      });
    }
    if (args.largest) {
      T top = 0;
      for (int lane = 0; lane < kPanel; lane++) top = std::fmax(top, reinterpret_cast<const T*>(tops)[lane]);
      // Only a NaN makes the sum of what is not negative NaN.
      if (!std::isnan(sum) && static_cast<double>(top) < to.largest.ratio) return;
      for_pairs(low, high, [&](int64_t i, int64_t j, int at) {
        if (i < j) to.largest.consider({static_cast<double>(ratios[at]), i, j});
      });
    }
  }

  // Step 3 for both panels. A panel that meets itself has all its pairs in the tile.
  static void add_sums(int64_t low, int64_t high, const T* panels, int64_t dims, const Vec<T>* weights,
                       Vec<T>* transposed, T* sums) {
    const int64_t a = low * kPanel * dims, b = high * kPanel * dims;
    add_weighted_differences(panels + b, panels + a, dims, weights, sums + a);
    if (low == high) return;
    const T* from = reinterpret_cast<const T*>(weights);
    T* to = reinterpret_cast<T*>(transposed);
    for (int row = 0; row < kPanel; row++)
      for (int lane = 0; lane < kPanel; lane++) to[row * kPanel + lane] = from[lane * kPanel + row];
    add_weighted_differences(panels + a, panels + b, dims, transposed, sums + b);
  }

  // Some panels of the one block stay in the cache while the other's pass by, each for all of them. A block meets
  // itself too.
  void meet_blocks(int64_t one, int64_t other, const Tile<T>& tile) const {
    const int64_t end = tournament.panel_begin(one + 1), other_end = tournament.panel_begin(other + 1);
    const int64_t panel_bytes = 2 * kPanel * (args.d + args.l) * static_cast<int64_t>(sizeof(T));
    const int64_t some = larger(kLeastGroup, kGroupBytes / panel_bytes);
    for (int64_t begin = tournament.panel_begin(one); begin < end; begin += some)
      for (int64_t high = larger(tournament.panel_begin(other), begin); high < other_end; high++)
        for (int64_t low = begin; low < smaller(smaller(begin + some, end), high + 1); low++)
          meet(low, high, tile, found[one]);
  }
};

template <class T>
void all_pairs(const OmegaAll& args, int requested_threads) {
  const Tournament tournament(args.b, args.d + args.l, requested_threads);
  const int64_t input_size = tournament.panels * kPanel * args.d, code_size = tournament.panels * kPanel * args.l;
  Memory memory((args.dinputs ? 2 : 1) * Arena::bytes<T>(input_size) +
                (args.dcodes ? 2 : 1) * Arena::bytes<T>(code_size) + Arena::bytes<Found>(tournament.blocks) +
                tournament.threads * Tile<T>::bytes());
  Arena arena{memory.base};
  AllPairs<T> pass{args, tournament};
  pass.inputs = arena.take<T>(input_size);
  pass.codes = arena.take<T>(code_size);
  if (args.dinputs) pass.input_sums = arena.take<T>(input_size);
  if (args.dcodes) pass.code_sums = arena.take<T>(code_size);
  pass.found = arena.take<Found>(tournament.blocks);
  for (int64_t block = 0; block < tournament.blocks; block++) new (pass.found + block) Found;

  Team::run(tournament.threads, [&](Team::Part& part) {
    const Tile<T> tile(Arena{arena.next + part.thread * Tile<T>::bytes()});
    part.each(tournament.panels, [&](int64_t panel) { pass.pack(panel); });
    part.each(tournament.blocks, [&](int64_t block) { pass.meet_blocks(block, block, tile); });
    for (int64_t round = 0; round < tournament.rounds; round++) {
      part.each(tournament.meetings(), [&](int64_t index) {
        int64_t low, high;
        tournament.meeting(round, index, &low, &high);
        if (high < tournament.blocks && low < high) pass.meet_blocks(low, high, tile);
      });
    }
    part.each(tournament.panels, [&](int64_t panel) { pass.unpack(panel); });
  });

  Found whole;
  for (int64_t block = 0; block < tournament.blocks; block++) {
    whole.sum += pass.found[block].sum;
    whole.largest.consider(pass.found[block].largest);
  }
  if (args.sum) *args.sum = whole.sum;
  if (args.largest) {
    args.largest[0] = whole.largest.i;
    args.largest[1] = whole.largest.j;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Halves: one pair after the other, the lanes are dimensions

template <class T>
T row_distance(const T* a, const T* b, int64_t dims) {
  Vec<T> sums[kHalvesVectors] = {};
  int64_t k = 0;
  for (; k + kHalvesVectors * kLanes<T> <= dims; k += kHalvesVectors * kLanes<T>) {
#pragma GCC unroll 4
    for (int s = 0; s < kHalvesVectors; s++) {
      Vec<T> x, y;
      std::memcpy(&x, a + k + s * kLanes<T>, sizeof x);
      std::memcpy(&y, b + k + s * kLanes<T>, sizeof y);
      sums[s] += (x - y) * (x - y);
    }
  }
  double sum = 0;
  for (int lane = 0; lane < kHalvesVectors * kLanes<T>; lane++)
    sum += static_cast<double>(reinterpret_cast<const T*>(sums)[lane]);
  for (; k < dims; k++) sum += static_cast<double>((a[k] - b[k]) * (a[k] - b[k]));
  return static_cast<T>(sum);
}

template <class T>
void write_differences(const T* a, const T* b, int64_t dims, T weight, T* da, T* db) {
  for (int64_t k = 0; k < dims; k++) {
    const T gradient = weight * (a[k] - b[k]);
    da[k] = gradient;
    db[k] = -gradient;
  }
}

template <class T>
void halves(const OmegaHalves& args, int requested_threads) {
  const int64_t other_inputs = args.pairs * args.d, other_codes = args.pairs * args.l;
  const int threads = other_inputs + other_codes < kSerialWork ? 1 : requested_threads;
  Memory memory(Arena::bytes<double>(args.pairs));
  double* ratios = reinterpret_cast<double*>(memory.base);
  const auto take = [&](int64_t pair) {
    const T* x = static_cast<const T*>(args.inputs) + pair * args.d;
    const T* z = static_cast<const T*>(args.codes) + pair * args.l;
    const T distance = row_distance(x, x + other_inputs, args.d),
            code_distance = row_distance(z, z + other_codes, args.l);
    const kdejsd::OmegaTerms<T> terms = kdejsd::omega_terms(distance, code_distance);
    ratios[pair] = static_cast<double>(terms.ratio);
    if (args.dinputs) {
      T* dx = static_cast<T*>(args.dinputs) + pair * args.d;
      write_differences(x, x + other_inputs, args.d, terms.input_weight, dx, dx + other_inputs);
    }
    if (args.dcodes) {
      T* dz = static_cast<T*>(args.dcodes) + pair * args.l;
      write_differences(z, z + other_codes, args.l, terms.code_weight, dz, dz + other_codes);
    }
  };
  Team::run(threads, [&](Team::Part& part) {
    part.ranges(args.pairs, threads, [&](int64_t pair, int64_t end) {
      for (; pair < end; pair++) take(pair);
    });
  });
  *args.sum = 0;
  for (int64_t pair = 0; pair < args.pairs; pair++) *args.sum += ratios[pair];
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Entry points of this instruction set

namespace kdejsd::cpu::KDEJSD_LEVEL {

extern const TileSize omega_sizes[] = {
    {"omega_samples", "rows", kRows},
    {"omega_samples", "panel", kPanel},
    {"omega_samples", "least group", kLeastGroup * kPanel},
    {"omega_dims", "columns", kColumns},
    {"omega_dims", "panel", kDims},
    {"omega_dims", "float32 halves", kHalvesVectors * kLanes<float>},
    {"omega_dims", "float64 halves", kHalvesVectors * kLanes<double>},
    // Of inputs and codes together: beyond, two panels of float32 are a group.
    {"omega_all_dims", "least group", kGroupBytes / ((kLeastGroup + 1) * 2 * kPanel * int64_t{sizeof(float)})},
    {nullptr, nullptr, 0}};

void omega_all(const OmegaAll& args, int threads) {
  args.dtype == DType::kFloat64 ? all_pairs<double>(args, threads) : all_pairs<float>(args, threads);
}

void omega_halves(const OmegaHalves& args, int threads) {
  args.dtype == DType::kFloat64 ? halves<double>(args, threads) : halves<float>(args, threads);
}

}  // namespace kdejsd::cpu::KDEJSD_LEVEL
