"""The compiled module: what it says of itself, what happens without it, and what importing the package leaves alone."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
import types
from typing import get_args

import pytest
import torch
from cuda_on_host import struct
from helpers import points

import kdejsd
from kdejsd import _native
from kdejsd._native import cuda_problem, native
from kdejsd.ops import _common
from kdejsd.ops import kde as kde_op


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
    done = run("import kdejsd; kdejsd.build_info", KDEJSD_CPU_LEVEL="v17")
    assert done.returncode != 0
    message = f"RuntimeError: KDEJSD_CPU_LEVEL must be one of {native().built_levels()} that this processor can run"
    assert message in done.stderr and "got 'v17'" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The structs that kernels take


def structs() -> list[str]:
    return [name for name, value in vars(native()).items() if hasattr(value, "fields")]


def test_there_is_a_struct_for_each_op():
    assert set(structs()) == {
        *("KdeMixture", "KdeForward", "KdeBackward", "OmegaAll", "OmegaHalves", "Radius", "NearestSearch")
    }


@pytest.mark.parametrize("name", structs())
def test_the_description_of_a_struct_covers_it(name):
    """Laid out by what is described and by nothing else, a struct of C has its members where C++ has them, and no byte
    more or less."""
    described, laid_out = getattr(native(), name), struct(name)
    assert {field: getattr(laid_out, field).offset for field, _ in laid_out._fields_} == {
        field: offset for field, _, offset in described.fields
    }
    assert ctypes.sizeof(laid_out) == described.size


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("DType", _common.KERNEL_DTYPE.values()),
        ("KdeValue", get_args(kde_op.KdeValue)),
        ("KdeProducts", get_args(kde_op.KdeProducts)),
    ],
)
def test_the_names_of_an_enum(name, known):
    """The package, which does without the module at import, has the same ones."""
    assert getattr(native(), name) == {text: number for number, text in enumerate(known)}


RADIUS = {"dtype": "kFloat32", "is_log": False, "rows": 1, "classes": 2, "masses": 0, "value": 0, "dmasses": 0}


def test_arguments_may_come_in_any_order():
    native().radius_cpu(native().Radius(**dict(reversed(RADIUS.items())) | {"rows": 0}), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": ...}, "Radius needs rows as well"),
        ({"rows": ..., "value": ...}, "Radius needs rows, value as well"),
        ({"row": 1}, "Radius has no member 'row'"),
        ({"rows": ..., "row": 1}, "Radius has no member 'row'"),
        ({"rows": 1.0}, "Radius: rows must be a value of int64_t, got 1.0"),
        ({"rows": 2**63}, f"Radius: rows must be a value of int64_t, got {2**63}"),
        ({"is_log": 1}, "Radius: is_log must be a value of bool, got 1"),
        ({"masses": None}, "Radius: masses must be a value of void*, got None"),
        ({"masses": 2**64}, f"Radius: masses must be a value of void*, got {2**64}"),
        ({"dtype": "float32"}, "Radius: dtype must be a value of DType, got 'float32'"),
        ({"dtype": 0}, "Radius: dtype must be a value of DType, got 0"),
    ],
)
def test_arguments_that_are_not_those_of_the_struct(change, message):
    with pytest.raises(TypeError) as raised:
        native().Radius(**{k: v for k, v in (RADIUS | change).items() if v is not ...})
    assert str(raised.value) == message


def test_other_wrong_arguments():
    radius = native().Radius(**RADIUS)
    with pytest.raises(TypeError, match=r"^Radius takes named arguments, got 2 without a name$"):
        native().Radius("kFloat32", False, rows=1)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'rows'"):
        native().Radius(rows=1, **RADIUS)
    with pytest.raises(TypeError, match=r"^KdeForward: mixture must be a value of KdeMixture, got <.*Radius object"):
        native().KdeForward(mixture=radius)
    with pytest.raises(TypeError, match=r"^KdeForward: target_variance must be a value of double, got '1'"):
        native().KdeForward(target_variance="1")
    with pytest.raises(TypeError, match=r"^the arguments must be of type OmegaAll, got kdejsd\._C\.Radius$"):
        native().omega_all_cpu(radius, 1)
    with pytest.raises(TypeError, match="cannot create"):
        native().Radius.__call__(**RADIUS)


def test_structs_are_given_back():
    """A struct that is made, or refused, leaves no reference behind."""
    before = sys.getrefcount(native().Radius)
    for _ in range(100):
        native().Radius(**RADIUS)
        with contextlib.suppress(TypeError):
            native().Radius(rows=1)
    assert sys.getrefcount(native().Radius) < before + 10  # the interpreter may keep one


# ----------------------------------------------------------------------------------------------------------------------
# CUDA, played by modules that are not compiled


def test_cuda_is_looked_for_until_it_is_found(monkeypatch):
    """A failure may pass, and is told each time; what was usable is not asked about at every call."""
    asked = []
    found = [(0, "no driver"), (0, "no device"), (1, "")]

    class Module:
        has_cuda = True

        @staticmethod
        def cuda_device_count():
            asked.append("devices")
            return found[min(len(asked), len(found)) - 1]

    monkeypatch.setattr(_native, "_C", Module)
    monkeypatch.setattr(_native, "_cuda_usable", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("torch") or True)
    assert cuda_problem() == "no CUDA device can be used: no driver"
    assert cuda_problem() == "no CUDA device can be used: no device"
    assert [cuda_problem() for _ in range(4)] == [""] * 4
    assert asked == ["devices", "devices", "devices", "torch"]


class Recorder:
    """Plays the compiled module, the guard and the allocator, and writes down who is called when."""

    def __init__(self, monkeypatch, fails_at=""):
        self.log = []
        self.fails_at = fails_at
        monkeypatch.setattr(_common._torch, "on_device", self.on_device)
        monkeypatch.setattr(_common._torch, "cuda_stream", lambda index: 1000 + index)
        monkeypatch.setattr(_common.torch, "empty", self.empty)

    @contextlib.contextmanager
    def on_device(self, index):
        self.log.append(f"enter {index}")
        try:
            yield
        finally:
            self.log.append(f"leave {index}")

    def empty(self, size, dtype, device):
        self.log.append(f"{size} bytes on {device}")
        assert dtype == torch.uint8
        return types.SimpleNamespace(data_ptr=lambda: 77)

    def __getattr__(self, name):
        def call(*arguments):
            self.log.append((name, *arguments))
            if name == self.fails_at:
                raise RuntimeError("launch failed")
            return 512

        return call


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Their device is the current one from before the workspace is asked for, and the caller's is again afterwards."""
    module = Recorder(monkeypatch)
    _common.launch(module, "op", torch.device("cuda", 3), "args")
    assert module.log == [
        "enter 3",
        ("op_workspace_cuda", "args", 3),
        "512 bytes on cuda:3",
        ("op_cuda", "args", 77, 3, 1003),
        "leave 3",
    ]


