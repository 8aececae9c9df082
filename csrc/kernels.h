// What bindings.cpp sees of the kernels: one struct of arguments per op, and the same functions of every op per device.
// It names each member and each value of an enum once more; a struct of which it lacks a member does not compile.
//
// All arrays are contiguous over their last dimensions as the shape in each comment says; a batch stride counts
// elements from one batch item to the next and is 0 where all items share the array. `T` is float or double, as `dtype`
// says. Pointers marked "or null" switch the thing they stand for off.
#pragma once

#include <cstdint>

namespace kdejsd {

enum class DType { kFloat32, kFloat64 };

// What kde_forward writes per query, from e = log p_e and, for the two divergences, t = log N(query; 0, variance I).
enum class KdeValue {
  kLogProb,        // e
  kJensenShannon,  // log 2 - softplus(t - e)
  kLogRatio,       // e - t
};

// How products may be used for float32: by CUDA's tensor cores, by a CPU's vectors or its matrix instructions.
enum class KdeProducts {
  kNone,     // not: distances from differences alone, rounded as kde_backward rounds them
  kSplit,    // with an error like float32's: tensor cores multiply numbers in parts, a CPU uses its vectors
  kReduced,  // numbers rounded to 11 bits on CUDA, and to two bfloat16 parts by a CPU's matrix instructions
};

// The mixture itself. Bandwidths that are not positive and finite count as NaN, and so do all of them where one is more
// than 1e30 (double: 1e300) times another.
//   a[i, j]  = log_weights[j] - l log h[j] - |query[i] - centers[j]|^2 / (2 h[j]^2),  a[i, exclude[i]] = -inf
//   log p_e(query[i]) = logsumexp_j a[i, j] - l/2 log(2 pi)
// Without log_weights every center has weight 1/m, or 1/(m - 1) for a query that excludes one.
struct KdeMixture {
  DType dtype;
  int64_t batch, n, m, l;   // m, l >= 1
  const void* query;        // [batch, n, l]
  const void* centers;      // [batch, m, l]
  const void* bandwidth;    // [batch, m], or [batch, 1] where per_center is false; or null: one number for all
  const void* log_weights;  // [batch, m], or null: equal weights
  const int64_t* exclude;   // [batch, n], the center that is left out, or -1; or null: none is
  bool per_center;
  int64_t query_stride, centers_stride, bandwidth_stride, log_weights_stride, exclude_stride;  // between batch items
  double bandwidth_number;  // h where `bandwidth` is null, as per_center then is false; it is rounded to dtype first
};

// One streamed pass over the centers: the value, and its gradient for the query and for a shared bandwidth. A center of
// a query's own counts in its density alone, as one more of the equal ones: they have weight 1/(m + 1) each, or 1/m for
// a query that excludes one.
struct KdeForward {
  KdeMixture mixture;
  KdeValue value_kind;
  double target_variance;  // of t above; not read for kLogProb
  KdeProducts products;
  const void* own;     // [batch, n, l], a center of its own for each query; or null, as it must be with log_weights or
                       // an h per center
  double* value;       // [batch, n]
  void* dquery;        // [batch, n, l], d value / d query; or null
  double* dbandwidth;  // [batch, n], d log p_e / d h; or null, as it must be unless kLogProb, one h for all centers and
                       // no own ones
};

// The transposed pass: gradients of sum_i grad[i] log p_e(query[i]), each summed over the queries in a fixed order.
struct KdeBackward {
  KdeMixture mixture;
  const void* grad;        // [batch, n]
  const double* log_prob;  // [batch, n], log p_e as kde_forward gave it: rounded to float it would spoil the weights
  void* dcenters;          // [batch, m, l]; or null
  void* dlog_weights;      // [batch, m]; or null
  void* dbandwidth;        // [batch, m], with one h per center; or null
};

// The ratios |codes[i] - codes[j]|^2 / |inputs[i] - inputs[j]|^2 of all pairs i < j, in one pass that makes nothing of
// size b x b but what is asked for. Where the inputs' squared distance is 0 the ratio is 0 and has no gradient, unless
// the codes hold NaN.
struct OmegaAll {
  DType dtype;
  int64_t b, d, l;       // b >= 2; d, l >= 1
  const void* inputs;    // [b, d]
  const void* codes;     // [b, l]
  const void* upstream;  // [b, b], gradient of a loss for `ratios`; or null: the loss is the sum over the pairs
  double* sum;           // [1], over the pairs; or null
  void* ratios;          // [b, b], symmetric, 0 on the diagonal; or null
  int64_t* largest;      // [2], i < j of the largest ratio, the first NaN if there is one; or null
  void* dinputs;         // [b, d], gradient of the loss; or null, as it must be beside ratios and largest
  void* dcodes;          // [b, l], as dinputs
};

// The same ratio for the pairs (i, i + pairs): their sum and its gradients.
struct OmegaHalves {
  DType dtype;
  int64_t pairs, d, l;  // all >= 1
  const void* inputs;   // [2 pairs, d]
  const void* codes;    // [2 pairs, l]
  double* sum;          // [1]
  void* dinputs;        // [2 pairs, d]; or null
  void* dcodes;         // [2 pairs, l]; or null
};

// Bounds on the mean class radius, one per row of masses: sum_k F(p[i, k]) with F(p) = p z + phi(z), z = Phi^-1(p), and
// its gradient. Masses that are NaN or no probability give NaN.
struct Radius {
  DType dtype;
  bool is_log;  // masses are log p
  int64_t rows, classes;
  const void* masses;  // [rows, classes]
  void* value;         // [rows]
  void* dmasses;       // [rows, classes], d value / d masses; or null
};

// For every sample the nearest one with another label: the lowest index among those at the least squared distance,
// which is summed over the dimensions in order; -1 where no squared distance to such a sample is finite.
struct NearestSearch {
  DType dtype;
  int64_t batch, n, d;    // d >= 1, n < 2^31
  const void* latents;    // [batch, n, d]
  const int64_t* labels;  // [batch, n]
  int64_t* index;         // [batch, n]
};

// Every op with its arguments.
#define KDEJSD_OPS(op)                                                                                            \
  op(kde_forward, KdeForward) op(kde_backward, KdeBackward) op(omega_all, OmegaAll) op(omega_halves, OmegaHalves) \
      op(radius, Radius) op(nearest, NearestSearch)

namespace cpu {

// Each is compiled once per instruction set, and dispatch.cpp calls the copy that is in use.
#define KDEJSD_DECLARE_OP(name, Args) void name(const Args& args, int threads);
KDEJSD_OPS(KDEJSD_DECLARE_OP)
#undef KDEJSD_DECLARE_OP

}  // namespace cpu

#ifdef KDEJSD_CUDA
namespace cuda {

// Scratch memory on the device that a call needs, in bytes; the caller allocates it and passes it in. The caller has
// made that device current, for the question as for the call itself. The kernels are queued on the stream, which is one
// of that device, and nothing waits for them. Errors are thrown as std::runtime_error.
#define KDEJSD_DECLARE_OP(name, Args)                     \
  int64_t name##_workspace(const Args& args, int device); \
  void name(const Args& args, void* workspace, int device, uintptr_t stream);
KDEJSD_OPS(KDEJSD_DECLARE_OP)
#undef KDEJSD_DECLARE_OP

}  // namespace cuda
#endif

}  // namespace kdejsd
