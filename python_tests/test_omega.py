"""The omega op: values and every gradient against float64, on shapes and values that break streamed sums."""

from __future__ import annotations

import gc
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from edges import LEVELS, at_edges, at_level, edges
from helpers import DEVICES, DTYPES, generator, points, worst
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import kdejsd
from kdejsd import reference

# pairs and reduction of every way to call it
CALLS = [(pairs, reduction) for pairs in ("halves", "all") for reduction in ("sum", "mean", "max", "none")]
DISTINCT = [call for call in CALLS if call[1] != "mean"]  # a mean is a sum that is divided
# Of every kind; those at the edges of what the kernels take at a time are below, as the build tells them.
SIZES = [
    (2, 1, 1),
    (4, 3, 2),
    (6, 70, 1),
    (50, 130, 3),
    (90, 1, 5),
    (100, 60, 45),
    (150, 33, 8),
    (150, 784, 10),
    (10, 3 * 64 * 64, 4),
]


def samples(b: int, d: int, dim: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return points(b, d, dtype=dtype, device=device, seed=1), points(b, dim, dtype=dtype, device=device, seed=2)


def omega_value(function, inputs, codes, pairs, reduction):
    found = function(inputs, codes, pairs=pairs, reduction=reduction)
    return found.value if reduction == "max" else found


def value_and_gradients(function, inputs, codes, pairs, reduction) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (inputs, codes)]
    value = omega_value(function, *leaves, pairs, reduction)
    upstream = torch.randn(value.shape, generator=generator(6), dtype=torch.float64).to(value.device, value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry of b."""
    if b.numel() == 0:
        return 0.0
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", CALLS, ids="-".join)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_is_the_reference(size, call, device):
    arguments = samples(*size, torch.float64, device)
    ours, truth = (value_and_gradients(f, *arguments, *call) for f in (kdejsd.omega, reference.omega))
    for got, expected in zip(ours, truth, strict=True):
        assert got.dtype == torch.float64 and got.shape == expected.shape
        assert relative(got, expected) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", [c for c in DISTINCT if c[1] != "max"], ids="-".join)
@pytest.mark.parametrize("size", [(150, 33, 8), (100, 200, 45), (70, 1, 2), (60, 784, 10)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_float32_error_is_at_most_that_of_plain_torch(size, call, offset, spread, device):
    """Twice plain PyTorch's own error, plus a few units in the last place; spread 1e-3 makes every pair a close one."""
    inputs, codes = samples(*size, torch.float32, device)
    inputs = inputs * spread + offset
    truth = value_and_gradients(reference.omega, inputs.double(), codes.double(), *call)
    plain = value_and_gradients(reference.omega, inputs, codes, *call)
    ours = value_and_gradients(kdejsd.omega, inputs, codes, *call)
    for got, yardstick, expected in zip(ours, plain, truth, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, expected) <= 2 * relative(yardstick, expected) + 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_a_close_pair_keeps_its_gradient(device):
    """Its weight is 1e8 times the others': the difference it multiplies must be exact."""
    inputs, codes = samples(200, 50, 6, torch.float32, device)
    with torch.no_grad():
        inputs[150] = inputs[3]
        inputs[150, 7] += 1e-4
    truth = value_and_gradients(reference.omega, inputs.double(), codes.double(), "all", "sum")
    for got, expected in zip(value_and_gradients(kdejsd.omega, inputs, codes, "all", "sum"), truth, strict=True):
        assert relative(got, expected) < 1e-6


def test_against_numpy():
    """An independent truth, pair by pair."""
    x, z = (t.numpy() for t in samples(10, 5, 3, torch.float64, "cpu"))

    def ratio(i, j):
        return np.linalg.norm(z[i] - z[j]) ** 2 / np.linalg.norm(x[i] - x[j]) ** 2

    halves = [ratio(i, i + 5) for i in range(5)]
    everything = {(i, j): ratio(i, j) for i in range(10) for j in range(i + 1, 10)}
    inputs, codes = torch.from_numpy(x), torch.from_numpy(z)
    np.testing.assert_allclose(kdejsd.omega(inputs, codes, reduction="none").numpy(), halves, rtol=1e-13)
    assert kdejsd.omega(inputs, codes).item() == pytest.approx(sum(halves), rel=1e-13)
    assert kdejsd.omega(inputs, codes, reduction="mean").item() == pytest.approx(sum(halves) / 5, rel=1e-13)
    best = kdejsd.omega(inputs, codes, reduction="max")
    assert best.indices.tolist() == [np.argmax(halves), np.argmax(halves) + 5]
    assert kdejsd.omega(inputs, codes, pairs="all").item() == pytest.approx(sum(everything.values()), rel=1e-13)
    mean = kdejsd.omega(inputs, codes, pairs="all", reduction="mean")
    assert mean.item() == pytest.approx(sum(everything.values()) / 45, rel=1e-13)
    value, indices = kdejsd.omega(inputs, codes, pairs="all", reduction="max")
    assert tuple(indices.tolist()) == max(everything, key=everything.get)
    assert value.item() == pytest.approx(max(everything.values()), rel=1e-13)
    matrix = kdejsd.omega(inputs, codes, pairs="all", reduction="none")
    assert torch.equal(matrix, matrix.T) and (matrix.diagonal() == 0).all()
    for (i, j), expected in everything.items():
        assert matrix[i, j].item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_linear_encoder(device):
    """f(x) = 3 x: every ratio is 9, and no gradient is left for an x that f moves along with it."""
    x = points(100, 20, device=device).requires_grad_()
    value = kdejsd.omega(x, 3 * x, pairs="all", reduction="mean")
    assert value.item() == pytest.approx(9, rel=1e-13)
    value.backward()
    assert x.grad.abs().max() < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS, ids="-".join)