@pytest.mark.parametrize("fails_at", ["op_workspace_cuda", "op_cuda"])
def test_the_device_is_given_back_after_an_error(fails_at, monkeypatch):
    module = Recorder(monkeypatch, fails_at)
    with pytest.raises(RuntimeError, match="launch failed"):
        _common.launch(module, "op", torch.device("cuda", 3), "args")
    assert module.log[0] == "enter 3" and module.log[-1] == "leave 3"


def test_no_guard_on_the_cpu(monkeypatch):
    module = Recorder(monkeypatch)
    _common.launch(module, "op", torch.device("cpu"), "args")
    assert module.log == [("op_cpu", "args", torch.get_num_threads())]


def test_every_op_is_launched_there(monkeypatch):
    launched, real = [], _common.launch

    def launch(module, name, device, args):
        assert module is native() and device == torch.device("cpu")
        assert not native().has_cuda or (
            hasattr(native(), f"{name}_cuda") and hasattr(native(), f"{name}_workspace_cuda")
        )
        launched.append(name)
        real(module, name, device, args)

    monkeypatch.setattr(_common, "launch", launch)
    z, labels = points(4, 2), torch.tensor([0, 0, 1, 1])
    kdejsd.kde_log_prob(z, points(5, 2).requires_grad_(), 0.5).sum().backward()
    kdejsd.jsd_loss(z, z, 0.5)
    kdejsd.omega(z, z)
    for reduction in ("sum", "max", "none"):
        kdejsd.omega(z, z, pairs="all", reduction=reduction)
    kdejsd.class_radius_bound(z.softmax(-1))
    kdejsd.nearest_other_class(z, labels)
    assert launched == [
        "kde_forward",
        "kde_backward",
        "kde_forward",
        "omega_halves",
        *["omega_all"] * 3,
        "radius",
        "nearest",
    ]


class Tunable:
    """A module with two cut-offs."""

    has_cuda = True

    def __init__(self):
        self.values = {"tensor_from": 1, "splits": 0}

    def cuda_tuning_ranges(self):
        return {"tensor_from": (1, 257), "splits": (0, 64)}

    def set_cuda_tuning(self, name: str, value: int):
        self.values[name] = value


