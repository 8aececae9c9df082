// The Python face of the kernels: raw pointers, sizes and a stream handle in, nothing else. Everything is checked in
// Python before it comes here. Optional arrays are 0.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cpu/parallel.h"
#include "kernels.h"
#include "machine.h"

namespace py = pybind11;

namespace {

using kdejsd::DType;
using kdejsd::KdeBackward;
using kdejsd::KdeForward;
using kdejsd::KdeMixture;
using kdejsd::KdeProducts;
using kdejsd::KdeValue;
using kdejsd::NearestSearch;
using kdejsd::OmegaAll;
using kdejsd::OmegaHalves;
using kdejsd::Radius;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

KdeMixture mixture(bool is_double, int64_t batch, int64_t n, int64_t m, int64_t l, uintptr_t query, uintptr_t centers,
                   uintptr_t bandwidth, uintptr_t log_weights, uintptr_t exclude, bool per_center, int64_t query_stride,
                   int64_t centers_stride, int64_t bandwidth_stride, int64_t log_weights_stride, int64_t exclude_stride,
                   double bandwidth_number) {
  return {is_double ? DType::kFloat64 : DType::kFloat32,
          batch,
          n,
          m,
          l,
          pointer(query),
          pointer(centers),
          pointer(bandwidth),
          pointer(log_weights),
          pointer<int64_t>(exclude),
          per_center,
          query_stride,
          centers_stride,
          bandwidth_stride,
          log_weights_stride,
          exclude_stride,
          bandwidth_number};
}

KdeForward forward(const KdeMixture& mix, int value_kind, double target_variance, int products, uintptr_t own,
                   uintptr_t value, uintptr_t dquery, uintptr_t dbandwidth) {
  return {mix,
          static_cast<KdeValue>(value_kind),
          target_variance,
          static_cast<KdeProducts>(products),
          pointer(own),
          pointer<double>(value),
          pointer(dquery),
          pointer<double>(dbandwidth)};
}

KdeBackward backward(const KdeMixture& mix, uintptr_t grad, uintptr_t log_prob, uintptr_t dcenters,
                     uintptr_t dlog_weights, uintptr_t dbandwidth) {
  return {mix,
          pointer(grad),
          pointer<const double>(log_prob),
          pointer(dcenters),
          pointer(dlog_weights),
          pointer(dbandwidth)};
}

OmegaAll omega_all(bool is_double, int64_t b, int64_t d, int64_t l, uintptr_t inputs, uintptr_t codes,
                   uintptr_t upstream, uintptr_t sum, uintptr_t ratios, uintptr_t largest, uintptr_t dinputs,
                   uintptr_t dcodes) {
  return {is_double ? DType::kFloat64 : DType::kFloat32,
          b,
          d,
          l,
          pointer(inputs),
          pointer(codes),
          pointer(upstream),
          pointer<double>(sum),
          pointer(ratios),
          pointer<int64_t>(largest),
          pointer(dinputs),
          pointer(dcodes)};
}

OmegaHalves omega_halves(bool is_double, int64_t pairs, int64_t d, int64_t l, uintptr_t inputs, uintptr_t codes,
                         uintptr_t sum, uintptr_t dinputs, uintptr_t dcodes) {
  return {is_double ? DType::kFloat64 : DType::kFloat32,
          pairs,
          d,
          l,
          pointer(inputs),
          pointer(codes),
          pointer<double>(sum),
          pointer(dinputs),
          pointer(dcodes)};
}

Radius radius(bool is_double, bool is_log, int64_t rows, int64_t classes, uintptr_t masses, uintptr_t value,
              uintptr_t dmasses) {
  return {is_double ? DType::kFloat64 : DType::kFloat32,
          is_log,
          rows,
          classes,
          pointer(masses),
          pointer(value),
          pointer(dmasses)};
}

NearestSearch nearest_search(bool is_double, int64_t batch, int64_t n, int64_t d, uintptr_t latents, uintptr_t labels,
                             uintptr_t index) {
  return {is_double ? DType::kFloat64 : DType::kFloat32,
          batch,
          n,
          d,
          pointer(latents),
          pointer<int64_t>(labels),
          pointer<int64_t>(index)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of kdejsd. Not an interface: use the functions of the package.";
  m.attr("version") = KDEJSD_VERSION;
  m.attr("compiler") = KDEJSD_COMPILER;

  // The mixture goes into each call as one opaque value: built once, from checked tensors, for any of the passes.
  py::class_<KdeMixture>(m, "KdeMixture").def(py::init(&mixture));

  m.def("kde_forward_cpu", [](const KdeMixture& mix, int value_kind, double target_variance, int products,
                              uintptr_t own, uintptr_t value, uintptr_t dquery, uintptr_t dbandwidth, int threads) {
    const KdeForward args = forward(mix, value_kind, target_variance, products, own, value, dquery, dbandwidth);
    py::gil_scoped_release release;
    kdejsd::cpu::kde_forward(args, threads);
  });
  m.def("kde_backward_cpu", [](const KdeMixture& mix, uintptr_t grad, uintptr_t log_prob, uintptr_t dcenters,
                               uintptr_t dlog_weights, uintptr_t dbandwidth, int threads) {
    const KdeBackward args = backward(mix, grad, log_prob, dcenters, dlog_weights, dbandwidth);
    py::gil_scoped_release release;
    kdejsd::cpu::kde_backward(args, threads);
  });
  // Likewise the arguments of the other ops, for the pass of either device.
  py::class_<OmegaAll>(m, "OmegaAll").def(py::init(&omega_all));
  py::class_<OmegaHalves>(m, "OmegaHalves").def(py::init(&omega_halves));
  m.def("omega_all_cpu", &kdejsd::cpu::omega_all, py::call_guard<py::gil_scoped_release>());
  m.def("omega_halves_cpu", &kdejsd::cpu::omega_halves, py::call_guard<py::gil_scoped_release>());
  py::class_<Radius>(m, "Radius").def(py::init(&radius));
  m.def("radius_cpu", &kdejsd::cpu::radius, py::call_guard<py::gil_scoped_release>());
  py::class_<NearestSearch>(m, "NearestSearch").def(py::init(&nearest_search));
  m.def("nearest_cpu", &kdejsd::cpu::nearest, py::call_guard<py::gil_scoped_release>());
  m.def("level", &kdejsd::cpu::level);
  m.def("tile_sizes", &kdejsd::cpu::tile_sizes);
  m.def("set_level", &kdejsd::cpu::set_level);
  m.def("built_levels", &kdejsd::cpu::built_levels);
  m.def("has_openmp", &kdejsd::cpu::has_openmp);
  // For tests: as if a call of this thread had lost so much by waiting; and what its regions were.
  m.def("lose_by_waiting", [](int64_t lost) { kdejsd::cpu::waiting().lose(lost, kdejsd::cpu::nanoseconds()); });
  m.def("regions", [] {
    const kdejsd::cpu::Waiting& waiting = kdejsd::cpu::waiting();
    return py::make_tuple(waiting.alone, waiting.teams);
  });

#ifdef KDEJSD_CUDA
  m.attr("has_cuda") = true;
  m.def("kde_forward_workspace_cuda",
        [](const KdeMixture& mix, int value_kind, double target_variance, int products, uintptr_t own, uintptr_t value,
           uintptr_t dquery, uintptr_t dbandwidth, int device) {
          return kdejsd::cuda::kde_forward_workspace(
              forward(mix, value_kind, target_variance, products, own, value, dquery, dbandwidth), device);
        });
  m.def("kde_forward_cuda",
        [](const KdeMixture& mix, int value_kind, double target_variance, int products, uintptr_t own, uintptr_t value,
           uintptr_t dquery, uintptr_t dbandwidth, uintptr_t workspace, int device, uintptr_t stream) {
          const KdeForward args = forward(mix, value_kind, target_variance, products, own, value, dquery, dbandwidth);
          py::gil_scoped_release release;
          kdejsd::cuda::kde_forward(args, pointer(workspace), device, stream);
        });
  m.def("kde_backward_workspace_cuda", [](const KdeMixture& mix, uintptr_t grad, uintptr_t log_prob, uintptr_t dcenters,
                                          uintptr_t dlog_weights, uintptr_t dbandwidth, int device) {
    return kdejsd::cuda::kde_backward_workspace(backward(mix, grad, log_prob, dcenters, dlog_weights, dbandwidth),
                                                device);
  });
  m.def("kde_backward_cuda",
        [](const KdeMixture& mix, uintptr_t grad, uintptr_t log_prob, uintptr_t dcenters, uintptr_t dlog_weights,
           uintptr_t dbandwidth, uintptr_t workspace, int device, uintptr_t stream) {
          const KdeBackward args = backward(mix, grad, log_prob, dcenters, dlog_weights, dbandwidth);
          py::gil_scoped_release release;
          kdejsd::cuda::kde_backward(args, pointer(workspace), device, stream);
        });
  // Every op is asked for its workspace in the same way, also where the answer depends on less.
  m.def("omega_all_workspace_cuda", [](const OmegaAll& args, int) { return kdejsd::cuda::omega_all_workspace(args); });
  m.def("omega_halves_workspace_cuda",
        [](const OmegaHalves& args, int) { return kdejsd::cuda::omega_halves_workspace(args); });
  m.def("omega_all_cuda", [](const OmegaAll& args, uintptr_t workspace, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    kdejsd::cuda::omega_all(args, pointer(workspace), device, stream);
  });
  m.def("omega_halves_cuda", [](const OmegaHalves& args, uintptr_t workspace, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    kdejsd::cuda::omega_halves(args, pointer(workspace), device, stream);
  });
  m.def("radius_workspace_cuda", [](const Radius&, int) { return 0; });
  m.def("radius_cuda", [](const Radius& args, uintptr_t, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    kdejsd::cuda::radius(args, device, stream);
  });
  m.def("nearest_workspace_cuda", &kdejsd::cuda::nearest_workspace);
  m.def("nearest_cuda", [](const NearestSearch& args, uintptr_t workspace, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    kdejsd::cuda::nearest(args, pointer(workspace), device, stream);
  });
  m.def("cuda_tuning", &kdejsd::cuda::tuning);
  m.def("cuda_tuning_ranges", &kdejsd::cuda::tuning_ranges);
  m.def("set_cuda_tuning", &kdejsd::cuda::set_tuning);
  m.def("cuda_device_count", [] {
    std::string error;
    const int count = kdejsd::cuda::device_count(&error);
    return py::make_tuple(count, error);
  });
  m.def("cuda_runtime_version", &kdejsd::cuda::runtime_version);
  m.def("cuda_driver_version", &kdejsd::cuda::driver_version);
  m.def("cuda_architectures", &kdejsd::cuda::built_architectures);
#else
  m.attr("has_cuda") = false;
#endif
}