def test_equal_inputs_count_for_nothing(call, dtype, device):
    """Also where their codes differ: neither inf nor NaN, in the value and in both gradients."""
    inputs, codes = samples(100, 7, 3, dtype, device)
    inputs[50:53] = inputs[0:3]  # pairs of the halves, and of all
    inputs[90] = inputs[4]
    ours = value_and_gradients(kdejsd.omega, inputs, codes, *call)
    truth = value_and_gradients(reference.omega, inputs.double(), codes.double(), *call)
    for got, expected in zip(ours, truth, strict=True):
        assert got.isfinite().all()
        assert relative(got, expected) < (1e-5 if dtype == torch.float32 else 1e-13)
    same = torch.ones(8, 7, dtype=dtype, device=device)
    for got in value_and_gradients(kdejsd.omega, same, codes[:8], *call):
        assert (got == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_upstream_gradient_of_what_counts_for_nothing(device):
    """A square root has one at the zeros of the matrix: the diagonal, and a pair of equal inputs."""
    inputs, codes = samples(100, 7, 3, torch.float64, device)
    inputs[60] = inputs[4]

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in (inputs, codes)]
        return torch.autograd.grad(function(*leaves, pairs="all", reduction="none").sqrt().sum(), leaves)

    for got, expected in zip(gradients(kdejsd.omega), gradients(reference.omega), strict=True):
        assert expected.isfinite().all() and worst(got, expected) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
def test_largest_of_equal_ratios_is_the_first(device):
    x = points(200, 3, device=device)
    assert kdejsd.omega(x, 2 * x[:, :1] * 0, pairs="all", reduction="max").indices.tolist() == [0, 1]
    assert kdejsd.omega(x, 0 * x, reduction="max").indices.tolist() == [0, 100]
    line = torch.arange(200.0, device=device).unsqueeze(1)
    codes = torch.zeros(200, 1, device=device)
    codes[60], codes[170] = 1, 1  # four neighbouring pairs with ratio 1
    assert kdejsd.omega(line, codes, pairs="all", reduction="max").indices.tolist() == [59, 60]
    codes[[59, 60, 61]] = 0
    assert kdejsd.omega(line, codes, pairs="all", reduction="max").indices.tolist() == [169, 170]


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_ratio_is_a_bound(device):
    """At most the squared spectral norm of a linear encoder, and nearly that on many samples of few dimensions."""
    weight = points(4, 2, device=device)
    x = points(400, 2, device=device, seed=1)
    value, (i, j) = kdejsd.omega(x, x @ weight.T, pairs="all", reduction="max")
    bound = torch.linalg.matrix_norm(weight, 2).square()
    assert 0.99 * bound < value <= bound * (1 + 1e-12)
    assert i < j
    torch.testing.assert_close(value, ((x[i] - x[j]) @ weight.T).square().sum() / (x[i] - x[j]).square().sum())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("argument", [0, 1])
