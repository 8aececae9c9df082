// The kde op on the CPU. Compiled once per instruction set (KDEJSD_LEVEL is base, v3 or v4); dispatch.cpp chooses.
//
// Vector lanes hold the points that get a result: queries in the forward pass, centers in the transposed one. The other
// side is streamed past them in tiles of kTile points and only ever broadcast, so nothing is reduced across lanes. Per
// tile and block of QV vectors there are three steps, of which kde_tile.h has the first and the last:
//   1. squared distances, in registers over the dimensions        -> pairs[kTile][QV]
//   2. weights, in place: 2^(exponent - reference) or its product with an upstream gradient
//   3. sums[l][QV] += weights * (tile points - lanes), in registers over the tile
// Sums over many points run in two levels: in registers over a tile, then over the tiles. In all three steps what is
// under the smallest normal number is 0.

#include <cmath>
#include <limits>
#include <new>

#include "cpu/kde_tile.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/subnormals.h"
#include "cpu/tile_sizes.h"
#include "cpu/tiles.h"
#include "kernels.h"
#include "math/log_sum_exp.h"

namespace {

using kdejsd::KdeBackward;
using kdejsd::KdeForward;
using kdejsd::KdeMixture;

constexpr int64_t kStateBytes = 1 << 18;  // packed lanes of one chunk, and again its sums: half a second-level cache
constexpr int64_t kMostBlocks = 16;       // of a chunk
constexpr int64_t kSerialWork = 1 << 14;  // n m (l + 8) below which a second thread costs more than it brings
constexpr int64_t kSkipFrom = 96;         // dimensions from which looking for rows to skip pays

// An excluded pair is this far apart: the weight is 0.
template <class T>
constexpr T kExcluded = std::numeric_limits<T>::infinity();

// A squared distance as a factor of its weight: 0 times it is 0.
template <class T>
Vec<T> finite(Vec<T> distance) {
  const Vec<T> most = broadcast(std::numeric_limits<T>::max());
  return distance < most ? distance : most;
}

// The reference of a lane that has seen no weight yet: finite, so that differences from it are never inf - inf.
template <class T>
constexpr T kNoReference = -std::numeric_limits<T>::max() / 2;

// A reference is raised only where the weights of a tile sum to more than this: almost always once, at the first tile.
template <class T>
constexpr T kLargestSum = T(1ll << 40);

// ---------------------------------------------------------------------------------------------------------------------
// One batch item, and its points as the kernels see them

template <class T>
struct Item {
  int64_t n, m, l;
  const T* query;          // [n, l]
  const T* centers;        // [m, l]
  const T* bandwidth;      // [m] or [1], or null: a number
  const T* log_weights;    // [m] or null
  const int64_t* exclude;  // [n] or null
  bool per_center;
  double h0;    // the bandwidth, or the middle one
  T scale;      // of the packed points: a power of two near 1 / h0
  double unit;  // h0 * scale: the bandwidth in packed units

  Item(const KdeMixture& mix, int64_t b)
      : n(mix.n),
        m(mix.m),
        l(mix.l),
        query(static_cast<const T*>(mix.query) + b * mix.query_stride),
        centers(static_cast<const T*>(mix.centers) + b * mix.centers_stride),
        bandwidth(static_cast<const T*>(mix.bandwidth) + b * mix.bandwidth_stride),
        log_weights(mix.log_weights ? static_cast<const T*>(mix.log_weights) + b * mix.log_weights_stride : nullptr),
        exclude(mix.exclude ? mix.exclude + b * mix.exclude_stride : nullptr),
        per_center(mix.per_center) {
    const T number = static_cast<T>(mix.bandwidth_number);
    h0 = per_center ? middle_bandwidth()
                    : static_cast<double>(kdejsd::checked_bandwidth(bandwidth ? bandwidth[0] : number));
    // 1 / h0 may lie beyond the normal numbers of T, on either side.
    constexpr int kMost = std::numeric_limits<T>::max_exponent - 2;
    const int exponent = std::isfinite(h0) ? -std::ilogb(h0) : 0;
    scale = std::ldexp(std::isfinite(h0) ? T(1) : T(h0), static_cast<int>(larger(-kMost, smaller(kMost, exponent))));
    unit = h0 * static_cast<double>(scale);
  }

  double middle_bandwidth() const {
    T least = std::numeric_limits<T>::infinity(), greatest = 0;
    for (int64_t j = 0; j < m; j++) {
      if (!(bandwidth[j] > T(0) && bandwidth[j] < std::numeric_limits<T>::infinity())) continue;  // h(j) is NaN
      least = bandwidth[j] < least ? bandwidth[j] : least;
      greatest = bandwidth[j] > greatest ? bandwidth[j] : greatest;
    }
    return kdejsd::middle_bandwidth(least, greatest);
  }

  double h(int64_t j) const { return per_center ? static_cast<double>(kdejsd::checked_bandwidth(bandwidth[j])) : h0; }

