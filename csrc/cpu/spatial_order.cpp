#include "cpu/spatial_order.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/parallel.h"

namespace kdejsd {
namespace cpu {
namespace {

template <class T>
struct Splitter {
  struct Keyed {
    T key;
    int32_t index;
  };

  const T* points;
  int64_t d, leaf;
  std::vector<Keyed> keyed;

  static T finite(T x) { return std::isfinite(x) ? x : T(0); }

  int64_t widest(const Keyed* first, int64_t count) const {
    int64_t best = 0;
    T width = -1;
    for (int64_t k = 0; k < d; k += kOrderColumns) {
      const int64_t columns = std::min(kOrderColumns, d - k);
      T low[kOrderColumns], high[kOrderColumns];
      std::fill(low, low + kOrderColumns, std::numeric_limits<T>::infinity());
      std::fill(high, high + kOrderColumns, -std::numeric_limits<T>::infinity());
      for (int64_t i = 0; i < count; i++) {
        const T* point = points + first[i].index * d + k;
        for (int64_t c = 0; c < columns; c++) {
          const T x = finite(point[c]);
          low[c] = std::min(low[c], x);
          high[c] = std::max(high[c], x);
        }
      }
      for (int64_t c = 0; c < columns; c++) {
        if (high[c] - low[c] > width) {
          width = high[c] - low[c];
          best = k + c;
        }
      }
    }
    return best;
  }

  int64_t left_of(int64_t count) const { return (count + leaf - 1) / leaf / 2 * leaf; }

  void split_all(int64_t begin, int64_t count) {
    const int64_t left = left_of(count);
    if (left == 0) return;
    split(begin, count);
    split_all(begin, left);
    split_all(begin + left, count - left);
  }

  void split(int64_t begin, int64_t count) {
    Keyed* first = keyed.data() + begin;
    const int64_t k = widest(first, count), left = left_of(count);
    for (int64_t i = 0; i < count; i++) first[i].key = finite(points[first[i].index * d + k]);
    std::nth_element(first, first + left, first + count, [](const Keyed& a, const Keyed& b) { return a.key < b.key; });
  }
};

}  // namespace

template <class T>
void spatial_order(const T* points, int64_t n, int64_t d, int64_t leaf, int32_t* order, int threads) {
  Splitter<T> splitter{points, d, leaf, {}};
  splitter.keyed.resize(n);
  for (int64_t i = 0; i < n; i++) splitter.keyed[i].index = static_cast<int32_t>(i);
  // Level after level until there are parts enough for all, then each part to its leaves.
  struct Range {
    int64_t begin, count;
  };
  std::vector<std::vector<Range>> levels = {{{0, n}}};
  const int64_t enough = threads == 1 ? 1 : 4 * threads;
  while (static_cast<int64_t>(levels.back().size()) < enough && levels.back().back().count > kOrderSerialSamples) {
    std::vector<Range> next;
    for (const Range& whole : levels.back()) {
      const int64_t left = splitter.left_of(whole.count);
      next.push_back({whole.begin, left});
      next.push_back({whole.begin + left, whole.count - left});
    }
    levels.push_back(next);
  }
  Team::run(n > kOrderSerialSamples ? threads : 1, [&](Team::Part& part) {
    for (size_t level = 0; level < levels.size(); level++) {
      const std::vector<Range>& parts = levels[level];
      part.each(static_cast<int64_t>(parts.size()), [&](int64_t i) {
        if (level + 1 < levels.size()) {
          splitter.split(parts[i].begin, parts[i].count);
        } else {
          splitter.split_all(parts[i].begin, parts[i].count);
        }
      });
    }
  });
  for (int64_t i = 0; i < n; i++) order[i] = splitter.keyed[i].index;
}

template void spatial_order(const float*, int64_t, int64_t, int64_t, int32_t*, int);
template void spatial_order(const double*, int64_t, int64_t, int64_t, int32_t*, int);

void class_ids(const int64_t* labels, int64_t n, int32_t* ids) {
  if (n == 0) return;
  const auto ends = std::minmax_element(labels, labels + n);
  const uint64_t low = static_cast<uint64_t>(*ends.first);
  if (static_cast<uint64_t>(*ends.second) - low <= INT32_MAX) {
    for (int64_t i = 0; i < n; i++) ids[i] = static_cast<int32_t>(static_cast<uint64_t>(labels[i]) - low);
    return;
  }
  std::vector<int64_t> distinct(labels, labels + n);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  for (int64_t i = 0; i < n; i++) {
    ids[i] = static_cast<int32_t>(std::lower_bound(distinct.begin(), distinct.end(), labels[i]) - distinct.begin());
  }
}

}  // namespace cpu
}  // namespace kdejsd
