// The nearest op on the CPU. Compiled once per instruction set (KDEJSD_LEVEL is base, v3 or v4); dispatch.cpp chooses.
//
// A branch-and-bound search of a tree of boxes, by many queries at once. The samples are ordered so that runs of kLeaf
// of them, the leaves, lie close together. The queries in the lanes of a group of vectors are part of one leaf: they
// are neighbours, and go through the tree together, nearer boxes first. A node is passed over when its box is further
// from the group's box than each lane's nearest sample so far, or when it holds but the class of all the group's
// queries. In a leaf that is left, every sample is compared with every lane: where boxes exclude nothing, from some ten
// dimensions on, this is the comparison of all pairs.
//
// Exact, to the bit. Squared distances are sums over k, in order, of squares of rounded differences. The distance to a
// box is the same sum over the differences from its sides, or 0 between them. Rounding being monotone, none of its
// terms nor sums exceeds that of a sample in the box: what is passed over is further away, computed as it would have
// been. Samples that are just as far are not passed over, since the lowest index counts.

#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/spatial_order.h"
#include "cpu/tile_sizes.h"
#include "cpu/tiles.h"
#include "kernels.h"

namespace {

using kdejsd::NearestSearch;

constexpr int kLeaf = 64;
constexpr int kGroup = kQV;          // vectors of queries that go through the tree together; a leaf holds whole groups
constexpr int kLeafRows = 4;         // samples of a leaf whose distances are in registers at once
constexpr int64_t kShareGroups = 8;  // that a thread takes one after the other
constexpr int64_t kSerialSamples = 512;  // up to which a second thread costs more than it brings
constexpr int kMaxDepth = 32;            // of a tree over 2^31 samples, and a leaf at its end
constexpr int32_t kMixed = -1;           // in place of a class
constexpr int32_t kNone = INT32_MAX;     // in place of an index: higher than any

template <class T>
using Index = decltype(Mask<T>{}[0] + 0);

template <class T>
inline T add_square(T sum, T difference) {
  return sum + difference * difference;
}

// The tree in preorder: of a node over leaves [a, b), with l = (b - a) / 2 leaves to its left, the children are the
// next node and the one 2 l after it.
template <class T>
struct Tree {
  int64_t n, d, leaves;
  T* rows;           // [leaves, kLeaf, d], samples in their order; after the last one such as are far from everything
  int32_t* indices;  // [leaves, kLeaf], of the samples as they were given; kNone after the last one
  int32_t* classes;  // [leaves, kLeaf]
  T* boxes;          // [2 leaves - 1, 2, d], lowest and highest coordinates
  int32_t* pure;     // [2 leaves - 1], the class of all samples in it, or kMixed

  static int64_t bytes(int64_t n, int64_t d) {
    const int64_t leaves = ceil_div(n, kLeaf);
    return Arena::bytes<T>(leaves * kLeaf * d) + 2 * Arena::bytes<int32_t>(leaves * kLeaf) +
           Arena::bytes<T>(4 * leaves * d) + Arena::bytes<int32_t>(2 * leaves);
  }
  Tree(Arena& arena, int64_t n, int64_t d)
      : n(n),
        d(d),
        leaves(ceil_div(n, kLeaf)),
        rows(arena.take<T>(leaves * kLeaf * d)),
        indices(arena.take<int32_t>(leaves * kLeaf)),
        classes(arena.take<int32_t>(leaves * kLeaf)),
        boxes(arena.take<T>(4 * leaves * d)),
        pure(arena.take<int32_t>(2 * leaves)) {}

  void build(const T* latents, const int32_t* order, const int32_t* ids, int threads) {
    Team::run(threads, [&](Team::Part& part) {
      part.ranges(leaves * kLeaf, threads, [&](int64_t first, int64_t end) { take(latents, order, ids, first, end); });
    });
    build_node(0, 0, leaves);
  }

