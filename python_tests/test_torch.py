"""The private names of torch that the ops use: each still exists and does what the ops take it to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import DEVICES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
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
    y.register_hook(lambda grad: seen.append((_torch.transforms_active(), _torch.dispatch_modes())))
    y.sum().backward()
    with torch.inference_mode(), torch.no_grad():
        seen.append((_torch.transforms_active(), _torch.dispatch_modes()))
    assert seen == [(False, 0), (False, 0)]


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_dispatch_modes():
    assert _torch.dispatch_modes() == 0
    with FakeTensorMode():
        assert _torch.dispatch_modes() == 1
        with Passing():
            assert _torch.dispatch_modes() == 2
        assert _torch.dispatch_modes() == 1
    assert _torch.dispatch_modes() == 0
    seen = []

    def function(x):
        seen.append(_torch.dispatch_modes())
        return x + 1

    torch.fx.experimental.proxy_tensor.make_fx(function)(torch.ones(3))
    assert seen[0] > 0


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
