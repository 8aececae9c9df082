"""The kde op: values and every gradient against float64, on shapes and values that break streamed sums."""

from __future__ import annotations

import gc
import math
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from edges import LEVELS, at_edges, at_level
from helpers import DEVICES, DTYPES, generator, points, worst
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from test_torch import Passing
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import kdejsd
from kdejsd import reference
from kdejsd.divergence import DIVERGENCES
from kdejsd.ops.kde import _operator

KDES = ["number", "scalar tensor", "per center", "per center, weights", "weights", "excluded", "excluded, weights"]
# Of every kind; those at the edges of what the kernels take at a time are below, as the build tells them.
SIZES = [
    (1, 1, 1),
    (1, 2, 1),
    (7, 5, 2),
    (17, 90, 4),
    (70, 130, 7),
    (130, 40, 18),
    (100, 1100, 8),
    (1000, 33, 5),
    (33, 300, 40),
    (9, 70, 111),
    (5, 6, 1000),
]


def arguments(kind: str, n: int, m: int, dim: int, dtype: torch.dtype, device: str, spread: float = 1.0) -> dict:
    """query, centers, bandwidth and keywords of one call; what can have a gradient requires it."""
    h = spread * (0.5 + 0.15 * math.sqrt(dim))
    query = (spread * points(n, dim, seed=1)).to(device, dtype).requires_grad_()
    centers = (spread * points(m, dim, seed=2)).to(device, dtype).requires_grad_()
    bandwidth: float | torch.Tensor = h
    if kind == "scalar tensor":
        bandwidth = torch.tensor(h, dtype=dtype, device=device, requires_grad=True)
    if "per center" in kind:
        ratios = 0.7 + 0.6 * torch.rand(m, generator=generator(3), dtype=torch.float64)
        bandwidth = (h * ratios).to(device, dtype).requires_grad_()
    keywords = {}
    if "weights" in kind:
        keywords["log_weights"] = points(m, seed=4).log_softmax(0).to(device, dtype).requires_grad_()
    if "excluded" in kind:
        keywords["exclude_self"] = torch.randint(-1, m, (n,), generator=generator(5)).to(device)
    return {"query": query, "centers": centers, "bandwidth": bandwidth, **keywords}


def in_dtype(call: dict, dtype: torch.dtype) -> dict:
    """Copies the call, with leaves of another dtype."""
    return {
        k: v.detach().to(dtype).requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }


def in_float64(call: dict) -> dict:
    """Copies the call, with leaves in float64, of which those require a gradient that did."""
    return {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in call.items()
    }


def differentiable(call: dict) -> list[torch.Tensor]:
    return [v for v in call.values() if isinstance(v, torch.Tensor) and v.requires_grad]


def value_and_gradients(function, call: dict) -> list[torch.Tensor]:
    value = function(**call)
    upstream = torch.randn(value.shape, generator=generator(6), dtype=torch.float64).to(value.device, value.dtype)
    return [value.detach(), *torch.autograd.grad(value, differentiable(call), upstream)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KDES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_is_the_reference(size, kind, device):
    n, m, dim = size
    if "excluded" in kind and m == 1:
        pytest.skip("nothing is left when the only center is excluded")
    call = arguments(kind, n, m, dim, torch.float64, device)
    for got, expected in zip(
        value_and_gradients(kdejsd.kde_log_prob, call),
        value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64)),
        strict=True,
    ):
        assert got.dtype == torch.float64 and got.shape == expected.shape
        assert worst(got, expected) < 1e-13 * dim**0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KDES)
@pytest.mark.parametrize("size", [(100, 1100, 8), (70, 130, 7), (33, 300, 40), (200, 400, 2), (40, 70, 256)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_error_is_at_most_that_of_plain_torch(size, kind, offset, device):
    """Twice plain PyTorch's own error for values and three times for gradients, plus a few units in the last place."""
    call = arguments(kind, *size, torch.float32, device)
    with torch.no_grad():
        call["query"] += offset
        call["centers"] += offset
    truth = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64))
    plain = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float32))
    ours = value_and_gradients(kdejsd.kde_log_prob, call)
    for i, (got, yardstick, expected) in enumerate(zip(ours, plain, truth, strict=True)):
        assert got.dtype == torch.float32
        # The gradient of one bandwidth is a sum over the queries: their terms cancel, their roundings add up.
        rounding = 1.2e-6 * (1 if got.ndim else math.sqrt(size[0]))
        assert worst(got, expected) <= (2 if i == 0 else 3) * worst(yardstick, expected) + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_all_magnitudes(dtype, device):
    """In many dimensions most weights are too small to matter to a sum; one of a far center does matter."""
    query, centers = points(150, 128, seed=1), points(2000, 128, seed=2)
    centers[1501] *= 8
    log_weights = torch.zeros(2000, dtype=torch.float64)
    at_far = 0.5 * ((query[0] - centers[1501]) / 0.8).square().sum()
    nearest = 0.5 * ((query[0] - centers) / 0.8).square().sum(-1).min()
    log_weights[1501] = at_far - nearest - 4  # its weight is e^-4 of the largest
    call = {"query": query, "centers": centers, "bandwidth": 0.8, "log_weights": log_weights}
    call = {k: v.to(device, dtype).requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    truth = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64))
    plain = value_and_gradients(reference.kde_log_prob, in_dtype(call, dtype))
    for got, yardstick, expected in zip(value_and_gradients(kdejsd.kde_log_prob, call), plain, truth, strict=True):
        assert (
            worst(got, expected) <= 3 * worst(yardstick, expected) + 500 * torch.finfo(dtype).eps
        )  # the exponents are in the thousands


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [8, 128])
def test_infinite_center_has_no_weight_and_no_gradient(dim, device):
    query, centers = points(70, dim, device=device).requires_grad_(), points(200, dim, seed=1, device=device)
    without = kdejsd.kde_log_prob(query, torch.cat([centers[:150], centers[151:]]), 1.0)
    centers[150, 3] = math.inf
    value = kdejsd.kde_log_prob(query, centers, 1.0)
    torch.testing.assert_close(value, without + math.log(199 / 200))
    assert torch.autograd.grad(value.sum(), query)[0].isnan().any(-1).all()