  void take(const T* latents, const int32_t* order, const int32_t* ids, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++) {
      const bool real = i < n;
      indices[i] = real ? order[i] : kNone;
      classes[i] = real ? ids[order[i]] : kMixed;
      for (int64_t k = 0; k < d; k++) {
        rows[i * d + k] = real ? latents[order[i] * d + k] : std::numeric_limits<T>::infinity();
      }
    }
  }

  // Not inlined: the compiler would unroll the recursion, loops and all, and take longer over it than over the search.
  [[gnu::noinline]] void build_node(int64_t node, int64_t begin, int64_t end) {
    if (end - begin == 1) return build_leaf(node, begin);
    const int64_t left_leaves = (end - begin) / 2, left = node + 1, right = node + 2 * left_leaves;
    build_node(left, begin, begin + left_leaves);
    build_node(right, begin + left_leaves, end);
    pure[node] = pure[left] == pure[right] ? pure[left] : kMixed;
    T *low = boxes + node * 2 * d, *high = low + d;
    const T *a = boxes + left * 2 * d, *b = boxes + right * 2 * d;
    for (int64_t k = 0; k < d; k++) {
      low[k] = a[k] < b[k] ? a[k] : b[k];
      high[k] = a[d + k] > b[d + k] ? a[d + k] : b[d + k];
    }
  }

  // Boxes hold the finite coordinates: samples with others are at no finite distance from anything.
  void build_leaf(int64_t node, int64_t leaf) {
    T *low = boxes + node * 2 * d, *high = low + d;
    for (int64_t k = 0; k < d; k++) {
      low[k] = std::numeric_limits<T>::infinity();
      high[k] = -std::numeric_limits<T>::infinity();
    }
    const int64_t first = leaf * kLeaf, last = smaller(first + kLeaf, n);
    pure[node] = classes[first];
    for (int64_t i = first; i < last; i++) {
      if (classes[i] != pure[node]) pure[node] = kMixed;
      for (int64_t k = 0; k < d; k++) {
        const T x = rows[i * d + k];
        if (!std::isfinite(x)) continue;
        low[k] = x < low[k] ? x : low[k];
        high[k] = x > high[k] ? x : high[k];
      }
    }
  }
};

// One group of queries on its way through the tree.
template <class T>
struct Group {
  static constexpr int kQueries = kGroup * kLanes<T>;
  static_assert(kLeaf % kQueries == 0 && kLeaf % kLeafRows == 0, "no group has queries of two leaves");

  const Tree<T>& tree;
  Vec<T>* lanes;     // [d][kGroup]
  T* box;            // [2, d]
  int32_t pure = 0;  // the class of all queries, or kMixed
  T furthest = 0;    // the largest of `best`
  Vec<T> best[kGroup] = {};
  Mask<T> best_index[kGroup] = {}, query_class[kGroup] = {};

  void start(int64_t first) {
    const int64_t d = tree.d, last = smaller(first + kQueries, tree.n) - 1;
    T* coordinates = reinterpret_cast<T*>(lanes);
    Index<T>* own_class = reinterpret_cast<Index<T>*>(query_class);
    pure = tree.classes[first];
    for (int64_t k = 0; k < d; k++) {
      box[k] = std::numeric_limits<T>::infinity();
      box[d + k] = -std::numeric_limits<T>::infinity();
    }
    for (int lane = 0; lane < kQueries; lane++) {
      const int64_t i = smaller(first + lane, last);
      own_class[lane] = tree.classes[i];
      if (tree.classes[i] != pure) pure = kMixed;
      for (int64_t k = 0; k < d; k++) {
        const T x = tree.rows[i * d + k];
        coordinates[k * kQueries + lane] = x;
        if (!std::isfinite(x)) continue;
        box[k] = x < box[k] ? x : box[k];
        box[d + k] = x > box[d + k] ? x : box[d + k];
      }
    }
    for (int v = 0; v < kGroup; v++) {
      best[v] = broadcast(std::numeric_limits<T>::infinity());
      best_index[v] = Mask<T>{} + static_cast<Index<T>>(kNone);
    }
    furthest = std::numeric_limits<T>::infinity();
  }

