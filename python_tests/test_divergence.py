"""jsd_loss and jsd: against plain PyTorch on every option and gradient, closed forms, and where exponentials end."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from helpers import DEVICES, DTYPES, generator, points, worst
from scipy.integrate import quad
from scipy.stats import norm
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal, Uniform

import kdejsd
from kdejsd import GaussianMixture, StandardNormal, reference
from kdejsd.divergence import DIVERGENCES as TABLE
from kdejsd.ops.kde import normal_divergence_terms

LOG2 = math.log(2)
DIM = 3
DIVERGENCES = list(TABLE)
REDUCTIONS = ["mean", "sum", "none"]
EXCLUSIONS = ["none", "self", "index"]


def normal(dim: int, variance: float = 1.0, device: str = "cpu") -> Independent:
    mean = torch.zeros(dim, dtype=torch.float64, device=device)
    return Independent(Normal(mean, math.sqrt(variance), validate_args=False), 1, validate_args=False)


def mixture(means, scales, weights) -> MixtureSameFamily:
    components = Independent(Normal(means, scales.unsqueeze(-1)), 1)
    return MixtureSameFamily(Categorical(weights), components, validate_args=False)


def target_and_truth(name: str, device: str = "cpu"):
    """A target, and the same law by torch.distributions in float64."""
    means, scales = points(4, DIM, device=device, seed=11), torch.linspace(0.5, 1.2, 4, dtype=torch.float64).to(device)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, device=device)
    factor = torch.eye(DIM, dtype=torch.float64, device=device) + 0.3 * points(DIM, DIM, device=device, seed=12).tril()
    multivariate = MultivariateNormal(means[0], covariance_matrix=factor @ factor.T, validate_args=False)
    independent = Independent(Normal(means[1], scales[:DIM], validate_args=False), 1, validate_args=False)
    return {
        "none": (None, normal(DIM, 1.0, device)),
        "standard normal": (StandardNormal(DIM), normal(DIM, 1.0, device)),
        "smoothed": (StandardNormal(DIM).smoothed(0.7), normal(DIM, 1.49, device)),
        "mixture": (GaussianMixture(means, scales, weights), mixture(means, scales, weights)),
        "multivariate normal": (multivariate, multivariate),
        "independent normal": (independent, independent),
    }[name]


TARGETS = ["none", "standard normal", "smoothed", "mixture", "multivariate normal", "independent normal"]
NORMALS = TARGETS[:3]


def arguments(exclusion: str = "none", device: str = "cpu", n: int = 23, m: int = 23, dim: int = DIM) -> dict:
    """One call; everything that can have a gradient requires it."""
    call = {
        "codes": points(n, dim, device=device, seed=1).requires_grad_(),
        "lagged": points(m, dim, device=device, seed=2).requires_grad_(),
        "bandwidth": torch.linspace(0.5, 1.1, m, dtype=torch.float64).to(device).requires_grad_(),
        "log_weights": points(m, seed=4).log_softmax(0).to(device).requires_grad_(),
    }
    if exclusion == "self":
        call["exclude_self"] = True
    if exclusion == "index":
        call["exclude_self"] = torch.randint(-1, m, (n,), generator=generator(5)).to(device)
    return call


def fresh(call: dict, dtype: torch.dtype, leaves: tuple[str, ...]) -> dict:
    """Copies the call, with new leaves of a dtype, of which those named require their gradient."""
    return {
        k: v.detach().to(dtype).requires_grad_(k in leaves)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for k, v in call.items()
    }


def value_and_gradients(function, call: dict) -> list[torch.Tensor]:
    value = function(**call)
    upstream = torch.randn(value.shape, generator=generator(6), dtype=torch.float64).to(value.device, value.dtype)
    leaves = [v for v in call.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


ALL = ("codes", "lagged", "bandwidth", "log_weights", "target_samples")
CODES = ("codes",)

# ----------------------------------------------------------------------------------------------------------------------
# Against plain PyTorch


def assert_is_the_reference(call: dict, target, truth, count: int) -> torch.Tensor:
    """The value, which with its gradients makes `count` tensors, all of them the reference's; in float64."""
    ours = value_and_gradients(kdejsd.jsd_loss, call | {"target": target})
    expected = value_and_gradients(reference.jsd_loss, call | {"target": truth})
    assert len(ours) == count
    for got, wanted in zip(ours, expected, strict=True):
        assert got.dtype == torch.float64 and got.shape == wanted.shape
        assert worst(got, wanted) < 1e-12
    return ours[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [ALL, CODES], ids=["all gradients", "codes only"])
@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", TARGETS)
def test_loss_is_the_reference(name, divergence, reduction, exclusion, leaves, device):
    target, truth = target_and_truth(name, device)
    options = {"divergence": divergence, "reduction": reduction}
    call = fresh(arguments(exclusion, device), torch.float64, leaves)
    value = assert_is_the_reference(call | options, target, truth, 5 if leaves is ALL else 2)
    with torch.no_grad():
        assert worst(kdejsd.jsd_loss(**call, **options, target=target), value) < 1e-14


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize("name", TARGETS)
def test_loss_with_target_samples_is_the_reference(name, exclusion, device):
    target, truth = target_and_truth(name, device)
    call = arguments(exclusion, device) | {"target_samples": points(31, DIM, device=device, seed=7).requires_grad_()}
    ours = value_and_gradients(kdejsd.jsd_loss, call | {"target": target})
    expected = value_and_gradients(reference.jsd_loss, call | {"target": truth})
    assert len(ours) == 6
    for got, wanted in zip(ours, expected, strict=True):
        assert got.shape == wanted.shape and worst(got, wanted) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TARGETS)
def test_jsd_is_the_reference(name, device):
    target, truth = target_and_truth(name, device)
    call = {
        "samples": points(23, DIM, device=device, seed=1).requires_grad_(),
        "centers": points(19, DIM, device=device, seed=2).requires_grad_(),
        "bandwidth": torch.tensor(0.6, dtype=torch.float64, device=device, requires_grad=True),
        "target_samples": points(31, DIM, device=device, seed=7).requires_grad_(),
    }
    ours = value_and_gradients(kdejsd.jsd, call | {"target": target})
    for got, wanted in zip(ours, value_and_gradients(reference.jsd, call | {"target": truth}), strict=True):
        assert got.shape == wanted.shape and worst(got, wanted) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TARGETS)