@pytest.mark.parametrize(
    ("environment", "values"),
    [
        ({}, {"tensor_from": 1, "splits": 0}),
        ({"KDEJSD_CUDA_TENSOR_FROM": "257"}, {"tensor_from": 257, "splits": 0}),
        ({"KDEJSD_CUDA_TENSOR_FROM": "1", "KDEJSD_CUDA_SPLITS": "64"}, {"tensor_from": 1, "splits": 64}),
        ({"KDEJSD_CUDA": "ON", "KDEJSD_CUDA_SPLITS": ""}, {"tensor_from": 1, "splits": 0}),
    ],
)
def test_cuda_can_be_tuned_by_the_environment(environment, values, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    module = Tunable()
    _native._apply_environment(module)
    assert module.values == values


@pytest.mark.parametrize("text", ["x", "0", "258", "-1", "1.5", "1e2", "9" * 30])
def test_other_cut_offs_are_errors(text, monkeypatch):
    monkeypatch.setenv("KDEJSD_CUDA_TENSOR_FROM", text)
    with pytest.raises(RuntimeError) as raised:
        _native._apply_environment(Tunable())
    assert str(raised.value) == f"KDEJSD_CUDA_TENSOR_FROM must be a whole number from 1 to 257, got {text!r}"


def test_without_cuda_there_are_no_cut_offs(monkeypatch):
    monkeypatch.setenv("KDEJSD_CUDA_TENSOR_FROM", "x")
    _native._apply_environment(types.SimpleNamespace(has_cuda=False))


def test_cut_offs_are_read_at_import():
    code = """
import sys, types
sys.modules["kdejsd._C"] = module = types.ModuleType("kdejsd._C")
module.version, module.has_cuda = %r, True
module.cuda_tuning_ranges = lambda: {"splits": (0, 64)}
module.set_cuda_tuning, module.use_openmp = print, lambda *addresses: None
import kdejsd._native
"""
    assert succeed(code % kdejsd.__version__, KDEJSD_CUDA_SPLITS="8") == "splits 8\n"


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


@pytest.mark.parametrize(
    ("former", "module"),
    [
        ("checkpoints", "runs.checkpoints"),
        ("divergences", "models.f_divergences"),
        ("models.classifier", "models.image_classifier"),
        ("report", "runs.report"),
    ],
)
def test_former_names_of_modules(former, module):
    former, module = f"kdejsd.{former}", f"kdejsd.{module}"
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=f"^{former} is {module} now") as warned:
        found = importlib.import_module(former)
    assert warned[0].filename == __file__ or "importlib" in warned[0].filename
    public = {name: value for name, value in vars(importlib.import_module(module)).items() if name[0] != "_"}
    assert public and public.items() <= vars(found).items()


def test_divergences_need_no_extra():
    code = "import sys; from kdejsd.models import f_divergences; print('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_package_without_the_extra():
    """All names are there, also those that need a package of the extra when they are called."""
    code = """
import sys
for name in ("lightning", "jsonargparse", "matplotlib"):
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "lightning" else found(name, package)
from kdejsd import *
import inspect, kdejsd
assert {name for name, _ in inspect.getmembers(kdejsd)} >= set(kdejsd.__all__) and hasattr(kdejsd, "load")
try:
    kdejsd.load("runs/x")
except ModuleNotFoundError as error:
    print(error)
"""
    done = run(code)
    assert 'pip install "kdejsd[train]"' in done.stdout, done.stderr


def test_the_command_needs_no_torch_for_its_help():
    code = "import sys, kdejsd; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert succeed(code) == "False False\n"


def test_models_without_their_extra():
    """Names are known, and asking for one says which package is missing."""
    code = """
import sys
sys.modules["lightning"] = None
from kdejsd import models
assert "GEN" in dir(models) and not hasattr(models, "nothing") and not hasattr(models, "gen.GEN")
try:
    models.GEN
except ModuleNotFoundError as error:
    print(error)
"""
    assert 'pip install "kdejsd[train]"' in succeed(code)


def test_models_lists_all_its_names():
    models = importlib.import_module("kdejsd.models")
    listed = {name: getattr(models, name) for name in models.__all__}
    found = vars(importlib.import_module("kdejsd.models._all"))
    assert listed.items() <= found.items()
    assert {name for name in found if name[0].isupper()} <= listed.keys()
    with pytest.raises(AttributeError, match=r"^module 'kdejsd\.models' has no attribute 'nothing'$"):
        models.nothing  # noqa: B018
