"""Answers what gpu_suite.sh asks: what is here, whether a module that was brought along fits, which files are tested.

    gpu_suite_tools.py environment              the machine, its tools and its Python packages
    gpu_suite_tools.py lacking build|run|tests|density      packages that are missing or too old for it, a line each
    gpu_suite_tools.py sources                  a hash of what the compiled module is built from
    gpu_suite_tools.py seal FOLDER ARCHITECTURES SOURCES    writes beside a module what it was built from and for
    gpu_suite_tools.py refusal FOLDER CAPABILITY            why the module there is not to be used, or nothing
    gpu_suite_tools.py module DEVICE            what `import kdejsd` finds; fails if that is of no use on the device
    gpu_suite_tools.py tests                    the test files that have tests for a CUDA device

Needs no package but for `module`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEAL = "prebuilt.json"

# The versions of pyproject.toml and CMakeLists.txt.
NEEDED = {
    "build": {"pybind11": "3.0", "scikit-build-core": "0.11", "cmake": "3.24"},
    "run": {"torch": "2.6", "numpy": "1", "scipy": "1"},
    "tests": {"pytest": "8", "hypothesis": "6.100"},
    "density": {"scikit-learn": "1.6"},
}
PACKAGES = (
    *("torch", "triton", "numpy", "scipy", "pytest", "pytest-xdist", "hypothesis", "pybind11", "scikit-build-core"),
    *("scikit-learn", "lightning", "jsonargparse", "pykeops", "torch-kde", "flash-sinkhorn", "flash-sd-kde"),
)


# ----------------------------------------------------------------------------------------------------------------------
# What is here


def said(*command: str) -> str:
    """Returns what a command prints; empty if it is not there or fails."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def version(package: str) -> str:
    """Of a package, or of the program cmake where there is no package of that name; empty if it is not there."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    if package == "cmake" and (found := re.search(r"version ([\d.]+)", said("cmake", "--version"))):
        return found[1]
    return ""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def lacking(purpose: str) -> list[str]:
    problems = []
    for package, least in NEEDED[purpose].items():
        found = version(package)
        if not found or numbers(found) < numbers(least):
            problems.append(f"{package}: {least} or later is needed, {found or 'none'} is here")
    return problems


def environment() -> dict[str, str]:
    query = "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    found = {"gpu": said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader") or "no CUDA device"}
    for tool in ("nvcc", "ncu", "compute-sanitizer", "cmake", "ninja", "c++"):
        lines = said(tool, "--version").splitlines() or ["not found"]
        found[tool] = next((line for line in lines if re.search(r"\d\.\d", line)), lines[0])
    found["commit"] = commit() or "unknown"
    found["sources"] = sources()
    found["python"] = f"{platform.python_version()}, {sys.executable}"
    return found | {package: version(package) or "not installed" for package in PACKAGES}


def commit() -> str:
    return said("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def module(device: str) -> int:
    import torch

    from kdejsd._native import build_info, cuda_problem, native

    facts = build_info() | {"compiled module": str(native().__file__), "torch CUDA": str(torch.version.cuda)}
    facts["torch sees"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    for name, value in facts.items():
        print(f"{name:<20}{value}")
    problem = cuda_problem() if device == "cuda" else ""
    print(problem or f"kdejsd is usable on {device}")
    return int(bool(problem))


def test_files() -> list[Path]:
    """Those that name a CUDA device, in whatever way; but for those that run its sources on the host."""
    files = sorted((ROOT / "python_tests").glob("test_*.py"))
    return [f for f in files if "on_host" not in f.name and re.search("cuda|CUDA|DEVICES", f.read_text())]


# ----------------------------------------------------------------------------------------------------------------------
# A compiled module that was built before, perhaps on another machine


def digest(files: list[Path], base: Path) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(base).as_posix()}\0{file.stat().st_size}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def sources() -> str:
    suffixes = (".cpp", ".h", ".cu", ".cuh")
    compiled = sorted(file for file in (ROOT / "csrc").rglob("*") if file.suffix in suffixes)
    return digest([ROOT / "CMakeLists.txt", *compiled], ROOT)


def python_version() -> str:
    """Of the Python files, which the compiled module must share."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "kdejsd/_version.py").read_text())
    return found[1] if found else ""


def seal(folder: Path, architectures: str, built_from: str) -> int:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if (now := sources()) != built_from:
        print(f"the sources changed while the module was built: {built_from} before, {now} after", file=sys.stderr)
        return 1
    compiled = folder / "kdejsd" / f"_C{suffix}"
    (folder / SEAL).write_text(
        json.dumps(
            {
                "suffix": suffix,
                "architectures": sorted({int(number) for number in re.findall(r"\d+", architectures)}),
                "version": python_version(),
                "sources": built_from,
                "module": digest([compiled], folder),
                "commit": commit() or "unknown",
                "nvcc": (said("nvcc", "--version").splitlines() or ["not found"])[-1],
            },
            indent=2,
        )
        + "\n"
    )
    return 0


def refusal(folder: Path, capability: str) -> str:
    """Why the module of a folder is not to be used with these sources, this Python and this device; empty if it is."""
    if not (folder / SEAL).is_file():
        return f"there is none in {folder}"
    sealed = json.loads((folder / SEAL).read_text())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if sealed["suffix"] != suffix:
        return f"it is for {sealed['suffix']}, this Python takes {suffix}"
    if capability and int(capability.replace(".", "")) not in sealed["architectures"]:
        architectures = ", ".join(f"sm_{number}" for number in sealed["architectures"])
        return f"it is for {architectures}, the device is of compute capability {capability}"
    if sealed["version"] != python_version():
        return f"it is of version {sealed['version']}, the Python files are of {python_version()}"
    if sealed["sources"] != (now := sources()):
        return f"it was built from other sources: {sealed['sources']}, these are {now}"
    compiled = folder / "kdejsd" / f"_C{suffix}"
    if not compiled.is_file() or digest([compiled], folder) != sealed["module"]:
        return f"{compiled} is not the file that was built"
    return ""


# ----------------------------------------------------------------------------------------------------------------------


def main(command: str, *arguments: str) -> int:
    if command == "environment":
        for name, value in environment().items():
            print(f"{name:<20}{value}")
    elif command == "lacking":
        print("\n".join(lacking(*arguments)))
    elif command == "sources":
        print(sources())
    elif command == "seal":
        folder, architectures, built_from = arguments
        return seal(Path(folder), architectures, built_from)
    elif command == "refusal":
        folder, capability = arguments
        print(refusal(Path(folder), capability))
    elif command == "module":
        return module(*arguments)
    elif command == "tests":
        print("\n".join(map(str, test_files())))
    else:
        print(f"no such command: {command}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
