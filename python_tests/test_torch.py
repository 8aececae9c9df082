"""The private names of torch that the ops use: each still exists and does what the ops take it to do."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import DEVICES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdejsd import _torch

TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda u: f(u).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "grad of vmap": lambda f, x: torch.func.grad(lambda u: torch.func.vmap(f)(u).sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_active(name):
    seen = []

    def function(x):
        seen.append(_torch.transforms_active())
        return x * 2

    assert not _torch.transforms_active()
    TRANSFORMS[name](function, torch.ones(3))
    assert seen == [True]
    assert not _torch.transforms_active()


def test_transforms_are_over_after_an_error():
    with pytest.raises(ZeroDivisionError):
        torch.func.vmap(lambda x: x * (1 // 0))(torch.ones(3))
    assert not _torch.transforms_active()


def test_plain_autograd_is_no_transform():
    x = torch.ones(3, requires_grad=True)
    seen = []
    y = x * 2
    y.register_hook(lambda grad: seen.append((_torch.transforms_active(), _torch.is_plain((grad, x)))))
    y.sum().backward()
    with torch.inference_mode(), torch.no_grad():
        seen.append((_torch.transforms_active(), _torch.is_plain((x * 2,))))
    assert seen == [(False, True), (False, True)]


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassingFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3), torch.nn.Parameter(torch.ones(3)), 0.5, None),
        (torch.inference_mode()(torch.ones)(3),),
        (torch.ones(2, 3).mT[::2],),
        (torch.nn.Linear(1, 1).weight.detach(),),
        (),
    ],
)
@pytest.mark.parametrize(
    "mode",
    [
        nullcontext,
        torch.no_grad,
        torch.inference_mode,
        torch.profiler.profile,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("cpu"),  # torch.set_default_device
        torch.autograd.detect_anomaly,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_plain(mode, arguments):
    with mode():
        assert _torch.is_plain(arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.as_subclass(Subclass),
        torch._neg_view,
        lambda x: torch.complex(x, x).conj().imag,
        torch.complex,
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: x.to_mkldnn(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: torch.nested.nested_tensor([x, x]),
        lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        lambda x: torch.masked.masked_tensor(x, x > 0),
        lambda x: torch._to_functional_tensor(x),
        lambda x: FakeTensorMode().from_tensor(x),
        lambda x: x.to("meta"),
        lambda x: x.numpy(),
    ],
)
@pytest.mark.filterwarnings("ignore")  # several kinds are called prototypes
def test_tensors_that_are_not_plain(make):
    x = torch.ones(3, 3)
    tensor = make(x) if make is not torch.complex else torch.complex(x, x).conj()
    assert not _torch.is_plain((torch.ones(3), tensor))


def test_tensors_of_cuda_are_plain():
    """By the keys of a fake one, without those that make it fake."""
    others = [] if torch.cuda.is_available() else ["xpu"]  # a torch with CUDA makes none of them
    with FakeTensorMode():
        of = [torch.empty(3, device=device) for device in ("cpu", "cuda", *others)]
    cpu, cuda, *rest = (_torch._keys(tensor).raw_repr() for tensor in of)
    plain = _torch._keys(torch.ones(3)).raw_repr()
    assert not (cuda & ~cpu) & _torch._OTHER_KEYS and not plain & _torch._OTHER_KEYS
    assert all((xpu & ~cpu) & _torch._OTHER_KEYS for xpu in rest)


def _called(run, *arguments):
    """Asks `is_plain` inside a function that something else calls."""
    seen = []

    def function(x):
        seen.append(_torch.is_plain((x, torch.ones(3))))
        return x * 2

    run(function)(*arguments)
    return seen


RUNS = {
    **{name: lambda f, name=name: lambda x: TRANSFORMS[name](f, x) for name in TRANSFORMS},
    "jit.trace": lambda f: lambda x: torch.jit.trace(f, (x,), check_trace=False),
    "compile": lambda f: torch.compile(f, backend="eager", fullgraph=True),
    "make_fx": make_fx,
    "make_fx before autograd": lambda f: make_fx(f, pre_dispatch=True),
    "make_fx with fake tensors": lambda f: make_fx(f, tracing_mode="symbolic"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_calls_that_are_recorded_or_transformed_are_not_plain(name):
    assert not any(_called(RUNS[name], torch.ones(3)))
    assert _torch.is_plain((torch.ones(3),))


@pytest.mark.parametrize("mode", [FakeTensorMode, Passing, PassingFunctions, forward_ad.dual_level])
def test_modes_that_are_not_plain(mode):
    with mode(), torch.device("cpu"):
        assert not _torch.is_plain((torch.ones(3),))
    assert _torch.is_plain((torch.ones(3),))


def test_below_autograd():
    """Inside, a call goes to the device's kernel, whatever its tensors require; outside it goes to the autograd one."""
    library = torch.library.Library("kdejsd_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    went = []

    def kernel(x):
        went.append("cpu")
        return x * 2

    def autograd(x):
        went.append("autograd")
        with _torch.below_autograd():
            return torch.ops.kdejsd_test.twice(x)

    library.impl("twice", kernel, "CPU")
    library.impl("twice", autograd, "Autograd")
    for requires_grad in (False, True):
        x = torch.ones(3, requires_grad=requires_grad)
        went.clear()
        result = torch.ops.kdejsd_test.twice(x)
        assert went == ["autograd", "cpu"] and not result.requires_grad
        went.clear()
        with _torch.below_autograd():
            torch.ops.kdejsd_test.twice(x)
        assert went == ["cpu"]
    assert (torch.ones(3, requires_grad=True) * 2).requires_grad  # autograd is back


def test_forward_mode_active():
    assert not _torch.forward_mode_active()
    with forward_ad.dual_level():
        assert _torch.forward_mode_active()
    assert not _torch.forward_mode_active()
    seen = []

    def function(x):
        seen.append(_torch.forward_mode_active())
        return x * 2

    torch.func.jvp(function, (torch.ones(3),), (torch.ones(3),))
    torch.func.grad(lambda x: function(x).sum())(torch.ones(3))
    assert seen == [True, False]
    assert not _torch.forward_mode_active()


def test_on_device_gives_the_callers_device_back_only_where_it_has_a_context(monkeypatch):
    """That is what torch's exchange does on leaving, where `_exchange_device` would make a context."""
    calls = []
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: calls.append(("exchange", index)) or 0)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: calls.append(("maybe", index)) or 1)
    with _torch.on_device(1):
        assert calls == [("exchange", 1)]
    assert calls == [("exchange", 1), ("maybe", 0)]