def test_against_scipy():
    """An independent truth: SciPy's normal density and its logsumexp."""
    z, c = points(5, 3, seed=1).numpy(), points(7, 3, seed=2).numpy()
    h = np.linspace(0.4, 1.2, 7)
    w = np.linspace(1, 2, 7)
    w /= w.sum()
    expected = logsumexp(
        [np.log(w[i]) + multivariate_normal(c[i], h[i] ** 2).logpdf(z) for i in range(7)],
        axis=0,
    )
    got = kdejsd.kde_log_prob(
        torch.from_numpy(z), torch.from_numpy(c), torch.from_numpy(h), log_weights=torch.from_numpy(w).log()
    )
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_leave_one_out(device):
    z = points(50, 4, device=device)
    got = kdejsd.kde_log_prob(z, z, 0.6, exclude_self=True)
    for i in range(50):
        others = torch.cat([z[:i], z[i + 1 :]])
        assert got[i].item() == pytest.approx(kdejsd.kde_log_prob(z[i : i + 1], others, 0.6).item(), rel=1e-13)
    # Query and centers are one tensor: both sides' gradients add up.
    a, b = points(50, 4, device=device).requires_grad_(), points(50, 4, device=device).requires_grad_()
    kdejsd.kde_log_prob(a, a, 0.6, exclude_self=True).sum().backward()
    reference.kde_log_prob(b, b, 0.6, exclude_self=True).sum().backward()
    assert worst(a.grad, b.grad) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_queries_and_large_dimension(dtype, device):
    dim = 1000
    centers = points(70, dim, dtype=dtype, device=device)
    query = points(9, dim, dtype=dtype, device=device, seed=1)
    query[0] = centers[3]  # distance 0
    query[1] = 60 / math.sqrt(dim) + centers.mean(0)  # about 60 from all centers
    query[2] *= 1e4
    call = {"query": query.requires_grad_(), "centers": centers, "bandwidth": 1.0}
    ours = value_and_gradients(kdejsd.kde_log_prob, call)
    truth = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64) | {"centers": centers.double()})
    for got, expected in zip(ours, truth, strict=True):
        assert got.isfinite().all()
        assert worst(got, expected) < (2e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["number", "excluded"])
def test_near_centers_come_last(kind, dtype, device):
    """Sums relative to far centers are rescaled, more than once, when nearer ones come."""
    call = arguments(kind, 150, 400, 3, dtype, device)
    with torch.no_grad():
        call["centers"] += torch.linspace(60, 0, 400, device=device)[:, None].to(dtype)
    ours = value_and_gradients(kdejsd.kde_log_prob, call)
    truth = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64))
    for got, expected in zip(ours, truth, strict=True):
        assert worst(got, expected) < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("distance", [30.0, 200.0, 3000.0])
def test_the_weights_of_a_far_query_sum_to_1(distance, device):
    """The transposed pass must round a large exponent as the forward pass did, or the weights lose whole digits."""
    query, centers = (
        points(9, 3, dtype=torch.float32, device=device),
        points(130, 3, dtype=torch.float32, device=device),
    )
    query[:, 1] += distance
    log_weights = torch.full((130,), -math.log(130), device=device, requires_grad=True)
    value = kdejsd.kde_log_prob(query, centers, 1.0, log_weights=log_weights)
    for row in value:
        (weights,) = torch.autograd.grad(row, log_weights, retain_graph=True)
        assert weights.sum().item() == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [1, 20, 70])
@pytest.mark.parametrize("distance", [1e3, 1e4, 1e5])
def test_equal_centers_share_a_far_query(distance, dim, device):
    """The last place of such an exponent is worth many powers of two."""
    centers = torch.full((3, dim), 0.3, device=device, requires_grad=True)
    log_weights = torch.full((3,), -math.log(3), device=device, requires_grad=True)
    query = torch.full((2, dim), 0.3, device=device)
    query[:, -1] += distance * torch.tensor([1.0, -0.7], device=device)
    value = kdejsd.kde_log_prob(query, centers, 1.0, log_weights=log_weights)
    for row, z in zip(value, query, strict=True):
        slope, weights = torch.autograd.grad(row, (centers, log_weights), retain_graph=True)
        torch.testing.assert_close(weights.cpu(), torch.full((3,), 1 / 3), rtol=2e-6, atol=0)
        torch.testing.assert_close(slope, (z - centers.detach()) / 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_range_of_exponentials(dtype, device):
    """Weights of 1e-10000: the nearest center alone counts, and the gradient points straight at it."""
    query = torch.tensor([[300.0, 0.0]], dtype=dtype, device=device, requires_grad=True)
    centers = torch.tensor([[0.0, 0.0], [0.0, 200.0], [-1.0, -1.0]], dtype=dtype, device=device)
    value = kdejsd.kde_log_prob(query, centers, 1.0)
    assert value.item() == pytest.approx(-0.5 * 300**2 - math.log(3) - math.log(2 * math.pi), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, query)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[-300.0, 0.0]], dtype=dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_duplicates_count_twice(device):
    z, c = points(20, 3, device=device), points(10, 3, device=device, seed=1)
    assert worst(kdejsd.kde_log_prob(z, torch.cat([c, c]), 0.5), kdejsd.kde_log_prob(z, c, 0.5)) < 1e-14


