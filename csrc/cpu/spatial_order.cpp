#include "cpu/spatial_order.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace kdejsd {
namespace cpu {
namespace {

constexpr int64_t kTaskPoints = 1 << 12;  // below, a task costs more than it brings

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
    constexpr int64_t kColumns = 8;  // at a time, so that a point's are read from one cache line
    for (int64_t k = 0; k < d; k += kColumns) {
      const int64_t columns = std::min(kColumns, d - k);
      T low[kColumns], high[kColumns];
      std::fill(low, low + kColumns, std::numeric_limits<T>::infinity());
      std::fill(high, high + kColumns, -std::numeric_limits<T>::infinity());
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

  void split(int64_t begin, int64_t count) {
    const int64_t leaves = (count + leaf - 1) / leaf;
    if (leaves <= 1) return;
    Keyed* first = keyed.data() + begin;
    const int64_t k = widest(first, count), left = leaves / 2 * leaf;
    for (int64_t i = 0; i < count; i++) first[i].key = finite(points[first[i].index * d + k]);
    std::nth_element(first, first + left, first + count, [](const Keyed& a, const Keyed& b) { return a.key < b.key; });
#pragma omp task if (left > kTaskPoints)
    split(begin, left);
    split(begin + left, count - left);
  }
};

}  // namespace

template <class T>
void spatial_order(const T* points, int64_t n, int64_t d, int64_t leaf, int32_t* order, int threads) {
  Splitter<T> splitter{points, d, leaf, {}};
  splitter.keyed.resize(n);
  for (int64_t i = 0; i < n; i++) splitter.keyed[i].index = static_cast<int32_t>(i);
#pragma omp parallel num_threads(threads) if (threads > 1 && n > kTaskPoints)
#pragma omp single
  splitter.split(0, n);
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
