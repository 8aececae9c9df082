// How calls of the kde op are cut into blocks, and how the blocks' shared memory is laid out. Plain C++, so that a host
// compiler can test it (python_tests/test_cuda_on_host.py); what it must know of a device comes as arguments.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>

#include "kernels.h"
#include "math/host_device.h"
#include "math/integer.h"

namespace kdejsd {
namespace cuda {

// ----------------------------------------------------------------------------------------------------------------
// What no device has been asked about: each is a guess by counts of instructions, and a benchmark can change it

struct KdeTuning {
  struct Number {
    const char* name;
    std::atomic<int> value;
    int least, most;

    operator int() const { return value; }
  };
  Number tensor_from = {"tensor_from", {1}, 1, 257};  // the least dimension that goes to the tensor cores
  Number tensor_warps = {"tensor_warps", {0}, 0, 8};  // of a block there, 4 or 8; else the plan chooses
  // Parts of an exponent, per dimension, up to which its distance is taken from products.
  Number tensor_parts = {"tensor_parts", {12}, 0, 1024};
  Number splits = {"splits", {0}, 0, 1 << 20};  // of the centers in a forward pass; 0: as many as fill the device

  Number* all[4] = {&tensor_from, &tensor_warps, &tensor_parts, &splits};
};
inline KdeTuning kde_tuning;

constexpr int kStartTiles = 1;  // what a block takes to start and to end, in tiles
constexpr int kMostWaves = 4;   // of blocks, for an even load

// ----------------------------------------------------------------------------------------------------------------
// The tensor cores' kernel. Its instances differ in the most k-steps, of 16 coordinates, that they take. Many k-steps
// leave registers for one M-tile, of 16 queries, a warp, and shared memory for half as many centers; with two a warp
// reads the centers half as often.

constexpr int kTensorSteps[] = {1, 4, 8, 16};
constexpr int kTensorWarps[] = {4, 8};

KDEJSD_HD constexpr int tensor_m_tiles(int most_steps) { return most_steps <= 4 ? 2 : 1; }

// Of a tile.
KDEJSD_HD constexpr int tensor_centers(int most_steps) { return most_steps <= 8 ? 32 : 16; }

// Whether shared memory has the queries a second time, whole and not in parts.
KDEJSD_HD constexpr bool has_whole_queries(int most_steps) { return most_steps == 1; }

// An instance, and the warps of its blocks.
struct TensorShape {
  int most_steps;  // 0: no tensor cores
  int m_tiles, warps;

  KDEJSD_HD constexpr int queries() const { return 16 * m_tiles * warps; }  // of a block
  KDEJSD_HD constexpr int centers() const { return tensor_centers(most_steps); }
};

// Where things lie in a block's shared memory, in units of 4 bytes; rows are points.
struct TensorTile {
  int steps;                                 // k-steps that l has
  int stride;                                // from one point to the next
  int exclude, query_norms, shift, columns;  // [queries], [queries], [16 steps], [2, centers, 4]
  int queries, whole_queries;                // [queries, ...]
  int staged, centers;                       // 2 tiles [centers, ...]
  int bytes;                                 // in all
};

KDEJSD_HD constexpr TensorTile tensor_tile(TensorShape shape, int64_t l) {
  const int rows = shape.queries(), columns = shape.centers();
  TensorTile tile = {};
  tile.steps = static_cast<int>(ceil_div(l, 16));
  // A number has 4 bytes, be it as it is or in two parts of float16. Rows lie an odd multiple of 16 bytes apart, so
  // that eight of them are in different banks.
  tile.stride = 16 * tile.steps + 4;
  tile.query_norms = tile.exclude + rows;
  tile.shift = tile.query_norms + rows;
  tile.columns = tile.shift + 16 * tile.steps;
  tile.queries = tile.columns + 2 * columns * 4;
  tile.whole_queries = tile.queries + rows * tile.stride;
  tile.staged = tile.whole_queries + (has_whole_queries(shape.most_steps) ? rows * tile.stride : 0);
  tile.centers = tile.staged + 2 * columns * tile.stride;
  tile.bytes = 4 * (tile.centers + 2 * columns * tile.stride);
  return tile;
}

// ----------------------------------------------------------------------------------------------------------------
// Forward

struct ForwardPlan {
  TensorShape tensor;   // where tensor cores do it
  float largest_parts;  // of an exponent, up to which its distances come from products
  int lc, slabs;        // the other kernel's template arguments: coordinates per thread, chunks per block at most
  int groups;           // blocks that share a tile of queries and differ in the chunks that they sum
  int chunks;           // that each of them sums
  int64_t query_tiles, center_tiles, splits, tiles_per_split;
  int64_t max, sum, moment, sum_centers, middle;  // offsets in the workspace, in elements
  int64_t elements;

