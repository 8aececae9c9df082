// Compares the CPU kernels with plain loops in double, from 1 to 256 dimensions, in float and double, by one thread and
// by three: a check for processors that the tests do not run on. Says what it compared; its exit status is 1 after a
// difference.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "kernels.h"

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

namespace {

using namespace kdejsd;

int compared = 0, failed = 0;

// Values agree if they differ by no more than the tolerance times the largest.
template <class T>
void compare(const std::string& what, const std::vector<T>& found, const std::vector<double>& expected) {
  const double tolerance = sizeof(T) == 4 ? 3e-5 : 1e-11;
  double largest = 1e-30, difference = 0;
  for (double value : expected) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < expected.size(); i++) {
    const double d = std::abs(static_cast<double>(found[i]) - expected[i]);
    difference = d <= difference ? difference : d;  // NaN stays
  }
  compared++;
  if (found.size() == expected.size() && difference <= tolerance * largest) return;
  failed++;
  std::printf("%s: differs by %g, the largest value is %g\n", what.c_str(), difference, largest);
}

template <class T>
std::vector<T> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> draw;
  std::vector<T> values(static_cast<size_t>(count));
  for (T& value : values) value = static_cast<T>(draw(generator));
  return values;
}

template <class T>
double squared(const std::vector<T>& a, int64_t i, const std::vector<T>& b, int64_t j, int64_t l) {
  double sum = 0;
  for (int64_t k = 0; k < l; k++) {
    const double d = static_cast<double>(a[i * l + k]) - static_cast<double>(b[j * l + k]);
    sum += d * d;
  }
  return sum;
}

template <class T>
struct Checks {
  static constexpr DType dtype = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
  const int64_t l;
  const int threads;

  std::string name(const char* what) const {
    return std::string(what) + ", l = " + std::to_string(l) + ", " + (sizeof(T) == 4 ? "float" : "double") + ", " +
           std::to_string(threads) + " threads";
  }

  void kde() const {
    const int64_t n = 65, m = 301;
    const double h = 0.5 * std::sqrt(static_cast<double>(l));
    const auto query = normal<T>(n * l, 1), centers = normal<T>(m * l, 2), grad = normal<T>(n, 3);
    KdeMixture mixture = {};
    mixture.dtype = dtype, mixture.batch = 1, mixture.n = n, mixture.m = m, mixture.l = l;
    mixture.query = query.data(), mixture.centers = centers.data();
    mixture.bandwidth_number = static_cast<double>(static_cast<T>(h));

    std::vector<double> log_prob(n), dquery(n * l), dcenters(m * l), weights(m);
    for (int64_t i = 0; i < n; i++) {
      double most = -std::numeric_limits<double>::infinity(), sum = 0;
      for (int64_t j = 0; j < m; j++) {
        weights[j] = -squared(query, i, centers, j, l) / (2 * mixture.bandwidth_number * mixture.bandwidth_number);
        most = std::max(most, weights[j]);
      }
      for (double& weight : weights) sum += weight = std::exp(weight - most);
      log_prob[i] = most + std::log(sum / static_cast<double>(m)) -
                    static_cast<double>(l) * std::log(mixture.bandwidth_number * std::sqrt(2 * std::acos(-1.0)));
      for (int64_t j = 0; j < m; j++) {
        const double scale = weights[j] / sum / (mixture.bandwidth_number * mixture.bandwidth_number);
        for (int64_t k = 0; k < l; k++) {
          const double pull = scale * (static_cast<double>(centers[j * l + k]) - static_cast<double>(query[i * l + k]));
          dquery[i * l + k] += pull;
          dcenters[j * l + k] -= static_cast<double>(grad[i]) * pull;
        }
      }
    }

    std::vector<double> value(n);
    std::vector<T> found(n * l), found_centers(m * l);
    KdeForward forward = {};
    forward.mixture = mixture, forward.value_kind = KdeValue::kLogProb, forward.products = KdeProducts::kSplit;
    forward.value = value.data(), forward.dquery = found.data();
    cpu::kde_forward(forward, threads);
    compare(name("kde, value"), std::vector<T>(value.begin(), value.end()), log_prob);
    compare(name("kde, gradient of the queries"), found, dquery);

    KdeBackward backward = {};
    backward.mixture = mixture, backward.grad = grad.data(), backward.log_prob = value.data();
    backward.dcenters = found_centers.data();
    cpu::kde_backward(backward, threads);
    compare(name("kde, gradient of the centers"), found_centers, dcenters);
  }

