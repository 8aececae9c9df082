"""The radius op against 50 digits of mpmath, and the bounds built on it against what they must never fall below."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from edges import LEVELS, at_edges, at_level
from helpers import DEVICES, DTYPES, generator, worst
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import kdejsd
from kdejsd import reference
from kdejsd._native import native
from kdejsd.ops.radius import _operator

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
HALF = float(np.log(0.5))


def softmax_rows(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", spread: float = 3.0):
    logits = spread * torch.randn(shape, generator=generator(1), dtype=torch.float64)
    return logits.softmax(-1).to(device, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Values and gradients of single masses, in units of the last place


def _hazard(x):
    """phi(x) / Q(x) to 50 digits."""
    if x < 6:
        with mpmath.workdps(75):
            return +(mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi) / (mpmath.erfc(x / mpmath.sqrt(2)) / 2))
    fraction = mpmath.mpf(0)
    for k in range(int(3500 / x**2) + 60, 0, -1):
        fraction = k / (x + fraction)
    return x + fraction


def exact(mass: float, is_log: bool):
    """F and its derivative for the mass as it is given, and log F: mpmath at 50 digits, by Newton's method."""
    with mpmath.workdps(50):
        m = mpmath.mpf(mass)
        p, q, log_p = (mpmath.exp(m), -mpmath.expm1(m), m) if is_log else (m, 1 - m, mpmath.log(m))
        lower = p <= 0.5
        surprise = -log_p if lower else -mpmath.log(q)
        x = mpmath.sqrt(max(2 * (surprise - mpmath.log(2)), mpmath.mpf(0)))
        for _ in range(60):
            h = _hazard(x)
            step = (surprise - x * x / 2 - mpmath.log(2 * mpmath.pi) / 2 - mpmath.log(h)) / h
            x += step
            if abs(step) < mpmath.mpf(10) ** -40 * (1 + x):
                break
        h = _hazard(x)
        value, slope = (p * (h - x), 1 / h) if lower else (x + q * (h - x), p / (q * h))
        log_value = log_p + mpmath.log(h - x) if lower else mpmath.log(value)
        return value, p * slope if is_log else slope, log_value


def ulps(got: float, expected, dtype: torch.dtype) -> float:
    spacing = np.spacing(NUMPY[dtype](float(expected)))
    return abs(float((mpmath.mpf(got) - expected) / mpmath.mpf(float(spacing))))


def grid(dtype: torch.dtype, is_log: bool) -> torch.Tensor:
    """Masses over all that the dtype holds, and closely around where the kernels change their formula."""
    double = dtype == torch.float64
    rng = np.random.default_rng(0)
    near = 1 + np.concatenate([-(10 ** np.linspace(-15, -2, 12)), [0], 10 ** np.linspace(-15, -2, 12)])
    branch = math.exp(-(3.8813653655321277**2))  # between the two ratios in double
    if is_log:
        lower = -np.geomspace(0.6932, 700 if double else 80, 120)
        upper = -np.geomspace(1e-300 if double else 1e-37, 0.6931, 120)
        masses = np.concatenate([lower, upper, HALF * near, math.log(branch) * near, -rng.uniform(0, 20, 100)])
    else:
        lower = np.geomspace(1e-300 if double else 1.2e-37, 0.4999, 150)
        upper = 1 - np.geomspace(1.2e-16 if double else 1e-7, 0.4999, 100)
        masses = np.concatenate([lower, upper, 0.5 * near, branch * near, rng.uniform(0, 1, 100)])
        masses = masses[masses.astype(NUMPY[dtype]) < 1]
    return torch.from_numpy(masses).to(dtype).unique()


@pytest.fixture(scope="module")
def truths():
    found: dict = {}

    def of(dtype, is_log):
        if (dtype, is_log) not in found:
            masses = grid(dtype, is_log)
            found[dtype, is_log] = masses, [exact(m, is_log) for m in masses.tolist()]
        return found[dtype, is_log]

    return of


