"""Finds the compiled module, and says what it can do on this machine or why it cannot be used."""

from __future__ import annotations

import ctypes
import importlib
import os
from types import ModuleType

import torch

from ._version import __version__

_INSTALL = "pip install . in the source folder (or pip install -e . -C editable.rebuild=true) builds it"

_C: ModuleType | None = None
_problem = ""
_cuda_usable = False  # True once it was found to be
try:
    _C = importlib.import_module(f"{__package__}._C")
    if _C.version != __version__:
        _problem = f"it is of version {_C.version}, the Python files are of {__version__}"
        _C = None
except ImportError as error:
    _problem = f"it could not be imported: {error}"


def _apply_environment(module: ModuleType) -> None:
    """Applies the settings that are read once: the CPU's instruction set, and the CUDA numbers that benchmarks vary."""
    level = os.environ.get("KDEJSD_CPU_LEVEL")
    if level and not module.set_level(level):
        raise RuntimeError(
            f"KDEJSD_CPU_LEVEL must be one of {module.built_levels()} that this processor can run, got {level!r}"
        )
    if not module.has_cuda:
        return
    for name, (least, most) in module.cuda_tuning_ranges().items():
        variable = f"KDEJSD_CUDA_{name.upper()}"
        text = os.environ.get(variable)
        if not text:
            continue
        if not (text.isdecimal() and least <= int(text) <= most):
            raise RuntimeError(f"{variable} must be a whole number from {least} to {most}, got {text!r}")
        module.set_cuda_tuning(name, int(text))


def _share_openmp(module: ModuleType) -> None:
    """Gives the module, which links no OpenMP runtime, the one that torch runs on; without it one thread computes."""
    torchs = ctypes.CDLL(torch._C.__file__)  # a name is looked up in all that this library was linked with
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if all(hasattr(torchs, name) for name in names):
        module.use_openmp(*(ctypes.cast(getattr(torchs, name), ctypes.c_void_p).value for name in names))


if _C is not None:
    _apply_environment(_C)
    _share_openmp(_C)


def native() -> ModuleType:
    """Returns the compiled module.

    Raises:
        RuntimeError: if it is missing, or of another version than the Python files.
    """
    if _C is None:
        raise RuntimeError(
            f"the compiled module of kdejsd cannot be used: {_problem}. {_INSTALL}; the functions of kdejsd.reference "
            "work without it"
        )
    return _C


def cuda_problem() -> str:
    """Returns the reason why CUDA tensors cannot be used, or "" if they can.

    Every call on CUDA asks. A device that was usable once is not looked at again; one that was not may become so.
    """
    global _cuda_usable
    if _cuda_usable:
        return ""
    problem = _look_for_cuda()
    _cuda_usable = not problem
    return problem


def _look_for_cuda() -> str:
    if _C is None:
        return _problem
    if not _C.has_cuda:
        return "kdejsd was built without CUDA: install it from source where nvcc is found, with KDEJSD_CUDA=ON"
    count, error = _C.cuda_device_count()
    if count == 0:
        return f"no CUDA device can be used: {error}"
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) sees no CUDA device: install a CUDA build of torch"
    return ""


def build_info() -> dict[str, str | int | bool]:
    """Returns what this build contains, and which parts of it this machine can use.

    Returns:
        A flat dict: the versions, the compiler, the CPU instruction set in use and those built ("amx", "v4" for
        AVX-512, "v3" for AVX2), the number of threads, whether CUDA was built and for which architectures, whether it
        is usable, and if not, why.

    Example:
        >>> import kdejsd
        >>> info = kdejsd.build_info()
        >>> info["version"] == kdejsd.__version__
        True
        >>> info["compiled"], info["threads"] >= 1
        (True, True)
    """
    info: dict[str, str | int | bool] = {
        "version": __version__,
        "torch": str(torch.__version__),
        "compiled": _C is not None,
    }
    if _C is None:
        info["problem"] = _problem
        return info
    problem = cuda_problem()
    info |= {
        "compiler": _C.compiler,
        "cpu_level": _C.level(),
        "cpu_levels_built": _C.built_levels(),
        "openmp": _C.has_openmp(),
        "threads": torch.get_num_threads(),
        "cuda_built": _C.has_cuda,
        "cuda_usable": not problem,
    }
    if _C.has_cuda:
        info |= {
            "cuda_architectures": _C.cuda_architectures(),
            "cuda_runtime": _version_text(_C.cuda_runtime_version()),
            "cuda_driver": _version_text(_C.cuda_driver_version()),
        }
    if problem:
        info["cuda_problem"] = problem
    return info


def _version_text(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"