  bool holds_own_class_only(int64_t node) const { return pure != kMixed && tree.pure[node] == pure; }

  // Squared distance between the group's box and a node's.
  T distance_to(int64_t node) const {
    const int64_t d = tree.d;
    const T* other = tree.boxes + node * 2 * d;
    T sum = 0;
    for (int64_t k = 0; k < d; k++) {
      const T above = other[k] - box[d + k], below = box[k] - other[d + k];
      const T gap = above > below ? above : below;
      sum = add_square(sum, gap > T(0) ? gap : T(0));
    }
    return sum;
  }

  // Whether some query itself is near enough to the box.
  bool reaches(int64_t node) const {
    const int64_t d = tree.d;
    const T* other = tree.boxes + node * 2 * d;
    Vec<T> sums[kGroup] = {};
    for (int64_t k = 0; k < d; k++) {
      const Vec<T> low = broadcast(other[k]), high = broadcast(other[d + k]);
      for (int v = 0; v < kGroup; v++) {
        const Vec<T> above = low - lanes[k * kGroup + v], below = lanes[k * kGroup + v] - high;
        const Vec<T> gap = above > below ? above : below;
        sums[v] = add_square(sums[v], gap > T(0) ? gap : Vec<T>{});
      }
    }
    Mask<T> near = {};
    for (int v = 0; v < kGroup; v++) near |= sums[v] <= best[v];
    return any<T>(near);
  }