@pytest.mark.parametrize("device", DEVICES)
def test_zero_weight_is_no_center(device):
    z, c = points(40, 3, device=device), points(90, 3, device=device, seed=1)
    log_weights = torch.full((90,), -math.inf, dtype=torch.float64, device=device)
    log_weights[70:] = -math.log(20)
    call = {"query": z.requires_grad_(), "centers": c.requires_grad_(), "bandwidth": 0.7, "log_weights": log_weights}
    value, dz, dc = value_and_gradients(kdejsd.kde_log_prob, call)
    assert worst(value, kdejsd.kde_log_prob(z, c[70:], 0.7)) < 1e-14
    assert dz.isfinite().all() and (dc[:70] == 0).all() and (dc[70:] != 0).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_nan_out(dtype, device):
    def nan_rows(query, centers, bandwidth):
        value, gradient = value_and_gradients(
            kdejsd.kde_log_prob, {"query": query.requires_grad_(), "centers": centers, "bandwidth": bandwidth}
        )
        assert torch.equal(value.isnan(), gradient.isnan().any(-1))
        return value.isnan().tolist()

    def fresh():
        return points(70, 3, dtype=dtype, device=device), points(130, 3, dtype=dtype, device=device, seed=1)

    query, centers = fresh()
    query[5, 1] = math.nan
    assert nan_rows(query, centers, 0.5) == [i == 5 for i in range(70)]
    query, centers = fresh()
    centers[128, 0] = math.nan
    assert all(nan_rows(query, centers, 0.5))
    for bad in (math.nan, 0.0, -1.0, math.inf):
        query, centers = fresh()
        assert all(nan_rows(query, centers, torch.tensor(bad, dtype=dtype, device=device)))
        bandwidth = torch.ones(130, dtype=dtype, device=device)
        bandwidth[77] = bad
        assert all(nan_rows(query, centers, bandwidth))
        bandwidth = torch.ones(130, dtype=dtype, device=device)
        bandwidth[0] = bad
        assert all(nan_rows(query, centers, bandwidth))


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_query_has_density_zero(device):
    query = points(3, 2, device=device)
    query[1, 0] = math.inf
    assert kdejsd.kde_log_prob(query, points(9, 2, device=device), 0.5).isneginf().tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_empty_queries(device):
    query = torch.empty(0, 3, device=device, requires_grad=True)
    centers = torch.randn(5, 3, device=device, requires_grad=True)
    value = kdejsd.kde_log_prob(query, centers, 0.5)
    assert value.shape == (0,)
    value.sum().backward()
    assert query.grad.shape == (0, 3) and (centers.grad == 0).all()
    assert kdejsd.kde_log_prob(torch.empty(4, 0, 3, device=device), centers, 0.5).shape == (4, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype, device):
    wide = points(8, 60, dtype=dtype, device=device)
    query, centers = wide[:, ::2].T, wide[:, 1::2].T[::2]
    assert not query.is_contiguous() and not centers.is_contiguous()
    bandwidth = (0.5 + torch.rand(30, generator=generator()).to(device, dtype))[::2]
    upstream = torch.ones(1, dtype=dtype, device=device).expand(30)  # stride 0
    plain, ours = query.contiguous().requires_grad_(), query.detach().requires_grad_()
    value = kdejsd.kde_log_prob(ours, centers, bandwidth)
    expected = kdejsd.kde_log_prob(plain, centers.contiguous(), bandwidth.contiguous())
    assert torch.equal(value, expected)
    assert torch.equal(
        torch.autograd.grad(value, ours, upstream)[0], torch.autograd.grad(expected, plain, upstream.contiguous())[0]
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("query", "centers", "bandwidth", "result"),
    [
        ((3, 11, 2), (7, 2), (), (3, 11)),
        ((11, 2), (3, 7, 2), (), (3, 11)),
        ((3, 11, 2), (3, 7, 2), (3, 1), (3, 11)),
        ((3, 11, 2), (3, 7, 2), (3, 7), (3, 11)),
        ((3, 11, 2), (3, 7, 2), (7,), (3, 11)),
        ((4, 1, 11, 2), (3, 7, 2), (4, 1, 7), (4, 3, 11)),
        ((1, 11, 2), (1, 7, 2), (1, 7), (1, 11)),
        ((2, 3, 0, 2), (3, 7, 2), (), (2, 3, 0)),
    ],
)
def test_batches_broadcast(query, centers, bandwidth, result, weighted, device):
    call = {
        "query": points(*query, device=device, seed=1).requires_grad_(),
        "centers": points(*centers, device=device, seed=2).requires_grad_(),
        "bandwidth": (0.6 + points(*bandwidth, seed=3).sigmoid()).to(device).requires_grad_(),
    }
    if weighted:
        call["log_weights"] = points(*centers[:-1], device=device, seed=4).requires_grad_()
    ours, plain = (
        value_and_gradients(f, in_dtype(call, torch.float64)) for f in (kdejsd.kde_log_prob, reference.kde_log_prob)
    )
    assert ours[0].shape == result
    for got, expected in zip(ours, plain, strict=True):
        assert got.shape == expected.shape and worst(got, expected) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype, device):
    query = points(20, 3, dtype=dtype, device=device).requires_grad_()
    centers = points(30, 3, dtype=dtype, device=device, seed=1)
    value = kdejsd.kde_log_prob(query, centers, 0.5)
    assert value.dtype == torch.float32
    assert torch.equal(value, kdejsd.kde_log_prob(query.float(), centers.float(), 0.5))
    value.sum().backward()
    assert query.grad.dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KDES)
def test_gradcheck_and_gradgradcheck(kind, device):
    call = arguments(kind, 5, 4, 3, torch.float64, device)
    names = [k for k, v in call.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def function(*tensors):
        return kdejsd.kde_log_prob(**{**call, **dict(zip(names, tensors, strict=True))})

    inputs = tuple(call[k] for k in names)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["scalar tensor", "per center, weights", "excluded"])