def test_gradcheck(name, device):
    target = target_and_truth(name, device)[0]
    call = arguments(device=device, n=4, m=5) | {"target_samples": points(3, DIM, device=device, seed=7)}
    call["target_samples"].requires_grad_()

    def loss(*values):
        return kdejsd.jsd_loss(**dict(zip(call, values, strict=True)), target=target)

    assert gradcheck(loss, tuple(call.values()))


# ----------------------------------------------------------------------------------------------------------------------
# The fused path: an isotropic normal as the target, and only the codes need a gradient


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", NORMALS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_composed(dtype, reduction, name, divergence, exclusion, device):
    target = target_and_truth(name)[0]
    options = {"target": target, "divergence": divergence, "reduction": reduction}
    fused = fresh(arguments(exclusion, device, 90, 90), dtype, CODES)
    composed = fresh(fused, dtype, ("codes", "lagged"))
    terms = [
        normal_divergence_terms(
            ("codes", "lagged"),
            *(call[k] for k in ("codes", "lagged", "bandwidth", "log_weights")),
            call.get("exclude_self", False),
            1.0,
            TABLE[divergence],
            reduction,
        )
        for call in (fused, composed)
    ]
    assert terms[0] is not None and terms[1] is None
    ours = value_and_gradients(kdejsd.jsd_loss, fused | options)
    parts = value_and_gradients(kdejsd.jsd_loss, composed | options)
    values, gradients = zip(ours, parts[:2], strict=True)
    if reduction == "sum":  # of terms that cancel, which on CUDA come from different kernels
        size = kdejsd.jsd_loss(**composed | options | {"reduction": "none"}).abs().sum().detach()
        values = tuple(v / size for v in values)
    for got, expected in (values, gradients):
        assert worst(got, expected) < (5e-14 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", NORMALS)
def test_fused_second_derivatives(name, divergence, exclusion):
    target = target_and_truth(name)[0]
    call = fresh(arguments(exclusion, n=4, m=4), torch.float64, CODES)

    def terms(codes):
        others = {k: v for k, v in call.items() if k != "codes"}
        return kdejsd.jsd_loss(codes, **others, target=target, divergence=divergence, reduction="none")

    assert gradcheck(terms, call["codes"])
    assert gradgradcheck(terms, call["codes"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["none", "smoothed", "mixture"])
def test_gradient_penalty(name, divergence, exclusion, device):
    """A loss made of the gradient's norm: create_graph gives the same gradient first, and its own afterwards."""
    target, truth = target_and_truth(name, device)
    found = []
    for function, law in ((kdejsd.jsd_loss, target), (reference.jsd_loss, truth)):
        call = fresh(arguments(exclusion, device), torch.float64, CODES)
        value = function(**call, target=law, divergence=divergence)
        (first,) = torch.autograd.grad(value, call["codes"], create_graph=True)
        found.append((first.detach(), torch.autograd.grad(first.square().sum(), call["codes"])[0]))
    for got, expected in zip(*found, strict=True):
        assert worst(got / expected.abs().max(), expected / expected.abs().max()) < 1e-12


def test_gradient_penalty_of_no_codes():
    codes = torch.zeros(0, DIM, requires_grad=True)
    value = kdejsd.jsd_loss(codes, torch.zeros(5, DIM), 0.5, reduction="sum")
    (gradient,) = torch.autograd.grad(value, codes, create_graph=True)
    assert value == 0 and gradient.shape == (0, DIM)


@pytest.mark.parametrize("name", ["none", "mixture"])
def test_js_gradient_is_the_dampened_kl_gradient(name):
    """d js = (1 - r) d kl at every code, with 1 - r = p_t / (p_e + p_t) = 1 - exp(term - log 2)."""
    target = target_and_truth(name)[0]
    call = fresh(arguments(), torch.float64, CODES)
    gradients, terms = {}, {}
    for divergence in DIVERGENCES:
        terms[divergence] = kdejsd.jsd_loss(**call, target=target, divergence=divergence, reduction="none")
        gradients[divergence] = torch.autograd.grad(terms[divergence].sum(), call["codes"])[0]
    weight = torch.sigmoid(-terms["kl"]).detach()
    assert worst(gradients["js"], weight[:, None] * gradients["kl"]) < 1e-13
    assert worst(1 - (terms["js"] - LOG2).exp(), weight) < 1e-14


# ----------------------------------------------------------------------------------------------------------------------
# A center of its own for each code

OWN = ("codes", "lagged", "bandwidth", "own")
OWN_LEAVES = pytest.mark.parametrize("leaves", [OWN, CODES], ids=["all gradients", "codes only"])


def own_arguments(exclusion: str = "none", device: str = "cpu", n: int = 23, m: int = 23, dim: int = DIM) -> dict:
    """One call in float64; every tensor that can have a gradient requires it."""
    call = arguments(exclusion, device, n, m, dim)
    del call["log_weights"]
    h = 0.5 + 0.15 * math.sqrt(dim)
    call["bandwidth"] = torch.tensor(h, dtype=torch.float64, device=device, requires_grad=True)
    noise = points(n, dim, device=device, seed=8)
    return call | {"own": (call["codes"] - h * noise).detach().requires_grad_()}


@pytest.mark.parametrize("device", DEVICES)
@OWN_LEAVES
@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", TARGETS)
def test_own_is_the_reference(name, divergence, reduction, exclusion, leaves, device):
    target, truth = target_and_truth(name, device)
    options = {"divergence": divergence, "reduction": reduction}
    call = fresh(own_arguments(exclusion, device), torch.float64, leaves)
    value = assert_is_the_reference(call | options, target, truth, 5 if leaves is OWN else 2)
    with torch.no_grad():
        assert worst(kdejsd.jsd_loss(**call, **options, target=target), value) < 1e-13


@pytest.mark.parametrize("function", [kdejsd.jsd_loss, reference.jsd_loss])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_own_is_one_more_center(divergence, function):
    """Each code by itself, its own center among the lagged ones and the one that it leaves out gone."""
    call = fresh(own_arguments("index", n=9, m=7), torch.float64, ("codes", "own"))
    codes, lagged, own, exclude = (call[k] for k in ("codes", "lagged", "own", "exclude_self"))
    terms = []
    for i in range(9):
        centers = torch.cat([lagged[torch.arange(7) != exclude[i]], own[i : i + 1]])
        terms.append(
            reference.jsd_loss(codes[i : i + 1], centers, call["bandwidth"], divergence=divergence, reduction="none")
        )
    expected = torch.cat(terms)
    found = function(**call, divergence=divergence, reduction="none")
    assert worst(found, expected) < 1e-13
    for leaf in (codes, own):
        assert worst(*(torch.autograd.grad(t.sum(), leaf, retain_graph=True)[0] for t in (found, expected))) < 1e-12


def own_in_float32(call: dict, leaves: tuple[str, ...] = CODES, **options) -> None:
    """That the error is at most twice plain PyTorch's own, three times for gradients."""
    call = fresh(call, torch.float32, leaves)
    options = {"reduction": "none"} | options
    truth = value_and_gradients(reference.jsd_loss, fresh(call, torch.float64, leaves) | options)
    plain = value_and_gradients(reference.jsd_loss, call | options)
    ours = value_and_gradients(kdejsd.jsd_loss, call | options)
    for i, (got, yardstick, expected) in enumerate(zip(ours, plain, truth, strict=True)):
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert worst(got, expected) <= (2 if i == 0 else 3) * worst(yardstick, expected) + 1.2e-6


OWN_SIZES = [(1, 1, 1), (61, 501, 2), (65, 121, 71), (40, 300, 256)]


@pytest.mark.parametrize("device", DEVICES)
@OWN_LEAVES
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", OWN_SIZES, ids=str)
def test_own_in_float32(size, divergence, leaves, device):
    own_in_float32(own_arguments("none", device, *size), leaves, divergence=divergence)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", ["its own center", "the lagged", "neither"])
def test_own_of_codes_at_10_000_bandwidths(where, divergence, device):
    """From the lagged codes, from their own center, and from both in two directions."""
    call = own_arguments("index", device, 33, 70)
    far = torch.zeros(DIM, dtype=torch.float64, device=device)
    far[0] = 1e4 * call["bandwidth"].item()
    with torch.no_grad():
        for name in {"its own center": ("codes", "own"), "the lagged": ("own",), "neither": ("codes",)}[where]:
            call[name] += far
        if where == "neither":
            call["own"] -= 0.7 * far.roll(1)
    own_in_float32(call, divergence=divergence)
    own_in_float32(call, divergence=divergence, target=target_and_truth("mixture", device)[0].to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_own_twice(divergence, device):
    """Where the code lies itself, and where a lagged code lies."""
    call = own_arguments("none", device, 30, 30)
    with torch.no_grad():
        call["own"][:10] = call["codes"][:10]
        call["own"][10:20] = call["lagged"][10:20]
        call["codes"][15:20] = call["lagged"][15:20]
    own_in_float32(call, divergence=divergence)


@pytest.mark.parametrize("device", DEVICES)
def test_own_where_the_lagged_codes_are_beyond_the_range_of_float32(device):
    """Their density is 0 there, and the own center alone counts."""
    codes = torch.full((3, DIM), 1e20, device=device)
    own = codes.clone()
    for divergence in DIVERGENCES:
        call = {"codes": codes.clone().requires_grad_(), "lagged": 0 * codes, "bandwidth": 1.0, "own": own}
        value, gradient = value_and_gradients(
            kdejsd.jsd_loss, call | {"divergence": divergence, "target": StandardNormal(DIM).smoothed(1e19)}
        )
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@OWN_LEAVES
@pytest.mark.parametrize("name", ["none", "mixture"])
@pytest.mark.parametrize(
    ("codes", "lagged", "bandwidth", "own"),
    [
        ((3, 11, DIM), (7, DIM), (), (3, 11, DIM)),
        ((3, 11, DIM), (7, DIM), (1,), (11, DIM)),
        ((11, DIM), (3, 7, DIM), (3, 1), (11, DIM)),
        ((11, DIM), (3, 7, DIM), (), (3, 11, DIM)),
        ((4, 1, 11, DIM), (3, 7, DIM), (4, 1, 1), (3, 11, DIM)),
    ],
)
def test_own_batches_broadcast(codes, lagged, bandwidth, own, name, leaves, device):
    target, truth = target_and_truth(name, device)
    call = {
        "codes": points(*codes, device=device, seed=1),
        "lagged": points(*lagged, device=device, seed=2),
        "bandwidth": 0.5 + torch.rand(bandwidth, dtype=torch.float64, generator=generator(3)).to(device),
        "own": points(*own, device=device, seed=4),
    }
    for reduction in REDUCTIONS:
        ours = value_and_gradients(
            kdejsd.jsd_loss, fresh(call, torch.float64, leaves) | {"target": target, "reduction": reduction}
        )
        expected = value_and_gradients(
            reference.jsd_loss, fresh(call, torch.float64, leaves) | {"target": truth, "reduction": reduction}
        )
        for got, wanted in zip(ours, expected, strict=True):
            assert got.shape == wanted.shape and worst(got, wanted) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
def test_own_not_contiguous(device):
    call = fresh(own_arguments(device=device), torch.float64, CODES)
    expected = value_and_gradients(kdejsd.jsd_loss, call)
    for strange in (call["own"].T.contiguous().T, torch.stack([call["own"]] * 2, -1)[..., 0]):
        assert not strange.is_contiguous()
        for got, wanted in zip(value_and_gradients(kdejsd.jsd_loss, call | {"own": strange}), expected, strict=True):
            assert torch.equal(got, wanted)


def test_own_of_no_codes():
    codes, own = torch.empty(0, DIM, requires_grad=True), torch.empty(0, DIM)
    assert kdejsd.jsd_loss(codes, torch.zeros(4, DIM), 0.5, own=own, reduction="none").shape == (0,)
    for leaf in (False, True):
        value = kdejsd.jsd_loss(codes, torch.zeros(4, DIM), 0.5, own=own.requires_grad_(leaf), reduction="sum")
        (gradient,) = torch.autograd.grad(value, codes, create_graph=True)
        assert value == 0 and gradient.shape == (0, DIM)


@pytest.mark.parametrize("device", DEVICES)
@OWN_LEAVES
@pytest.mark.parametrize("name", ["none", "mixture"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_nan_in_nan_out(dtype, name, leaves, device):
    call = fresh(own_arguments(device=device, n=10), dtype, leaves)
    with torch.no_grad():
        call["own"][4, 1] = math.nan
    target = target_and_truth(name, device)[0]
    value, gradient, *_ = value_and_gradients(kdejsd.jsd_loss, call | {"target": target, "reduction": "none"})
    assert value.isnan().nonzero().tolist() == [[4]] and gradient.isnan().any(-1).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_own_of_half_types(dtype):
    call = fresh(own_arguments("index"), dtype, CODES) | {"bandwidth": 0.6}
    value, gradient = value_and_gradients(kdejsd.jsd_loss, call)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert worst(value, kdejsd.jsd_loss(**fresh(call, torch.float32, CODES))) < 1e-6


@pytest.mark.parametrize("exclusion", EXCLUSIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["none", "smoothed", "mixture"])
def test_own_derivatives(name, divergence, exclusion):
    """First and second ones, of the pass and composed."""
    target = target_and_truth(name)[0]
    call = fresh(own_arguments(exclusion, n=4, m=4), torch.float64, CODES)
    for leaves in (CODES, ("codes", "own", "bandwidth")):
        leaf = fresh(call, torch.float64, leaves)

        def terms(*values, names=leaves, leaf=leaf):
            changed = leaf | dict(zip(names, values, strict=True))
            return kdejsd.jsd_loss(**changed, target=target, divergence=divergence, reduction="none")

        assert gradcheck(terms, tuple(leaf[k] for k in leaves))
        assert gradgradcheck(terms, tuple(leaf[k] for k in leaves))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["none", "mixture"])
def test_own_transforms(name, device):
    """torch.compile, function transforms and meta tensors."""
    target = target_and_truth(name, device)[0]
    call = fresh(own_arguments(device=device, n=6, m=5), torch.float64, ())
    batch = points(4, 6, DIM, device=device, seed=1)

    def loss(codes):
        return kdejsd.jsd_loss(codes, call["lagged"], 0.6, target=target, own=call["own"])

    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(codes) for codes in batch]))
    leaves = batch.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(codes) for codes in leaves), leaves)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batch), expected)
    tangent = torch.func.jvp(loss, (batch[0],), (torch.ones_like(batch[0]),))[1]
    torch.testing.assert_close(tangent, expected[0].sum())
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    codes = batch[0].clone().requires_grad_()
    torch.testing.assert_close(compiled(codes), loss(codes))
    torch.testing.assert_close(torch.autograd.grad(compiled(codes), codes)[0], expected[0])
    z, c = torch.empty(4, DIM, device="meta"), torch.empty(5, DIM, device="meta")
    assert kdejsd.jsd_loss(z, c, 0.5, target=target, own=z, reduction="none").shape == (4,)


