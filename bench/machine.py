"""The machine that a benchmark ran on: facts for its header, the machine's own limits, and the peak of extra memory."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import kdejsd
from kdejsd._native import native

BENCH = Path(__file__).resolve().parent
# What the compiler is told for each instruction set. The limit of "amx" is that of its vectors, as float32 has no
# multiply-adds by matrices: products of bfloat16 parts may pass it.
ARCHITECTURES = {"base": "x86-64", "v3": "x86-64-v3", "v4": "x86-64-v4", "amx": "x86-64-v4"}
PACKAGES = ("torch", "triton", "numpy", "scipy", "scikit-learn", "KDEpy", "pykeops", "torch-kde")
PACKAGES += ("flash-sinkhorn", "flash-sd-kde")
SOURCES = ("kdejsd", "csrc", "CMakeLists.txt", "bench/*.py", "bench/*.cpp")
MIB = 2.0**20


# ----------------------------------------------------------------------------------------------------------------------
# Facts


def facts(device: str) -> dict[str, str]:
    """Machine, versions and commit, in the order in which they are printed."""
    info = kdejsd.build_info()
    found = {"machine": cpu_model(), "threads": str(torch.get_num_threads())}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["machine"] = f"{properties.name}, {properties.multi_processor_count} multiprocessors; {found['machine']}"
        found["cuda"] = (
            f"torch {torch.version.cuda}, kdejsd {info.get('cuda_runtime')}, driver {info.get('cuda_driver')}"
        )
        found["kdejsd built for"] = str(info.get("cuda_architectures"))
        if tuning := getattr(native(), "cuda_tuning", dict)():
            found["tuning"] = ", ".join(f"{name}={value}" for name, value in tuning.items())
    else:
        found["kdejsd level"] = f"{info.get('cpu_level')} of {info.get('cpu_levels_built')}"
    versions = [f"kdejsd {kdejsd.__version__} ({info.get('compiler')})", f"python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    found["versions"] = ", ".join(versions)
    found["commit"] = commit()
    found["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    level = os.environ.get("KDEJSD_CPU_LEVEL")
    found["command"] = (f"KDEJSD_CPU_LEVEL={level} " if level else "") + shlex.join(["python", *sys.argv])
    return found


def cpu_model() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    capability = torch.backends.cpu.get_cpu_capability()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {capability}, {platform.system()} {platform.machine()}"


def commit() -> str:
    """The short commit, with "dirty" if what the benchmark depends on differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(BENCH.parent), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" dirty" if git("status", "--porcelain", "--", *SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ----------------------------------------------------------------------------------------------------------------------
# Limits


@dataclass(frozen=True)
class Peaks:
    """Holds what the machine does at most in a second, all cores together, and where that is from."""

    multiply_adds: float
    exponentials: float
    bytes: float
    source: str
    one_unit: bool  # multiply-adds and exponentials compete for the same units, as on a CPU
    float16: float = 0.0  # multiply-adds of float16 numbers on a GPU's tensor cores; 0 where they are no option

    def limit_ms(self, n: int, m: int, dim: int, itemsize: int, gradient: bool) -> float:
        """The least time for log p_e at n queries among m centers of dimension l, and its query gradient if wanted.

        n m l multiply-adds for the distances, as many for the weighted mean, n m exponentials; every input read once
        and every result written once.
        """
        products = n * m * dim * (2 if gradient else 1) / self.multiply_adds
        exponentials = n * m / self.exponentials
        transfers = itemsize * (m * dim + n * dim * (2 if gradient else 1) + n) / self.bytes
        work = products + exponentials if self.one_unit else max(products, exponentials)
        return 1e3 * max(work, transfers)

    def on_tensor_cores(self, products: int) -> Peaks:
        """Returns the rates where a multiply-add is so many products in float16: 3 of numbers in two parts, or 1."""
        return dataclasses.replace(self, multiply_adds=self.float16 / products)

    def or_higher(self, other: Peaks) -> Peaks:
        """The higher of each peak: a disturbed measurement is too low, never too high."""
        higher = {
            name: max(getattr(self, name), getattr(other, name)) for name in ("multiply_adds", "exponentials", "bytes")
        }
        return dataclasses.replace(self, **higher)

    def __str__(self) -> str:
        return (
            f"{2e-9 * self.multiply_adds:.0f} GFLOP/s, {1e-9 * self.exponentials:.1f} G exp/s, "
            f"{1e-9 * self.bytes:.0f} GB/s ({self.source})"
        )


def cpu_peaks(level: str, dtype: torch.dtype, given: tuple[float, float] | None) -> Peaks:
    """Peaks of one instruction set, by micro-kernels that the system's compiler builds now.

    Args:
        level: "base", "v3", "v4" or "amx", as the compiled module names them.
        dtype: torch.float32 or torch.float64.
        given: GFLOP/s and G exp/s to take instead of measuring.

    Raises:
        RuntimeError: there is no compiler that can build them, and nothing was given.
    """
    if given is not None:
        return Peaks(given[0] * 1e9 / 2, given[1] * 1e9, math.inf, "given by flags", one_unit=True)
    folder = _peaks_program(level, "double" if dtype == torch.float64 else "float")
    command = [f"{folder.name}/peaks", str(torch.get_num_threads())]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    multiply_adds, exponentials, read = map(float, printed.split())
    return Peaks(multiply_adds, exponentials, read, f"measured, {level}", one_unit=True)


@functools.cache
def _peaks_program(level: str, real: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    architecture = ARCHITECTURES[level] if platform.machine() in ("x86_64", "AMD64") else "native"
    flags = f"-std=c++17 -O3 -march={architecture} -fno-math-errno -fno-trapping-math -ffp-contract=fast -pthread"
    command = ["g++", *flags.split(), f"-DREAL={real}", str(BENCH / "peaks.cpp"), "-o", f"{folder.name}/peaks"]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        raise RuntimeError(
            f"the limits of {level} could not be measured ({reason}): "
            "install g++, or give them with --fma-gflops and --gexp"
        ) from error
    return folder


def cuda_peaks(dtype: torch.dtype, given: tuple[float, float] | None) -> Peaks:
    """Peaks of the CUDA device outside of its tensor cores, from its datasheet's numbers; the bandwidth by a copy."""
    # No random numbers: torch refuses to make any on the device after a CUDA graph's capture has failed.
    source = torch.arange(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / (1e-3 * _cuda_median_ms(lambda: target.copy_(source)))
    if given is not None:
        return Peaks(given[0] * 1e9 / 2, given[1] * 1e9, copied, "given by flags; copy measured", one_unit=False)
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    # Arithmetic throughput table of the CUDA programming guide: results per clock and multiprocessor.
    single = 64 if capability in ((7, 0), (7, 2), (7, 5), (8, 0)) else 128
    double = 64 if capability in ((8, 0), (9, 0), (10, 0)) else 32 if capability in ((7, 0), (7, 2)) else 2
    lanes = double if dtype == torch.float64 else single
    clock = _max_clock_hz()
    cores = properties.multi_processor_count
    note = f"{cores} multiprocessors x {lanes} multiply-adds or 16 exp2 x {clock / 1e9:.2f} GHz; copy measured"
    exponentials = cores * 16 * clock if dtype == torch.float32 else cores * lanes * clock / 13  # by a polynomial
    return Peaks(cores * lanes * clock, exponentials, copied, note, one_unit=dtype == torch.float64)


def cuda_products() -> dict[str, float]:
    """Multiply-adds a second that torch's own matrix product reaches here, in float32 and in float16."""
    reached = {}
    for dtype in (torch.float32, torch.float16):
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        reached[str(dtype).removeprefix("torch.")] = 8192**3 / (
            1e-3 * _cuda_median_ms(functools.partial(torch.mm, a, b))
        )
    return reached


def _max_clock_hz() -> float:
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    return 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def _cuda_median_ms(call: Callable[[], object], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[repeats // 2]


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def available_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 1024.0 * _proc("/proc/meminfo", "MemAvailable")


class OthersLoad:
    """Cores that other processes kept busy since this was made; NaN where the system does not tell (Linux does)."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def cores(self) -> float:
        wall, busy, own = (now - then for now, then in zip(self._seconds(), self._start, strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        busy = math.nan
        with contextlib.suppress(OSError):
            user, nice, system, _idle, _wait, irq, softirq, steal = map(
                float, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
            )
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, own.user + own.system + own.children_user + own.children_system


class PeakMemory:
    """The peak of memory beyond what was held when it began, in MiB; NaN where the system does not tell.

    CUDA: torch's allocator. CPU (Linux): the process's resident set, whose high-water mark is reset first and read
    after. Freed memory is given back to the system before, so that its reuse counts too; what libraries keep from
    earlier calls (packing buffers, thread stacks) does not.
    """

    mib = math.nan


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[PeakMemory]:
    peak = PeakMemory()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        torch.cuda.synchronize()
        peak.mib = (torch.cuda.max_memory_allocated() - before) / MIB
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        yield peak
        return
    held = _proc("/proc/self/status", "VmRSS")
    yield peak
    peak.mib = max(0.0, _proc("/proc/self/status", "VmHWM") - held) / 1024


def _proc(file: str, key: str) -> float:
    """A figure in KiB; infinite where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return float(line.split()[1])
    return math.inf