  // Center j's exponent is offset(j) - slope(j) * (packed squared distance), in log2 units, apart from `constant`.
  double slope(int64_t j) const { return 0.5 * kdejsd::kLog2E * precision(j) / (unit * unit); }
  double precision(int64_t j) const { return per_center ? (h0 / h(j)) * (h0 / h(j)) : 1.0; }
  double offset(int64_t j) const {
    const double weight = log_weights ? kdejsd::kLog2E * static_cast<double>(log_weights[j]) : 0.0;
    return per_center ? weight - static_cast<double>(l) * std::log2(h(j) / h0) : weight;
  }

  // What the log-sum-exp of query i lacks to log p_e, nats; `own`: how many centers of its own are in the sum.
  double constant(int64_t i, int64_t own = 0) const {
    return kdejsd::kde_log_constant(kdejsd::kde_count(m, !log_weights, exclude ? exclude[i] : -1) + own, l, h0);
  }
};

// What the centers of a tile have beside their coordinates, in the forward pass.
template <class T>
struct CenterTerms {
  T *offset, *slope, *precision;  // [kTile], see Item
  double largest_slope = 0;

  static int64_t bytes() { return 3 * Arena::bytes<T>(kTile); }
  explicit CenterTerms(Arena arena)
      : offset(arena.take<T>(kTile)), slope(arena.take<T>(kTile)), precision(arena.take<T>(kTile)) {}

  void take(const Item<T>& item, int64_t first, int count) {
    largest_slope = 0;
    for (int j = 0; j < count; j++) {
      const double exact = item.slope(first + j);
      offset[j] = static_cast<T>(item.offset(first + j));
      slope[j] = static_cast<T>(exact);
      precision[j] = static_cast<T>(item.precision(first + j));
      largest_slope = exact > largest_slope ? exact : largest_slope;
    }
  }
};

// What the queries of a tile have beside theirs, in the transposed pass.
template <class T>
struct QueryTerms {
  T* log_prob;  // [kTile], log p_e in log2 units, without Item's constant
  T* grad;      // [kTile], the upstream gradient

  static int64_t bytes() { return 2 * Arena::bytes<T>(kTile); }
  explicit QueryTerms(Arena arena) : log_prob(arena.take<T>(kTile)), grad(arena.take<T>(kTile)) {}
};

// An index, counted from the first of a range; -1 where it is not in the range. It may be any number, so no difference
// is taken before that is known.
int64_t among(int64_t index, int64_t first, int64_t end) { return index >= first && index < end ? index - first : -1; }

// The pairs of a tile [first, first + count) with lanes that one index array (per lane: a tile point, or none)
// excludes.
template <class T, int QV>
void mark_excluded(const int64_t* exclude, int64_t first_lane, int64_t lanes_end, int64_t first, int count,
                   Vec<T>* pairs) {
  const int64_t lanes = smaller(QV * kLanes<T>, lanes_end - first_lane);
  for (int64_t lane = 0; lane < lanes; lane++) {
    const int64_t row = among(exclude[first_lane + lane], first, first + count);
    if (row >= 0) reinterpret_cast<T*>(pairs)[row * QV * kLanes<T> + lane] = kExcluded<T>;
  }
}

// What a chunk of lanes has gathered from the points streamed past it. A block of QV vectors that starts at vector f
// has its sums at sums + f * l, as [l][QV].
template <class T>
struct State {
  Vec<T>* reference;  // [vectors], log2 units; not used by the transposed pass
  Vec<T>* factor;     // [vectors], of this share where several are merged; not used by the transposed pass
  Vec<T>* weight;     // [vectors], sum of the weights
  Vec<T>* moment;     // [vectors], sum of weight * squared distance, or of weight * precision
  Vec<T>* sums;       // [vectors * l], sum of weight * (point - lane)

  static int64_t bytes(int64_t vectors, int64_t l) {
    return 4 * Arena::bytes<Vec<T>>(vectors) + Arena::bytes<Vec<T>>(vectors * l);
  }
  State(Arena arena, int64_t vectors, int64_t l)
      : reference(arena.take<Vec<T>>(vectors)),
        factor(arena.take<Vec<T>>(vectors)),
        weight(arena.take<Vec<T>>(vectors)),
        moment(arena.take<Vec<T>>(vectors)),
        sums(arena.take<Vec<T>>(vectors * l)) {}

