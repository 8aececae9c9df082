"""Every op in modes of torch that change, record or forbid what a call does: it gives what an ordinary call gives, or
an error; never what stands by chance at an address."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import pytest
import torch
from helpers import points, worst
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import kdejsd
from kdejsd.ops.streamed import streamed_log_prob

pytestmark = pytest.mark.filterwarnings("ignore")  # jit.trace is deprecated, nested and masked tensors are prototypes

CENTERS = points(16, 3, seed=9)
LABELS = torch.arange(6) % 2


@dataclass(frozen=True)
class Op:
    """A function of one tensor [6, 3] that calls an op, and the operator of the library behind it."""

    call: Callable[[Tensor], Tensor]
    operator: str
    takes: Callable[[Tensor], Tensor] = lambda x: x
    second_derivative: bool = True


OPS = {
    "kde_log_prob": Op(lambda x: kdejsd.kde_log_prob(x, CENTERS, 0.5), "kde"),
    "kde_log_prob of itself": Op(lambda x: kdejsd.kde_log_prob(x, x, 0.5, exclude_self=True), "kde"),
    "jsd_loss": Op(lambda x: kdejsd.jsd_loss(x, CENTERS, 0.5), "kde"),
    "jsd_loss with own": Op(lambda x: kdejsd.jsd_loss(x, CENTERS, 0.5, own=x.detach() + 0.1), "kde"),
    "jsd": Op(lambda x: kdejsd.jsd(x, CENTERS, 0.5, 1.1 * CENTERS), "kde"),
    "streamed": Op(lambda x: streamed_log_prob(x, CENTERS.bfloat16(), 0.5)[0], "kde_streamed", second_derivative=False),
    "omega, halves": Op(lambda x: kdejsd.omega(x, x[:, :2] ** 3), "omega"),
    "omega, all": Op(lambda x: kdejsd.omega(x, x[:, :2] ** 3, pairs="all"), "omega"),
    "omega, none": Op(lambda x: kdejsd.omega(x, x[:, :2] ** 3, pairs="all", reduction="none"), "omega_ratios"),
    "omega, max": Op(lambda x: kdejsd.omega(x, x[:, :2] ** 3, pairs="all", reduction="max").value, "omega_largest"),
    "class_radius_bound": Op(lambda x: kdejsd.class_radius_bound(x), "radius", lambda x: x.softmax(-1)),
    "nearest_other_class": Op(lambda x: kdejsd.nearest_other_class(x, LABELS).distance, "nearest"),
}


@pytest.fixture(params=OPS)
def op(request) -> Op:
    return OPS[request.param]


def arguments(op: Op) -> tuple[Tensor, Tensor]:
    return op.takes(points(6, 3)), op.takes(points(6, 3, seed=1))


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and worst(found, expected) < 1e-10


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient


def test_jit_trace(op):
    """Also on inputs that it was not traced with, with a gradient and inside of no_grad."""
    x, y = arguments(op)
    traced = torch.jit.trace(op.call, (x,))
    assert f"kdejsd::{op.operator}" in str(traced.graph)
    for z in (x, y):
        assert same(traced(z), op.call(z))
        assert same(slope(traced, z), slope(op.call, z))


def test_jit_trace_of_a_module_that_trains(tmp_path):
    class Term(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = torch.nn.Linear(3, 3).double()

        def forward(self, x):
            return kdejsd.jsd_loss(self.encode(x), CENTERS, 0.5)

    module, x, y = Term(), points(6, 3), points(6, 3, seed=1)
    traced = torch.jit.trace(module, (x,))
    torch.jit.save(traced, tmp_path / "term.pt")
    loaded = torch.jit.load(tmp_path / "term.pt")
    assert same(loaded(y), module(y))
    (found,) = torch.autograd.grad(loaded(y), loaded.encode.weight)
    (expected,) = torch.autograd.grad(module(y), module.encode.weight)
    assert same(found, expected)


def test_add_graph(tmp_path):
    """TensorBoardLogger(log_graph=True) does this."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    class Term(torch.nn.Module):
        def forward(self, x):
            return kdejsd.jsd_loss(x, CENTERS, 0.5)

    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(Term(), points(6, 3))
    assert b"kdejsd::kde" in next(tmp_path.iterdir()).read_bytes()