@pytest.mark.parametrize(
    ("error", "text", "keywords"),
    [
        (TypeError, "own must be a tensor, got list", {"own": [[0.0] * DIM]}),
        (
            ValueError,
            r"own must have shape \[..., 4, 3\], one center for each of codes; got \[5, 3\]",
            {"own": torch.zeros(5, DIM)},
        ),
        (ValueError, r"own must have shape \[..., 4, 3\].* got \[4, 2\]", {"own": torch.zeros(4, 2)}),
        (
            ValueError,
            r"no leading dimensions beside \[\], those of the result; got \[2, 4, 3\]",
            {"own": torch.zeros(2, 4, DIM)},
        ),
        (
            TypeError,
            "own must have the dtype of codes, torch.float32; got torch.float64",
            {"own": torch.zeros(4, DIM).double()},
        ),
        (RuntimeError, "own must be on the device of codes", {"own": torch.zeros(4, DIM, device="meta")}),
        (
            ValueError,
            r"log_weights must be None where own is given, got shape \[5\]",
            {"own": torch.zeros(4, DIM), "log_weights": torch.zeros(5)},
        ),
        (
            ValueError,
            "bandwidth must be a number.* where own is given; got one per center",
            {"own": torch.zeros(4, DIM), "bandwidth": torch.ones(5)},
        ),
        (
            ValueError,
            "target_samples must be None where own is given, got both",
            {"own": torch.zeros(4, DIM), "target_samples": torch.zeros(4, DIM)},
        ),
    ],
)
@pytest.mark.parametrize("target_name", ["none", "mixture"])
def test_errors_of_own(error, text, keywords, target_name):
    """The pass gives the same numbers fused and composed."""
    call = {"codes": torch.zeros(4, DIM), "lagged": torch.zeros(5, DIM), "bandwidth": 0.5}
    with pytest.raises(error, match=text):
        kdejsd.jsd_loss(**call | {"target": target_and_truth(target_name)[0]} | keywords)