  void scan(int64_t leaf) {
    const int64_t d = tree.d;
    const T* rows = tree.rows + leaf * kLeaf * d;
    bool found = false;
    for (int j = 0; j < kLeaf; j += kLeafRows) {
      Vec<T> sums[kLeafRows][kGroup] = {};
      for (int64_t k = 0; k < d; k++) {
#pragma GCC unroll 4
        for (int r = 0; r < kLeafRows; r++) {
          const Vec<T> x = broadcast(rows[(j + r) * d + k]);
#pragma GCC unroll 4
          for (int v = 0; v < kGroup; v++) sums[r][v] = add_square(sums[r][v], lanes[k * kGroup + v] - x);
        }
      }
      // A comparison with NaN is false: a sample that is NaN hides no other.
      Vec<T> least[kGroup];
      Mask<T> near = {};
#pragma GCC unroll 4
      for (int v = 0; v < kGroup; v++) {
        least[v] = broadcast(std::numeric_limits<T>::infinity());
#pragma GCC unroll 4
        for (int r = 0; r < kLeafRows; r++) least[v] = sums[r][v] < least[v] ? sums[r][v] : least[v];
        near |= least[v] <= best[v];
      }
      if (!any<T>(near)) continue;
      found = true;
#pragma GCC unroll 4
      for (int r = 0; r < kLeafRows; r++) {
        const int64_t i = leaf * kLeaf + j + r;
        const Mask<T> index = Mask<T>{} + static_cast<Index<T>>(tree.indices[i]);
        const Mask<T> sample_class = Mask<T>{} + static_cast<Index<T>>(tree.classes[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kGroup; v++) {
          const Mask<T> nearer = ((sums[r][v] < best[v]) | ((sums[r][v] == best[v]) & (index < best_index[v]))) &
                                 (sample_class != query_class[v]);
          best[v] = nearer ? sums[r][v] : best[v];
          best_index[v] = nearer ? index : best_index[v];
        }
      }
    }
    if (!found) return;
    furthest = 0;
    const T* nearest = reinterpret_cast<const T*>(best);
    for (int lane = 0; lane < kQueries; lane++) furthest = nearest[lane] > furthest ? nearest[lane] : furthest;
  }

  void search() {
    struct Pending {
      int64_t node, begin, end;
      T distance;
    };
    Pending stack[kMaxDepth + 1];
    int depth = 0;
    stack[depth++] = {0, 0, tree.leaves, T(0)};
    while (depth > 0) {
      const Pending here = stack[--depth];
      if (here.distance > furthest || holds_own_class_only(here.node)) continue;
      const int64_t left_leaves = (here.end - here.begin) / 2;
      if (left_leaves == 0) {
        if (reaches(here.node)) scan(here.begin);
        continue;
      }
      const int64_t left = here.node + 1, right = here.node + 2 * left_leaves, middle = here.begin + left_leaves;
      Pending near = {left, here.begin, middle, distance_to(left)};
      Pending far = {right, middle, here.end, distance_to(right)};
      if (far.distance < near.distance) {
        const Pending swapped = near;
        near = far;
        far = swapped;
      }
      stack[depth++] = far;
      stack[depth++] = near;
    }
  }

  void write(int64_t first, int64_t* index) const {
    const T* distance = reinterpret_cast<const T*>(best);
    const Index<T>* at = reinterpret_cast<const Index<T>*>(best_index);
    for (int lane = 0; lane < kQueries && first + lane < tree.n; lane++) {
      index[tree.indices[first + lane]] = distance[lane] < std::numeric_limits<T>::infinity() ? at[lane] : -1;
    }
  }
};

template <class T>
void search_item(const NearestSearch& args, int64_t b, int threads) {
  const int64_t n = args.n, d = args.d;
  const T* latents = static_cast<const T*>(args.latents) + b * n * d;
  if (n <= kSerialSamples) threads = 1;

  const int64_t group_bytes = Arena::bytes<Vec<T>>(kGroup * d) + Arena::bytes<T>(2 * d);
  Memory memory(2 * Arena::bytes<int32_t>(n) + Tree<T>::bytes(n, d) + threads * group_bytes);
  Arena arena{memory.base};
  int32_t* order = arena.take<int32_t>(n);
  int32_t* ids = arena.take<int32_t>(n);
  kdejsd::cpu::spatial_order(latents, n, d, kLeaf, order, threads);
  kdejsd::cpu::class_ids(args.labels + b * n, n, ids);
  Tree<T> tree(arena, n, d);
  tree.build(latents, order, ids, threads);

  // Each query's result is its own: the same whichever thread finds it.
  constexpr int64_t kQueries = Group<T>::kQueries, kSome = kShareGroups * kQueries;
  Team::run(threads, [&](Team::Part& part) {
    Arena own{arena.next + part.thread * group_bytes};
    Vec<T>* lanes = own.take<Vec<T>>(kGroup * d);
    Group<T> group{tree, lanes, own.take<T>(2 * d)};
    part.each(ceil_div(n, kSome), [&](int64_t some) {
      for (int64_t first = some * kSome; first < smaller(n, (some + 1) * kSome); first += kQueries) {
        group.start(first);
        group.search();
        group.write(first, args.index + b * n);
      }
    });
  });
}

}  // namespace

namespace kdejsd::cpu::KDEJSD_LEVEL {

extern const TileSize nearest_sizes[] = {{"nearest_samples", "leaf rows", kLeafRows},
                                         {"nearest_samples", "leaf", kLeaf},
                                         {"nearest_samples", "float32 group", Group<float>::kQueries},
                                         {"nearest_samples", "float64 group", Group<double>::kQueries},
                                         {"nearest_samples", "float32 share", kShareGroups * Group<float>::kQueries},
                                         {"nearest_samples", "float64 share", kShareGroups * Group<double>::kQueries},
                                         {"nearest_samples", "serial", kSerialSamples},
                                         {"nearest_dims", "order's columns", kOrderColumns},
                                         {"nearest_ordered_samples", "serial", kOrderSerialSamples},
                                         {nullptr, nullptr, 0}};

void nearest(const NearestSearch& args, int threads) {
  if (args.n == 0) return;
  for (int64_t b = 0; b < args.batch; b++) {
    if (args.dtype == DType::kFloat64) {
      search_item<double>(args, b, threads);
    } else {
      search_item<float>(args, b, threads);
    }
  }
}

}  // namespace kdejsd::cpu::KDEJSD_LEVEL
