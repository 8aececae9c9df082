"""The nearest op: distance, index and gradient against all pairs, on what a search by boxes can get wrong."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from edges import LEVELS, at_edges, at_level, edges
from helpers import DEVICES, DTYPES, generator, points
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import kdejsd
from kdejsd import reference
from kdejsd._native import native
from kdejsd.ops.nearest import _operator

# Of every kind; those at the edges of what the kernels take at a time are below, as the build tells them.
SIZES = [
    (2, 1),
    (3, 2),
    (36, 3),
    (70, 10),
    (250, 2),
    (700, 4),
    (1000, 17),
    (90, 111),
    (5, 1000),
]


def labels(*shape: int, classes: int = 3, device: str = "cpu", seed: int = 7) -> torch.Tensor:
    return torch.randint(classes, shape, generator=generator(seed)).to(device)


def lattice(n: int, dim: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """Small integers: every squared distance is exact in any order of summation, and many are equal."""
    return torch.randint(-3, 4, (n, dim), generator=generator(seed)).to(device, dtype)


def all_pairs(latents: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distance and index by comparing everything, in float64."""
    wide = latents.detach().double()
    squares = (wide.unsqueeze(1) - wide).square().sum(-1)
    squares = torch.where(classes.unsqueeze(1) == classes, math.inf, squares)
    least, index = squares.min(1)
    return least, torch.where(least.isinf(), -1, index)