  void clear(int64_t vectors, int64_t l) {
    for (int64_t v = 0; v < vectors; v++) {
      reference[v] = broadcast(kNoReference<T>);
      weight[v] = moment[v] = Vec<T>{};
    }
    for (int64_t v = 0; v < vectors * l; v++) sums[v] = Vec<T>{};
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// How the work is cut: lanes into chunks of vectors, a chunk into blocks of at most kQV, the streamed points into
// splits

struct Plan {
  int64_t vectors, chunks, splits, tiles, chunk_vectors;
  int threads;

  Plan(int64_t lanes, int width, int64_t streamed, int64_t l, int64_t item_bytes, int requested_threads) {
    threads = lanes * streamed * (l + 8) < kSerialWork ? 1 : requested_threads;
    vectors = ceil_div(lanes, width);
    tiles = ceil_div(streamed, kTile);
    const int64_t fitting = smaller(kMostBlocks, larger(1, kStateBytes / (l * item_bytes * width * kQV))) * kQV;
    chunks = ceil_div(vectors, fitting);
    // Whole chunks for each thread where they divide well; otherwise each thread streams its own share of the points
    // past every chunk, and the shares are merged.
    splits = chunks >= 4 * threads || chunks % threads == 0 ? 1 : smaller(threads, tiles);
    if (splits == 1) share_chunks();
    chunk_vectors = ceil_div(vectors, chunks);
  }

  // Every thread streams all points past chunks of its own: more of them than threads, so that a thread that is held up
  // keeps none waiting, as long as they are large beside the work of packing a tile.
  void share_chunks() {
    splits = 1;
    if (threads == 1) return;
    chunks = larger(chunks, smaller(vectors, threads));
    chunks = larger(chunks, smaller(vectors / (4 * kQV), 4 * threads));
    chunk_vectors = ceil_div(vectors, chunks);
  }

  int64_t chunk_begin(int64_t chunk) const { return vectors * chunk / chunks; }
  int64_t vectors_of(int64_t chunk) const { return chunk_begin(chunk + 1) - chunk_begin(chunk); }
  int64_t tile_begin(int64_t split) const { return tiles * split / splits; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// What rides along with the log-sum-exp.
enum class Moment { kNone, kDistance, kPrecision };

// Step 2 for a tile whose weights may sum to more than kLargestSum: raises the references to the exponents' maxima.
template <class T, int QV>
void raise_references(const CenterTerms<T>& terms, const Vec<T>* pairs, int count, int64_t sum_vectors,
                      Vec<T>* reference, Vec<T>* weight, Vec<T>* moment, Vec<T>* sums) {
  Vec<T> top[QV];
  for (int v = 0; v < QV; v++) top[v] = reference[v];
  for (int j = 0; j < count; j++) {
    const Vec<T> offset = broadcast(terms.offset[j]), slope = broadcast(terms.slope[j]);
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) {
      const Vec<T> x = offset - slope * pairs[j * QV + v];
      top[v] = x > top[v] ? x : top[v];
    }
  }
  for (int v = 0; v < QV; v++) {
    const Vec<T> shrink = exp2(reference[v] - top[v]);
    reference[v] = top[v];
    weight[v] *= shrink;
    moment[v] *= shrink;
    for (int64_t k = 0; k < sum_vectors; k++) sums[k * QV + v] *= shrink;
  }
}

// Step 2: the weights in place of the squared distances, added up, in `mass` for this tile alone; false, and nothing
// added, where the tile's sum passes kLargestSum.
template <class T, int QV, Moment M>
bool forward_weights(const CenterTerms<T>& terms, Vec<T>* pairs, int count, const Vec<T>* reference, Vec<T>* weight,
                     Vec<T>* moment, Vec<T>* mass) {
  Vec<T> base[QV], tile_weight[QV] = {}, tile_moment[QV] = {};
  for (int v = 0; v < QV; v++) base[v] = reference[v];
  for (int j = 0; j < count; j++) {
    const Vec<T> offset = broadcast(terms.offset[j]), slope = broadcast(terms.slope[j]);
    const Vec<T> precision = broadcast(terms.precision[j]);
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) {
      const Vec<T> distance = pairs[j * QV + v];
      // The exponent as it was rounded for the maximum: a far query's must not differ from its reference by an ulp.
      Vec<T> w = exp2((offset - slope * distance) - base[v]);
      tile_weight[v] += w;
      if (M == Moment::kDistance) tile_moment[v] += w * finite<T>(distance);
      if (M == Moment::kPrecision) {
        w *= precision;
        tile_moment[v] += w;
      }
      pairs[j * QV + v] = w;
    }
  }
  Mask<T> over = {};
  for (int v = 0; v < QV; v++) over |= tile_weight[v] > kLargestSum<T>;
  if (__builtin_expect(any<T>(over), 0)) return false;
  for (int v = 0; v < QV; v++) {
    weight[v] += tile_weight[v];
    moment[v] += tile_moment[v];
    mass[v] = M == Moment::kPrecision ? tile_moment[v] : tile_weight[v];
  }
  return true;
}

// The rows whose weights matter to the weighted sums of any lane, and the sum of these; returns how many. A row is left
// out where for every lane weight * precision * reach <= epsilon W / m / h, in packed units: reach the furthest that a
// row is from a lane, W the sum of the weights so far, which only grows, 1 / h^2 the mean of the precisions by these
// weights. What m such rows add to the score (sum of weight * precision * difference) / W is then less than its
// rounding, epsilon times 1 / h or more.
template <class T, int QV, Moment M>
int rows_that_matter(const Tile<T>& tile, int count, double reach, int64_t m, const Vec<T>* weight,
                     const Vec<T>* moment, int* kept, Vec<T>* mass) {
  if (!(reach < std::numeric_limits<double>::infinity())) reach = std::numeric_limits<double>::quiet_NaN();
  const T least = static_cast<T>(std::numeric_limits<T>::epsilon() / 2 / static_cast<double>(m) / reach);
  Vec<T> bound[QV];
  for (int v = 0; v < QV; v++) {
    bound[v] = least * (M == Moment::kPrecision ? sqrt<T>(weight[v]) * sqrt<T>(moment[v]) : weight[v]);
    mass[v] = Vec<T>{};
  }
  int n = 0;
  for (int j = 0; j < count; j++) {
    Mask<T> matters = {};
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) matters |= ~(tile.pairs[j * QV + v] <= bound[v]);  // NaN matters
    if (!any<T>(matters)) continue;
    kept[n++] = j;
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) mass[v] += tile.pairs[j * QV + v];
  }
  return n;
}

// A tile of centers, with a block of a chunk of queries.
template <class T, Moment M>
struct ForwardBlock {
  const Item<T>& item;
  const Tile<T>& tile;
  const CenterTerms<T>& terms;
  const State<T>& state;
  int64_t first_center = 0;  // of the tile
  int count = 0;             // of its centers
  int64_t first_query = 0, first_vector = 0;
  Lanes<T> lanes = {};
  bool is_first_tile = false, want_sums = false, may_use_products = false;