def test_own_values_are_checked_where_asked(monkeypatch):
    monkeypatch.setenv("KDEJSD_CHECK", "1")
    z = torch.zeros(4, DIM)
    with pytest.raises(ValueError, match="own must be finite, got 12 values"):
        kdejsd.jsd_loss(z, z, 0.5, own=z / 0)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes and dtypes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [ALL, CODES], ids=["all gradients", "codes only"])
@pytest.mark.parametrize("name", ["none", "mixture", "multivariate normal"])
@pytest.mark.parametrize(
    ("codes", "lagged", "result"),
    [
        ((3, 11, DIM), (7, DIM), (3, 11)),
        ((11, DIM), (3, 7, DIM), (3, 11)),
        ((4, 1, 11, DIM), (3, 7, DIM), (4, 3, 11)),
    ],
)
def test_batches_broadcast(codes, lagged, result, name, leaves, device):
    target, truth = target_and_truth(name, device)
    call = {
        "codes": points(*codes, device=device, seed=1),
        "lagged": points(*lagged, device=device, seed=2),
        "bandwidth": torch.tensor(0.7, dtype=torch.float64, device=device),
    }
    for reduction in REDUCTIONS:
        ours = value_and_gradients(
            kdejsd.jsd_loss, fresh(call, torch.float64, leaves) | {"target": target, "reduction": reduction}
        )
        expected = value_and_gradients(
            reference.jsd_loss, fresh(call, torch.float64, leaves) | {"target": truth, "reduction": reduction}
        )
        assert ours[0].shape == (result if reduction == "none" else ())
        for got, wanted in zip(ours, expected, strict=True):
            assert got.shape == wanted.shape and worst(got, wanted) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [ALL, CODES], ids=["all gradients", "codes only"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [(60, 500, 2), (65, 121, 40), (40, 300, 256)], ids=str)