def assert_nearest(latents: torch.Tensor, classes: torch.Tensor) -> None:
    """Whatever ties rounding makes or breaks: the sample found is of another class, and no other is nearer."""
    distance, index = kdejsd.nearest_other_class(latents, classes)
    least, expected = all_pairs(latents, classes)
    assert torch.equal(index < 0, expected < 0)
    found = (index >= 0).nonzero().squeeze(1)
    assert (classes[index[found]] != classes[found]).all()
    wide = latents.detach().double()
    exact = (wide[found] - wide[index[found]]).square().sum(-1)
    tolerance = 4 * (latents.shape[1] + 2) * torch.finfo(distance.dtype).eps
    assert (exact <= least[found] * (1 + tolerance)).all()
    assert ((distance[found].double() - least[found].sqrt()).abs() <= tolerance * least[found].sqrt()).all()


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_distance_and_index(size, dtype, device):
    classes = labels(size[0], device=device)
    assert_nearest(points(*size, dtype=dtype, device=device), classes)
    exact = lattice(*size, dtype, device)
    assert torch.equal(kdejsd.nearest_other_class(exact, classes).index, all_pairs(exact, classes)[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_far_from_the_origin(offset, dtype, device):
    """Differences keep what the expanded square loses: at 3000 it would be good to one unit."""
    latents = (points(500, 3, device=device) + offset).to(dtype)
    assert_nearest(latents, labels(500, device=device))


CLASSES = {
    "half-space": lambda x: (x[:, 0] > 0).long(),
    "slabs": lambda x: (2 * x[:, 0]).floor().long() * 2**40,  # further apart than an int32 holds
    "one odd sample": lambda x: (torch.arange(len(x), device=x.device) == len(x) // 2).long(),
    "all different": lambda x: torch.arange(len(x), device=x.device) - len(x) // 2,
    "extreme labels": lambda x: torch.where(x[:, 0] > 0.3, torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [(1500, 2), (1100, 6)], ids=str)
def test_divisions_into_classes(size, name, device):
    for latents in (points(*size, device=device), lattice(*size, torch.float32, device)):
        classes = CLASSES[name](latents)
        found = kdejsd.nearest_other_class(latents, classes)
        assert torch.equal(found.index, all_pairs(latents, classes)[1])


@pytest.mark.parametrize("device", DEVICES)
def test_duplicates_and_ties(device):
    latents = torch.zeros(200, 3, device=device)
    found = kdejsd.nearest_other_class(latents, torch.arange(200, device=device) // 50)
    assert (found.distance == 0).all()
    assert found.index.tolist() == [50] * 50 + [0] * 150


@pytest.mark.parametrize("device", DEVICES)
def test_a_single_class_and_empty_inputs(device):
    found = kdejsd.nearest_other_class(points(100, 2, device=device), torch.full((100,), 5, device=device))
    assert found.distance.isposinf().all() and (found.index == -1).all()
    for shape in ((0, 3), (4, 0, 3), (0, 5, 3)):
        latents = torch.zeros(shape, device=device)
        for f in (kdejsd.nearest_other_class, reference.nearest_other_class):
            found = f(latents, torch.zeros(shape[:-1], dtype=torch.int64, device=device))
            assert found.distance.shape == found.index.shape == shape[:-1]
            assert found.distance.dtype == torch.float32 and found.index.dtype == torch.int64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(), (17,), (17, 18, 400), (17, 3, 5)])
def test_not_finite(where, value, dtype, device):
    """Such a sample, and whoever might have it for a neighbour, is NaN; its own class is not concerned."""
    latents, classes = lattice(600, 2, dtype, device), labels(600, device=device)
    classes[[3, 5, 17]] = torch.tensor([0, 1, 0], device=device)
    classes[[18, 400]] = 0
    latents[list(where), 1] = value
    found, expected = (f(latents, classes) for f in (kdejsd.nearest_other_class, reference.nearest_other_class))
    torch.testing.assert_close(found.distance, expected.distance, equal_nan=True)
    assert torch.equal(found.index, expected.index)
    bad = torch.zeros(600, dtype=torch.bool, device=device)
    bad[list(where)] = True
    for other in set(classes[bad].tolist()):
        bad |= classes != other
    assert torch.equal(found.distance.isnan(), bad) and torch.equal(found.index == -1, bad)
    assert found.distance[~bad].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_squares_beyond_the_dtype(device):
    latents = torch.tensor([[0.0], [1e30], [-1e30], [1.0]], device=device)
    found = kdejsd.nearest_other_class(latents, torch.tensor([0, 1, 2, 0], device=device))
    assert found.distance.isposinf().all() and (found.index == -1).all()
    found = kdejsd.nearest_other_class(latents.double(), torch.tensor([0, 1, 2, 0], device=device))
    assert found.index.tolist() == [1, 0, 0, 1]  # 1e30 - 1 is 1e30: a tie


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "label_shape"), [((4, 30, 3), (4, 30)), ((2, 1, 30, 3), (3, 30)), ((30, 3), (2, 30)), ((2, 30, 3), (30,))]
)
def test_batches(shape, label_shape, device):
    latents = points(*shape, device=device).requires_grad_()
    classes = labels(*label_shape, device=device)
    found, expected = (f(latents, classes) for f in (kdejsd.nearest_other_class, reference.nearest_other_class))
    assert torch.equal(found.index, expected.index.expand(found.index.shape))
    torch.testing.assert_close(found.distance, expected.distance.expand(found.distance.shape))
    for ours, plain in zip(*(torch.autograd.grad(r.distance.sum(), latents) for r in (found, expected)), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_not_contiguous(device):
    wide = points(4, 300, device=device)
    latents, classes = wide.T[::2, 1:], labels(300, device=device)[::2]
    assert not latents.is_contiguous() and not classes.is_contiguous()
    found = kdejsd.nearest_other_class(latents, classes)
    assert torch.equal(found.index, all_pairs(latents, classes)[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype, device):
    latents = points(60, 3, dtype=dtype, device=device).requires_grad_()
    found = kdejsd.nearest_other_class(latents, labels(60, device=device))
    wide = kdejsd.nearest_other_class(latents.float(), labels(60, device=device))
    assert found.distance.dtype == torch.float32
    assert torch.equal(found.distance, wide.distance) and torch.equal(found.index, wide.index)
    found.distance.sum().backward()
    assert latents.grad.dtype == dtype


def test_against_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    latents, classes = points(3000, 3), labels(3000, classes=4)
    distance, index = kdejsd.nearest_other_class(latents, classes)
    for c in range(4):
        own, other = (classes == c).numpy(), (classes != c).numpy().nonzero()[0]
        expected, at = neighbors.KDTree(latents.numpy()[other]).query(latents.numpy()[own])
        np.testing.assert_allclose(distance.numpy()[own], expected[:, 0], rtol=1e-12)
        np.testing.assert_array_equal(index.numpy()[own], other[at[:, 0]])


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives and transforms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 1), (36, 2), (150, 7)], ids=str)
def test_gradient(size, dtype, device):
    assert_gradient(size, dtype, device)