  int64_t blocks(int64_t batch) const { return query_tiles * groups * splits * batch; }
};

// Each split of the queries leaves gradients of its own, one array after the other as in KdeBackward; those of a single
// split are the results.
struct BackwardPlan {
  int lc, slabs, groups, chunks;
  int64_t center_tiles, query_tiles, splits, tiles_per_split;
  int64_t elements;  // that a split leaves

  int64_t blocks(int64_t batch) const { return center_tiles * groups * splits * batch; }
};

constexpr int kPlainTile = 64;  // rows and columns of the other kernels' tiles
constexpr int kPlainSide = 16;  // threads that share a row's coordinates
constexpr int kMostSlabs = 4;   // chunks of the coordinates that a block sums

// Coordinates that one of those threads has at most, in 16 bytes.
constexpr int64_t widest_lc(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Bandwidths of each center's own, whose middle and least one are looked for first: how many numbers that leaves.
inline int64_t middle_count(const KdeMixture& mixture) { return mixture.per_center ? 2 * mixture.batch : 0; }

// The chunks of l that the blocks sum: how wide they are, and how many blocks share them. Where nothing is summed over
// coordinates, one block goes through all of them.
template <typename Plan>
void plan_chunks(const KdeMixture& mixture, bool with_sums, Plan* plan) {
  const int64_t lc = mixture.l <= kPlainSide ? 1 : mixture.l <= 2 * kPlainSide ? 2 : widest_lc(mixture.dtype);
  const int64_t chunks = with_sums ? ceil_div(mixture.l, kPlainSide * lc) : 1;
  plan->lc = static_cast<int>(lc);
  plan->slabs = chunks == 1 ? 1 : chunks == 2 ? 2 : kMostSlabs;
  plan->groups = static_cast<int>(ceil_div(chunks, plan->slabs));
  plan->chunks = static_cast<int>(ceil_div(chunks, plan->groups));
}

// Splits a pass over `tiles` tiles so that the device is full, in one wave of blocks or in a few where that leaves less
// of the last one empty. No split is empty, and none has so many tiles that 32 bits could not count their points.
template <typename Plan>
void plan_splits(int64_t blocks, int64_t slots, int64_t tiles, int wanted, Plan* plan) {
  const int64_t most_tiles = (int64_t{1} << 30) / kPlainTile;
  int64_t fewest = INT64_MAX;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t splits = wanted > 0 ? wanted : waves * slots / blocks;
    const int64_t each = std::min(most_tiles, ceil_div(tiles, std::max<int64_t>(1, std::min(tiles, splits))));
    const int64_t cut = ceil_div(tiles, each);
    const int64_t steps = ceil_div(blocks * cut, slots) * (each + kStartTiles);
    if (steps >= fewest) continue;
    fewest = steps;
    plan->tiles_per_split = each;
    plan->splits = cut;
  }
}

// Which instance of the tensor cores' kernel does the pass, in blocks of how many warps; none where l or the device
// does not allow it. It is the one of the fewest k-steps that fits; of the two sizes of blocks the one that keeps more
// warps at work on queries that are there. `resident` says how many blocks of the plan a multiprocessor holds.
template <typename Resident>
void plan_tensor(const KdeForward& args, int shared_bytes, const Resident& resident, ForwardPlan* plan) {
  const KdeMixture& mixture = args.mixture;
  if (args.products == KdeProducts::kNone || mixture.dtype != DType::kFloat32) return;
  if (mixture.l < kde_tuning.tensor_from) return;
  const bool split = args.products == KdeProducts::kSplit;
  const bool chosen = std::count(std::begin(kTensorWarps), std::end(kTensorWarps), kde_tuning.tensor_warps) > 0;
  double best = 0;
  for (const int steps : kTensorSteps) {
    if (mixture.l > 16 * steps || plan->tensor.most_steps > 0) continue;
    for (const int warps : kTensorWarps) {
      const TensorShape shape = {steps, tensor_m_tiles(steps), warps};
      if (chosen && kde_tuning.tensor_warps != warps) continue;
      if (tensor_tile(shape, mixture.l).bytes > shared_bytes) continue;
      ForwardPlan tried = *plan;
      tried.tensor = shape;
      const int64_t rows = ceil_div(mixture.n, shape.queries()) * shape.queries();
      const double filled = static_cast<double>(mixture.n) / static_cast<double>(rows);
      const double at_work = resident(tried) * warps * filled;
      if (at_work <= best) continue;
      best = at_work;
      *plan = tried;
    }
  }
  // The parts are 1.4 l / h^2 for points of variance 1, so 12 l leaves products to bandwidths from 0.35 on, with errors
  // that grow with l as the values and their rounding do. With 11 bits the error of an exponent is 1 at the worst.
  const float parts = static_cast<float>(kde_tuning.tensor_parts) * static_cast<float>(mixture.l);
  plan->largest_parts = split || parts < 512.0f ? parts : 512.0f;
}

template <typename Resident>
ForwardPlan plan_forward(const KdeForward& args, int multiprocessors, int shared_bytes, const Resident& resident) {
  const KdeMixture& mixture = args.mixture;
  ForwardPlan plan = {};
  plan_tensor(args, shared_bytes, resident, &plan);
  if (plan.tensor.most_steps > 0) {
    plan.groups = 1;
    plan.query_tiles = ceil_div(mixture.n, plan.tensor.queries());
    plan.center_tiles = ceil_div(mixture.m, plan.tensor.centers());
  } else {
    plan_chunks(mixture, args.dquery != nullptr, &plan);
    plan.query_tiles = ceil_div(mixture.n, kPlainTile);
    plan.center_tiles = ceil_div(mixture.m, kPlainTile);
  }
  const int64_t slots = static_cast<int64_t>(multiprocessors) * std::max(1, resident(plan));
  plan_splits(mixture.batch * plan.query_tiles * plan.groups, slots, plan.center_tiles, kde_tuning.splits, &plan);
  const int64_t each = plan.splits * mixture.batch * mixture.n;
  plan.sum = plan.max + each;
  plan.moment = plan.sum + each;
  plan.sum_centers = plan.moment + (args.dbandwidth != nullptr ? each : 0);
  const bool in_dquery = args.dquery == nullptr || plan.splits == 1;  // the sums of a single split lie in dquery
  plan.middle = plan.sum_centers + (in_dquery ? 0 : each * mixture.l);
  plan.elements = plan.middle + middle_count(mixture);
  return plan;
}

// ----------------------------------------------------------------------------------------------------------------
// Backward

template <typename Resident>
BackwardPlan plan_backward(const KdeBackward& args, int multiprocessors, const Resident& resident) {
  const KdeMixture& mixture = args.mixture;
  BackwardPlan plan = {};
  plan_chunks(mixture, args.dcenters != nullptr, &plan);
  plan.center_tiles = ceil_div(mixture.m, kPlainTile);
  plan.query_tiles = ceil_div(mixture.n, kPlainTile);
  const int64_t slots = static_cast<int64_t>(multiprocessors) * std::max(1, resident(plan));
  plan_splits(mixture.batch * plan.center_tiles * plan.groups, slots, plan.query_tiles, 0, &plan);
  const int64_t centers = mixture.batch * mixture.m;
  if (args.dcenters != nullptr) plan.elements += centers * mixture.l;
  if (args.dlog_weights != nullptr) plan.elements += centers;
  if (args.dbandwidth != nullptr) plan.elements += centers;
  return plan;
}

}  // namespace cuda
}  // namespace kdejsd