def test_float32_error_is_at_most_that_of_plain_torch(size, divergence, leaves, device):
    """Twice plain PyTorch's own error for values and three times for gradients, plus a few units in the last place."""
    n, m, dim = size
    call = arguments(device=device, n=n, m=m, dim=dim)
    call["bandwidth"] = call["bandwidth"].detach() * (0.5 + 0.15 * math.sqrt(dim))
    call = fresh(call, torch.float32, leaves)  # all three start from the same float32 numbers
    options = {"divergence": divergence, "reduction": "none"}
    wide = fresh(call, torch.float64, leaves)
    truth = value_and_gradients(reference.jsd_loss, wide | options)
    plain = value_and_gradients(reference.jsd_loss, call | options)
    ours = value_and_gradients(kdejsd.jsd_loss, call | options)
    for i, (got, yardstick, expected) in enumerate(zip(ours, plain, truth, strict=True)):
        assert got.dtype == torch.float32
        assert worst(got, expected) <= (2 if i == 0 else 3) * worst(yardstick, expected) + 1.2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lagged_gradient", [False, True])
@pytest.mark.parametrize("name", ["none", "mixture", "multivariate normal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype, name, lagged_gradient, device):
    target = target_and_truth(name, device)[0]
    codes = points(20, DIM, dtype=dtype, device=device, seed=1).requires_grad_()
    lagged = points(30, DIM, dtype=dtype, device=device, seed=2).requires_grad_(lagged_gradient)
    value = kdejsd.jsd_loss(codes, lagged, 0.5, target=target)
    assert value.dtype == torch.float32
    assert worst(value, kdejsd.jsd_loss(codes.float(), lagged.float(), 0.5, target=target)) < 1e-6
    value.backward()
    assert codes.grad.dtype == dtype and codes.grad.isfinite().all() and (codes.grad != 0).any()
    assert not lagged_gradient or lagged.grad.dtype == dtype


def test_no_codes():
    codes = torch.empty(0, DIM, requires_grad=True)
    assert kdejsd.jsd_loss(codes, torch.zeros(4, DIM), 0.5, reduction="none").shape == (0,)
    value = kdejsd.jsd_loss(codes, torch.zeros(4, DIM), 0.5, reduction="sum")
    value.backward()
    assert value == 0 and codes.grad.shape == (0, DIM)


# ----------------------------------------------------------------------------------------------------------------------
# Where one density is nothing beside the other


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [("codes", "lagged"), CODES], ids=["composed", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_zone_has_a_tiny_right_gradient(dtype, leaves, device):
    """A tight cluster at distance 8 from the target's center, p_e >> p_t: near log 2, and no digit of 1 - r is lost."""
    cluster = torch.tensor([8.0, 0.0, 0.0], dtype=torch.float64)
    call = {
        "codes": (cluster + 0.1 * points(40, DIM, seed=1)).to(device),
        "lagged": (cluster + 0.1 * points(50, DIM, seed=2)).to(device),
        "bandwidth": torch.tensor(0.2, dtype=torch.float64, device=device),
    }
    ours = fresh(call, dtype, leaves)
    value, *gradients = value_and_gradients(kdejsd.jsd_loss, ours | {"reduction": "none"})
    _, *expected = value_and_gradients(reference.jsd_loss, fresh(ours, torch.float64, leaves) | {"reduction": "none"})
    assert (value.double() - LOG2).abs().max() < 1e-7
    assert 1e-20 < expected[0].abs().max() < 1e-10
    for got, wanted in zip(gradients, expected, strict=True):
        assert ((got.double() - wanted).abs().amax(0) <= 1e-3 * wanted.abs().amax(0)).all()


@pytest.mark.parametrize("leaves", [("codes", "lagged"), CODES], ids=["composed", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_dead_zone_nothing_moves(dtype, leaves):
    """At distance 1000 the weight 1 - r is below every float: the value is log 2, the gradient 0, neither is NaN."""
    codes = torch.full((5, DIM), 1000.0, dtype=dtype)
    call = fresh({"codes": codes, "lagged": codes + 0.1, "bandwidth": torch.tensor(0.5)}, dtype, leaves)
    value, *gradients = value_and_gradients(kdejsd.jsd_loss, call)
    assert value.item() == pytest.approx(LOG2, rel=1e-7)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [("codes", "lagged"), CODES], ids=["composed", "fused"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_every_lagged_code(dtype, divergence, leaves, device):
    """A query at distance 60 from all centers, p_t >> p_e: thousands of nats below, finite, and pushed outward."""
    call = {
        "codes": 0.3 * points(9, DIM, device=device, seed=1),
        "lagged": 0.3 * points(30, DIM, device=device, seed=2),
        "bandwidth": torch.tensor(0.5, dtype=torch.float64, device=device),
    }
    call["lagged"][:, 0] += 60.0
    ours = fresh(call, dtype, leaves)
    options = {"divergence": divergence, "reduction": "none"}
    found = value_and_gradients(kdejsd.jsd_loss, ours | options)
    expected = value_and_gradients(reference.jsd_loss, fresh(ours, torch.float64, leaves) | options)
    assert (expected[0] < -6000).all()
    assert all(t.isfinite().all() for t in found)
    rounding = torch.finfo(dtype).eps
    assert worst(found[0], expected[0]) < 8 * rounding
    # The gradients' weights are exponentials of exponents near -7200, rounded to this dtype: so much of the codes'
    # whole pull is what a lagged code's gradient, where pulls cancel, can be off by.
    pull = expected[1].norm(dim=-1).sum()
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        assert (got.double() - wanted).abs().max() < 2 * 7200 * rounding * pull
    assert worst(found[1], expected[1]) < (2e-6 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [("codes", "lagged"), CODES], ids=["composed", "fused"])
@pytest.mark.parametrize("name", TARGETS)
def test_nan_in_nan_out(name, leaves, device):
    target = target_and_truth(name, device)[0]

    def nan_rows(change):
        call = {
            "codes": points(10, DIM, device=device, seed=1),
            "lagged": points(12, DIM, device=device, seed=2),
            "bandwidth": torch.tensor(0.5, dtype=torch.float64, device=device),
        }
        change(call)
        value, gradient, *_ = value_and_gradients(
            kdejsd.jsd_loss, fresh(call, torch.float64, leaves) | {"target": target, "reduction": "none"}
        )
        assert torch.equal(value.isnan(), gradient.isnan().any(-1))
        return value.isnan().tolist()

    assert nan_rows(lambda call: call["codes"][4, 1].fill_(math.nan)) == [i == 4 for i in range(10)]
    assert all(nan_rows(lambda call: call["lagged"][7, 0].fill_(math.nan)))
    for bad in (math.nan, 0.0, -1.0, math.inf):
        assert all(nan_rows(lambda call, bad=bad: call["bandwidth"].fill_(bad)))


# ----------------------------------------------------------------------------------------------------------------------
# Closed forms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", [ALL, CODES], ids=["composed", "fused"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dim", [1, 2, 17, 300])
def test_equal_laws(dim, divergence, leaves, device):
    """One kernel of bandwidth h at 0 is N(0, h^2 I): no divergence from it, and nothing to gain from moving."""
    for bandwidth, target in (
        (1.0, None),
        (1.0, StandardNormal(dim)),
        (math.sqrt(1.25), StandardNormal(dim).smoothed(0.5)),
    ):
        call = {
            "codes": 2 * points(40, dim, device=device),
            "lagged": torch.zeros(1, dim, dtype=torch.float64, device=device),
            "bandwidth": torch.tensor(bandwidth, dtype=torch.float64, device=device),
        }
        largest = call["codes"].square().sum(-1).max() + dim
        for dtype in DTYPES:
            ours = fresh(call, dtype, leaves)
            options = {"target": target, "divergence": divergence, "reduction": "none"}
            terms, gradient, *_ = value_and_gradients(kdejsd.jsd_loss, ours | options)
            assert terms.abs().max() <= 4 * torch.finfo(dtype).eps * largest
            assert gradient.abs().max() <= 4 * torch.finfo(dtype).eps * largest
    samples = points(30, dim, device=device, seed=1)
    value = kdejsd.jsd(samples, call["lagged"], 1.0, samples.flip(0))
    assert abs(value.item()) < 4e-15 * dim


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TARGETS)
def test_laws_far_apart(name, device):
    """No overlap: the Jensen-Shannon divergence is log 2."""
    target = target_and_truth(name, device)[0]
    samples, centers = 60 + points(50, DIM, device=device, seed=1), 60 + points(60, DIM, device=device, seed=2)
    value = kdejsd.jsd(samples, centers, 0.5, points(40, DIM, device=device, seed=3), target=target)
    assert value.item() == pytest.approx(LOG2, rel=1e-14)


@pytest.mark.parametrize("name", TARGETS)
def test_js_terms_are_at_most_log_2(name):
    target = target_and_truth(name)[0]
    codes = torch.cat([s * points(200, DIM, seed=i) for i, s in enumerate((0.01, 1.0, 10.0, 1e4))])
    for dtype in DTYPES:
        terms = kdejsd.jsd_loss(codes.to(dtype), codes[::7].to(dtype), 0.3, target=target, reduction="none")
        assert (terms <= torch.tensor(LOG2, dtype=dtype)).all() and (terms < -1).any()


def test_kl_of_two_normals():
    """KL(N(mu, h^2 I) | N(0, I)) = (l h^2 + |mu|^2 - l - 2 l log h) / 2, to 5 standard errors of 200 000 samples."""
    h, mean = 0.6, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    codes = mean + h * points(200_000, 3)
    terms = kdejsd.jsd_loss(codes, mean[None], h, divergence="kl", reduction="none")
    exact = 0.5 * (3 * h * h + mean.square().sum().item() - 3 - 6 * math.log(h))
    assert abs(terms.mean().item() - exact) < 5 * terms.std().item() / math.sqrt(len(terms))
    assert kdejsd.jsd_loss(codes, mean[None], h, divergence="kl").item() == pytest.approx(
        terms.mean().item(), rel=1e-12
    )


@pytest.mark.parametrize("h", [0.1, 0.4, 1.5])
def test_jsd_is_the_integral(h):
    """In one dimension against quadrature of the definition, to 5 standard errors of 100 000 samples of each law."""
    n, centers = 100_000, [-2.0, 0.5, 0.6, 3.0]

    def integrand(x):
        p, q = np.mean([norm.pdf(x, c, h) for c in centers]), norm.pdf(x)
        middle = (p + q) / 2
        return 0.5 * sum(a * np.log(a / middle) for a in (p, q) if a > 0)

    exact = quad(integrand, -12, 12, points=[*centers, 0.0], limit=500)[0]
    z = torch.tensor(centers, dtype=torch.float64)[:, None]
    samples = z[torch.randint(4, (n,), generator=generator(1))] + h * points(n, 1, seed=2)
    at_target = points(n, 1, seed=3)
    value = kdejsd.jsd(samples, z, h, at_target).item()
    error = math.hypot(*(_ratio_terms(x, z, h, sign).std().item() for x, sign in ((samples, 1), (at_target, -1))))
    assert abs(value - exact) < 5 * 0.5 * error / math.sqrt(n)
    assert 0 < exact < LOG2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["none", "mixture", "multivariate normal"])
def test_jsd_of_a_batch(name, device):
    """One value for each item, and each argument with batch dimensions of its own."""
    target = target_and_truth(name, device)[0]
    samples, centers = points(3, 1, 7, DIM, device=device, seed=1), points(4, 5, DIM, device=device, seed=2)
    bandwidth = 0.3 + torch.rand(3, 4, 1, dtype=torch.float64, generator=generator(3)).to(device)
    for at_target in (points(9, DIM, device=device, seed=4), points(4, 9, DIM, device=device, seed=4)):
        arguments = [x.detach().clone().requires_grad_() for x in (samples, centers, bandwidth, at_target)]
        batched = kdejsd.jsd(*arguments, target=target)
        assert batched.shape == (3, 4)
        singles = torch.stack(
            [
                kdejsd.jsd(
                    arguments[0][i, 0],
                    arguments[1][j],
                    arguments[2][i, j],
                    arguments[3].expand(4, -1, -1)[j],
                    target=target,
                )
                for i in range(3)
                for j in range(4)
            ]
        ).reshape(3, 4)
        torch.testing.assert_close(batched, singles, rtol=1e-13, atol=1e-13)
        weights = points(3, 4, device=device, seed=5)
        expected = torch.autograd.grad((weights * singles).sum(), arguments)
        found = torch.autograd.grad((weights * batched).sum(), arguments)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def _ratio_terms(x, centers, h, sign):
    """log of p_e / (p_e + p_t) at x, or of p_t / (p_e + p_t) for sign -1."""
    return torch.nn.functional.logsigmoid(sign * kdejsd.jsd_loss(x, centers, h, divergence="kl", reduction="none"))


@pytest.mark.parametrize("name", TARGETS)
def test_root_of_jsd_in_bits_is_between_0_and_1(name):
    """Samples of the KDE itself, 4000 of each law; estimates may fall below 0 by their error (5 / sqrt(4000) nats)."""
    target, truth = target_and_truth(name)
    torch.manual_seed(0)
    at_target = truth.sample((4000,))
    for i, (scale, h) in enumerate(
        [(0.2, 0.3), (1.0, 0.5), (1.0, 1.0), (3.0, 0.5), (1.0, 20.0), (0.0, 1e-3), (30.0, 1.0)]
    ):
        centers = scale * points(50, DIM, seed=i)
        samples = centers[torch.randint(50, (4000,), generator=generator(i))] + h * points(4000, DIM, seed=100 + i)
        bits = kdejsd.jsd(samples, centers, h, at_target, target=target).item() / LOG2
        assert -5 / math.sqrt(4000) <= bits <= 1
        assert 0 <= math.sqrt(max(bits, 0.0)) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Transforms and compilation


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "backend"), [("none", "inductor"), ("none", "aot_eager"), ("mixture", "aot_eager")])
def test_compile_whole_graph(name, backend, device):
    target = target_and_truth(name, device)[0]
    torch.compiler.reset()

    def loss(codes, lagged, target_samples):
        return kdejsd.jsd_loss(codes, lagged, 0.6, target=target, target_samples=target_samples)

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    inputs = [points(k, DIM, device=device, seed=k).requires_grad_() for k in (11, 9, 7)]
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    found, expected = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["none", "smoothed", "mixture", "multivariate normal"])
def test_function_transforms(name, divergence, device):
    target = target_and_truth(name, device)[0]
    batch = points(4, 6, DIM, device=device, seed=1)
    lagged = points(5, DIM, device=device, seed=2)

    def loss(codes):
        return kdejsd.jsd_loss(codes, lagged, 0.6, target=target, divergence=divergence)

    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(codes) for codes in batch]))
    leaves = batch.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(codes) for codes in leaves), leaves)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(batch), expected)
    tangent = torch.func.jvp(loss, (batch[0],), (torch.ones_like(batch[0]),))[1]
    torch.testing.assert_close(tangent, expected[0].sum())