  template <int QV>
  void run() {
    Vec<T>* sums = state.sums + first_vector * item.l;
    Vec<T>*reference = state.reference + first_vector, *weight = state.weight + first_vector;
    Vec<T>*moment = state.moment + first_vector, mass[QV];
    const double norms = tile.largest_norm + lanes.largest_norm, parts = terms.largest_slope * norms;
    const bool use_products = may_use_products && parts <= most_parts_of_products(item.l);
    distances<QV>(use_products);
    // The first tile finds the references; it is rare that one has to be raised after it.
    if (is_first_tile) raise_references<T, QV>(terms, tile.pairs, count, 0, reference, weight, moment, sums);
    if (!forward_weights<T, QV, M>(terms, tile.pairs, count, reference, weight, moment, mass)) {
      distances<QV>(use_products);
      const int64_t sum_vectors = want_sums ? item.l : 0;
      raise_references<T, QV>(terms, tile.pairs, count, sum_vectors, reference, weight, moment, sums);
      forward_weights<T, QV, M>(terms, tile.pairs, count, reference, weight, moment, mass);
    }
    if (!want_sums) return;
#if defined(__AMX_BF16__)
    if (use_products) return add_weighted_rows_by_matrices<QV>(tile, count, item.l, lanes, mass, sums);
#endif
    WeightedRows<T, QV> rows{tile, tile.all, count, item.l, lanes, mass, sums};
    int kept[kTile];
    if (item.l >= kSkipFrom) {
      rows.count = rows_that_matter<T, QV, M>(tile, count, std::sqrt(2 * norms), item.m, weight, moment, kept, mass);
      rows.rows = kept;
    }
    if (!(parts <= most_parts_of_sums(item.l))) rows.mass = nullptr;
    rows.add();
  }

  template <int QV>
  void distances(bool use_products) const {
    if (use_products) {
      distances_from_products<T, QV>(tile, count, item.l, lanes);
    } else {
      distances_from_differences<T, QV>(tile, count, item.l, lanes);
    }
    if (item.exclude) mark_excluded<T, QV>(item.exclude, first_query, item.n, first_center, count, tile.pairs);
  }
};

template <class T>
struct Forward {
  const KdeForward& args;
  Item<T> item;
  Frame<T> frame;
  Plan plan;
  double* value;                 // [n]
  const T* own = nullptr;        // [n, l] or null
  T* dquery = nullptr;           // [n, l] or null
  double* dbandwidth = nullptr;  // [n] or null

  // Streams split `split` of the centers past chunk `chunk` of the queries.
  template <Moment M>
  void stream(int64_t chunk, int64_t split, const ChunkLanes<T>& lanes, const State<T>& state, Tile<T>& tile,
              CenterTerms<T>& terms) const {
    const int64_t begin = plan.chunk_begin(chunk);
    const bool same_terms = !item.per_center && !item.log_weights;  // then they are written once
    const bool may_use_products = item.l >= kProductsFrom && args.products != kdejsd::KdeProducts::kNone;
#if defined(__AMX_BF16__)
    const MatrixRegisters registers;
#endif
    ForwardBlock<T, M> block{item, tile, terms, state};
    block.want_sums = dquery != nullptr;
    block.may_use_products = may_use_products;
    for (int64_t t = plan.tile_begin(split); t < plan.tile_begin(split + 1); t++) {
      block.is_first_tile = t == plan.tile_begin(split);
      block.first_center = t * kTile;
      block.count = static_cast<int>(smaller(kTile, item.m - block.first_center));
      tile.pack(item.centers, block.first_center, block.count, frame, may_use_products);
      if (same_terms) {
        if (block.is_first_tile) terms.take(item, block.first_center, kTile);
      } else {
        terms.take(item, block.first_center, block.count);
      }
      const FlushSubnormals flush;
      for_blocks(plan.vectors_of(chunk), [&](int width, int64_t vector) {
        block.first_query = (begin + vector) * kLanes<T>;
        block.first_vector = vector;
        block.lanes = lanes.block(vector, item.l);
        with_width(width, block);
      });
    }
  }