@pytest.mark.parametrize(
    ("device", "level"),
    [*(("cpu", level) for level in LEVELS), pytest.param("cuda", native().level(), marks=DEVICES[1].marks)],
)
@pytest.mark.parametrize("is_log", [False, True], ids=["p", "log_p"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_units_in_the_last_place(dtype, is_log, device, level, truths):
    with at_level(level):
        masses, expected = truths(dtype, is_log)
        column = masses.to(device).unsqueeze(-1).requires_grad_()
        value = kdejsd.class_radius_bound(**{"log_p" if is_log else "p": column})
        (slope,) = torch.autograd.grad(value.sum(), column)
    for mass, f, d, (f_true, d_true, _) in zip(
        masses.tolist(), value.tolist(), slope.squeeze(-1).tolist(), expected, strict=True
    ):
        assert ulps(f, f_true, dtype) <= 4, mass
        assert ulps(d, d_true, dtype) <= 4, mass


@pytest.mark.parametrize("is_log", [False, True], ids=["p", "log_p"])
def test_the_reference_is_the_truth(is_log, truths):
    """Also its second derivative: F/phi^2 for p, dF/dlog p + F (dF/dp)^2 for log p."""
    masses, expected = truths(torch.float64, is_log)
    column = masses.unsqueeze(-1).requires_grad_()
    value = reference.class_radius_bound(**{"log_p" if is_log else "p": column})
    (slope,) = torch.autograd.grad(value.sum(), column, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), column)
    for i, (mass, (f, d, _)) in enumerate(zip(masses.tolist(), expected, strict=True)):
        assert value[i].item() == pytest.approx(float(f), rel=3e-15), mass
        assert slope[i].item() == pytest.approx(float(d), rel=3e-15), mass
        p = mpmath.exp(mass) if is_log else mpmath.mpf(mass)
        second = d + f * (d / p) ** 2 if is_log else f * (d / p) ** 2
        if second < 1e300:
            assert bend[i].item() == pytest.approx(float(second), rel=1e-12), mass


def test_the_logarithm_of_what_no_float_holds():
    log_p = torch.tensor([[-1000.0], [-1e5], [-3.0], [-0.1], [-1e-9]], dtype=torch.float64).requires_grad_()
    value = kdejsd.class_radius_bound(log_p=log_p, log=True)
    (slope,) = torch.autograd.grad(value.sum(), log_p)
    for i, mass in enumerate(log_p.flatten().tolist()):
        f, d, log_f = exact(mass, True)
        assert value[i].item() == pytest.approx(float(log_f), rel=2e-15)
        assert slope[i].item() == pytest.approx(float(d / f), rel=1e-14)
    assert value[0].item() == pytest.approx(-1003.799, abs=1e-3)
    assert (kdejsd.class_radius_bound(log_p=log_p[:2]) == 0).all()  # of the value nothing is left
    rows = softmax_rows(4, 9)
    for keywords in ({"p": rows}, {"log_p": rows.log()}):
        got = kdejsd.class_radius_bound(**keywords, log=True)
        torch.testing.assert_close(got, kdejsd.class_radius_bound(**keywords).log(), rtol=1e-14, atol=1e-14)
    terms = torch.tensor([-1000.0, -1000.0, -math.inf], dtype=torch.float64, requires_grad=True)
    total = kdejsd.class_radius_bound(log_p=terms, log=True)
    assert total.item() == pytest.approx(value[0].item() + math.log(2), rel=1e-14)
    total.backward()
    assert terms.grad[2] == 0 and terms.grad[0] == terms.grad[1] == pytest.approx(0.5 * slope[0].item())


def test_half_spaces_reach_it():
    assert kdejsd.class_radius_bound(torch.tensor([0.5, 0.5]).double()).item() == pytest.approx(
        0.797884560803, abs=1e-12
    )
    equal = torch.full((5,), 0.2, dtype=torch.float64)
    x = torch.randn(200_000, generator=generator(), dtype=torch.float64)
    edges = torch.special.ndtri(torch.linspace(0, 1, 6, dtype=torch.float64)[1:-1])
    distance = (x.unsqueeze(-1) - edges).abs().amin(-1).mean()  # five slabs: below the bound, which is 0.558
    assert distance.item() == pytest.approx(0.307870, abs=3e-3)
    assert distance < kdejsd.class_radius_bound(equal)


# ----------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_log", [False, True], ids=["p", "log_p"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (2,), (3, 7), (5, 20), (2, 3, 37), (0, 5), (130, 70), (3, 5000), (1, 50_001)], ids=str
)
def test_rows(shape, dtype, is_log, device):
    masses = softmax_rows(*shape, dtype=dtype, device=device)
    masses = (masses.log() if is_log else masses).requires_grad_()
    name = "log_p" if is_log else "p"
    value = kdejsd.class_radius_bound(**{name: masses})
    wide = masses.detach().double().requires_grad_()
    expected = reference.class_radius_bound(**{name: wide})
    assert value.dtype == dtype and value.shape == shape[:-1]
    upstream = torch.randn(shape[:-1], generator=generator(2), dtype=torch.float64).to(device)
    (got,) = torch.autograd.grad(value, masses, upstream.to(dtype))
    (wanted,) = torch.autograd.grad(expected, wide, upstream.to(dtype).double())
    ulp = torch.finfo(dtype).eps
    own = 8e-16  # the reference's own error
    torch.testing.assert_close(value.double(), expected, rtol=4 * ulp + own, atol=0)
    torch.testing.assert_close(got.double(), wanted, rtol=5 * ulp + own, atol=0)  # with the upstream factor's rounding