  void omega() const {
    const int64_t b = 66, d = 2 * l + 1;
    const auto inputs = normal<T>(b * d, 4), codes = normal<T>(b * l, 5);
    for (const bool all : {true, false}) {
      std::vector<double> sum(1), dcodes(b * l), value(1);
      for (int64_t i = 0; i < b; i++) {
        for (int64_t j = i + 1; j < b; j++) {
          if (!all && j != i + b / 2) continue;
          const double distance = squared(inputs, i, inputs, j, d);
          sum[0] += squared(codes, i, codes, j, l) / distance;
          for (int64_t k = 0; k < l; k++) {
            const double pull =
                2 * (static_cast<double>(codes[i * l + k]) - static_cast<double>(codes[j * l + k])) / distance;
            dcodes[i * l + k] += pull;
            dcodes[j * l + k] -= pull;
          }
        }
      }
      std::vector<T> dinputs(b * d), found(b * l);
      if (all) {
        OmegaAll args = {};
        args.dtype = dtype, args.b = b, args.d = d, args.l = l;
        args.inputs = inputs.data(), args.codes = codes.data();
        args.sum = value.data(), args.dinputs = dinputs.data(), args.dcodes = found.data();
        cpu::omega_all(args, threads);
      } else {
        OmegaHalves args = {};
        args.dtype = dtype, args.pairs = b / 2, args.d = d, args.l = l;
        args.inputs = inputs.data(), args.codes = codes.data();
        args.sum = value.data(), args.dinputs = dinputs.data(), args.dcodes = found.data();
        cpu::omega_halves(args, threads);
      }
      compare(name(all ? "omega, all pairs" : "omega, halves"), std::vector<T>{static_cast<T>(value[0])}, sum);
      compare(name("omega, gradient of the codes"), found, dcodes);
    }
  }

  // Phi^-1 by bisection of the complementary error function.
  static double quantile(double p) {
    double low = -40, high = 40;
    for (int step = 0; step < 100; step++) {
      const double middle = (low + high) / 2;
      (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
    }
    return low;
  }

  void radius() const {
    const int64_t rows = 9;
    auto masses = normal<T>(rows * l, 6);
    std::vector<double> expected(rows), dmasses(rows * l);
    for (int64_t i = 0; i < rows; i++) {
      double sum = 0;
      for (int64_t k = 0; k < l; k++) sum += std::exp(static_cast<double>(masses[i * l + k]));
      for (int64_t k = 0; k < l; k++) {
        T& mass = masses[i * l + k];
        mass = static_cast<T>(0.99 * std::exp(static_cast<double>(mass)) / sum);
        const double p = static_cast<double>(mass), z = quantile(p);
        const double density = std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0));
        expected[i] += p * z + density;
        dmasses[i * l + k] = p / density;
      }
    }
    std::vector<T> value(rows), found(rows * l);
    Radius args = {};
    args.dtype = dtype, args.rows = rows, args.classes = l, args.masses = masses.data();
    args.value = value.data(), args.dmasses = found.data();
    cpu::radius(args, threads);
    compare(name("radius, value"), value, expected);
    compare(name("radius, gradient"), found, dmasses);
  }

  void nearest() const {
    const int64_t n = 400;
    const auto latents = normal<T>(n * l, 7);
    std::vector<int64_t> labels(n), index(n);
    for (int64_t i = 0; i < n; i++) labels[i] = i % 3;
    std::vector<double> expected(n), found(n);
    NearestSearch args = {};
    args.dtype = dtype, args.batch = 1, args.n = n, args.d = l;
    args.latents = latents.data(), args.labels = labels.data(), args.index = index.data();
    cpu::nearest(args, threads);
    for (int64_t i = 0; i < n; i++) {
      expected[i] = std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < n; j++) {
        if (labels[j] != labels[i]) expected[i] = std::min(expected[i], squared(latents, i, latents, j, l));
      }
      const bool is_other = index[i] >= 0 && index[i] < n && labels[index[i]] != labels[i];
      found[i] = is_other ? squared(latents, i, latents, index[i], l) : std::nan("");
    }
    compare(name("nearest"), std::vector<T>(found.begin(), found.end()), expected);
  }
};

template <class T>
void check(int64_t l, int threads) {
  const Checks<T> checks = {l, threads};
  checks.kde();
  checks.omega();
  checks.radius();
  checks.nearest();
}

}  // namespace

int main() {
  cpu::openmp.parallel = GOMP_parallel;
  cpu::openmp.thread_num = omp_get_thread_num;
  cpu::openmp.num_threads = omp_get_num_threads;
  for (const int64_t l : {1, 2, 3, 8, 17, 64, 256}) {
    for (const int threads : {1, 3}) {
      check<float>(l, threads);
      check<double>(l, threads);
    }
  }
  std::printf("%d comparisons, %d of them failed\n", compared, failed);
  return failed != 0;
}