def test_opcheck(kind, requires_grad, device):
    call = arguments(kind, 5, 4, 3, torch.float64, device)
    bandwidth = torch.as_tensor(call["bandwidth"], dtype=torch.float64, device=device)
    tensors = [call["query"], call["centers"], bandwidth.reshape(-1), call.get("log_weights"), call.get("exclude_self")]
    tensors = [None if t is None else t.detach().unsqueeze(0) for t in tensors]
    if requires_grad:
        tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(_operator, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_whole_graph(dynamic, device):
    torch.compiler.reset()
    backend = "aot_eager" if dynamic else "inductor"  # which makes C++ of what is not ours, and compiles it
    compiled = torch.compile(
        lambda **call: kdejsd.kde_log_prob(**call).tanh().sum(), fullgraph=True, dynamic=dynamic, backend=backend
    )
    for n in (10, 13):
        call = arguments("per center, weights", n, 9, 3, torch.float64, device)
        eager = torch.autograd.grad(kdejsd.kde_log_prob(**call).tanh().sum(), differentiable(call))
        for got, expected in zip(torch.autograd.grad(compiled(**call), differentiable(call)), eager, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_export(device):
    class Density(torch.nn.Module):
        def forward(self, query, centers):
            return kdejsd.kde_log_prob(query, centers, 0.5)

    inputs = (points(6, 3, device=device), points(5, 3, device=device, seed=1))
    exported = torch.export.export(Density(), inputs).module()
    torch.testing.assert_close(exported(*inputs), kdejsd.kde_log_prob(*inputs, 0.5))


TRANSFORMS = {
    "func.grad": lambda f, x: torch.func.grad(lambda u: f(u).sum())(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(lambda u: f(u).sum())(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(lambda row: f(row.unsqueeze(0)))(x),
    "compiled func.grad": lambda f, x: torch.compile(
        torch.func.grad(lambda u: f(u).sum()), fullgraph=True, backend="aot_eager"
    )(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, device):
    x, centers = points(6, 3, device=device), points(5, 3, device=device, seed=1)
    bandwidth = torch.linspace(0.5, 1.0, 5, dtype=torch.float64, device=device)
    got, expected = (
        TRANSFORMS[name](lambda u, f=f: f(u, centers, bandwidth), x)
        for f in (kdejsd.kde_log_prob, reference.kde_log_prob)
    )
    torch.testing.assert_close(got, expected)
    assert (got != 0).any()


def test_forward_mode_is_not_dropped():
    x, centers = points(6, 3), points(5, 3, seed=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(kdejsd.kde_log_prob(dual, centers, 0.5)).tangent
        expected = forward_ad.unpack_dual(reference.kde_log_prob(dual, centers, 0.5)).tangent
        torch.testing.assert_close(tangent, expected)
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.ops.kdejsd.kde(dual[None], centers[None], torch.full((1, 1), 0.5).double(), None, None)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = kdejsd.kde_log_prob(torch.empty(4, 7, 3, device="meta"), torch.empty(5, 3, device="meta"), 0.5)
    assert meta.shape == (4, 7) and meta.device.type == "meta"
    with FakeTensorMode():
        query = torch.randn(7, 3, requires_grad=True)
        kdejsd.kde_log_prob(query, torch.randn(5, 3), 0.5).sum().backward()
        assert query.grad.shape == (7, 3)


def test_inference_mode():
    with torch.inference_mode():
        assert kdejsd.kde_log_prob(points(4, 2), points(5, 2), 0.5).shape == (4,)


# ----------------------------------------------------------------------------------------------------------------------
# A bandwidth that is a number goes to the kernels as it is, and gives what a tensor of it gives


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int64 if t.dtype == torch.float64 else torch.int32)


def assert_same_bits(function, call: dict, h: float) -> None:
    """Value and gradients with the number are those with a tensor of one element."""
    tensor = torch.full((1,), h, dtype=call["query"].dtype, device=call["query"].device)
    found, expected = (value_and_gradients(function, {**call, "bandwidth": b}) for b in (h, tensor))
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype and torch.equal(bits(got), bits(wanted))


def jsd_losses(divergence: str, reduction: str):
    def call(query, centers, bandwidth, **keywords):
        return kdejsd.jsd_loss(query, centers, bandwidth, divergence=divergence, reduction=reduction, **keywords)

    return call


LEARNT = ("centers", "log_weights")  # what takes the second pass
NUMBER_CALLS = {
    "kde_log_prob": kdejsd.kde_log_prob,
    **{f"{d}, {r}": jsd_losses(d, r) for d in DIVERGENCES for r in ("mean", "sum", "none")},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["number", "weights", "excluded", "excluded, weights"])
@pytest.mark.parametrize("wanted", [("query",), ("query", *LEARNT)], ids=["query", "all"])
@pytest.mark.parametrize("name", NUMBER_CALLS)
def test_a_number_gives_the_bits_of_a_tensor(name, wanted, kind, dtype, device):
    """0.1 and 2/3 are other numbers in float32."""
    for size in ((33, 70, 4), (5, 1, 3)):
        if size[1] == 1 and "excluded" in kind:
            continue
        call = arguments(kind, *size, dtype, device)
        call |= {k: v.detach().requires_grad_(k in wanted) for k, v in call.items() if k in ("query", *LEARNT)}
        for h in (0.1, 2 / 3, 1, 3.0):
            assert_same_bits(NUMBER_CALLS[name], call, h)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("query", "centers"),
    [((3, 11, 2), (7, 2)), ((11, 2), (3, 7, 2)), ((3, 7, 2), (3, 7, 2)), ((4, 1, 7, 2), (3, 7, 2))],
)
def test_a_number_gives_the_bits_of_a_tensor_to_all_of_a_batch(query, centers, dtype, device):
    call = {
        "query": points(*query, dtype=dtype, device=device, seed=1).requires_grad_(),
        "centers": points(*centers, dtype=dtype, device=device, seed=2).requires_grad_(),
        "exclude_self": query[-2] == centers[-2],
    }
    for function in NUMBER_CALLS.values():
        assert_same_bits(function, call, 0.1)
    call["log_weights"] = points(*centers[:-1], dtype=dtype, device=device, seed=4).requires_grad_()
    for function in NUMBER_CALLS.values():
        assert_same_bits(function, call, 0.1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "ends"),
    [
        (torch.float32, (1e-44, 1e-38, 1e38, torch.finfo(torch.float32).max)),
        (torch.float64, (5e-324, 1e-308, 1e308, torch.finfo(torch.float64).max)),
    ],
    ids=str,
)
def test_a_number_at_the_ends_of_the_range_gives_the_bits_of_a_tensor(dtype, ends, device):
    query, centers = points(9, 2, dtype=dtype, device=device), points(20, 2, dtype=dtype, device=device, seed=1)
    query[3] = centers[5]
    call = {"query": query.requires_grad_(), "centers": centers.requires_grad_()}
    for h in ends:
        assert_same_bits(kdejsd.kde_log_prob, call, h)
        near = 1 if h < 1 else 20  # centers, beside the bandwidth
        expected = math.log(near / 20) - 2 * math.log(torch.tensor(h, dtype=dtype).item()) - math.log(2 * math.pi)
        assert kdejsd.kde_log_prob(query, centers, h)[3].item() == pytest.approx(expected, rel=1e-6)


def operators(function) -> list[str]:
    """The names of torch's operators that a call takes, in their order."""
    function()  # what only a first call does
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name.startswith("aten::")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NUMBER_CALLS)
def test_a_number_is_made_no_tensor_of(name, device):
    """It takes the operators that a tensor takes, which lies on the device already; none of them fills a tensor."""
    query, centers = points(8, 4, device=device).requires_grad_(), points(16, 4, device=device, seed=1)
    tensor = torch.ones(1, dtype=torch.float64, device=device)

    def forward(bandwidth):
        return NUMBER_CALLS[name](query, centers, bandwidth)

    found = operators(lambda: forward(0.5))
    assert found == operators(lambda: forward(tensor)) and "aten::empty" in found
    assert "aten::full" not in found and (name != "kde_log_prob" or "aten::fill_" not in found)
    grad = torch.ones_like(forward(tensor))
    assert operators(lambda: forward(0.5).backward(grad)) == operators(lambda: forward(tensor).backward(grad))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(7, 2), (3, 7, 2)], ids=str)