@pytest.mark.parametrize("is_log", [False, True], ids=["p", "log_p"])
@pytest.mark.parametrize("dtype", DTYPES)
@at_edges("radius_classes")
def test_edges_of_classes(size, level, dtype, is_log):
    with at_level(level):
        for rows in (1, 3):
            test_rows((rows, size), dtype, is_log, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_and_nan(dtype, device):
    inf, nan = math.inf, math.nan
    p = [0.0, 1.0, nan, -1e-9, 1.5, 0.25, inf, -inf]
    for name, masses, value, slope in (
        ("p", p, [0, inf, nan, nan, nan, 0.1491527, nan, nan], [0, inf, nan, nan, nan, 0.7867146, nan, nan]),
        ("log_p", [-inf, 0.0, nan, 1e-9, -1e30], [0, inf, nan, nan, 0], [0, inf, nan, nan, 0]),
    ):
        for width in (1, 40):  # alone, and among others in the same vector
            column = torch.full((len(masses), width), -inf if name == "log_p" else 0.0, dtype=dtype)
            column[:, 0] = torch.tensor(masses)
            for function in (kdejsd.class_radius_bound, reference.class_radius_bound):
                leaf = column.to(device).requires_grad_()
                got = function(**{name: leaf})
                (gradient,) = torch.autograd.grad(got.sum(), leaf)
                expected = torch.tensor(value, dtype=got.dtype)
                torch.testing.assert_close(got.cpu(), expected, equal_nan=True, rtol=1e-4, atol=0)
                torch.testing.assert_close(
                    gradient[:, 0].cpu(), torch.tensor(slope, dtype=dtype), equal_nan=True, rtol=1e-4, atol=0
                )
                assert (gradient[:, 1:] == 0).all()


def test_denormal_masses():
    for dtype, mass in ((torch.float64, 1e-310), (torch.float32, 1e-40)):
        p = torch.tensor([[mass]], dtype=dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(kdejsd.class_radius_bound(p).sum(), p)
        assert ulps(slope.item(), exact(p.item(), False)[1], dtype) <= 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype, device):
    wide = softmax_rows(6, 40, dtype=dtype, device=device)
    for view in (wide.T, wide[:, ::3], wide.T[::2], wide[0].expand(5, 40)):
        leaf, plain = view.detach().requires_grad_(), view.detach().contiguous().requires_grad_()
        got, expected = kdejsd.class_radius_bound(leaf), kdejsd.class_radius_bound(plain)
        assert torch.equal(got, expected)
        upstream = torch.ones(1, dtype=dtype, device=device).expand(got.shape)
        assert torch.equal(
            torch.autograd.grad(got, leaf, upstream)[0], torch.autograd.grad(expected, plain, upstream.contiguous())[0]
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype, device):
    p = softmax_rows(7, 20, dtype=dtype, device=device).requires_grad_()
    value = kdejsd.class_radius_bound(p)
    assert value.dtype == torch.float32
    assert torch.equal(value, kdejsd.class_radius_bound(p.float()))
    value.sum().backward()
    assert p.grad.dtype == dtype
    assert kdejsd.class_radius_bound(p, log=True).dtype == torch.float32


@pytest.mark.parametrize("shape", [(300, 101), (2, 70_000), (1, 200_000)], ids=str)
def test_threads(shape):
    """Any number of threads gives the same bits."""
    p = softmax_rows(*shape, dtype=torch.float32).requires_grad_()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            value = kdejsd.class_radius_bound(p)
            found.append((value, torch.autograd.grad(value.sum(), p)[0]))
    finally:
        torch.set_num_threads(before)
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1])
    assert worst(found[0][0], reference.class_radius_bound(p.double())) < 4 * torch.finfo(torch.float32).eps