@pytest.mark.parametrize("settings", [{}, {"pre_dispatch": True}, {"tracing_mode": "symbolic"}], ids=str)
def test_make_fx(op, settings):
    x, y = arguments(op)
    if "tracing_mode" in settings:
        settings = {**settings, "_allow_non_fake_inputs": True}
    graph = make_fx(op.call, **settings)(x)
    assert f"kdejsd.{op.operator}" in graph.code
    assert same(graph(y), op.call(y))


class Recorder:
    def __init__(self):
        super().__init__()
        self.seen = []

    def record(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(Recorder, TorchFunctionMode):
    __torch_function__ = Recorder.record


class Operators(Recorder, TorchDispatchMode):
    __torch_dispatch__ = Recorder.record


@pytest.mark.parametrize("mode", [Functions, Operators])
def test_modes_see_the_operator(op, mode):
    x, _ = arguments(op)
    with mode() as active:
        found = op.call(x)
        assert f"kdejsd.{op.operator}.default" in active.seen
        gradient = slope(op.call, x)
    assert same(found, op.call(x)) and same(gradient, slope(op.call, x))


class Plain(Tensor):
    pass


class WithoutFunctions(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class Wrapper(Tensor):
    """Has no memory of its own."""

    held: Tensor

    @staticmethod
    def __new__(cls, held):
        wrapper = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda a: a.held if isinstance(a, Wrapper) else a, (args, kwargs or {}))
        return tree_map(lambda a: Wrapper(a) if isinstance(a, Tensor) else a, func(*args, **kwargs))


KINDS = {
    "subclass": lambda x: x.as_subclass(Plain),
    "subclass without functions": lambda x: x.as_subclass(WithoutFunctions),
    "wrapper": Wrapper,
    "negated by a flag": lambda x: torch._neg_view(-x),
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "made in inference mode": lambda x: torch.inference_mode()(x.clone)(),
    "view": lambda x: torch.stack((x, x), -1)[..., 1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors(op, kind):
    x, _ = arguments(op)
    found = op.call(KINDS[kind](x))
    assert same(getattr(found, "held", found).as_subclass(Tensor), op.call(x))


def test_zero_tensor(op):
    """A tangent that is zero has no memory in forward-mode AD."""
    found, expected = op.call(torch._efficientzerotensor((6, 3), dtype=torch.float64)), op.call(points(6, 3) * 0)
    torch.testing.assert_close(found, expected, equal_nan=True)


REFUSED = {
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
    "oneDNN": lambda x: x.float().to_mkldnn(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
}


REFUSING = {
    "kde_log_prob": lambda x: kdejsd.kde_log_prob(x, CENTERS, 0.5),
    "jsd_loss": lambda x: kdejsd.jsd_loss(CENTERS, x, 0.5),
    "omega": lambda x: kdejsd.omega(CENTERS[:6], x),
    "class_radius_bound": lambda x: kdejsd.class_radius_bound(x),
    "nearest_other_class": lambda x: kdejsd.nearest_other_class(x, LABELS),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", REFUSING)
def test_refused(name, kind):
    message = "" if kind == "masked" else "must (be|have)"  # torch itself refuses the masked one
    with pytest.raises(TypeError, match=message):
        REFUSING[name](REFUSED[kind](points(6, 3)))


def test_gradients_from_a_mode(op):
    """Of a forward pass that was called in none: a gradient negated by a flag, and a batch of them."""
    x = arguments(op)[0].requires_grad_()
    value = op.call(x)
    upstream = points(3, *value.shape, seed=5)
    expected = [torch.autograd.grad(value, x, g, retain_graph=True)[0] for g in upstream]
    (negated,) = torch.autograd.grad(value, x, torch._neg_view(-upstream[0]), retain_graph=True)
    assert same(negated, expected[0])
    (batch,) = torch.autograd.grad(value, x, upstream, is_grads_batched=True)
    assert same(batch, torch.stack(expected))


def test_second_derivatives_in_a_mode(op):
    """By the operator too they are those of the reference, or refused."""

    def penalty(x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(op.call(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    x, _ = arguments(op)
    if not op.second_derivative:
        with Operators(), pytest.raises(RuntimeError, match="no second derivatives"):
            slope(penalty, x)
        return
    with Operators():
        found = slope(penalty, x)
    assert same(found, slope(penalty, x))


def test_fake_tensors(op):
    x, _ = arguments(op)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op.call(mode.from_tensor(x))
    assert fake.shape == op.call(x).shape and type(fake).__name__ == "FakeTensor"


MIXED = {
    "kde_log_prob": lambda x, y, h: kdejsd.kde_log_prob(x, y, h[0], log_weights=h[1:5].repeat(2)[:6]),
    "jsd_loss": lambda x, y, _: kdejsd.jsd_loss(x, y, 0.5),
    "jsd_loss with own": lambda x, y, _: kdejsd.jsd_loss(x, y.flip(0), 0.5, own=y),
    "jsd_loss with samples": lambda x, y, _: kdejsd.jsd_loss(x, x.detach(), 0.5, target_samples=y),
    "jsd": lambda x, y, _: kdejsd.jsd(x, y, 0.5, y),
    "omega": lambda x, y, _: kdejsd.omega(x, y),
    "omega of all pairs": lambda x, y, _: kdejsd.omega(x, y, pairs="all", reduction="none"),
}
HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("dtypes", [(HALF, SINGLE, SINGLE), (SINGLE, HALF, HALF), (SINGLE, HALF, SINGLE)], ids=str)
def test_autocast(name, dtypes):
    """All is in float32, as in torch.cdist, value and gradient; float64 is not autocast's to change."""
    call = MIXED[name]
    x, y, h = (points(6, 3, seed=seed).to(HALF) for seed in (0, 1, 2))
    h = h.flatten().abs() + 0.5
    mixed = [t.to(dtype) for t, dtype in zip((x, y, h), dtypes, strict=True)]
    expected = call(x.float(), y.float(), h.float())
    with torch.autocast("cpu", HALF):
        found = call(*mixed)
        gradient = slope(lambda u: call(u, *mixed[1:]), mixed[0])
        with pytest.raises(TypeError, match="must have the dtype of"):
            call(x.double(), *mixed[1:])
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert gradient.dtype == dtypes[0]
    torch.testing.assert_close(gradient, slope(lambda u: call(u, y.float(), h.float()), x.float()).to(dtypes[0]))
    with torch.autocast("cpu", HALF, enabled=False), pytest.raises(TypeError, match="must have the dtype of"):
        call(*mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_lagged_codes(dtype):
    """In one graph, whatever the codes are kept in."""
    lagged = [kdejsd.LaggedKDE(16, 3, 0.5, storage_dtype=dtype) for _ in range(2)]
    z, index = points(6, 3, dtype=torch.float32), torch.arange(6)
    for module in lagged:
        module.refresh(CENTERS.float(), torch.arange(16))
        module.reserve(60)
    graphs = []
    push = torch.compile(lagged[1].push, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for start in range(0, 54, 6):  # at other places each time
        lagged[0].push(z + start, index + start)
        push(z + start, index + start)
    assert len(graphs) == 1
    index = index + 48
    for attribute in ("codes", "indices", "oldest", "own_copies.places"):
        attribute = attrgetter(attribute)
        torch.testing.assert_close(attribute(lagged[1]), attribute(lagged[0]))
    compiled = torch.compile(lambda u: lagged[0].loss(u, index), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), lagged[0].loss(z, index))
    torch.testing.assert_close(slope(compiled, z), slope(lambda u: lagged[0].loss(u, index), z))