def test_meta_tensors():
    for target in (None, target_and_truth("mixture")[0]):
        terms = kdejsd.jsd_loss(
            torch.empty(4, DIM, device="meta"), torch.empty(5, DIM, device="meta"), 0.5, target=target, reduction="none"
        )
        assert terms.shape == (4,) and terms.device.type == "meta"


def test_same_signatures_as_the_reference():
    for name in ("jsd_loss", "jsd"):
        ours, plain = (inspect.signature(getattr(m, name)).parameters for m in (kdejsd, reference))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in plain.values()
        ]


# ----------------------------------------------------------------------------------------------------------------------
# Errors: the argument's name, what was expected, what came

Z, C = torch.zeros(4, DIM), torch.zeros(5, DIM)


@pytest.mark.parametrize("name", ["jsd", "JS", "", None])
def test_no_unknown_divergence_is_taken_for_another(name):
    calls = [
        lambda: kdejsd.jsd_loss(Z, C, 0.5, divergence=name),
        lambda: kdejsd.jsd_loss(Z, C, 0.5, divergence=name, target=GaussianMixture([[0.0] * DIM])),
        lambda: kdejsd.LaggedKDE(5, DIM, 0.5, divergence=name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^divergence must be 'js' or 'kl', got {name!r}$"):
            call()
    with pytest.raises(KeyError):
        reference.jsd_loss(Z, C, 0.5, divergence=name)


@pytest.mark.parametrize(
    ("error", "text", "arguments", "keywords"),
    [
        (ValueError, "divergence must be 'js' or 'kl', got 'jsd'", (Z, C, 0.5), {"divergence": "jsd"}),
        (ValueError, "reduction must be 'mean', 'sum' or 'none', got None", (Z, C, 0.5), {"reduction": None}),
        (TypeError, "codes must be a tensor, got list", ([[0.0] * DIM], C, 0.5), {}),
        (ValueError, r"codes must have shape \[..., points, l\], got \[3\]", (Z[0], C, 0.5), {}),
        (ValueError, "target must have the 3 dimensions of codes, got 2", (Z, C, 0.5), {"target": StandardNormal(2)}),
        (ValueError, "target must have the 3 dimensions of codes, got 2", (Z, C, 0.5), {"target": normal(2)}),
        (
            ValueError,
            r"one distribution over vectors.*got event_shape \[\] and batch_shape \[3\].*Independent",
            (Z, C, 0.5),
            {"target": Normal(torch.zeros(DIM), 1.0)},
        ),
        (TypeError, "target must be None, StandardNormal.*got str", (Z, C, 0.5), {"target": "normal"}),
        (
            ValueError,
            "target_samples needs divergence='js' and reduction='mean', got divergence='kl' and reduction='mean'",
            (Z, C, 0.5),
            {"target_samples": Z, "divergence": "kl"},
        ),
        (
            ValueError,
            "target_samples needs.*got divergence='js' and reduction='none'",
            (Z, C, 0.5),
            {"target_samples": Z, "reduction": "none"},
        ),
        (TypeError, "must be float32, float64, float16 or bfloat16, got torch.int64", (Z.long(), C, 0.5), {}),
        (ValueError, r"same number of dimensions.*\[4, 3\].*\[5, 2\]", (Z, C[:, :2], 0.5), {}),
        (ValueError, "must hold at least one point", (Z, C[:0], 0.5), {}),
        (TypeError, "lagged must have the dtype of codes, torch.float32; got torch.float64", (Z, C.double(), 0.5), {}),
        (ValueError, "bandwidth must be positive and finite, got -0.3", (Z, C, -0.3), {}),
        (ValueError, r"log_weights must have shape \[..., 5\]", (Z, C, 0.5), {"log_weights": torch.zeros(4)}),
        (
            ValueError,
            "exclude_self=True needs as many codes as lagged, got 4 and 5",
            (Z, C, 0.5),
            {"exclude_self": True},
        ),
        (ValueError, "same number of dimensions", (Z, C, 0.5), {"target_samples": Z[:, :2]}),
        (RuntimeError, "lagged must be on the device of codes", (Z, C.to("meta"), 0.5), {}),
    ],
)
@pytest.mark.parametrize("target_name", ["none", "mixture"])
def test_errors(error, text, arguments, keywords, target_name):
    """The pass gives the same numbers fused and composed."""
    with pytest.raises(error, match=text):
        kdejsd.jsd_loss(*arguments, **{"target": target_and_truth(target_name)[0]} | keywords)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, r"samples must have shape", (Z[0], C, 0.5, Z)),
        (ValueError, "bandwidth must be positive and finite, got 0", (Z, C, 0, Z)),
        (ValueError, "same number of dimensions", (Z, C, 0.5, Z[:, :2])),
        (TypeError, "target_samples must be a tensor, got ndarray", (Z, C, 0.5, np.zeros((4, DIM)))),
        (TypeError, "target_samples must be a tensor, got NoneType", (Z, C, 0.5, None)),
    ],
)
def test_errors_of_jsd(error, text, arguments):
    with pytest.raises(error, match=text):
        kdejsd.jsd(*arguments)