# ----------------------------------------------------------------------------------------------------------------------
# Autograd, transforms, tracing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keywords", [{}, {"log": True}], ids=["value", "log"])
def test_gradcheck_and_gradgradcheck(keywords, device):
    p = softmax_rows(3, 5, device=device).requires_grad_()
    log_p = p.detach().log().requires_grad_()
    for name, leaf in (("p", p), ("log_p", log_p)):

        def function(t, name=name):
            return kdejsd.class_radius_bound(**{name: t}, **keywords)

        assert gradcheck(function, (leaf,))
        assert gradgradcheck(function, (leaf,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("is_log", [False, True])
def test_opcheck(is_log, requires_grad, device):
    p = softmax_rows(3, 5, device=device)
    torch.library.opcheck(_operator, ((p.log() if is_log else p).requires_grad_(requires_grad), is_log))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_whole_graph(dynamic, device):
    torch.compiler.reset()
    backend = "aot_eager" if dynamic else "inductor"  # which makes C++ of what is not ours, and compiles it
    compiled = torch.compile(
        lambda x: kdejsd.class_radius_bound(log_p=x.log_softmax(-1)).tanh().sum(),
        fullgraph=True,
        dynamic=dynamic,
        backend=backend,
    )
    for rows in (4, 6):
        logits = torch.randn(rows, 9, generator=generator(), dtype=torch.float64).to(device).requires_grad_()
        value = kdejsd.class_radius_bound(log_p=logits.log_softmax(-1)).tanh().sum()
        (expected,) = torch.autograd.grad(value, logits)
        (got,) = torch.autograd.grad(compiled(logits), logits)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_export(device):
    class Bound(torch.nn.Module):
        def forward(self, p):
            return kdejsd.class_radius_bound(p)

    p = softmax_rows(4, 6, device=device)
    torch.testing.assert_close(torch.export.export(Bound(), (p,)).module()(p), kdejsd.class_radius_bound(p))


TRANSFORMS = {
    "func.grad": lambda f, x: torch.func.grad(lambda u: f(u).sum())(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(lambda u: f(u).sum())(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "compiled func.grad": lambda f, x: torch.compile(
        torch.func.grad(lambda u: f(u).sum()), fullgraph=True, backend="aot_eager"
    )(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms(name, device):
    p = softmax_rows(4, 3, device=device)
    got = TRANSFORMS[name](kdejsd.class_radius_bound, p)
    z = torch.special.ndtri(p)
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    slope, bend = p / density, (density + p * z) / density.square()
    if "grad" in name:
        expected = slope
    elif name == "func.hessian":
        expected = torch.diag(bend.flatten()).reshape(4, 3, 4, 3)
    elif name == "func.jvp":
        expected = slope.sum(-1)
    elif name == "vmap":
        expected = (density + p * z).sum(-1)
    else:
        expected = torch.einsum("ik,ij->ijk", slope, torch.eye(4, dtype=p.dtype, device=device))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_forward_mode_is_not_dropped():
    p = softmax_rows(4, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p, torch.ones_like(p))
        tangent = forward_ad.unpack_dual(kdejsd.class_radius_bound(dual)).tangent
        leaf = p.clone().requires_grad_()
    (expected,) = torch.autograd.grad(kdejsd.class_radius_bound(leaf).sum(), leaf)
    torch.testing.assert_close(tangent, expected.sum(-1))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        torch.ops.kdejsd.radius(forward_ad.make_dual(p, torch.ones_like(p)), False)


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = kdejsd.class_radius_bound(torch.empty(4, 7, device="meta"))
    assert meta.shape == (4,) and meta.device.type == "meta"
    with FakeTensorMode():
        p = torch.rand(7, 3, requires_grad=True)
        kdejsd.class_radius_bound(p).sum().backward()
        assert p.grad.shape == (7, 3)


def test_inference_mode():
    with torch.inference_mode():
        assert kdejsd.class_radius_bound(softmax_rows(4, 2)).shape == (4,)


# ----------------------------------------------------------------------------------------------------------------------
# Errors

P = torch.full((2, 4), 0.25)


@pytest.mark.parametrize(
    ("error", "text", "keywords"),
    [
        (ValueError, "either p or log_p must be given, got neither", {}),
        (ValueError, "either p or log_p must be given, got both", {"p": P, "log_p": P}),
        (TypeError, "p must be a tensor, got list", {"p": [0.5, 0.5]}),
        (TypeError, "log_p must be float32.*got torch.int64", {"log_p": P.long()}),
        (ValueError, r"p must have shape \[..., classes\].*got \[2, 0\]", {"p": P[:, :0]}),
        (ValueError, r"log_p must have shape \[..., classes\].*got \[\]", {"log_p": P[0, 0]}),
        (ValueError, r"p must sum to 1.*got 1.25 in row \[1\]", {"p": P + torch.tensor([[0.0], [0.0625]])}),
        (ValueError, r"log_p must sum to 1.*got 2 in row \[0\]", {"log_p": (2 * P).log()}),
        (ValueError, r"p must sum to 1.*got 0.5 in row \[\]", {"p": P[0, :2]}),
        (ValueError, r"p must be in \[0, 1\], got 8 values that are not, the first -0.25", {"p": -P}),
        (ValueError, "log_p must be at most 0, got 8 values that are not, the first nan", {"log_p": P * math.nan}),
    ],
)
def test_errors(error, text, keywords):
    with pytest.raises(error, match=text):
        kdejsd.class_radius_bound(**keywords, check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounded_distributions_pass_the_check(dtype):
    kdejsd.class_radius_bound(softmax_rows(50, 1000, dtype=dtype), check=True)
    logits = torch.randn(50, 1000, generator=generator(), dtype=torch.float64).to(dtype)
    kdejsd.class_radius_bound(log_p=logits.log_softmax(-1), check=True)


def test_values_are_checked_on_request(monkeypatch):
    bad = torch.tensor([0.5, math.nan])
    assert kdejsd.class_radius_bound(bad).isnan()
    monkeypatch.setenv("KDEJSD_CHECK", "1")
    kdejsd.class_radius_bound(P[0, :2])  # sums are asked for by check=True alone
    with pytest.raises(ValueError, match="p must be in"):
        kdejsd.class_radius_bound(bad)


# ----------------------------------------------------------------------------------------------------------------------
# Bounds by the collision probability


def distributions(count: int = 1000):
    """Distributions of 2 to 40 classes, from nearly equal ones to nearly one-sided ones."""
    source = np.random.default_rng(3)
    for classes in (2, 3, 4, 5, 8, 13, 40):
        for concentration in (0.03, 0.3, 1.0, 10.0, 300.0):
            p = source.dirichlet(np.full(classes, concentration), count)
            yield torch.from_numpy(p[np.square(p).sum(-1) < 1 - 1e-9])
    # One class beside equal ones, where psi(|p|^2) alone falls short.
    one = torch.linspace(0.001, 0.999, 999, dtype=torch.float64).unsqueeze(-1)
    for others in (1, 2, 3, 4, 6, 30, 1000):
        yield torch.cat([one, ((1 - one) / others).expand(-1, others)], -1)


def test_sharp_bound_holds_for_every_distribution():
    for p in distributions():
        gap = kdejsd.collision_radius_bound(p) / kdejsd.class_radius_bound(p) - 1
        assert gap.min() > -1e-13
    p = torch.tensor([0.3816, 0.20613333, 0.20613333, 0.20613334], dtype=torch.float64)
    v = p.square().sum()
    assert v < 0.2731 and kdejsd.class_radius_bound(p) > kdejsd.class_radius_bound(v[None]) / v


@pytest.mark.parametrize("classes", [6, 25, 1000])
def test_sharp_bound_is_reached_by_equal_classes(classes):
    p = torch.full((classes,), 1 / classes, dtype=torch.float64)
    expected = kdejsd.class_radius_bound(p).item()
    assert kdejsd.collision_radius_bound(p).item() == pytest.approx(expected, rel=1e-14)
    assert kdejsd.uniform_radius_bound(classes).item() == pytest.approx(expected, rel=1e-14)


def test_sharp_bound_is_continuous_and_rises():
    # One mass x and dust: v = x^2 + almost nothing, through the seam at 0.19885 up to 1.
    x = torch.linspace(0.05, 1, 3001, dtype=torch.float64).unsqueeze(-1)
    p = torch.cat([x, ((1 - x) / 10**5).expand(-1, 10**3), torch.zeros_like(x)], -1)
    bound = kdejsd.collision_radius_bound(p)
    steps = bound.diff()
    assert bound[-1] == math.inf and (steps > 0).all()
    assert steps[:2800].max() < 3e-3


def fifths_at_most():
    """Distributions without a class above 1/5, some of them with classes of probability 0."""
    source = np.random.default_rng(4)
    for classes in (5, 6, 8, 13, 40, 1000):
        for concentration in (0.3, 1.0, 10.0, 300.0):
            p = source.dirichlet(np.full(classes, concentration), 1000)
            even = np.full(classes, 1 / classes)
            # As far towards even probabilities as the greatest one asks for: it is then 1/5 in most rows.
            share = np.clip((0.2 - even[0]) / (p.max(-1, keepdims=True) - even[0]), 0, 1)
            p = even + share * (p - even)
            yield torch.from_numpy(np.concatenate([p, np.zeros((len(p), 2))], -1))


def test_printed_bound():
    for p in fifths_at_most():
        assert (kdejsd.collision_radius_bound(p, form="printed") >= kdejsd.collision_radius_bound(p)).all()
        assert (kdejsd.collision_radius_bound(p, form="printed") >= kdejsd.class_radius_bound(p)).all()
    for classes, ratio in ((5, 3.0), (1000, 4.34)):
        equal = torch.full((classes,), 1 / classes, dtype=torch.float64)
        bound = kdejsd.collision_radius_bound(equal, form="printed")
        entropy = math.log(classes)
        assert bound.item() == pytest.approx(math.log(4 * math.pi * entropy) / math.sqrt(2 * entropy), rel=1e-14)
        assert (bound / kdejsd.class_radius_bound(equal)).item() == pytest.approx(ratio, abs=0.01)
    entropy = math.log(1e9)  # of a billion equal classes
    loose = math.log(4 * math.pi * entropy) / math.sqrt(2 * entropy) / kdejsd.uniform_radius_bound(1e9)
    assert loose.item() == pytest.approx(5.45, abs=0.01)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_printed_bound_is_refused_where_a_class_has_more_than_a_fifth(dtype, device):
    """Theorem 3.1 assumes 0 < p_i <= 1/5 of every class."""

    def printed(p):
        return kdejsd.collision_radius_bound(torch.as_tensor(p, dtype=dtype, device=device), form="printed")

    fifth = printed([0.2] * 5)
    assert fifth.item() == pytest.approx(1.67598, abs=1e-2 if dtype.itemsize == 2 else 1e-5)
    assert torch.equal(printed([0.2] * 5 + [0.0]), fifth)  # a class that never occurs
    assert kdejsd.max_collision_entropy(fifth, form="printed").item() == pytest.approx(math.log(5), rel=1e-2)
    assert printed([[0.1] * 10, [math.nan] * 10]).isnan().tolist() == [False, True]
    assert printed([math.nan, 0.5]).isnan()
    assert printed(torch.zeros(0, 3)).shape == (0,)
    more = 0.21 if dtype.itemsize == 2 else 0.200001
    with pytest.raises(
        ValueError, match=r"^p must be at most 1/5 for every class .* Theorem 3.1 assumes, got 0.2\d*; "
    ):
        printed([more] + [(1 - more) / 9] * 9)
    with pytest.raises(ValueError, match=r"got 0\.25; form='sharp'"):  # of four classes one has a quarter at least
        printed([0.25] * 4)
    with pytest.raises(ValueError, match=r"got 0.5 in row \[1, 0\]; "):
        printed([[[0.1] * 10], [[0.5] * 2 + [0.0] * 8]])


def test_uniform_radius_bound():
    assert kdejsd.uniform_radius_bound(2).item() == pytest.approx(0.797884560803, abs=1e-12)
    assert kdejsd.uniform_radius_bound(2.0, lipschitz=3.0).item() == pytest.approx(3 * 0.797884560803, abs=1e-11)
    got = kdejsd.uniform_radius_bound(torch.tensor([1, 2, 25]))
    assert got.dtype == torch.float64 and got[0] == math.inf and got[2].item() == pytest.approx(0.4036, abs=1e-4)
    assert kdejsd.uniform_radius_bound(torch.tensor([0.5], dtype=torch.float32)).isnan().all()
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        kdejsd.uniform_radius_bound(0)


def test_max_collision_entropy_inverts_the_bound():
    assert kdejsd.max_collision_entropy(kdejsd.uniform_radius_bound(25)).item() == pytest.approx(math.log(25))
    assert kdejsd.max_collision_entropy(0.4037).exp().item() == pytest.approx(25, abs=0.05)
    # Entropies by their exact tail: v = Q(x), from 1 - 1e-3 to e^-5000.
    entropy = torch.tensor([1e-3, 0.1, 0.5, 1.0, 1.6, 1.61, 1.62, 2.0, 5.0, 50.0, 300.0], dtype=torch.float64)
    v = (-entropy).exp()
    p = torch.stack([v.sqrt(), torch.zeros_like(v)], -1)  # |p|^2 = v is all that the bound looks at
    radius = kdejsd.collision_radius_bound(p)
    torch.testing.assert_close(kdejsd.max_collision_entropy(radius), entropy, rtol=1e-11, atol=0)
    torch.testing.assert_close(kdejsd.max_collision_entropy(radius * 7, lipschitz=7.0), entropy, rtol=1e-11, atol=0)
    high = torch.tensor([math.log(5), 1.61, 1.62, 2.0, 5.0, 50.0, 300.0], dtype=torch.float64)
    radius = (4 * math.pi * high).log() / (2 * high).sqrt()
    torch.testing.assert_close(kdejsd.max_collision_entropy(radius, form="printed"), high, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        kdejsd.max_collision_entropy(7 * radius, form="printed", lipschitz=7.0), high, rtol=1e-9, atol=0
    )
    for classes in (5, 25):
        equal = torch.full((classes,), 1 / classes)
        radius = kdejsd.collision_radius_bound(equal, form="printed")
        for given in (radius, radius.item()):
            entropy = kdejsd.max_collision_entropy(given, form="printed")
            assert entropy.item() == pytest.approx(math.log(classes), rel=1e-5)
    assert kdejsd.max_collision_entropy(0.4037, form="printed") == pytest.approx(184, abs=0.2)  # sharp: 3.2


def test_max_collision_entropy_at_the_ends():
    nan, inf = math.nan, math.inf
    got = kdejsd.max_collision_entropy(torch.tensor([-0.1, nan, 0.0, 1e-4, 30.0], dtype=torch.float64))
    assert got[:2].isnan().all() and got[2] == inf
    assert got[3].item() == pytest.approx(5e7, rel=1e-5) and 0 < got[4] < 1e-100
    printed = kdejsd.max_collision_entropy(torch.tensor([1.6761, 1.6759, -0.1, nan]), form="printed")
    assert printed.isnan().tolist() == [True, False, True, True]
    least = kdejsd.max_collision_entropy(torch.tensor([0.0, 1e-300, 1e-140], dtype=torch.float64), form="printed")
    assert least[:2].tolist() == [inf, inf]
    assert (4 * math.pi * least[2]).log() / (2 * least[2]).sqrt() == pytest.approx(1e-140)
    assert kdejsd.max_collision_entropy(0, form="printed") == inf
    assert kdejsd.max_collision_entropy(torch.tensor([0.5])).dtype == torch.float32
    for radius, form, text in (
        (-1.0, "sharp", "at least 0"),
        (nan, "sharp", "at least 0"),
        (1.6761, "printed", r"at most 1.67598 .* some class has more than the 1/5 .*; got 1.6761"),
    ):
        with pytest.raises(ValueError, match=f"radius must be {text}"):
            kdejsd.max_collision_entropy(radius, form=form)
    with pytest.raises(ValueError, match=r"radius must be at most 3\.35196 with"):
        kdejsd.max_collision_entropy(3.36, form="printed", lipschitz=2)
    with pytest.raises(ValueError, match="form must be 'sharp' or 'printed', got 'tight'"):
        kdejsd.max_collision_entropy(0.4, form="tight")
    with pytest.raises(ValueError, match="form must be"):
        kdejsd.collision_radius_bound(P, form="tight")


def test_bounds_are_differentiable():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]], dtype=torch.float64)
    many = softmax_rows(2, 8, spread=0.3)
    for x in (p, many):
        leaf = x.requires_grad_()
        assert gradcheck(kdejsd.collision_radius_bound, (leaf,))
        assert gradgradcheck(kdejsd.collision_radius_bound, (leaf,))
    even = torch.tensor([[0.19, 0.18, 0.18, 0.15, 0.15, 0.15], [0.1, 0.15, 0.15, 0.2, 0.2, 0.2]], dtype=torch.float64)
    even = even.mul(0.99).requires_grad_()
    assert gradcheck(lambda t: kdejsd.collision_radius_bound(t, form="printed"), (even,))
    radius = torch.tensor([0.05, 0.4, 0.55, 0.7, 1.4], dtype=torch.float64, requires_grad=True)
    assert gradcheck(kdejsd.max_collision_entropy, (radius,))
    assert gradcheck(lambda t: kdejsd.max_collision_entropy(t, form="printed"), (radius,))
    assert gradgradcheck(kdejsd.max_collision_entropy, (radius[:3].detach().requires_grad_(),))
    count = torch.tensor([1.5, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(kdejsd.uniform_radius_bound, (count,))


def test_far_radii_keep_their_derivative():
    """dH/dradius is -1/radius^3 for small radii, to the leading order."""
    radius = torch.tensor([1e-4, 1.1e-3, 0.9e-3], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kdejsd.max_collision_entropy(radius).sum(), radius)
    torch.testing.assert_close(slope * radius.detach() ** 3, -torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