def test_nan_in_nan_out(argument, dtype, device):
    for row in (0, 49, 99):
        arguments = samples(100, 7, 3, dtype, device)
        arguments[0][[50, 20]] = arguments[0][[0, 10]]  # a pair of equal inputs beside
        arguments[argument][row, 1] = math.nan
        for pairs, reduction in CALLS:
            value, *gradients = value_and_gradients(kdejsd.omega, *arguments, pairs, reduction)
            if reduction != "none":
                assert value.isnan()
                assert gradients[argument][row, 1].isnan()
        assert row in kdejsd.omega(*arguments, pairs="all", reduction="max").indices.tolist()
        assert row in kdejsd.omega(*arguments, reduction="max").indices.tolist()
        matrix = kdejsd.omega(*arguments, pairs="all", reduction="none")
        expected = torch.zeros(100, 100, dtype=torch.bool, device=device)
        expected[row], expected[:, row] = True, True
        assert torch.equal(matrix.isnan(), expected.fill_diagonal_(False))
        (gradient,) = torch.autograd.grad(
            kdejsd.omega(arguments[0].requires_grad_(), arguments[1], pairs="all"), arguments[0]
        )
        assert gradient.isnan().any(-1).all()  # every sample has a pair with it


@pytest.mark.parametrize("device", DEVICES)
def test_codes_of_equal_inputs_may_not_hide_nan(device):
    codes = torch.zeros(4, 2, device=device)
    codes[2, 0] = math.nan
    for pairs, reduction in CALLS:
        assert omega_value(kdejsd.omega, torch.ones(4, 3, device=device), codes, pairs, reduction).isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("b", [0, 1])
def test_without_pairs(b, device):
    inputs = torch.ones(b, 3, device=device, requires_grad=True)
    codes = torch.ones(b, 2, device=device, requires_grad=True)
    for pairs in ("halves", "all")[b:]:
        value = kdejsd.omega(inputs, codes, pairs=pairs)
        assert value.item() == 0
        for gradient, like in zip(torch.autograd.grad(value, (inputs, codes)), (inputs, codes), strict=True):
            assert torch.equal(gradient, torch.zeros_like(like))
        assert kdejsd.omega(inputs, codes, pairs=pairs, reduction="mean").isnan()
        with pytest.raises(ValueError, match=f'reduction="max" needs at least one pair, got {b} samples'):
            kdejsd.omega(inputs, codes, pairs=pairs, reduction="max")
        ratios = kdejsd.omega(inputs, codes, pairs=pairs, reduction="none")
        assert ratios.shape == ((b, b) if pairs == "all" else (0,)) and (ratios == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", CALLS, ids="-".join)
def test_images_and_strides(call, device):
    """Inputs of any shape, no tensor contiguous, upstream gradients with stride 0."""
    images = points(3, 4, 60, 5, device=device).permute(2, 0, 3, 1)
    codes = points(7, 120, device=device, seed=2).T[::2]
    assert not images.is_contiguous() and not codes.is_contiguous()
    leaves = [t.detach().requires_grad_() for t in (images, codes)]
    plain = [t.detach().contiguous().requires_grad_() for t in (images.flatten(1), codes)]
    ours = omega_value(kdejsd.omega, *leaves, *call).sum()
    expected = omega_value(reference.omega, *plain, *call).sum()
    assert worst(ours, expected) < 1e-13
    for got, wanted in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, plain), strict=True):
        assert worst(got.flatten(1), wanted) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype, device):
    inputs, codes = samples(20, 7, 3, dtype, device)
    for call in CALLS:
        value = omega_value(kdejsd.omega, inputs, codes, *call)
        assert value.dtype == torch.float32
        assert torch.equal(value, omega_value(kdejsd.omega, inputs.float(), codes.float(), *call))
        assert value_and_gradients(kdejsd.omega, inputs, codes, *call)[1].dtype == dtype