# What else a divergence brings beside its terms: the share of the target, and the loss of matched codes


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_target_share_from_the_terms(divergence):
    """Also where one density is 0, or so small that a term is at the end of its range."""
    gap = torch.tensor([-math.inf, -800.0, 800.0, math.inf, *range(-30, 31)], dtype=torch.float64)  # log p_t - log p_e
    share = TABLE[divergence].target_share(TABLE[divergence].terms(gap))
    torch.testing.assert_close(share, torch.sigmoid(gap), rtol=0, atol=1e-12)


UNIFORM = Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("smoothed", "kernel_noise"), [(False, False), (True, False), (True, True)])
def test_matched_loss_is_the_mean_for_codes_that_follow_the_target(smoothed, kernel_noise, divergence):
    dim, m, h, scale = 3, 50, 0.5, 2.0
    found = kdejsd.matched_loss(
        dim,
        m,
        scale * h,
        target=GaussianMixture([[0.0] * dim], scale),
        smoothed=smoothed,
        kernel_noise=kernel_noise,
        divergence=divergence,
    )
    unit = kdejsd.matched_loss(dim, m, h, smoothed=smoothed, kernel_noise=kernel_noise, divergence=divergence)
    law = StandardNormal(dim).smoothed(h) if smoothed else None
    rng = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(64):
        lagged, codes, noise = torch.randn(3, m, dim, generator=rng, dtype=torch.float64)
        own = codes if kernel_noise else None
        losses.append(
            reference.jsd_loss(codes + h * noise * kernel_noise, lagged, h, target=law, own=own, divergence=divergence)
        )
    mean, error = torch.stack(losses).mean(), torch.stack(losses).std() / 8
    assert abs(unit - mean) < 4 * error
    assert abs(found - unit) < 4 * error  # by samples, as a mixture's, and in other units
    normal = torch.distributions.MultivariateNormal(torch.zeros(dim), scale**2 * torch.eye(dim))
    keywords = {"smoothed": smoothed, "kernel_noise": kernel_noise, "divergence": divergence}
    assert abs(kdejsd.matched_loss(dim, m, scale * h, target=normal, **keywords) - unit) < 4 * error