def assert_gradient(size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    latents, classes = points(*size, dtype=dtype, device=device).requires_grad_(), labels(size[0], device=device)
    upstream = points(size[0], dtype=dtype, device=device, seed=3)
    distance = kdejsd.nearest_other_class(latents, classes).distance
    (gradient,) = torch.autograd.grad(distance, latents, upstream.where(distance.isfinite(), 0))
    wide = latents.detach().double().requires_grad_()
    distance = reference.nearest_other_class(wide, classes).distance
    (expected,) = torch.autograd.grad(distance, wide, upstream.double().where(distance.isfinite(), 0))
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_where_there_is_none(device):
    latents = torch.tensor([[1.0, 2.0], [1.0, 2.0], [math.nan, 0.0]], device=device, requires_grad=True)
    kdejsd.nearest_other_class(latents[:2], torch.tensor([0, 1], device=device)).distance.sum().backward()
    assert (latents.grad == 0).all()  # at distance 0
    kdejsd.nearest_other_class(latents[:2], torch.tensor([1, 1], device=device)).distance.sum().backward()
    assert (latents.grad == 0).all()  # at distance inf
    kdejsd.nearest_other_class(latents, torch.tensor([0, 1, 1], device=device)).distance.nansum().backward()
    assert latents.grad[:2].isfinite().all()  # a NaN keeps to itself


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_and_gradgradcheck(device):
    latents, classes = points(12, 3, device=device).requires_grad_(), labels(12, device=device)

    def function(x):
        return kdejsd.nearest_other_class(x, classes).distance

    assert gradcheck(function, (latents,))
    assert gradgradcheck(function, (latents,))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_is_deterministic(device):
    """All samples have the same neighbour: its gradient is one long sum."""
    latents = points(5000, 2, dtype=torch.float32, device=device).requires_grad_()
    classes = torch.zeros(5000, dtype=torch.int64, device=device)
    classes[1234] = 1
    first, second = (
        torch.autograd.grad(kdejsd.nearest_other_class(latents, classes).distance.square().sum(), latents)[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    latents = points(2, 9, 3, device=device).requires_grad_(requires_grad)
    torch.library.opcheck(_operator, (latents, labels(2, 9, device=device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_whole_graph(dynamic, device):
    torch.compiler.reset()

    def function(latents, classes):
        found = kdejsd.nearest_other_class(latents, classes)
        return found.distance.tanh().sum(), found.index

    backend = "aot_eager" if dynamic else "inductor"  # which makes C++ of what is not ours, and compiles it
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (40, 53):
        latents, classes = points(n, 3, device=device).requires_grad_(), labels(n, device=device)
        (value, index), (expected, expected_index) = compiled(latents, classes), function(latents, classes)
        assert torch.equal(index, expected_index)
        got, wanted = (torch.autograd.grad(v, latents)[0] for v in (value, expected))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_export(device):
    class Radius(torch.nn.Module):
        def forward(self, latents, classes):
            return kdejsd.nearest_other_class(latents, classes).distance

    inputs = (points(6, 3, device=device), labels(6, device=device))
    exported = torch.export.export(Radius(), inputs)
    assert any("kdejsd.nearest" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*inputs), kdejsd.nearest_other_class(*inputs).distance)


TRANSFORMS = {
    "func.grad": lambda f, x: torch.func.grad(lambda u: f(u).sum())(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.cos(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x.sin(), -x])),
    "compiled func.grad": lambda f, x: torch.compile(
        torch.func.grad(lambda u: f(u).sum()), fullgraph=True, backend="aot_eager"
    )(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, device):
    x, classes = points(9, 3, device=device), labels(9, device=device)
    got, expected = (
        TRANSFORMS[name](lambda u, f=f: f(u, classes).distance, x)
        for f in (kdejsd.nearest_other_class, reference.nearest_other_class)
    )
    torch.testing.assert_close(got, expected)
    assert (got != 0).any()


@pytest.mark.parametrize("device", DEVICES)
def test_hessian(device):
    """Against the formula: (I - u u^T) / distance for the sample and its neighbour, their signs opposite."""
    x, classes = points(2, 3, device=device), torch.tensor([0, 1], device=device)
    hessian = torch.func.hessian(lambda u: kdejsd.nearest_other_class(u, classes).distance[0])(x)
    difference = x[0] - x[1]
    block = (torch.eye(3, device=device) - torch.outer(difference, difference) / difference.square().sum()).to(x)
    block = block / difference.norm()
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(hessian[i, :, j], block if i == j else -block)


def test_forward_mode_is_not_dropped():
    x, classes = points(9, 3), labels(9)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        tangent = forward_ad.unpack_dual(kdejsd.nearest_other_class(dual, classes).distance).tangent
        expected = forward_ad.unpack_dual(reference.nearest_other_class(dual, classes).distance).tangent
    torch.testing.assert_close(tangent, expected)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = kdejsd.nearest_other_class(torch.empty(4, 7, 3, device="meta"), labels(7).to("meta"))
    assert meta.distance.shape == meta.index.shape == (4, 7) and meta.index.device.type == "meta"
    with FakeTensorMode():
        latents = torch.randn(7, 3, requires_grad=True)
        kdejsd.nearest_other_class(latents, torch.zeros(7, dtype=torch.int64)).distance.sum().backward()
        assert latents.grad.shape == (7, 3)


def test_inference_mode():
    with torch.inference_mode():
        assert kdejsd.nearest_other_class(points(40, 2), labels(40)).distance.shape == (40,)


# ----------------------------------------------------------------------------------------------------------------------
# The machine: instruction sets, threads, memory


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(level, dtype):
    with at_level(level):
        for size in SIZES:
            test_distance_and_index(size, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@at_edges("nearest_samples")
def test_edges_of_samples(size, level, dtype):
    with at_level(level):
        test_distance_and_index((size, 3), dtype, "cpu")
        assert_gradient((size, 3), dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@at_edges("nearest_dims")
def test_edges_of_dimensions(size, level, dtype):
    """As many, and the samples far apart in the last one alone."""
    latents, classes = points(300, size, dtype=dtype), labels(300)
    latents[:, :-1] /= 100
    with at_level(level):
        assert_nearest(latents, classes)
        assert_gradient((300, size), dtype, "cpu")


@pytest.mark.parametrize("size", edges("nearest_ordered_samples"))
def test_edges_of_samples_that_are_put_in_order(size):
    exact, classes = lattice(size, 2, torch.float32), labels(size)
    assert torch.equal(kdejsd.nearest_other_class(exact, classes).index, all_pairs(exact, classes)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 12])
def test_same_bits_for_any_number_of_threads(dim, dtype):
    latents, classes = points(6000, dim, dtype=dtype), labels(6000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(kdejsd.nearest_other_class(latents, classes))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.index, found[0].index) and torch.equal(other.distance, found[0].distance)


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_boxes_pass_over_nothing_at_their_bounds(dim):
    """float32 coordinates with few digits, many at equal distances and on the sides of boxes, rounded differently
    from the exact sums: the search finds what the reference's own float32 sums, in the same order, find."""
    latents = (points(1500, dim, dtype=torch.float32) * 8).round() / 7
    classes = (latents[:, 0] > 0.1).long()
    squares = torch.zeros(1500, 1500)
    for k in range(dim):  # each product and sum rounded once: exact products of float32 in float64, then rounded
        difference = latents[:, None, k] - latents[:, k]
        fused = difference.double().square() + squares.double()
        squares = fused.float() if native().level() != "base" else squares + difference.square()
    squares = squares.masked_fill(classes.unsqueeze(1) == classes, math.inf)
    assert torch.equal(kdejsd.nearest_other_class(latents, classes).index, squares.argmin(1))


def test_memory_does_not_grow_with_the_pairs():
    """30 000 samples: all pairs would be 3.6 GB as float32."""
    machine = pytest.importorskip("resource")
    latents, classes = points(30_000, 2, dtype=torch.float32), labels(30_000)
    before = machine.getrusage(machine.RUSAGE_SELF).ru_maxrss
    kdejsd.nearest_other_class(latents, classes)
    assert machine.getrusage(machine.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


# ----------------------------------------------------------------------------------------------------------------------
# Errors

X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "latents must be a tensor, got list", ([[0.0]], Y)),
        (TypeError, "labels must be a tensor, got list", (X, [0] * 4)),
        (TypeError, "latents must be float32.*got torch.int64", (X.long(), Y)),
        (TypeError, "labels must be int64, got torch.int32", (X, Y.int())),
        (TypeError, "labels must be int64, got torch.float32", (X, Y.float())),
        (ValueError, r"latents must have shape \[..., N, d\], d at least 1; got \[3\]", (X[0], Y)),
        (ValueError, r"latents must have shape .*got \[4, 0\]", (X[:, :0], Y)),
        (ValueError, r"labels must have shape \[..., 4\], one per sample; got \[3\]", (X, Y[:3])),
        (ValueError, r"labels must have shape .*got \[\]", (X, Y[0])),
        (ValueError, "leading dimensions of latents and labels must broadcast", (X.expand(2, 4, 3), Y.expand(3, 4))),
        (RuntimeError, "labels must be on the device of latents, got labels on meta", (X, Y.to("meta"))),
    ],
)
def test_errors(error, text, arguments):
    with pytest.raises(error, match=text):
        kdejsd.nearest_other_class(*arguments)


def test_values_are_checked_on_request(monkeypatch):
    latents = torch.tensor([[math.nan, 0.0], [math.inf, 0.0]])
    kdejsd.nearest_other_class(latents, Y[:2])
    monkeypatch.setenv("KDEJSD_CHECK", "1")
    with pytest.raises(ValueError, match="latents must be finite, got 2 values"):
        kdejsd.nearest_other_class(latents, Y[:2])


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kdejsd.nearest_other_class(points(40, 2).requires_grad_(), labels(40)).distance.sum().backward()


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("size", [(100, 3), (20_000, 2), (3000, 40), (500, 300)], ids=str)
def test_cuda_finds_what_the_cpu_finds(size, device):
    latents, classes = lattice(*size, torch.float32), labels(size[0])
    ours = kdejsd.nearest_other_class(latents.to(device), classes.to(device)).index
    assert torch.equal(ours.cpu(), kdejsd.nearest_other_class(latents, classes).index)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_cuda_graph(device):
    latents, classes = points(3000, 8, dtype=torch.float32, device=device), labels(3000, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        kdejsd.nearest_other_class(latents, classes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        found = kdejsd.nearest_other_class(latents, classes)
    latents.copy_(points(3000, 8, device=device, seed=9))
    graph.replay()
    assert torch.equal(found.index, all_pairs(latents, classes)[1])
