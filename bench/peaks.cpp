// What a processor does at most: multiply-adds, exponentials and bytes read per second, by all threads together.
// machine.py compiles this for one instruction set and one type (-DREAL=float or double) and reads what it prints.
//
// Each figure is the median over rounds in which all threads start together and the slowest one counts.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../csrc/cpu/simd.h"

namespace {

using V = Vec<REAL>;

constexpr int kChains = kRegisters == 32 ? 24 : 12;  // independent sums: enough to cover the units' latency
constexpr int kExpVectors = 8192 / kVectorBytes;     // in the first-level cache, twice
constexpr size_t kReadVectors = (size_t{1} << 27) / kVectorBytes;  // 128 MiB a thread
constexpr int kRounds = 15;
constexpr double kRoundSeconds = 0.012;

// The kernels' exponential without its care for the ends of the range, which costs time where there is no scalef.
V fastest_exp2(V x) {
#if defined(__AVX512F__)
  return exp2(x);
#else
  using E = Exp2<REAL>;
  const V shifted = x + E::kRound;
  const V fraction = E::polynomial(x - (shifted - E::kRound));
  return reinterpret_cast<V>((reinterpret_cast<Mask<REAL> >(shifted) << E::kMantissa) +
                             reinterpret_cast<Mask<REAL> >(fraction));
#endif
}

void keep(void* data) { asm volatile("" : : "r"(data) : "memory"); }

struct Worker {
  V* data = nullptr;

  // Each returns how many operations `repeats` repeats are.
  double multiply_adds(long repeats) {
    V sums[kChains];
    for (int c = 0; c < kChains; c++) sums[c] = broadcast(REAL(c));
    const V factor = broadcast(REAL(0.999)), term = broadcast(REAL(1e-3));
    for (long i = 0; i < repeats; i++) {
#pragma GCC unroll 24
      for (int c = 0; c < kChains; c++) sums[c] = sums[c] * factor + term;
    }
    for (int c = 0; c < kChains; c++) data[c] = sums[c];
    keep(data);
    return static_cast<double>(repeats) * kChains * kLanes<REAL>;
  }

  double exponentials(long repeats) {
    const V* in = data;
    V* out = data + kExpVectors;
    for (long i = 0; i < repeats; i++) {
#pragma GCC unroll 8
      for (int v = 0; v < kExpVectors; v++) out[v] = fastest_exp2(in[v]);
      keep(out);
    }
    return static_cast<double>(repeats) * kExpVectors * kLanes<REAL>;
  }

  double bytes_read(long repeats) {
    V sums[8] = {};
    for (long i = 0; i < repeats; i++) {
      for (size_t v = 0; v < kReadVectors; v += 8) {
#pragma GCC unroll 8
        for (int c = 0; c < 8; c++) sums[c] += data[v + c];
      }
    }
    keep(sums);
    return static_cast<double>(repeats) * kReadVectors * kVectorBytes;
  }
};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

using Work = double (Worker::*)(long);

double rate(std::vector<Worker>& workers, Work work) {
  long repeats = 1;
  for (double took = 0; took < kRoundSeconds; repeats *= took < kRoundSeconds ? 2 : 1) {
    const double start = seconds();
    (workers[0].*work)(repeats);
    took = seconds() - start;
  }
  std::vector<double> rates;
  for (int round = 0; round < kRounds; round++) {
    std::atomic<size_t> waiting{workers.size()};
    std::vector<double> starts(workers.size()), ends(workers.size()), counts(workers.size());
    std::vector<std::thread> threads;
    for (size_t t = 0; t < workers.size(); t++) {
      threads.emplace_back([&, t] {
        for (waiting--; waiting > 0;) std::this_thread::yield();
        starts[t] = seconds();
        counts[t] = (workers[t].*work)(repeats);
        ends[t] = seconds();
      });
    }
    double count = 0;
    for (size_t t = 0; t < workers.size(); t++) {
      threads[t].join();
      count += counts[t];
    }
    rates.push_back(count /
                    (*std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end())));
  }
  std::sort(rates.begin(), rates.end());
  return rates[kRounds / 2];
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Worker> workers(argc > 1 ? std::max(1, std::atoi(argv[1])) : 1);
  for (Worker& worker : workers) {
    worker.data = static_cast<V*>(std::aligned_alloc(kVectorBytes, kReadVectors * kVectorBytes));
    if (!worker.data) return 1;
    for (size_t v = 0; v < kReadVectors; v++) worker.data[v] = broadcast(-REAL(v % 32) - REAL(0.3));
  }
  std::printf("%.6g %.6g %.6g\n", rate(workers, &Worker::multiply_adds), rate(workers, &Worker::exponentials),
              rate(workers, &Worker::bytes_read));
}
