"""The compiled module: what it says of itself, what happens without it, and what importing the package leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import points

import kdejsd
from kdejsd._native import cuda_problem, native


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python in a new process, where modules are found as they are here."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeed(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What it says of itself


def test_build_info():
    info = kdejsd.build_info()
    expected = {
        "version": str,
        "torch": str,
        "compiled": bool,
        "compiler": str,
        "cpu_level": str,
        "cpu_levels_built": str,
        "openmp": bool,
        "threads": int,
        "cuda_built": bool,
        "cuda_usable": bool,
    }
    if info["cuda_built"]:
        expected |= {"cuda_architectures": str, "cuda_runtime": str, "cuda_driver": str}
    if not info["cuda_usable"]:
        expected |= {"cuda_problem": str}
    assert info.keys() == expected.keys()
    assert all(isinstance(info[key], kind) for key, kind in expected.items())
    assert info["version"] == kdejsd.__version__ and info["torch"] == torch.__version__
    assert info["compiled"] and info["cpu_level"] in str(info["cpu_levels_built"]).split(",")
    assert "base" in str(info["cpu_levels_built"]).split(",")
    assert info["cuda_usable"] == (not cuda_problem())
    assert all(value != "" for value in info.values())


def test_threads_are_torchs():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert kdejsd.build_info()["threads"] == 3
    finally:
        torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------------------
# Instruction sets


def test_the_level_can_be_forced():
    code = """
import torch, kdejsd
query, centers = torch.linspace(-1, 1, 60).reshape(20, 3), torch.linspace(-2, 1, 99).reshape(33, 3)
value = kdejsd.kde_log_prob(query, centers, 0.5)
torch.testing.assert_close(value, kdejsd.reference.kde_log_prob(query, centers, 0.5))
print(kdejsd.build_info()["cpu_level"])
"""
    assert succeed("import kdejsd.reference" + code, KDEJSD_CPU_LEVEL="base").strip() == "base"


def test_an_unknown_level_is_an_error():
    done = run("import kdejsd", KDEJSD_CPU_LEVEL="v17")
    assert done.returncode != 0
    message = f"RuntimeError: KDEJSD_CPU_LEVEL must be one of {native().built_levels()} that this processor can run"
    assert message in done.stderr and "got 'v17'" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Without it

MISSING = "import sys; sys.modules['kdejsd._C'] = None\n"
OTHER_VERSION = """
import sys, types
sys.modules['kdejsd._C'] = types.ModuleType('kdejsd._C')
sys.modules['kdejsd._C'].version = '0.0.9'
"""


@pytest.mark.parametrize(
    ("prelude", "problem"),
    [
        (MISSING, "it could not be imported: "),
        (OTHER_VERSION, f"it is of version 0.0.9, the Python files are of {kdejsd.__version__}"),
    ],
    ids=["missing", "other version"],
)
def test_without_the_compiled_module(prelude, problem):
    """Importing works and says why, the reference works, and the op tells what to do."""
    code = """
import torch, kdejsd, kdejsd.reference
from kdejsd._native import cuda_problem
info = kdejsd.build_info()
assert sorted(info) == ["compiled", "problem", "torch", "version"] and info["compiled"] is False, info
assert cuda_problem() == info["problem"]
query, centers = torch.zeros(4, 2), torch.ones(5, 2)
assert kdejsd.reference.kde_log_prob(query, centers, 0.5).isfinite().all()
for call in (kdejsd.kde_log_prob, kdejsd.jsd_loss):
    for gradient in (False, True):
        try:
            call(query.requires_grad_(gradient), centers, 0.5)
        except RuntimeError as error:
            print(error)
print(info["problem"])
"""
    *errors, said = succeed(prelude + code).splitlines()
    assert said.startswith(problem)
    assert len(errors) == 4
    for error in errors:
        assert error.startswith(f"the compiled module of kdejsd cannot be used: {said}. ")
        assert "pip install" in error and "kdejsd.reference" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch has no CUDA device to put a tensor on")
@pytest.mark.skipif(native().has_cuda, reason="this build has CUDA")
def test_a_cuda_tensor_needs_a_cuda_build():
    query = torch.zeros(4, 2, device="cuda")
    with pytest.raises(RuntimeError, match=r"query is on cuda:0, but kdejsd was built without CUDA.*KDEJSD_CUDA=ON"):
        kdejsd.kde_log_prob(query, query, 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# What importing the package leaves alone


def test_import_is_light():
    """Nothing of what training needs is imported, and torch's settings and random numbers stay as they were."""
    code = """
import sys, torch
state = torch.get_rng_state()
threads, default = torch.get_num_threads(), torch.get_default_dtype()
import kdejsd
heavy = "lightning pytorch_lightning torchmetrics matplotlib sklearn tensorboard jsonargparse scipy.optimize PIL pytest"
print([name for name in heavy.split() if name in sys.modules])
assert torch.equal(torch.get_rng_state(), state)
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, default)
"""
    assert succeed(code).strip() == "[]"


def test_subnormal_numbers_stay():
    """A library built with -ffast-math would switch them off for the whole process, on its threads too."""
    tiny = torch.full((100_000,), 1e-40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        kdejsd.kde_log_prob(points(400, 3), points(400, 3, seed=1), 0.5)
        assert ((tiny * 1) != 0).all()
    finally:
        torch.set_num_threads(before)
    assert float("1e-310") * 1.0 != 0
    assert (torch.tensor(1e-310, dtype=torch.float64) * 1 != 0).all()
