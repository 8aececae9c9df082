// The ops of csrc/cuda as functions of a shared library, for ctypes. They return the text of an error, or null.
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kde_plan.h"
#include "cuda/micro_tile.cuh"
#include "cuda/mma_half.cuh"
#include "cuda/steps.h"
#include "cuda/warp.cuh"
#include "kernels.h"
#include "machine.h"

namespace {

constexpr int kDevice = 1;  // not the one that is current where nobody has chosen

template <typename Call>
const char* error_of(const Call& call) {
  static std::string text;
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    return (text = error.what()).c_str();
  }
}

// Calls an op with scratch memory that holds NaN.
template <typename Call>
const char* with_workspace(int64_t bytes, const Call& call) {
  const std::unique_ptr<unsigned char[]> workspace(new unsigned char[bytes]);
  std::memset(workspace.get(), 0xff, static_cast<size_t>(bytes));
  return error_of([&] { call(workspace.get()); });
}

}  // namespace

using namespace kdejsd;

extern "C" {

void set_device(int multiprocessors, int shared_bytes, bool backwards) {
  host::device.multiprocessors = multiprocessors;
  host::device.shared_bytes = shared_bytes;
  host::device.backwards = backwards;
}
int devices_set() { return host::device.devices_set; }
int allowances() { return host::device.allowances; }
bool set_tuning(const char* name, int value) { return cuda::set_tuning(name, value); }

struct Number {
  const char* name;
  int64_t value;
};

// The plan of a forward pass, for a device whose multiprocessors have registers for 8 warps of the tensor cores' kernel
// and 228 KiB of shared memory. The last number has no name.
const Number* forward_plan(const KdeForward& args, int multiprocessors, int shared_bytes) {
  const auto bytes = [&](const cuda::ForwardPlan& plan) {
    return cuda::tensor_tile(plan.tensor, args.mixture.l).bytes;
  };
  const auto resident = [&](const cuda::ForwardPlan& plan) {
    if (plan.tensor.most_steps == 0) return 2;
    return std::min(8 / plan.tensor.warps, 228 * 1024 / (bytes(plan) + 1024));
  };
  const cuda::ForwardPlan plan = cuda::plan_forward(args, multiprocessors, shared_bytes, resident);
  static std::vector<Number> numbers;
#define NUMBER(name) {#name, plan.name}
  numbers = {{"tensor_steps", plan.tensor.most_steps},
             {"tensor_m_tiles", plan.tensor.m_tiles},
             {"tensor_warps", plan.tensor.warps},
             {"bytes", plan.tensor.most_steps > 0 ? bytes(plan) : 0},
             NUMBER(lc),
             NUMBER(slabs),
             NUMBER(groups),
             NUMBER(chunks),
             NUMBER(query_tiles),
             NUMBER(center_tiles),
             NUMBER(splits),
             NUMBER(tiles_per_split),
             NUMBER(max),
             NUMBER(sum),
             NUMBER(moment),
             NUMBER(sum_centers),
             NUMBER(middle),
             NUMBER(elements),
             {nullptr, 0}};
#undef NUMBER
  return numbers.data();
}

#define CALL(name, Args)                                                                                               \
  const char* name(const Args& args) {                                                                                 \
    return with_workspace(cuda::name##_workspace(args, kDevice), [&](void* at) { cuda::name(args, at, kDevice, 0); }); \
  }
KDEJSD_OPS(CALL)

// Where the kernels cut their work: in each line what an op counts, and a size.
const char* tile_sizes() {
  using namespace cuda;
  static std::string text;
  text.clear();
  const auto add = [](const char* counted, int64_t size) {
    text += counted + (" " + std::to_string(size)) + "\n";
  };
  add("kde_points", kTile);
  for (const int steps : kTensorSteps) {
    add("kde_points", tensor_centers(steps));
    for (const int warps : kTensorWarps) add("kde_points", TensorShape{steps, tensor_m_tiles(steps), warps}.queries());
    add("kde_dims", kStepK * steps);
  }
  add("kde_dims", kSide);
  add("kde_dims", 2 * kSide);
  for (const DType dtype : {DType::kFloat32, DType::kFloat64}) {
    for (const int slabs : {1, 2, kMostSlabs}) add("kde_dims", slabs * kSide * widest_lc(dtype));
  }
  add("omega_samples", kTile);
  add("omega_samples", kOmegaStep);
  add("omega_dims", kTile);
  add("omega_dims", kOmegaStep);
  add("omega_dims", kOmegaPairThreads);
  add("nearest_samples", kTile);
  add("nearest_dims", kNearestChunk);
  add("radius_classes", kWarp);
  add("radius_classes", kRadiusWarpClasses);
  return text.c_str();
}
}
