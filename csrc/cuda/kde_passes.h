// The passes of the kde op, each in a file of its own: what kde.cu puts calls together from. T is float or double.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kde_mixture.cuh"

namespace kdejsd {
namespace cuda {

// kde_middle.cu: queues the look for the middle and the least bandwidth where each center has its own; returns `at`,
// else null.
template <typename T>
const T* launch_middle(const KdeMixture& mixture, T* at /* [2, batch] */, cudaStream_t stream);

// kde_tensor.cu and kde_forward.cu: the pass over all pairs, by tensor cores and without. `resident`: how many blocks
// of the plan a multiprocessor holds.
int tensor_resident(const ForwardPlan& plan, bool split, int64_t l, int device);
void launch_tensor(const KdeForward& args, const float* middle, const ForwardPlan& plan,
                   const Partials<float>& partials, cudaStream_t stream);
template <typename T>
int forward_resident(const ForwardPlan& plan, int device);
template <typename T>
void launch_forward(const KdeForward& args, const T* middle, const ForwardPlan& plan, const Partials<T>& partials,
                    cudaStream_t stream);

// kde_merge.cu: what the splits left becomes value and gradients.
template <typename T>
void launch_merge(const KdeForward& args, const T* middle, const Partials<T>& partials, int64_t splits, int device,
                  cudaStream_t stream);

// kde_backward.cu: the transposed pass and the sum over its splits. `parts`: [splits, elements] of scratch memory, not
// read for a single split.
template <typename T>
int backward_resident(const BackwardPlan& plan, int device);
template <typename T>
void launch_backward(const KdeBackward& args, const T* middle, const BackwardPlan& plan, T* parts, cudaStream_t stream);

}  // namespace cuda
}  // namespace kdejsd
