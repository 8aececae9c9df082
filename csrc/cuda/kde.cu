// The kde op on CUDA devices: log p_e at every query with its gradients in one pass over the centers, and the
// transposed pass that gives the gradients of centers, log weights and bandwidths. Nothing of size n x m is stored.
//
// A call is a pass over the pairs and a merge of what its blocks leave; before them, where each center has a bandwidth
// of its own, a look for the middle one and the least. kde_plan.h says how calls are cut into blocks, kde_mixture.cuh
// in what frame and units they are computed, kde_passes.h which file has which pass.
//
// Arrays are row-major: query [batch, n, l], centers [batch, m, l].
#include <type_traits>

#include "cuda/kde_passes.h"
#include "machine.h"

namespace kdejsd {
namespace cuda {
namespace {

template <typename T>
ForwardPlan forward_plan(const KdeForward& args, int device) {
  const auto resident = [&](const ForwardPlan& plan) {
    if (plan.tensor.most_steps == 0) return forward_resident<T>(plan, device);
    return tensor_resident(plan, args.products == KdeProducts::kSplit, args.mixture.l, device);
  };
  return plan_forward(args, multiprocessor_count(device), most_shared_bytes(device), resident);
}

template <typename T>
BackwardPlan backward_plan(const KdeBackward& args, int device) {
  const auto resident = [&](const BackwardPlan& plan) { return backward_resident<T>(plan, device); };
  return plan_backward(args, multiprocessor_count(device), resident);
}

template <typename T>
int64_t forward_bytes(const KdeForward& args, int device) {
  return forward_plan<T>(args, device).elements * static_cast<int64_t>(sizeof(T));
}

template <typename T>
int64_t backward_bytes(const KdeBackward& args, int device) {
  const BackwardPlan plan = backward_plan<T>(args, device);
  const int64_t elements = middle_count(args.mixture) + (plan.splits == 1 ? 0 : plan.splits * plan.elements);
  return elements * static_cast<int64_t>(sizeof(T));
}

template <typename T>
void forward(const KdeForward& args, void* workspace, int device, cudaStream_t stream) {
  const ForwardPlan plan = forward_plan<T>(args, device);
  T* elements = static_cast<T*>(workspace);
  Partials<T> partials = {elements + plan.max, elements + plan.sum, nullptr, nullptr};
  if (args.dbandwidth != nullptr) partials.moment = elements + plan.moment;
  if (args.dquery != nullptr) {
    partials.sum_centers = plan.splits == 1 ? static_cast<T*>(args.dquery) : elements + plan.sum_centers;
  }
  const T* middle = launch_middle(args.mixture, elements + plan.middle, stream);
  if (plan.tensor.most_steps == 0) {
    launch_forward(args, middle, plan, partials, stream);
  } else if constexpr (std::is_same_v<T, float>) {
    launch_tensor(args, middle, plan, partials, stream);
  }
  launch_merge(args, middle, partials, plan.splits, device, stream);
}

void write_zeros(void* to, int64_t bytes, cudaStream_t stream) {
  if (to != nullptr) check(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
}

template <typename T>
void backward(const KdeBackward& args, void* workspace, int device, cudaStream_t stream) {
  const KdeMixture& mixture = args.mixture;
  if (mixture.n == 0) {  // sums of nothing, whatever the centers hold
    const int64_t bytes = mixture.batch * mixture.m * static_cast<int64_t>(sizeof(T));
    write_zeros(args.dcenters, bytes * mixture.l, stream);
    write_zeros(args.dlog_weights, bytes, stream);
    write_zeros(args.dbandwidth, bytes, stream);
    return;
  }
  const BackwardPlan plan = backward_plan<T>(args, device);
  if (plan.elements == 0) return;
  T* elements = static_cast<T*>(workspace);
  const T* middle = launch_middle(mixture, elements, stream);
  launch_backward(args, middle, plan, elements + middle_count(mixture), stream);
}

bool is_empty(const KdeMixture& mixture) { return mixture.batch == 0 || mixture.n == 0; }

}  // namespace

std::map<std::string, int> tuning() {
  std::map<std::string, int> found;
  for (const KdeTuning::Number* number : kde_tuning.all) found[number->name] = *number;
  return found;
}

std::map<std::string, std::pair<int, int>> tuning_ranges() {
  std::map<std::string, std::pair<int, int>> found;
  for (const KdeTuning::Number* number : kde_tuning.all) found[number->name] = {number->least, number->most};
  return found;
}

bool set_tuning(const std::string& name, int value) {
  for (KdeTuning::Number* number : kde_tuning.all) {
    if (number->name != name) continue;
    if (value < number->least || value > number->most) return false;
    number->value = value;
    return true;
  }
  return false;
}

int64_t kde_forward_workspace(const KdeForward& args, int device) {
  if (is_empty(args.mixture)) return 0;
  return args.mixture.dtype == DType::kFloat32 ? forward_bytes<float>(args, device)
                                               : forward_bytes<double>(args, device);
}

void kde_forward(const KdeForward& args, void* workspace, int device, uintptr_t stream) {
  if (is_empty(args.mixture)) return;
  const auto call = args.mixture.dtype == DType::kFloat32 ? forward<float> : forward<double>;
  call(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
}

int64_t kde_backward_workspace(const KdeBackward& args, int device) {
  if (is_empty(args.mixture)) return 0;
  return args.mixture.dtype == DType::kFloat32 ? backward_bytes<float>(args, device)
                                               : backward_bytes<double>(args, device);
}

void kde_backward(const KdeBackward& args, void* workspace, int device, uintptr_t stream) {
  if (args.mixture.batch == 0) return;
  const auto call = args.mixture.dtype == DType::kFloat32 ? backward<float> : backward<double>;
  call(args, workspace, device, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace cuda
}  // namespace kdejsd
