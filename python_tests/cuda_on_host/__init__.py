"""The CUDA sources, compiled as plain C++ and run on the host, thread by thread, in the place of the CPU kernels.

`cuda_runtime.h` beside this is the stand-in for the device; nothing in csrc/cuda knows of it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
OPS = ("kde", "omega", "radius", "nearest")
NONE, SPLIT, REDUCED = range(3)  # KdeProducts
SHARED_BYTES = 227 * 1024  # that a block may have, on an H200

# What forward_plan of calls.cpp writes.
_PLAN = (
    *("tensor_steps", "tensor_m_tiles", "tensor_warps", "bytes", "lc", "slabs", "groups", "chunks", "query_tiles"),
    *("center_tiles", "splits", "tiles_per_split", "max", "sum", "moment", "sum_centers", "middle", "elements"),
)

_TYPES = {"i": ctypes.c_int, "q": ctypes.c_int64, "d": ctypes.c_double, "?": ctypes.c_bool, "P": ctypes.c_void_p}


def _struct(name: str, fields: str, first: type | None = None) -> type[ctypes.Structure]:
    """A struct of csrc/kernels.h, by the types of its members; `first` is one that is a struct itself."""
    types = ([first] if first else []) + [_TYPES[field] for field in fields]
    return type(name, (ctypes.Structure,), {"_fields_": [(f"field_{i}", type_) for i, type_ in enumerate(types)]})


KdeMixture = _struct("KdeMixture", "iqqqqPPPPP?qqqqqd")
KdeForward = _struct("KdeForward", "idiPPPP", KdeMixture)
KdeBackward = _struct("KdeBackward", "PPPPP", KdeMixture)


def missing() -> str:
    """Says why the sources cannot be compiled here; "" if they can."""
    if shutil.which("g++") is None:
        return "there is no g++ to compile the CUDA sources with"
    if not SOURCES.is_dir():
        return f"the sources are not in {SOURCES}"
    return ""


def build(folder: Path) -> ctypes.CDLL:
    library = folder / "cuda_on_host.so"
    flags = "-std=c++17 -O2 -fPIC -shared -ffp-contract=off -U_FORTIFY_SOURCE -DKDEJSD_CUDA"
    compilers = []
    units = (source for source in SOURCES.glob("cuda/*.cu") if source.stem != "device")
    for source in (*units, HERE / "calls.cpp"):
        command = ["g++", *flags.split(), "-c", f"-I{HERE}", f"-I{SOURCES}", "-x", "c++", str(source)]
        compilers.append(subprocess.Popen([*command, "-o", str(folder / f"{source.stem}.o")]))
    assert all(compiler.wait() == 0 for compiler in compilers)
    objects = sorted(map(str, folder.glob("*.o")))
    subprocess.run(["g++", "-shared", *objects, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class CudaOnHost:
    """Takes the place of the compiled module: what goes to the CPU's kernels goes to those of CUDA.

    Attributes:
        multiprocessors: of the device that is played: few make long loops, many make splits and merges.
        shared_bytes: that its blocks may have.
        reduced: whether reduced precision is allowed; the package asks torch only for a device that is there.
        backwards: whether a block's threads, where they do not wait for each other, run from the last to the first.
    """

    KdeMixture = KdeMixture
    OmegaAll = _struct("OmegaAll", "iqqqPPPPPPPP")
    OmegaHalves = _struct("OmegaHalves", "iqqqPPPPP")
    Radius = _struct("Radius", "i?qqPPP")
    NearestSearch = _struct("NearestSearch", "iqqqPPP")

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.multiprocessors = 132
        self.shared_bytes = SHARED_BYTES
        self.reduced = False
        self.backwards = False

    def devices_set(self) -> int:
        """How often the kernels' code has changed the current device, since the library was loaded."""
        return int(self._library.devices_set())

    def allowances(self) -> int:
        """How often it has asked for more shared memory than every kernel may have."""
        return int(self._library.allowances())

    def set_tuning(self, name: str, value: int) -> bool:
        return bool(self._library.set_tuning(name.encode(), value))

    def forward_plan(self, args: KdeForward, multiprocessors: int, shared_bytes: int) -> dict[str, int]:
        """How csrc/cuda/kde_plan.h cuts a forward pass into blocks; `bytes` are the shared memory of one."""
        numbers = (ctypes.c_int64 * len(_PLAN))()
        self._library.forward_plan(ctypes.byref(args), multiprocessors, shared_bytes, numbers)
        return dict(zip(_PLAN, numbers, strict=True))

    def __getattr__(self, name: str) -> Callable[..., None]:
        """The function NAME_cpu of the compiled module."""
        function = getattr(self._library, name.removesuffix("_cpu"))
        function.restype = ctypes.c_char_p
        struct = {"kde_forward_cpu": KdeForward, "kde_backward_cpu": KdeBackward}.get(name)

        def call(*arguments: Any) -> None:
            *arguments, _threads = arguments
            if name == "kde_forward_cpu" and self.reduced and arguments[3] == SPLIT:
                arguments[3] = REDUCED
            args = struct(*arguments) if struct else arguments[0]
            self._library.set_device(self.multiprocessors, self.shared_bytes, self.backwards)
            if error := function(ctypes.byref(args)):
                raise RuntimeError(error.decode())

        return call