def test_matched_loss_by_samples_is_repeatable_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    mixture = GaussianMixture([[-2.0], [2.0]])
    assert kdejsd.matched_loss(1, 50, 0.3, target=mixture) == kdejsd.matched_loss(1, 50, 0.3, target=mixture)
    assert torch.equal(before, torch.get_rng_state())
    # Bandwidths that the integral is not made for.
    assert kdejsd.matched_loss(2, 50, 1e-3) < -1000 < 0 < kdejsd.matched_loss(2, 50, 100.0, smoothed=True) + 1e-3


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "latent_dim must be at least 1, got 0", {"latent_dim": 0}),
        (TypeError, "num_centers must be an integer", {"num_centers": 2.5}),
        (ValueError, "num_centers must be at most 1000000000, got 10000000000", {"num_centers": 10**10}),
        (ValueError, "bandwidth must be positive and finite, got 0", {"bandwidth": 0}),
        (ValueError, "divergence must be 'js' or 'kl', got 'jsd'", {"divergence": "jsd"}),
        (ValueError, "target must have .* dimensions", {"target": StandardNormal(3)}),
        (ValueError, "smoothed=True needs a target that can be convolved", {"target": UNIFORM, "smoothed": True}),
    ],
)
def test_errors_of_matched_loss(error, text, arguments):
    with pytest.raises(error, match=text):
        kdejsd.matched_loss(**{"latent_dim": 2, "num_centers": 10, "bandwidth": 0.5} | arguments)