@pytest.mark.parametrize("device", DEVICES[1:])
def test_on_device(device):
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        with _torch.on_device(index):
            assert torch.cuda.current_device() == index
        assert torch.cuda.current_device() == before


@pytest.mark.parametrize("device", DEVICES[1:])
def test_cuda_stream(device):
    index = torch.cuda.current_device()
    assert _torch.cuda_stream(index) == torch.cuda.current_stream(index).cuda_stream
    stream = torch.cuda.Stream(index)
    with torch.cuda.stream(stream):
        assert _torch.cuda_stream(index) == stream.cuda_stream
    assert _torch.cuda_stream(index) == torch.cuda.current_stream(index).cuda_stream != stream.cuda_stream


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_reduced_precision_allowed(device_type):
    """By either of torch's interfaces; in a process of its own, since torch does not like them mixed."""
    script = f"""
import torch
from kdejsd._torch import reduced_precision_allowed
allowed = lambda: reduced_precision_allowed({device_type!r})
found = [allowed()]
for precision in ("high", "medium", "highest"):
    torch.set_float32_matmul_precision(precision)
    found.append(allowed())
backend = torch.backends.cuda if {device_type!r} == "cuda" else torch.backends.mkldnn
if hasattr(getattr(backend, "matmul", None), "fp32_precision"):
    for precision in ("tf32", "ieee"):
        backend.matmul.fp32_precision = precision
        found.append(allowed())
print(found)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = [False, True, True, False, True, False]
    assert eval(done.stdout) in (expected, expected[:4])


def test_tf32_is_allowed_by_the_older_flag():
    script = """
import torch
from kdejsd._torch import reduced_precision_allowed
torch.backends.cuda.matmul.allow_tf32 = True
print(reduced_precision_allowed("cuda"), reduced_precision_allowed("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "True"
