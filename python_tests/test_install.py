"""What an installed copy must hold: its types, one OpenMP runtime, and CUDA code for the GPUs that are there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import kdejsd
from kdejsd._native import native

ROOT = Path(__file__).parent.parent
reads_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def output(*command: str, **environment: str) -> str:
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# One OpenMP runtime in the process, torch's


@reads_proc
def test_the_module_names_no_runtime_and_uses_torchs():
    """Under whichever file name torch brings it; a machine need not have one of its own."""
    path = native().__file__
    assert path is not None
    with open(path, "rb") as file:
        assert not re.search(rb"lib[gi]?i?omp[-.\w]*\.so", file.read())
    mapped = output(
        sys.executable,
        "-c",
        "import kdejsd, torch; assert kdejsd.build_info()['openmp'];"
        "kdejsd.kde_log_prob(torch.randn(500, 3), torch.randn(5000, 3), 0.5); print(open('/proc/self/maps').read())",
    )
    assert len(set(re.findall(r"/\S*lib(?:g|i)?omp\S*", mapped))) == 1


@reads_proc
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_set_num_threads_is_obeyed(threads):
    """The process has as many threads more, after work for many, as torch was told, whatever OMP_NUM_THREADS says."""
    code = f"""
import os, torch, kdejsd, kdejsd._native
torch.set_num_threads({threads})
query, centers = torch.randn(2000, 8), torch.randn(20_000, 8)
before = len(os.listdir("/proc/self/task"))
teams = kdejsd._native.native().regions()[1]
kdejsd.kde_log_prob(query, centers, 0.5)
print(len(os.listdir("/proc/self/task")) - before, kdejsd._native.native().regions()[1] - teams)
"""
    expected = f"{threads - 1} {int(threads > 1)}"
    assert output(sys.executable, "-c", code, OMP_NUM_THREADS="2").strip() == expected


def test_without_a_runtime_one_thread_computes():
    code = """
import ctypes, torch
class Nothing: pass
real, ctypes.CDLL = ctypes.CDLL, lambda *arguments: Nothing()
import kdejsd, kdejsd.reference
torch.set_num_threads(2)
query, centers = torch.randn(300, 8), torch.randn(4000, 8)
found, expected = (f(query, centers, 0.5) for f in (kdejsd.kde_log_prob, kdejsd.reference.kde_log_prob))
torch.testing.assert_close(found, expected)
print(kdejsd.build_info()["openmp"], kdejsd._native.native().regions())
"""
    assert output(sys.executable, "-c", code).strip() == "False (1, 0)"


# ----------------------------------------------------------------------------------------------------------------------
# Types and names


def test_the_mark_of_types_is_shipped():
    assert resources.files(kdejsd).joinpath("py.typed").is_file()


def test_no_module_of_pythons_own_is_listed():
    assert "pkgutil" not in dir(kdejsd)


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_a_users_program_is_type_checked(tmp_path):
    """And not taken for Any: mypy knows what comes back, and finds the wrong argument."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, kdejsd\n"
        "reveal_type(kdejsd.jsd_loss(torch.zeros(4, 2), torch.zeros(5, 2), 0.5))\n"
        "kdejsd.StandardNormal(dim='two')\n"
    )
    # The package as installed: mypy takes no notice of the folder it is started in.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-incremental", "program.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "program.py:2: note: Revealed type is" in done.stdout and "Tensor" in done.stdout.splitlines()[0], (
        done.stdout
    )
    assert 'program.py:3: error: Argument "dim" to "StandardNormal" has incompatible type "str"' in done.stdout
    assert "Found 1 error" in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What CUDA code is compiled for


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are elsewhere")
@pytest.mark.parametrize(
    ("capabilities", "architectures"),
    [
        ("8.6", "86"),
        ("9.0\n8.6\n9.0", "86-real;90"),
        ("10.0", "100"),
        ("12.0\n9.0\n10.0", "90-real;100-real;120"),
        ("No devices were found", "80-real;90"),
        ("[N/A]", "80-real;90"),
        ("7.5", "80-real;90"),  # too old for the kernels
        ("9.0\n13.7", "80-real;90"),  # newer than nvcc: it compiles the PTX when it loads
        (None, "80-real;90"),  # no driver
    ],
)
def test_cuda_is_compiled_for_the_gpus_that_are_there(tmp_path, capabilities, architectures):
    def program(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        path.chmod(0o755)
        return path

    nvcc = program("nvcc", "\n".join(f"compute_{a}" for a in (75, 80, 86, 89, 90, 100, 120)))
    if capabilities is None:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    else:
        program("nvidia-smi", capabilities)
    script = tmp_path / "ask.cmake"
    script.write_text(
        f"cmake_minimum_required(VERSION 3.24)\ninclude({ROOT}/csrc/cuda/architectures.cmake)\n"
        f'kdejsd_cuda_architectures({nvcc} found why)\nmessage(STATUS "${{found}}")\n'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert output("cmake", "-P", str(script), PATH=path, CUDA_VISIBLE_DEVICES="").strip() == f"-- {architectures}"
