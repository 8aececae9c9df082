// The ops of csrc/cuda as functions of a shared library, for ctypes. They return the text of an error, or null.
#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace {

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
  host::device = {multiprocessors, shared_bytes, backwards, ""};
}
const char* kde_forward(const KdeForward& args) {
  return with_workspace(cuda::kde_forward_workspace(args, 0), [&](void* at) { cuda::kde_forward(args, at, 0, 0); });
}
const char* kde_backward(const KdeBackward& args) {
  return with_workspace(cuda::kde_backward_workspace(args, 0), [&](void* at) { cuda::kde_backward(args, at, 0, 0); });
}
const char* omega_all(const OmegaAll& args) {
  return with_workspace(cuda::omega_all_workspace(args), [&](void* at) { cuda::omega_all(args, at, 0, 0); });
}
const char* omega_halves(const OmegaHalves& args) {
  return with_workspace(cuda::omega_halves_workspace(args), [&](void* at) { cuda::omega_halves(args, at, 0, 0); });
}
const char* radius(const Radius& args) {
  return error_of([&] { cuda::radius(args, 0, 0); });
}
const char* nearest(const NearestSearch& args) {
  return with_workspace(cuda::nearest_workspace(args, 0), [&](void* at) { cuda::nearest(args, at, 0, 0); });
}
}
