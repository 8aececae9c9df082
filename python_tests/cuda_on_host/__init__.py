"""The CUDA sources, compiled as plain C++ and run on the host, thread by thread, in the place of the CPU kernels.

`cuda_runtime.h` beside this is the stand-in for the device; nothing in csrc/cuda knows of it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kdejsd._native import native

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
OPS = ("kde", "omega", "radius", "nearest")
SHARED_BYTES = 227 * 1024  # that a block may have, on an H200

_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "bool": ctypes.c_bool, "void*": ctypes.c_void_p}


class _Arguments(ctypes.Structure):
    """Takes what the compiled module's struct of this name takes."""

    def __init__(self, **values: Any) -> None:
        kinds = {name: kind for name, kind, _ in getattr(native(), type(self).__name__).fields}
        assert values.keys() == kinds.keys(), f"{type(self).__name__} has the members {list(kinds)}, got {list(values)}"
        enums = {name: getattr(native(), kinds[name])[v] for name, v in values.items() if isinstance(v, str)}
        super().__init__(**values | enums)


@functools.cache
def struct(name: str) -> type[ctypes.Structure]:
    """A struct of csrc/kernels.h, from the compiled module's description: ctypes lays it out by itself."""

    def ctype(kind: str) -> type:
        if kind in _TYPES:
            return _TYPES[kind]
        return ctypes.c_int if isinstance(getattr(native(), kind), dict) else struct(kind)

    fields = [(field, ctype(kind)) for field, kind, _ in getattr(native(), name).fields]
    return type(name, (_Arguments,), {"_fields_": fields})


class _Number(ctypes.Structure):
    """Of a plan, as calls.cpp gives it."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


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
    built = ctypes.CDLL(str(library))
    built.forward_plan.restype = ctypes.POINTER(_Number)
    return built


class CudaOnHost:
    """Takes the place of the compiled module: what goes to the CPU's kernels goes to those of CUDA.

    Attributes:
        multiprocessors: of the device that is played: few make long loops, many make splits and merges.
        shared_bytes: that its blocks may have.
        reduced: whether reduced precision is allowed; the package asks torch only for a device that is there.
        backwards: whether a block's threads, where they do not wait for each other, run from the last to the first.
    """

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

    def forward_plan(self, args: ctypes.Structure, multiprocessors: int, shared_bytes: int) -> dict[str, int]:
        """How csrc/cuda/kde_plan.h cuts a forward pass into blocks; `bytes` are the shared memory of one."""
        numbers = self._library.forward_plan(ctypes.byref(args), multiprocessors, shared_bytes)
        return {number.name.decode(): number.value for number in itertools.takewhile(lambda n: n.name, numbers)}

    def __getattr__(self, name: str) -> Any:
        """A struct of the compiled module, or its function NAME_cpu."""
        if not name.endswith("_cpu"):
            return struct(name)
        function = getattr(self._library, name.removesuffix("_cpu"))
        function.restype = ctypes.c_char_p

        def call(args: ctypes.Structure, _threads: int) -> None:
            products = native().KdeProducts
            if name == "kde_forward_cpu" and self.reduced and args.products == products["kSplit"]:
                args.products = products["kReduced"]
            self._library.set_device(self.multiprocessors, self.shared_bytes, self.backwards)
            if error := function(ctypes.byref(args)):
                raise RuntimeError(error.decode())

        return call