def test_a_traced_number_gives_the_same_bits(shape, device):
    """The operator, whose bandwidth is a tensor."""
    call = {
        "query": points(11, 2, dtype=torch.float32, device=device).requires_grad_(),
        "centers": points(*shape, dtype=torch.float32, device=device, seed=2).requires_grad_(),
        "bandwidth": 0.1,
    }
    expected = value_and_gradients(kdejsd.kde_log_prob, call)
    with Passing():
        found = value_and_gradients(kdejsd.kde_log_prob, call)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_number_may_change_from_call_to_call_of_a_compiled_function(device):
    torch.compiler.reset()
    z, c = points(8, 4, device=device).requires_grad_(), points(16, 4, device=device, seed=1)
    compiled = torch.compile(lambda h: kdejsd.kde_log_prob(z, c, h).sum(), fullgraph=True, backend="aot_eager")
    for h in (0.5, 0.7, 0.9):
        for got, expected in zip(
            torch.autograd.grad(compiled(h), z), torch.autograd.grad(kdejsd.kde_log_prob(z, c, h).sum(), z), strict=True
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_number_passes_the_checks_of_values(dtype, monkeypatch):
    monkeypatch.setenv("KDEJSD_CHECK", "1")
    for shape in ((7, 2), (3, 7, 2)):
        query, centers = points(11, 2, dtype=dtype), points(*shape, dtype=dtype, seed=1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = kdejsd.kde_log_prob(query, centers, torch.tensor(0.1, dtype=wide))
        assert torch.equal(kdejsd.kde_log_prob(query, centers, 0.1), expected)


# ----------------------------------------------------------------------------------------------------------------------
# The machine: instruction sets, threads, memory


@pytest.fixture(params=LEVELS)
def level(request):
    with at_level(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(level, dtype):
    for kind in KDES:
        call = arguments(kind, 77, 130, 5, dtype, "cpu")
        truth = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64))
        for got, expected in zip(value_and_gradients(kdejsd.kde_log_prob, call), truth, strict=True):
            assert worst(got, expected) < (5e-6 if dtype == torch.float32 else 1e-13)
    query = points(3, 2, dtype=dtype)
    query[0, 0], query[1, 0] = math.nan, math.inf
    value = kdejsd.kde_log_prob(query, points(100, 2, dtype=dtype), 0.5)
    assert value[0].isnan() and value[1].isneginf() and value[2].isfinite()


def errors_beside_float64(name: str, call: dict) -> list[float]:
    """Those of a function's value and gradients."""
    ours = value_and_gradients(getattr(kdejsd, name), call)
    truth = value_and_gradients(getattr(reference, name), in_float64(call))
    return [worst(got, expected) for got, expected in zip(ours, truth, strict=True)]


def with_gradients_for(call: dict, *names: str) -> dict:
    """The same call with the gradients of these arguments alone: none for centers, and no transposed pass is taken."""
    return {
        k: v.detach().requires_grad_(k in names) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }


def loss_call(call: dict) -> dict:
    """jsd_loss with the arguments of kde_log_prob, and with centers of the codes' own where it takes such."""
    call = {{"query": "codes", "centers": "lagged"}.get(k, k): v for k, v in call.items()}
    if isinstance(call["bandwidth"], float) and "log_weights" not in call:
        call["own"] = call["codes"].detach() + 0.1
    return with_gradients_for(call, "codes") | {"reduction": "none"}


@pytest.fixture(params=["highest", "high"])
def float32_precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


EDGE_KINDS = ["excluded", "scalar tensor", "per center, weights"]


def edge_calls(size: int, dim: int, dtype: torch.dtype) -> Iterator[dict]:
    """As many queries, as many centers, and both where they are few."""
    for n, m in ((size, 9), (9, size), (size, size))[: 3 if size < 100 else 2]:
        for kind in EDGE_KINDS[m == 1 :]:
            yield arguments(kind, n, m, dim, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@at_edges("kde_points")
def test_edges_of_queries_and_centers(size, level, dtype):
    bound = 5e-6 if dtype == torch.float32 else 1e-13
    with at_level(level):
        for call in edge_calls(size, 3, dtype):
            assert max(errors_beside_float64("kde_log_prob", call)) < bound
            assert max(errors_beside_float64("jsd_loss", loss_call(call))) < bound


# Distances from products: of matrices where the processor multiplies them, since the precision allows their error.
HIGH = pytest.mark.parametrize("float32_precision", ["high"], indirect=True)


@HIGH
@at_edges("kde_points")
def test_edges_of_queries_and_centers_in_products(size, level, float32_precision):
    bound = 3e-4 if level == "amx" else 5e-6
    with at_level(level):
        for call in edge_calls(size, 33, torch.float32):
            call = with_gradients_for(call, "query")
            assert max(errors_beside_float64("kde_log_prob", call)) < bound
            assert max(errors_beside_float64("jsd_loss", loss_call(call))) < bound


@HIGH
@pytest.mark.parametrize("dtype", DTYPES)
@at_edges("kde_dims")
def test_edges_of_dimensions(size, level, dtype, float32_precision):
    bound = 5e-6 if dtype == torch.float32 else 1e-13 * size**0.5
    of_products = 3e-4 if level == "amx" and dtype == torch.float32 else bound
    with at_level(level):
        for kind in EDGE_KINDS:
            call = arguments(kind, 70, 60, size, dtype, "cpu")
            assert max(errors_beside_float64("kde_log_prob", call)) < bound
            call = with_gradients_for(call, "query")
            assert max(errors_beside_float64("kde_log_prob", call)) < of_products
            assert max(errors_beside_float64("jsd_loss", loss_call(call))) < of_products


def assert_at_most_twice_the_error_of_plain_pytorch(call: dict) -> None:
    """The value and each gradient of a float32 call, against float64."""
    truth = value_and_gradients(reference.kde_log_prob, in_float64(call))
    plain = value_and_gradients(reference.kde_log_prob, call)
    for got, yardstick, expected in zip(value_and_gradients(kdejsd.kde_log_prob, call), plain, truth, strict=True):
        assert worst(got, expected) <= 2 * worst(yardstick, expected) + 1.2e-6


@pytest.mark.parametrize("for_centers", [False, True])
@pytest.mark.parametrize("narrow", [1.0, 0.3])
@pytest.mark.parametrize("dim", [1, 2, 8, 15, 16, 24, 40, 64, 100, 256])
def test_error_by_dimension(dim, narrow, for_centers, level):
    """Distances from products, from differences, and sums of many dimensions; excluded centers and weights too."""
    call = arguments("excluded, weights", 70, 500, dim, torch.float32, "cpu")
    for name in ("centers", "log_weights"):
        call[name] = call[name].detach().requires_grad_(for_centers)
    call["bandwidth"] = narrow * min(0.95, 0.13 * dim**0.5)
    assert_at_most_twice_the_error_of_plain_pytorch(call)


def places(kind: str, n: int, m: int, dim: int, h: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and centers of which some are far from the others."""
    query, centers = points(n, dim, dtype=torch.float32, seed=1), points(m, dim, dtype=torch.float32, seed=2)
    if kind == "two clusters":
        query, centers = 0.1 * query, 0.1 * centers
        query[::2] += 1000
        centers[::2] += 1000
        query[: n // 4] = centers[: n // 4] + h * points(n // 4, dim, dtype=torch.float32, seed=3)
    elif kind == "offset":
        query, centers = query + 100, centers + 100
    else:
        centers[7] = float(kind)
    return query, centers


FAR = ["two clusters", "offset", "1e3", "-1e5", "1e6", "1e10", "1e20"]


@pytest.mark.parametrize("for_centers", [False, True])
@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize(("dim", "h"), [(1, 0.1), (2, 0.27), (17, 0.5), (40, 0.75)])
def test_points_far_from_others_take_none_of_their_digits(dim, h, kind, for_centers, level):
    query, centers = places(kind, 80, 96, dim, h)
    call = {"query": query.requires_grad_(), "centers": centers.requires_grad_(for_centers), "bandwidth": h}
    assert_at_most_twice_the_error_of_plain_pytorch(call)


@pytest.mark.parametrize("bandwidths", [(1e-5, 1e5), (1e-3, 1e3), (0.3, 30.0)])
@pytest.mark.parametrize("dim", [2, 95, 96, 200])
def test_a_narrow_center_hides_no_wide_one(dim, bandwidths, level):
    """A wide center pulls little, and has all the weight where the narrow ones do not reach."""
    query, centers = points(16, dim, dtype=torch.float32), points(40, dim, dtype=torch.float32, seed=1)
    bandwidth = torch.tensor(bandwidths).repeat(20)
    for _ in ("far from the narrow ones", "some near"):
        call = {"query": query.requires_grad_(), "centers": centers, "bandwidth": bandwidth}
        truth = value_and_gradients(reference.kde_log_prob, in_float64(call))[1]
        for row, exact in zip(value_and_gradients(kdejsd.kde_log_prob, call)[1], truth, strict=True):
            assert (row - exact).abs().max() <= 1e-5 * exact.abs().max()
        query = query.detach()
        query[::2] = centers[:16:2] + bandwidths[0] * query[::2]


@pytest.mark.parametrize("dim", [31, 32, 57, 64, 71, 256])
@pytest.mark.parametrize("kind", ["scalar tensor", "per center, weights", "excluded, weights"])
def test_reduced_precision(kind, dim, float32_precision, level):
    """Products of two bfloat16 parts where torch allows them and the processor has them; nothing else changes."""
    call = arguments(kind, 70, 500, dim, torch.float32, "cpu")
    call = {
        k: v.detach() if isinstance(v, torch.Tensor) and k in ("centers", "log_weights") else v for k, v in call.items()
    }
    if kind != "scalar tensor" and isinstance(call["bandwidth"], torch.Tensor):
        call["bandwidth"] = call["bandwidth"].detach()
    if float32_precision == "highest" or level != "amx" or dim < 32:
        return assert_at_most_twice_the_error_of_plain_pytorch(call)
    found = value_and_gradients(kdejsd.kde_log_prob, call)
    truth = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64))
    assert worst(found[0], truth[0]) < 3e-5 and worst(found[1], truth[1]) < 3e-4
    torch.set_float32_matmul_precision("highest")
    assert not torch.equal(value_and_gradients(kdejsd.kde_log_prob, call)[1], found[1])


@pytest.mark.parametrize("bits", [-1, 0x7FC00000, 0x7F800001, 0x7FFFFFFF])
@pytest.mark.parametrize("dim", [3, 20, 64])
def test_no_nan_is_lost(dim, bits, float32_precision, level):
    """Whichever of its bits are set: cutting a number into parts can make 0 of some."""
    nan = torch.tensor(bits if bits < 2**31 else bits - 2**32, dtype=torch.int32).view(torch.float32)
    query, centers = points(70, dim, dtype=torch.float32), points(130, dim, dtype=torch.float32, seed=1)
    for row in (0, 37, 69):
        bad = query.clone()
        bad[row, row % dim] = nan
        call = {"query": bad.requires_grad_(), "centers": centers, "bandwidth": 1.0}
        value, gradient = value_and_gradients(kdejsd.kde_log_prob, call)
        assert value.isnan().nonzero().tolist() == [[row]] and gradient[row].isnan().all()
        assert not gradient[:row].isnan().any() and not gradient[row + 1 :].isnan().any()
    for row in (0, 64, 129):
        bad = centers.clone()
        bad[row, row % dim] = nan
        call = {"query": query.clone().requires_grad_(), "centers": bad, "bandwidth": 1.0}
        value, gradient = value_and_gradients(kdejsd.kde_log_prob, call)
        assert value.isnan().all() and gradient.isnan().all()


def error_of_exponents(query: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """The largest error of log p_e at h = 1 beside the parts of its exponent, of one center [1, l]."""
    centers = torch.cat([center, -center])  # about the origin, so there is no shift; the second has no weight
    log_weights = torch.tensor([0.0, -math.inf])
    value = kdejsd.ops.kde._launch_forward(query, centers, torch.ones(1), log_weights, None)[0]
    wide = query.double(), center.double()
    exact = -0.5 * ((wide[0] - wide[1]).square().sum(-1) + query.shape[-1] * math.log(2 * math.pi))
    parts = 0.5 * (wide[0].square().sum(-1) + wide[1].square().sum())
    return ((value - exact).abs() / parts).max()


@pytest.mark.parametrize("dim", [16, 32, 70, 256])
def test_products_keep_the_bound_on_an_exponent(dim, float32_precision, level):
    """2^-21 of its parts, or 2^-17, shortly before pairs are taken from differences; beyond, what differences have."""
    reduced = float32_precision == "high" and level == "amx" and dim >= 32
    bound, limit = (2**-17, min(12 * dim, 512)) if reduced else (2**-21, 12 * dim)
    for share in (0.8, 1.4):
        radius = math.sqrt(share * limit / (dim * math.log2(math.e)))
        query, center = (radius * points(n, dim, dtype=torch.float32, seed=n) for n in (70, 1))
        query *= (radius * dim**0.5 / query.norm(dim=1)).unsqueeze(1)
        center *= radius * dim**0.5 / center.norm()
        error = error_of_exponents(query, center)
        assert error < (bound if share < 1 else 2**-21)
        assert not reduced or share > 1 or error > 2**-21


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_below_the_smallest_normal_number_are_0(dtype, level):
    """A product with one takes many processors a hundred cycles and more."""
    least = -math.log2(torch.finfo(dtype).smallest_normal)
    exponents = torch.linspace(least - 60, least + 60, 500, dtype=torch.float64)  # base 2
    exponents[0] = 0
    centers = (2 * math.log(2) * exponents).sqrt().to(dtype)[:, None]
    log_weights = torch.full((500,), -math.log(500), dtype=dtype, requires_grad=True)
    value = kdejsd.kde_log_prob(torch.zeros(1, 1, dtype=dtype), centers, 1.0, log_weights=log_weights)
    (weights,) = torch.autograd.grad(value.sum(), log_weights)
    tiny = weights < torch.finfo(dtype).smallest_normal
    assert (weights[tiny] == 0).all() and 200 < tiny.sum() < 300
    # Relative to the upstream gradient: a small one loses none of them.
    value = kdejsd.kde_log_prob(torch.zeros(1, 1, dtype=dtype), centers, 1.0, log_weights=log_weights)
    (small,) = torch.autograd.grad(1e-30 * value.sum(), log_weights)
    torch.testing.assert_close(small[:1], 1e-30 * weights[:1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("flush", [False, True])
def test_the_setting_for_subnormal_numbers_is_the_callers(flush, level):
    """On all threads: each of them writes gradients below the smallest normal number after its kernels."""
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor cannot flush subnormal numbers")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        codes, centers = (points(n, 2, dtype=torch.float32, seed=n) + 10 for n in (3000, 400))
        for _ in range(2):
            (gradient,) = torch.autograd.grad(
                kdejsd.jsd_loss(codes.requires_grad_(), centers, 0.5, reduction="sum"), codes
            )
            assert torch.tensor([1e-39]).mul(0.5).item() == (0 if flush else pytest.approx(5e-40, rel=1e-5))
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)
    subnormal = gradient.abs() < torch.finfo(torch.float32).smallest_normal  # p_t / p_e there is 1e-39 and less
    assert subnormal.all(1).sum() > 1000 and (flush or (gradient[subnormal.all(1)] != 0).any(1).sum() > 900)


@pytest.mark.parametrize("size", [(3, 20000, 4), (20000, 3, 4), (700, 900, 8), (5000, 64, 2)], ids=str)
def test_threads(size):
    """Any number of threads is right, and a number gives the same bits every time."""
    call = arguments("per center, weights", *size, torch.float32, "cpu")
    truth = value_and_gradients(reference.kde_log_prob, in_dtype(call, torch.float64))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            first, again = (value_and_gradients(kdejsd.kde_log_prob, call) for _ in range(2))
            for a, b, expected in zip(first, again, truth, strict=True):
                assert torch.equal(a, b) and worst(a, expected) < 5e-6
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads():
    query, centers = points(300, 5, dtype=torch.float32), points(2000, 5, dtype=torch.float32, seed=1)
    expected = kdejsd.kde_log_prob(query, centers, 0.5)
    found = [torch.empty(0)] * 4

    def work(i):
        for _ in range(5):
            found[i] = kdejsd.kde_log_prob(query, centers, 0.5)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(value, expected) for value in found)


def test_memory_does_not_grow_with_n_times_m():
    """A pass over 2000 x 50 000 pairs, 400 MB as one float array, in a few MiB (peak of the process, by the kernel)."""
    status = "/proc/self/clear_refs"
    try:
        query = points(2000, 4, dtype=torch.float32).requires_grad_()
        centers = points(50_000, 4, dtype=torch.float32, seed=1).requires_grad_()
        kdejsd.kde_log_prob(query[:10], centers[:10], 0.5).sum().backward()
        gc.collect()
        with open(status, "w") as file:
            file.write("5")  # sets the peak back to what is in use now
        before = _peak_kib()
    except OSError:
        pytest.skip(f"{status} cannot be written here")
    kdejsd.kde_log_prob(query, centers, 0.5).sum().backward()
    assert (_peak_kib() - before) < 4096 * torch.get_num_threads() + 4096


def _peak_kib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


# ----------------------------------------------------------------------------------------------------------------------
# Errors: the argument's name, what was expected, what came

Z, C = torch.zeros(4, 3), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("error", "text", "arguments", "keywords"),
    [
        (TypeError, "query must be a tensor, got list", ([[0.0]], C, 0.5), {}),
        (TypeError, "centers must be a tensor, got ndarray", (Z, np.zeros((5, 3)), 0.5), {}),
        (TypeError, "query must be float32.*got torch.int64", (Z.long(), C, 0.5), {}),
        (TypeError, "centers must have the dtype of query, torch.float32; got torch.float64", (Z, C.double(), 0.5), {}),
        (TypeError, "bandwidth must have the dtype of query", (Z, C, torch.tensor(0.5).double()), {}),
        (TypeError, "bandwidth must be a real number, got .0.5. of type str", (Z, C, "0.5"), {}),
        (TypeError, "bandwidth must be a real number, got True of type bool", (Z, C, True), {}),
        (ValueError, r"query must have shape \[..., points, l\], got \[3\]", (Z[0], C, 0.5), {}),
        (ValueError, r"centers must have shape .*got \[3\]", (Z, C[0], 0.5), {}),
        (ValueError, r"same number of dimensions l.*\[4, 3\] and centers \[5, 2\]", (Z, C[:, :2], 0.5), {}),
        (ValueError, "same number of dimensions l, at least 1", (Z[:, :0], C[:, :0], 0.5), {}),
        (ValueError, r"centers must hold at least one point, got shape \[0, 3\]", (Z, C[:0], 0.5), {}),
        (ValueError, "bandwidth must be positive and finite, got -0.3", (Z, C, -0.3), {}),
        (ValueError, "bandwidth must be positive and finite, got 0", (Z, C, 0), {}),
        (ValueError, "bandwidth must be positive and finite, got nan", (Z, C, math.nan), {}),
        (ValueError, "bandwidth must be positive and finite, got inf", (Z, C, math.inf), {}),
        (ValueError, r"bandwidth must be a number.*\[..., 5\].*got \[4\]", (Z, C, torch.ones(4)), {}),
        (ValueError, r"log_weights must have shape \[..., 5\].*got \[4\]", (Z, C, 0.5), {"log_weights": torch.ones(4)}),
        (TypeError, "log_weights must be a tensor, got list", (Z, C, 0.5), {"log_weights": [0.0] * 5}),
        (
            ValueError,
            r"dimensions of centers and bandwidth and log_weights must broadcast, got \[2\] and \[\] and \[3\]",
            (Z, C.expand(2, 5, 3), 0.5),
            {"log_weights": torch.zeros(3, 5)},
        ),
        (TypeError, "log_weights must have the dtype of query", (Z, C, 0.5), {"log_weights": torch.ones(5).double()}),
        (
            ValueError,
            "exclude_self=True needs as many query as centers, got 4 and 5",
            (Z, C, 0.5),
            {"exclude_self": True},
        ),
        (ValueError, "exclude_self needs at least 2 centers", (Z[:1], C[:1], 0.5), {"exclude_self": True}),
        (TypeError, "exclude_self must be a bool or an int64 tensor, got int", (Z, C, 0.5), {"exclude_self": 1}),
        (TypeError, "exclude_self must be.*torch.int32", (Z, C, 0.5), {"exclude_self": torch.zeros(4).int()}),
        (ValueError, r"exclude_self must have shape \[..., 4\]", (Z, C, 0.5), {"exclude_self": torch.zeros(5).long()}),
        (RuntimeError, "centers must be on the device of query, got centers on meta", (Z, C.to("meta"), 0.5), {}),
    ],
)
def test_errors(error, text, arguments, keywords):
    with pytest.raises(error, match=text):
        kdejsd.kde_log_prob(*arguments, **keywords)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("query must be finite, got 1 values", {"query": torch.tensor([[math.nan, 0.0]])}),
        ("centers must be finite, got 2 values", {"centers": torch.tensor([[math.inf, math.nan]])}),
        ("bandwidth must be positive and finite, got -1.0", {"bandwidth": torch.tensor(-1.0)}),
        ("log_weights must be below infinity", {"log_weights": torch.tensor([math.nan, 0.0, 0.0])}),
        ("exclude_self must hold -1 or the index of a center, 0 to 2; got 3 to 3", {"exclude_self": torch.tensor([3])}),
    ],
)
def test_values_are_checked_on_request(text, change, monkeypatch):
    call = {"query": torch.zeros(1, 2), "centers": torch.zeros(3, 2), "bandwidth": 0.5} | change
    kdejsd.kde_log_prob(**call)
    monkeypatch.setenv("KDEJSD_CHECK", "1")
    with pytest.raises(ValueError, match=text):
        kdejsd.kde_log_prob(**call)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kdejsd.kde_log_prob(points(4, 2).requires_grad_(), points(5, 2), 0.5).sum().backward()


# ----------------------------------------------------------------------------------------------------------------------
# CUDA alone; test_cuda_on_host.py runs the kernels' source without a device


@pytest.fixture
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"], indirect=True)
@pytest.mark.parametrize("size", [(1, 1, 16), (33, 300, 40), (300, 2000, 65), (130, 259, 17), (20, 100, 256)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_tensor_cores(size, offset, precision, device):
    """Without gradients for the centers: an error like float32's, or that of 11 bits where torch allows it."""
    call = arguments("scalar tensor", *size, torch.float32, device)
    call["centers"] = call["centers"].detach() + offset
    with torch.no_grad():
        call["query"] += offset
    plain = {k: v.detach().clone().requires_grad_(k != "centers") for k, v in call.items()}
    exact = {k: v.detach().double().requires_grad_(k != "centers") for k, v in call.items()}
    truth = value_and_gradients(reference.kde_log_prob, exact)
    yardsticks = value_and_gradients(reference.kde_log_prob, plain)
    ours = value_and_gradients(kdejsd.kde_log_prob, call)
    again = value_and_gradients(kdejsd.kde_log_prob, call)
    for i, (got, repeated, yardstick, expected) in enumerate(zip(ours, again, yardsticks, truth, strict=True)):
        assert torch.equal(got, repeated)
        if precision == "highest":
            assert worst(got, expected) <= (2 if i == 0 else 3) * worst(yardstick, expected) + 1.2e-6
        else:
            assert worst(got, expected) < (3e-4 if i == 0 else 3e-3)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("size", [(5000, 70, 8), (3000, 3, 200), (100, 20000, 40)], ids=str)
def test_cuda_gradients_are_the_same_every_time(size, device):
    """Also where the transposed pass is split over the queries."""
    call = arguments("per center, weights", *size, torch.float32, device)
    first = value_and_gradients(kdejsd.kde_log_prob, call)
    for _ in range(3):
        for again, expected in zip(value_and_gradients(kdejsd.kde_log_prob, call), first, strict=True):
            assert torch.equal(again, expected)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("dim", [8, 40])
@pytest.mark.parametrize("name", ["value", "gradients", "jsd_loss"])
def test_cuda_graph(name, dim, device):
    """Capturable: no synchronisation, no allocation outside of torch's pool."""
    query = points(100, dim, dtype=torch.float32, device=device).requires_grad_()
    centers = points(3000, dim, dtype=torch.float32, device=device, seed=1).requires_grad_(name == "gradients")

    def step(module, z, c):
        if name == "value":
            with torch.no_grad():
                return [module.kde_log_prob(z, c, 1.5)]
        if name == "jsd_loss":
            loss = module.jsd_loss(z, c, 1.5)
            return [loss, *torch.autograd.grad(loss, z)]
        value = module.kde_log_prob(z, c, 1.5)
        return [value, *torch.autograd.grad(value.sum(), (z, c))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(kdejsd, query, centers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(kdejsd, query, centers)
    with torch.no_grad():
        query.copy_(points(100, dim, device=device, seed=9))
    graph.replay()
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (query, centers)]
    for got, expected in zip(found, step(reference.kde, *wide), strict=True):
        assert worst(got, expected) < 5e-6


@pytest.mark.parametrize("exclude", [-(2**63), -2, 200, 2**63 - 1])
def test_an_excluded_index_that_no_center_has(exclude):
    """Any number may stand for none, also beyond the first tile."""
    query, centers = points(130, 3).requires_grad_(), points(200, 3, seed=1).requires_grad_()
    found = []
    for index in (exclude, -1):
        value = kdejsd.kde_log_prob(query, centers, 0.5, exclude_self=torch.full((130,), index))
        found.append((value, *torch.autograd.grad(value.sum(), (query, centers))))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)