# ----------------------------------------------------------------------------------------------------------------------
# Autograd and tracing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", CALLS, ids="-".join)
def test_gradcheck(call, device):
    leaves = [t.requires_grad_() for t in samples(6, 4, 3, torch.float64, device)]
    assert gradcheck(lambda *a: omega_value(kdejsd.omega, *a, *call), leaves)
    assert gradgradcheck(lambda *a: omega_value(kdejsd.omega, *a, *call), leaves)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", CALLS, ids="-".join)
def test_second_derivative_is_that_of_plain_torch(call, device):
    def gradient_of_gradient(function):
        leaves = [t.requires_grad_() for t in samples(6, 4, 3, torch.float64, device)]
        first = torch.autograd.grad(omega_value(function, *leaves, *call).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)

    for got, expected in zip(gradient_of_gradient(kdejsd.omega), gradient_of_gradient(reference.omega), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pairs", ["halves", "all"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_one_gradient_alone(reduction, pairs, device):
    for wanted in (0, 1):
        leaves = list(samples(60, 9, 3, torch.float64, device))
        leaves[wanted].requires_grad_()
        ours, plain = (
            torch.autograd.grad(f(*leaves, pairs=pairs, reduction=reduction).sum(), leaves[wanted])[0]
            for f in (kdejsd.omega, reference.omega)
        )
        assert worst(ours, plain) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    leaves = [t.requires_grad_(requires_grad) for t in samples(6, 4, 3, torch.float64, device)]
    for all_pairs in (False, True):
        torch.library.opcheck(torch.ops.kdejsd.omega.default, (*leaves, all_pairs))
    torch.library.opcheck(torch.ops.kdejsd.omega_ratios.default, leaves)
    detached = [t.detach() for t in leaves]
    torch.library.opcheck(torch.ops.kdejsd.omega_largest.default, detached)
    grad = points(6, 6, device=device, seed=3)
    torch.library.opcheck(torch.ops.kdejsd.omega_ratios_backward.default, (grad, *detached, True, False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("call", DISTINCT, ids="-".join)
def test_compile_whole_graph(call, dynamic, device):
    torch.compiler.reset()
    # This one has no operator of ours, and Triton 3.6 fails on what the inductor of torch 2.11 makes of it on CUDA.
    without = dynamic or (call, device) == (("halves", "max"), "cuda")
    backend = "aot_eager" if without else "inductor"  # which makes C++ of what is not ours, and compiles it
    compiled = torch.compile(
        lambda x, z: omega_value(kdejsd.omega, x, z, *call).tanh().sum(),
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
    )
    for b in (10, 14):
        leaves = [t.requires_grad_() for t in samples(b, 4, 3, torch.float64, device)]
        eager = torch.autograd.grad(omega_value(kdejsd.omega, *leaves, *call).tanh().sum(), leaves)
        for got, expected in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", DISTINCT, ids="-".join)
def test_export(call, device):
    class Ratio(torch.nn.Module):
        def forward(self, inputs, codes):
            return omega_value(kdejsd.omega, inputs, codes, *call)

    arguments = samples(6, 4, 3, torch.float64, device)
    exported = torch.export.export(Ratio(), arguments).module()
    torch.testing.assert_close(exported(*arguments), omega_value(kdejsd.omega, *arguments, *call))


TRANSFORMS = {
    "func.grad": lambda f, x: torch.func.grad(lambda u: f(u).sum())(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(lambda u: f(u).sum())(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.linspace(0, 1, x.numel()).to(x).view_as(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x, x.sin()])),
    "compiled func.grad": lambda f, x: torch.compile(
        torch.func.grad(lambda u: f(u).sum()), fullgraph=True, backend="aot_eager"
    )(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("call", DISTINCT, ids="-".join)
def test_function_transforms(call, name, device):
    torch.compiler.reset()
    x, codes = samples(6, 4, 3, torch.float64, device)
    got, expected = (
        TRANSFORMS[name](lambda u, f=f: omega_value(f, u, codes, *call), x) for f in (kdejsd.omega, reference.omega)
    )
    torch.testing.assert_close(got, expected)
    assert (got != 0).any()


def test_vmap_is_a_loop():
    stack, codes = points(3, 6, 4), points(6, 2, seed=1)
    for call in CALLS:
        got = torch.func.vmap(lambda u, call=call: omega_value(kdejsd.omega, u, codes, *call))(stack)
        torch.testing.assert_close(got, torch.stack([omega_value(kdejsd.omega, u, codes, *call) for u in stack]))


def test_forward_mode_is_not_dropped():
    x, codes = samples(6, 4, 3, torch.float64, "cpu")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.linspace(0, 1, 24).double().view(6, 4))
        for call in CALLS:
            tangents = [
                forward_ad.unpack_dual(omega_value(f, dual, codes, *call)).tangent
                for f in (kdejsd.omega, reference.omega)
            ]
            torch.testing.assert_close(*tangents)
        for operator, arguments in (
            (torch.ops.kdejsd.omega, (dual, codes, True)),
            (torch.ops.kdejsd.omega_ratios, (dual, codes)),
            (torch.ops.kdejsd.omega_largest, (dual, codes)),
        ):
            with pytest.raises(RuntimeError, match="forward-mode"):
                operator(*arguments)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for pairs, reduction in CALLS:
        shape = () if reduction != "none" else (4,) if pairs == "halves" else (8, 8)
        inputs, codes = torch.empty(8, 2, 3, device="meta"), torch.empty(8, 2, device="meta")
        value = omega_value(kdejsd.omega, inputs, codes, pairs, reduction)
        assert value.shape == shape and value.device.type == "meta"
        with FakeTensorMode():
            inputs = torch.randn(8, 3, requires_grad=True)
            value = omega_value(kdejsd.omega, inputs, torch.randn(8, 2), pairs, reduction)
            assert value.shape == shape
            value.sum().backward()
            assert inputs.grad.shape == (8, 3)


def test_inference_mode():
    with torch.inference_mode():
        assert kdejsd.omega(points(4, 2), points(4, 2), pairs="all").shape == ()


# ----------------------------------------------------------------------------------------------------------------------
# The machine: instruction sets, threads, memory


def error_beside_float64(inputs: torch.Tensor, codes: torch.Tensor, call: tuple[str, str]) -> float:
    """The largest of value and gradients."""
    ours = value_and_gradients(kdejsd.omega, inputs, codes, *call)
    truth = value_and_gradients(reference.omega, inputs.double(), codes.double(), *call)
    return max(relative(got, expected) for got, expected in zip(ours, truth, strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(level, dtype):
    with at_level(level):
        for call in CALLS:
            inputs, codes = samples(150, 71, 5, dtype, "cpu")
            inputs[149] = inputs[3]
            assert error_beside_float64(inputs, codes, call) < (3e-6 if dtype == torch.float32 else 1e-13)
            inputs[40, 3] = math.nan
            assert omega_value(kdejsd.omega, inputs, codes, *call).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@at_edges("omega_samples")
def test_edges_of_samples(size, level, dtype):
    with at_level(level):
        for call in DISTINCT:
            b = 2 * size if call[0] == "halves" else max(2, size)
            assert error_beside_float64(*samples(b, 7, 3, dtype, "cpu"), call) < (
                3e-6 if dtype == torch.float32 else 1e-13
            )


@pytest.mark.parametrize("dtype", DTYPES)
@at_edges("omega_dims")
def test_edges_of_dimensions(size, level, dtype):
    """Of the inputs, and of the codes."""
    with at_level(level):
        for call in DISTINCT:
            for dims in ((size, 2), (2, size)):
                assert error_beside_float64(*samples(52, *dims, dtype, "cpu"), call) < (
                    3e-6 if dtype == torch.float32 else 1e-13
                )


@at_edges("omega_all_dims")
def test_edges_of_groups(size, level):
    """One panel more than is a group in so many dimensions, by one thread, whose block has them all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with at_level(level):
            inputs, codes = samples(edges("omega_samples")[-1], size - 4, 4, torch.float32, "cpu")
            assert error_beside_float64(inputs, codes, ("all", "sum")) < 3e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(400, 30, 5), (1000, 3, 2), (120, 500, 3), (2000, 40, 4)], ids=str)
def test_threads(size):
    """Any number of threads is right, and a number gives the same bits every time."""
    inputs, codes = samples(*size, torch.float32, "cpu")
    truths = {call: value_and_gradients(kdejsd.omega, inputs.double(), codes.double(), *call) for call in CALLS}
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for call, truth in truths.items():
                first, again = (value_and_gradients(kdejsd.omega, inputs, codes, *call) for _ in range(2))
                for a, b, expected in zip(first, again, truth, strict=True):
                    assert torch.equal(a, b) and relative(a, expected) < 1e-5
    finally:
        torch.set_num_threads(before)


def test_memory_does_not_grow_with_the_pairs():
    """All pairs of 8000 samples, 256 MB as one float array: in some copies of the arguments, 2.3 MB."""
    inputs, codes = (t.requires_grad_() for t in samples(8000, 64, 8, torch.float32, "cpu"))
    kdejsd.omega(inputs[:10], codes[:10], pairs="all").backward()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
        before = _peak_kib()
    except OSError:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    kdejsd.omega(inputs, codes, pairs="all").backward()
    assert _peak_kib() - before < 20_000


def _peak_kib() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# ----------------------------------------------------------------------------------------------------------------------
# Errors: the argument's name, what was expected, what came

X, Z = torch.zeros(4, 3), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("error", "text", "arguments", "keywords"),
    [
        (TypeError, "inputs must be a tensor, got list", ([[0.0]], Z), {}),
        (TypeError, "codes must be a tensor, got ndarray", (X, np.zeros((4, 2))), {}),
        (TypeError, "inputs must be float32.*got torch.int64", (X.long(), Z), {}),
        (TypeError, "codes must have the dtype of inputs, torch.float32; got torch.float64", (X, Z.double()), {}),
        (ValueError, r"inputs must have shape \[b, ...\] with at least 2 dimensions, got \[4\]", (X[:, 0], Z), {}),
        (ValueError, r"codes must have shape \[b, l\].*got \[4, 2, 1\]", (X, Z.unsqueeze(-1)), {}),
        (ValueError, "as many samples, got 4 and 3", (X, Z[:3]), {}),
        (ValueError, "at least one number per sample, got 0 and 2", (X[:, :0], Z), {}),
        (ValueError, "at least one number per sample, got 3 and 0", (X, Z[:, :0]), {}),
        (ValueError, 'pairs="halves" needs an even number of samples, got 3', (X[:3], Z[:3]), {}),
        (ValueError, "pairs must be one of halves, all; got 'some'", (X, Z), {"pairs": "some"}),
        (ValueError, "reduction must be one of sum, mean, max, none; got None", (X, Z), {"reduction": None}),
        (RuntimeError, "codes must be on the device of inputs, got codes on meta", (X, Z.to("meta")), {}),
    ],
)
def test_errors(error, text, arguments, keywords):
    with pytest.raises(error, match=text):
        kdejsd.omega(*arguments, **keywords)


def test_values_are_checked_on_request(monkeypatch):
    bad = X.clone()
    bad[0, 0], bad[1, 1] = math.nan, math.inf
    kdejsd.omega(bad, Z)
    monkeypatch.setenv("KDEJSD_CHECK", "1")
    with pytest.raises(ValueError, match="inputs must be finite, got 2 values that are NaN or infinite"):
        kdejsd.omega(bad, Z)
    with pytest.raises(ValueError, match="codes must be finite, got 2 values"):
        kdejsd.omega(X, bad, pairs="all", reduction="max")


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in CALLS:
            value_and_gradients(kdejsd.omega, *samples(6, 4, 3, torch.float32, "cpu"), *call)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("call", CALLS, ids="-".join)
def test_cuda_graph(call, device):
    """Capturable: no synchronisation, no allocation outside of torch's pool."""
    inputs, codes = samples(300, 50, 4, torch.float32, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        kdejsd.omega(inputs, codes, pairs=call[0], reduction=call[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        value = omega_value(kdejsd.omega, inputs, codes, *call)
    inputs.copy_(points(300, 50, device=device, seed=9))
    graph.replay()
    expected = omega_value(reference.omega, inputs.double(), codes.double(), *call)
    assert relative(value, expected) < 1e-5