  void stream(int64_t chunk, int64_t split, const ChunkLanes<T>& lanes, State<T>& state, Tile<T>& tile,
              CenterTerms<T>& terms) const {
    state.clear(plan.vectors_of(chunk), item.l);
    if (item.per_center) return stream<Moment::kPrecision>(chunk, split, lanes, state, tile, terms);
    if (dbandwidth) return stream<Moment::kDistance>(chunk, split, lanes, state, tile, terms);
    stream<Moment::kNone>(chunk, split, lanes, state, tile, terms);
  }

  void pack(int64_t chunk, const ChunkLanes<T>& lanes) const {
    const int64_t begin = plan.chunk_begin(chunk);
    for_blocks(plan.vectors_of(chunk), [&](int width, int64_t vector) {
      lanes.pack(item.query, (begin + vector) * kLanes<T>, item.n, frame, width, vector);
    });
  }

  // Merges what the splits hold of block [vector, vector + width) of a chunk, and writes its queries' results.
  void finish(int64_t chunk, int width, int64_t vector, const State<T>* splits) const {
    const int64_t first = (plan.chunk_begin(chunk) + vector) * kLanes<T>;
    const int64_t lanes = width * kLanes<T>;
    for (int64_t lane = 0; lane < smaller(lanes, item.n - first); lane++) {
      const int64_t i = first + lane;
      const auto at = [&](Vec<T>* vectors) -> T& { return reinterpret_cast<T*>(vectors + vector)[lane]; };
      kdejsd::LogSumExp2<double> total = {at(splits[0].reference), at(splits[0].weight)};
      for (int64_t s = 1; s < plan.splits; s++)
        total = kdejsd::merge<double>(total, {at(splits[s].reference), at(splits[s].weight)});
      double moment = 0;
      for (int64_t s = 0; s < plan.splits; s++) {
        const double reference = static_cast<double>(at(splits[s].reference));
        at(splits[s].factor) = static_cast<T>(kdejsd::rescale_factor(reference, total.max));
        moment += static_cast<double>(at(splits[s].moment)) * at(splits[s].factor);
      }

      const T* query = item.query + i * item.l;
      const bool has_target = args.value_kind != kdejsd::KdeValue::kLogProb;
      double log_target = 0;
      if (has_target) {
        double square = 0;
        for (int64_t k = 0; k < item.l; k++) square += static_cast<double>(query[k]) * query[k];
        log_target = kdejsd::normal_log_prob(square, item.l, args.target_variance);
      }
      const auto own_step = [&](int64_t k) { return (static_cast<double>(own[i * item.l + k]) - query[k]) / item.h0; };
      kdejsd::KdeShares shares = {total, 0.0, 1.0};
      if (own) {
        double square = 0;
        for (int64_t k = 0; k < item.l; k++) square += own_step(k) * own_step(k);
        shares = kdejsd::with_own_center(total, square);
      }
      const double log_prob = kdejsd::kde_log_prob(shares.sum, item.constant(i, own != nullptr));
      const kdejsd::KdeTerm term = kdejsd::kde_term(args.value_kind, log_prob, log_target);
      value[i] = term.value;
      if (dbandwidth)
        dbandwidth[i] = (moment / (total.sum * item.unit * item.unit) - static_cast<double>(item.l)) / item.h0;
      if (!dquery) continue;
      for (int64_t k = 0; k < item.l; k++) {
        double sum = 0;
        for (int64_t s = 0; s < plan.splits; s++) {
          const T* sums = reinterpret_cast<const T*>(splits[s].sums + vector * item.l);
          sum += static_cast<double>(sums[k * lanes + lane]) * at(splits[s].factor);
        }
        double direction = sum / (total.sum * item.unit) / item.h0;  // the score of p_e, less the target's
        if (own) direction = kdejsd::merged_score(shares, own_step(k) / item.h0, direction);
        if (has_target) direction += static_cast<double>(query[k]) / args.target_variance;
        dquery[i * item.l + k] = static_cast<T>(term.weight * direction);
      }
    }
  }
};

template <class T>
void forward_item(const KdeForward& args, int64_t b, int requested_threads) {
  const KdeMixture& mix = args.mixture;
  const Item<T> item(mix, b);
  const Plan plan(mix.n, kLanes<T>, mix.m, mix.l, sizeof(T), requested_threads);
  const int64_t lane_bytes = ChunkLanes<T>::bytes(plan.chunk_vectors, mix.l);
  const int64_t state_bytes = State<T>::bytes(plan.chunk_vectors, mix.l);
  const int64_t tile_bytes = Tile<T>::bytes(mix.l) + CenterTerms<T>::bytes();
  const int64_t copies = plan.splits == 1 ? plan.threads : 1;  // of the packed lanes; splits share them
  Memory memory(Frame<T>::bytes(mix.l) + copies * lane_bytes + plan.threads * (state_bytes + tile_bytes) +
                Arena::bytes<State<T>>(plan.threads));
  Arena arena{memory.base};
  const Frame<T> frame(arena.cut(Frame<T>::bytes(mix.l)), item.centers, mix.m, mix.l, item.scale);
  char* lanes = arena.take<char>(copies * lane_bytes);
  char* states = arena.take<char>(plan.threads * state_bytes);
  char* tiles = arena.take<char>(plan.threads * tile_bytes);

  Forward<T> pass{args, item, frame, plan, args.value + b * mix.n};
  if (args.own) pass.own = static_cast<const T*>(args.own) + b * mix.n * mix.l;
  if (args.dquery) pass.dquery = static_cast<T*>(args.dquery) + b * mix.n * mix.l;
  if (args.dbandwidth) pass.dbandwidth = args.dbandwidth + b * mix.n;
  State<T>* splits = arena.take<State<T>>(plan.threads);
  for (int s = 0; s < plan.threads; s++)
    new (splits + s) State<T>(Arena{states + s * state_bytes}, plan.chunk_vectors, mix.l);

  Team::run(plan.threads, [&](Team::Part& part) {
    const int thread = part.thread;
    Arena own{tiles + thread * tile_bytes};
    Tile<T> tile(own.cut(Tile<T>::bytes(mix.l)), frame);
    CenterTerms<T> terms(own);
    const ChunkLanes<T> own_lanes(Arena{lanes + (copies > 1 ? thread : 0) * lane_bytes}, plan.chunk_vectors, frame);
    if (plan.splits == 1) {
      part.each(plan.chunks, [&](int64_t chunk) {
        pass.pack(chunk, own_lanes);
        pass.stream(chunk, 0, own_lanes, splits[thread], tile, terms);
        for_blocks(plan.vectors_of(chunk),
                   [&](int width, int64_t vector) { pass.finish(chunk, width, vector, splits + thread); });
      });
    } else {
      for (int64_t chunk = 0; chunk < plan.chunks; chunk++) {
        const int64_t vectors = plan.vectors_of(chunk);
        part.each(1, [&](int64_t) { pass.pack(chunk, own_lanes); });
        part.each(plan.splits,
                  [&](int64_t split) { pass.stream(chunk, split, own_lanes, splits[split], tile, terms); });
        part.each(block_count(vectors), [&](int64_t block) {
          at_block(vectors, block, [&](int width, int64_t vector) { pass.finish(chunk, width, vector, splits); });
        });
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Transposed pass: lanes are centers, the queries are streamed

// Step 2: grad * 2^(exponent - log p_e), in place of the squared distances.
template <class T, int QV>
void backward_weights(const QueryTerms<T>& terms, Vec<T>* pairs, int count, const Vec<T>* offset, const Vec<T>* slope,
                      Vec<T>* weight, Vec<T>* moment, Vec<T>* mass) {
  Vec<T> tile_weight[QV] = {}, tile_moment[QV] = {};
  for (int j = 0; j < count; j++) {
    const Vec<T> log_prob = broadcast(terms.log_prob[j]), grad = broadcast(terms.grad[j]);
#pragma GCC unroll 4
    for (int v = 0; v < QV; v++) {
      const Vec<T> distance = pairs[j * QV + v];
      // The exponent as the forward pass rounded it: for a far query the difference is worth whole digits.
      const Vec<T> w = grad * exp2((offset[v] - slope[v] * distance) - log_prob);
      tile_weight[v] += w;
      tile_moment[v] += w * finite<T>(distance);
      pairs[j * QV + v] = w;
    }
  }
  for (int v = 0; v < QV; v++) {
    weight[v] += tile_weight[v];
    moment[v] += tile_moment[v];
    mass[v] = tile_weight[v];
  }
}

// A tile of queries, with a block of a chunk of centers.
template <class T>
struct BackwardBlock {
  const Item<T>& item;
  const Tile<T>& tile;
  const QueryTerms<T>& terms;
  const State<T>& state;
  int64_t first_query = 0;  // of the tile
  int count = 0;            // of its queries
  int64_t first_center = 0, first_vector = 0;
  Lanes<T> lanes = {};
  const Vec<T>*offset = nullptr, *slope = nullptr;  // of the chunk's centers
  double largest_slope = 0;
  bool want_sums = false;

  template <int QV>
  void run() {
    Vec<T> mass[QV];
    // The forward pass took its distances from differences too: the exponents are rounded alike.
    distances_from_differences<T, QV>(tile, count, item.l, lanes);
    if (item.exclude) {
      for (int j = 0; j < count; j++) {
        const int64_t lane = among(item.exclude[first_query + j], first_center, first_center + QV * kLanes<T>);
        if (lane >= 0) reinterpret_cast<T*>(tile.pairs)[j * QV * kLanes<T> + lane] = kExcluded<T>;
      }
    }
    backward_weights<T, QV>(terms, tile.pairs, count, offset + first_vector, slope + first_vector,
                            state.weight + first_vector, state.moment + first_vector, mass);
    if (!want_sums) return;
    const double parts = largest_slope * (tile.largest_norm + lanes.largest_norm);
    const bool by_mass = parts <= most_parts_of_sums(item.l);
    WeightedRows<T, QV>{
        tile, tile.all, count, item.l, lanes, by_mass ? mass : nullptr, state.sums + first_vector * item.l}
        .add();
  }
};

template <class T>
struct Backward {
  Item<T> item;
  Frame<T> frame;
  Plan plan;
  const T* grad;           // [n]
  int grad_exponent;       // of the largest: gradients are divided by 2 to it, so that no product with one is flushed
  const double* log_prob;  // [n]
  T* dcenters = nullptr;   // [m, l] or null
  T* dlog_weights = nullptr;  // [m] or null
  T* dbandwidth = nullptr;    // [m] or null

  void stream(int64_t chunk, const ChunkLanes<T>& lanes, Vec<T>* offset, Vec<T>* slope, State<T>& state, Tile<T>& tile,
              const QueryTerms<T>& terms) const {
    const int64_t begin = plan.chunk_begin(chunk), vectors = plan.vectors_of(chunk);
    state.clear(vectors, item.l);
    double largest_slope = 0;
    for (int64_t lane = 0; lane < vectors * kLanes<T>; lane++) {
      const int64_t j = smaller(begin * kLanes<T> + lane, item.m - 1);
      reinterpret_cast<T*>(offset)[lane] = static_cast<T>(item.offset(j));
      reinterpret_cast<T*>(slope)[lane] = static_cast<T>(item.slope(j));
      largest_slope = item.slope(j) > largest_slope ? item.slope(j) : largest_slope;
    }
    for_blocks(vectors, [&](int width, int64_t vector) {
      lanes.pack(item.centers, (begin + vector) * kLanes<T>, item.m, frame, width, vector);
    });
    BackwardBlock<T> block{item, tile, terms, state};
    block.offset = offset;
    block.slope = slope;
    block.largest_slope = largest_slope;
    block.want_sums = dcenters != nullptr;
    for (int64_t t = 0; t < plan.tiles; t++) {
      block.first_query = t * kTile;
      block.count = static_cast<int>(smaller(kTile, item.n - block.first_query));
      tile.pack(item.query, block.first_query, block.count, frame, false);
      take_queries(block.first_query, block.count, terms);
      const FlushSubnormals flush;
      for_blocks(vectors, [&](int width, int64_t vector) {
        block.first_center = (begin + vector) * kLanes<T>;
        block.first_vector = vector;
        block.lanes = lanes.block(vector, item.l);
        with_width(width, block);
      });
    }
    for_blocks(vectors, [&](int width, int64_t vector) { finish(begin + vector, width, vector, state); });
  }

  // What rounding takes from an exponent is given back to the gradient, its factor.
  void take_queries(int64_t first, int count, const QueryTerms<T>& terms) const {
    for (int j = 0; j < count; j++) {
      const int64_t i = first + j;
      const double exponent = kdejsd::kLog2E * (log_prob[i] - item.constant(i));
      terms.log_prob[j] = static_cast<T>(exponent);
      const double correction = std::exp2(static_cast<double>(terms.log_prob[j]) - exponent);
      terms.grad[j] = static_cast<T>(std::ldexp(static_cast<double>(grad[i]) * correction, -grad_exponent));
    }
  }

  void finish(int64_t first_vector, int width, int64_t vector, const State<T>& state) const {
    const int64_t first = first_vector * kLanes<T>, lanes = width * kLanes<T>;
    const T* sums = reinterpret_cast<const T*>(state.sums + vector * item.l);
    for (int64_t lane = 0; lane < smaller(lanes, item.m - first); lane++) {
      const int64_t j = first + lane;
      const auto gradient = [&](T sum) { return std::ldexp(static_cast<double>(sum), grad_exponent); };
      const double weight = gradient(reinterpret_cast<const T*>(state.weight + vector)[lane]);
      const double moment = gradient(reinterpret_cast<const T*>(state.moment + vector)[lane]);
      const double h = item.h(j), precision = item.precision(j), square = item.unit * item.unit;
      if (dlog_weights) dlog_weights[j] = static_cast<T>(weight);
      if (dbandwidth)
        dbandwidth[j] = static_cast<T>((moment * precision / square - static_cast<double>(item.l) * weight) / h);
      if (!dcenters) continue;
      for (int64_t k = 0; k < item.l; k++) {
        dcenters[j * item.l + k] = static_cast<T>(gradient(sums[k * lanes + lane]) * precision / item.unit / item.h0);
      }
    }
  }
};

// 2 to it is at most the largest magnitude; 0 where that is 0 or not finite.
template <class T>
int largest_exponent(const T* x, int64_t count) {
  T largest = 0;
  for (int64_t i = 0; i < count; i++) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  return largest > T(0) && std::isfinite(largest) ? std::ilogb(largest) : 0;
}

template <class T>
void backward_item(const KdeBackward& args, int64_t b, int requested_threads) {
  const KdeMixture& mix = args.mixture;
  const Item<T> item(mix, b);
  Plan plan(mix.m, kLanes<T>, mix.n, mix.l, sizeof(T), requested_threads);
  // Each center's sums run over the queries in order, whatever the number of threads: chunks only.
  plan.share_chunks();

  const int64_t lane_bytes = ChunkLanes<T>::bytes(plan.chunk_vectors, mix.l);
  const int64_t row_bytes = Arena::bytes<Vec<T>>(plan.chunk_vectors);
  const int64_t state_bytes = State<T>::bytes(plan.chunk_vectors, mix.l), tile_bytes = Tile<T>::bytes(mix.l);
  const int64_t thread_bytes = lane_bytes + 2 * row_bytes + state_bytes + tile_bytes + QueryTerms<T>::bytes();
  Memory memory(Frame<T>::bytes(mix.l) + plan.threads * thread_bytes);
  Arena arena{memory.base};
  const Frame<T> frame(arena.cut(Frame<T>::bytes(mix.l)), item.centers, mix.m, mix.l, item.scale);

  const T* grad = static_cast<const T*>(args.grad) + b * mix.n;
  Backward<T> pass{item, frame, plan, grad, largest_exponent(grad, mix.n), args.log_prob + b * mix.n};
  if (args.dcenters) pass.dcenters = static_cast<T*>(args.dcenters) + b * mix.m * mix.l;
  if (args.dlog_weights) pass.dlog_weights = static_cast<T*>(args.dlog_weights) + b * mix.m;
  if (args.dbandwidth) pass.dbandwidth = static_cast<T*>(args.dbandwidth) + b * mix.m;

  Team::run(plan.threads, [&](Team::Part& part) {
    Arena own{arena.next + part.thread * thread_bytes};
    const ChunkLanes<T> lanes(own.cut(lane_bytes), plan.chunk_vectors, frame);
    Vec<T>* offset = own.take<Vec<T>>(plan.chunk_vectors);
    Vec<T>* slope = own.take<Vec<T>>(plan.chunk_vectors);
    State<T> state(own.cut(state_bytes), plan.chunk_vectors, mix.l);
    Tile<T> tile(own.cut(tile_bytes), frame);
    const QueryTerms<T> terms(own);
    part.each(plan.chunks, [&](int64_t chunk) { pass.stream(chunk, lanes, offset, slope, state, tile, terms); });
  });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Entry points of this instruction set

namespace kdejsd::cpu::KDEJSD_LEVEL {

extern const TileSize kde_sizes[] = {
#if defined(__AMX_BF16__)
    {"kde_points", "matrix tile", kTile},
    {"kde_points", "matrix side", kSide},
    {"kde_points", "matrix inner", kInner},
    {"kde_dims", "matrices from", kMatrixDims},
    {"kde_dims", "matrix side", kSide},
    {"kde_dims", "matrix inner", kInner},
    {"kde_dims", "rest in one matrix", kInner + kInner / kProducts},
    {"kde_dims", "rest in two matrices", kInner + 2 * kInner / kProducts},
#else
    {"kde_points", "rows", kRows},
    {"kde_points", "tile", kTile},
    {"kde_points", "shift sample", kShiftSample},
    {"kde_points", "float32 lanes", kLanes<float>},
    {"kde_points", "float64 lanes", kLanes<double>},
    {"kde_points", "float32 block", kQV * kLanes<float>},
    {"kde_points", "float64 block", kQV * kLanes<double>},
    {"kde_points", "float32 chunk", kMostBlocks * kQV * kLanes<float>},
    {"kde_points", "float64 chunk", kMostBlocks * kQV * kLanes<double>},
    {"kde_dims", "columns", kColumns},
    {"kde_dims", "differences", kDifferenceDims},
    {"kde_dims", "products", kProductDims},
    {"kde_dims", "products from", kProductsFrom},
    {"kde_dims", "skip from", kSkipFrom},
    {"kde_dims", "float32 lanes", kLanes<float>},
    {"kde_dims", "float64 lanes", kLanes<double>},
#endif
    {nullptr, nullptr, 0}};

void kde_forward(const KdeForward& args, int threads) {
  if (args.mixture.n == 0) return;
  for (int64_t b = 0; b < args.mixture.batch; b++) {
#if !defined(__AMX_BF16__)  // there for float32 alone
    if (args.mixture.dtype == DType::kFloat64) {
      forward_item<double>(args, b, threads);
      continue;
    }
#endif
    forward_item<float>(args, b, threads);
  }
}

#if !defined(__AMX_BF16__)
void kde_backward(const KdeBackward& args, int threads) {
  for (int64_t b = 0; b < args.mixture.batch; b++) {
    if (args.mixture.dtype == DType::kFloat64) {
      backward_item<double>(args, b, threads);
    } else {
      backward_item<float>(args, b, threads);
    }
  }
}
#endif

}  // namespace kdejsd::cpu::KDEJSD_LEVEL
