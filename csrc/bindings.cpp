// The Python face of the kernels: structs of raw pointers and sizes, and a stream handle in, nothing else. Everything
// is checked in Python before it comes here. Optional arrays are 0.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/parallel.h"
#include "kernels.h"
#include "machine.h"
#include "named_arguments.h"

namespace py = pybind11;

namespace kdejsd::python {

KDEJSD_DESCRIBE_ENUM(DType, VALUE(kFloat32), VALUE(kFloat64))
KDEJSD_DESCRIBE_ENUM(KdeValue, VALUE(kLogProb), VALUE(kJensenShannon), VALUE(kLogRatio))
KDEJSD_DESCRIBE_ENUM(KdeProducts, VALUE(kNone), VALUE(kSplit), VALUE(kReduced))

KDEJSD_DESCRIBE_STRUCT(KdeMixture, MEMBER(dtype), MEMBER(batch), MEMBER(n), MEMBER(m), MEMBER(l), MEMBER(query),
                       MEMBER(centers), MEMBER(bandwidth), MEMBER(log_weights), MEMBER(exclude), MEMBER(per_center),
                       MEMBER(query_stride), MEMBER(centers_stride), MEMBER(bandwidth_stride),
                       MEMBER(log_weights_stride), MEMBER(exclude_stride), MEMBER(bandwidth_number))
KDEJSD_DESCRIBE_STRUCT(KdeForward, MEMBER(mixture), MEMBER(value_kind), MEMBER(target_variance), MEMBER(products),
                       MEMBER(own), MEMBER(value), MEMBER(dquery), MEMBER(dbandwidth))
KDEJSD_DESCRIBE_STRUCT(KdeBackward, MEMBER(mixture), MEMBER(grad), MEMBER(log_prob), MEMBER(dcenters),
                       MEMBER(dlog_weights), MEMBER(dbandwidth))
KDEJSD_DESCRIBE_STRUCT(OmegaAll, MEMBER(dtype), MEMBER(b), MEMBER(d), MEMBER(l), MEMBER(inputs), MEMBER(codes),
                       MEMBER(upstream), MEMBER(sum), MEMBER(ratios), MEMBER(largest), MEMBER(dinputs), MEMBER(dcodes))
KDEJSD_DESCRIBE_STRUCT(OmegaHalves, MEMBER(dtype), MEMBER(pairs), MEMBER(d), MEMBER(l), MEMBER(inputs), MEMBER(codes),
                       MEMBER(sum), MEMBER(dinputs), MEMBER(dcodes))
KDEJSD_DESCRIBE_STRUCT(Radius, MEMBER(dtype), MEMBER(is_log), MEMBER(rows), MEMBER(classes), MEMBER(masses),
                       MEMBER(value), MEMBER(dmasses))
KDEJSD_DESCRIBE_STRUCT(NearestSearch, MEMBER(dtype), MEMBER(batch), MEMBER(n), MEMBER(d), MEMBER(latents),
                       MEMBER(labels), MEMBER(index))

namespace {

// NAME_cpu(args, threads)
template <class Args>
void add_cpu(py::module_& m, const std::string& name, void (*run)(const Args&, int)) {
  m.def((name + "_cpu").c_str(), [run](py::handle object, int threads) {
    const Args& args = struct_of<Args>(object);
    py::gil_scoped_release release;
    run(args, threads);
  });
}

#ifdef KDEJSD_CUDA
// NAME_workspace_cuda(args, device) and NAME_cuda(args, workspace, device, stream)
template <class Args>
void add_cuda(py::module_& m, const std::string& name, int64_t (*workspace)(const Args&, int),
              void (*run)(const Args&, void*, int, uintptr_t)) {
  m.def((name + "_workspace_cuda").c_str(),
        [workspace](py::handle object, int device) { return workspace(struct_of<Args>(object), device); });
  m.def((name + "_cuda").c_str(), [run](py::handle object, uintptr_t workspace, int device, uintptr_t stream) {
    const Args& args = struct_of<Args>(object);
    py::gil_scoped_release release;
    run(args, reinterpret_cast<void*>(workspace), device, stream);
  });
}
#endif

// What the ops have in common, whichever they are.
void add_ops(py::module_& m) {
  add_enum<DType>(m);
  add_enum<KdeValue>(m);
  add_enum<KdeProducts>(m);
  add_struct<KdeMixture>(m);
#define KDEJSD_ADD_CPU(name, Args) \
  add_struct<Args>(m);             \
  add_cpu(m, #name, cpu::name);
  KDEJSD_OPS(KDEJSD_ADD_CPU)
#ifdef KDEJSD_CUDA
#define KDEJSD_ADD_CUDA(name, Args) add_cuda(m, #name, cuda::name##_workspace, cuda::name);
  KDEJSD_OPS(KDEJSD_ADD_CUDA)
#endif
}

}  // namespace
}  // namespace kdejsd::python

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of kdejsd. Not an interface: use the functions of the package.";
  m.attr("version") = KDEJSD_VERSION;
  m.attr("compiler") = KDEJSD_COMPILER;

  kdejsd::python::add_ops(m);

  m.def("level", &kdejsd::cpu::level);
  m.def("tile_sizes", &kdejsd::cpu::tile_sizes);
  m.def("set_level", &kdejsd::cpu::set_level);
  m.def("built_levels", &kdejsd::cpu::built_levels);
  m.def("has_openmp", [] { return kdejsd::cpu::openmp.parallel != nullptr; });
  m.def("use_openmp", [](uintptr_t parallel, uintptr_t thread_num, uintptr_t num_threads) {
    kdejsd::cpu::OpenMP& openmp = kdejsd::cpu::openmp;
    openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
    openmp.thread_num = reinterpret_cast<decltype(openmp.thread_num)>(thread_num);
    openmp.num_threads = reinterpret_cast<decltype(openmp.num_threads)>(num_threads);
  });
  // For tests: as if a call of this thread had lost so much by waiting; and what its regions were.
  m.def("lose_by_waiting", [](int64_t lost) { kdejsd::cpu::waiting().lose(lost, kdejsd::cpu::nanoseconds()); });
  m.def("regions", [] {
    const kdejsd::cpu::Waiting& waiting = kdejsd::cpu::waiting();
    return py::make_tuple(waiting.alone, waiting.teams);
  });

#ifdef KDEJSD_CUDA
  m.attr("has_cuda") = true;
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
