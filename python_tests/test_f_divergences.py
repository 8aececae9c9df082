"""The f-divergences: each f against its conjugate, the bound against the divergences that SciPy integrates."""

from __future__ import annotations

import copy
import math
import pickle
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from helpers import points
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import Tensor
from torch.autograd import gradcheck

from kdejsd.models.f_divergences import NAMES, by_name

LOG2 = math.log(2)
INF, NAN = math.inf, math.nan
RATIOS = torch.logspace(-6, 6, 200, dtype=torch.float64)
EVERY = pytest.mark.parametrize("name", NAMES)


def test_the_names():
    assert NAMES == ("kl", "reverse-kl", "pearson", "squared-hellinger", "jensen-shannon", "gan")
    assert [by_name(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", ["js", "KL", "", None])
def test_an_unknown_name_is_told_the_names(name):
    with pytest.raises(ValueError, match=r"'kl', 'reverse-kl', .*, 'gan', got ") as error:
        by_name(name)
    assert repr(name) in str(error.value)


@EVERY
def test_copies_are_equal(name):
    divergence = by_name(name)
    assert pickle.loads(pickle.dumps(divergence)) == copy.deepcopy(divergence) == divergence
    assert hash(copy.deepcopy(divergence)) == hash(divergence)
    assert sum(by_name(other) == divergence for other in NAMES) == 1


# ----------------------------------------------------------------------------------------------------------------------
# f and its conjugate

# The f as the paper prints them.
PRINTED = {
    "kl": lambda u: u * np.log(u),
    "reverse-kl": lambda u: -np.log(u),
    "pearson": lambda u: (u - 1) ** 2,
    "squared-hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
    "jensen-shannon": lambda u: -(u + 1) * np.log((1 + u) / 2) + u * np.log(u),
    "gan": lambda u: u * np.log(u) - (u + 1) * np.log(u + 1),
}


@EVERY
def test_f(name):
    divergence = by_name(name)
    u = RATIOS[(RATIOS > 1e-3) & (RATIOS < 1e3)]
    np.testing.assert_allclose(divergence.f(u), PRINTED[name](u.numpy()), rtol=1e-11, atol=1e-13)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert divergence.f(one).item() == pytest.approx(-2 * LOG2 if name == "gan" else 0, abs=1e-15)
    assert divergence.derivative(one).item() == pytest.approx(divergence.threshold, abs=1e-15)


@EVERY
def test_f_is_convex_with_this_derivative(name):
    divergence = by_name(name)
    u = RATIOS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergence.f(u).sum(), u)
    torch.testing.assert_close(slope, divergence.derivative(RATIOS), rtol=1e-9, atol=1e-13)
    assert (divergence.derivative(RATIOS).diff() > 0).all()
    for a, b in ((0.0, 0.5), (0.3, 2.0), (1.0, 1000.0)):
        f = divergence.f(torch.tensor([a, (a + b) / 2, b], dtype=torch.float64))
        assert f[1] < (f[0] + f[2]) / 2


def test_f_at_zero():
    """f(0) is what mass of q costs where p has none."""
    zero = torch.zeros((), dtype=torch.float64)
    expected = {"kl": 0, "reverse-kl": INF, "pearson": 1, "squared-hellinger": 1, "jensen-shannon": LOG2, "gan": 0}
    for name, value in expected.items():
        assert by_name(name).f(zero).item() == pytest.approx(value, abs=1e-15), name


@pytest.mark.parametrize("name", ["jensen-shannon", "gan"])
@pytest.mark.parametrize("u", [1e-30, 1e-8, 1.001, 1e4, 1e8, 1e30])
def test_float32_keeps_its_digits_where_terms_cancel(name, u):
    u32 = torch.tensor(u)
    got, slope = by_name(name).f(u32), by_name(name).derivative(u32)
    u = u32.double().numpy()
    w = min(u, 1 / u)
    halves = name == "jensen-shannon"
    exact = max(u, 1) * (w * np.log(w) - (1 + w) * np.log1p((w - 1) / 2 if halves else w))
    assert got.item() == pytest.approx(float(exact), rel=2e-6, abs=1e-7 if halves else 0)
    exact_slope = (LOG2 if halves else 0) - np.log1p(1 / u)
    assert slope.item() == pytest.approx(float(exact_slope), rel=1e-5, abs=1e-7 if halves else 0)


@EVERY
@pytest.mark.parametrize("u", [0.01, 0.5, 1.0, 3.0, 50.0])
def test_the_conjugate_of_the_conjugate(name, u):
    """sup_t (u t - f*(t)) = f(u), by a search over t = g_f(v) that knows nothing of f'."""
    divergence = by_name(name)

    def gap(v: float) -> float:
        t = divergence.output(torch.tensor(v, dtype=torch.float64))
        return float(divergence.conjugate(t) - u * t)

    found = minimize_scalar(gap, bracket=(-1.0, 0.5), options={"xtol": 1e-10})
    f = divergence.f(torch.tensor(u, dtype=torch.float64)).item()
    assert -found.fun == pytest.approx(f, rel=1e-9, abs=1e-9)


@EVERY
def test_fenchel_young(name):
    """f(u) + f*(t) >= u t, with equality at t = f'(u)."""
    divergence = by_name(name)
    u = torch.logspace(-3, 3, 61, dtype=torch.float64)
    f, best = divergence.f(u), divergence.derivative(u)
    torch.testing.assert_close(divergence.conjugate(best), u * best - f, rtol=1e-9, atol=1e-12)
    t = divergence.output(torch.linspace(-6, 6, 101, dtype=torch.float64))
    gap = f[:, None] + divergence.conjugate(t) - u[:, None] * t
    assert (gap > -1e-10 * (1 + (u[:, None] * t).abs())).all()


@EVERY
def test_the_derivative_of_the_conjugate_is_the_inverse_of_f_prime(name):
    divergence = by_name(name)
    u = torch.logspace(-3, 3, 31, dtype=torch.float64)
    t = divergence.derivative(u).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(divergence.conjugate(t).sum(), t)[0], u, rtol=1e-8, atol=0)


@EVERY
def test_outside_the_domain_the_conjugate_is_infinite(name):
    divergence = by_name(name)
    low, high = divergence.domain
    assert low == -INF
    if high == INF:
        assert divergence.conjugate(torch.tensor([-50.0, 0.0, 50.0])).isfinite().all()
        return
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([high - 1e-3, high, high + 1e-3, high + 5, INF], dtype=dtype)
        assert divergence.conjugate(t).isfinite().tolist() == [True] + 4 * [False]
        assert (divergence.conjugate(t)[1:] == INF).all()


# ----------------------------------------------------------------------------------------------------------------------
# Networks' outputs


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_increase_into_the_domain(name, dtype):
    divergence = by_name(name)
    v = torch.linspace(-15, 15, 301, dtype=dtype)
    t = divergence.output(v)
    assert t.dtype == dtype and (t.diff() >= 0).all() and (t <= divergence.domain[1]).all()
    middle = v.abs() < 5
    assert (t[middle].diff() > 0).all() and (t[middle] < divergence.domain[1]).all()


@EVERY
@pytest.mark.parametrize("v", [-40.0, -21.0, -5.0, -1e-9, 0.0, 1e-9, 0.7, 12.0, 25.0, 40.0])
def test_fake_term_is_the_conjugate_of_the_output(name, v):
    """Against the composition in 60 digits, and in float64 where that has the digits."""
    divergence = by_name(name)
    with localcontext() as context:
        context.prec = 60
        x, one, two = Decimal(v), Decimal(1), Decimal(2)
        exact = {
            "kl": lambda: (x - 1).exp(),
            "reverse-kl": lambda: -1 - (-x).exp().ln(),
            "pearson": lambda: x * x / 4 + x,
            "squared-hellinger": lambda: (1 - (-x).exp()) / (-x).exp(),
            "jensen-shannon": lambda: -(2 - two / (1 + (-x).exp())).ln(),
            "gan": lambda: -(1 - one / (1 + (-x).exp())).ln(),
        }[name]()
    got = divergence.fake_term(torch.tensor(v, dtype=torch.float64))
    assert got.item() == pytest.approx(float(exact), rel=1e-12, abs=1e-15)
    if abs(v) <= 12:
        t = divergence.output(torch.tensor(v, dtype=torch.float64))
        assert divergence.conjugate(t).item() == pytest.approx(got.item(), rel=1e-10, abs=1e-15)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_outputs(name, dtype):
    """No term overflows that is not itself too large for the dtype, and none is NaN."""
    divergence = by_name(name)
    v = torch.tensor([-1e4, -300.0, 300.0, 1e4], dtype=dtype, requires_grad=True)
    real, fake = divergence.output(v), divergence.fake_term(v)
    assert not real.isnan().any() and not fake.isnan().any()
    bounded = {
        "kl": ("1111", "1100"),
        "reverse-kl": ("0011", "1111"),
        "pearson": ("1111", "1111"),
        "squared-hellinger": ("0011", "1100"),
        "jensen-shannon": ("1111", "1111"),
        "gan": ("1111", "1111"),
    }[name]
    if dtype == torch.float64:  # exp(300) is a float64 number
        bounded = tuple(x.replace("0011", "0111").replace("1100", "1110") for x in bounded)
    for term, expected in zip((real, fake), bounded, strict=True):
        assert term.isfinite().tolist() == [x == "1" for x in expected]
    for term in (real, fake):
        (slope,) = torch.autograd.grad(term.sum(), v)
        assert not slope.isnan().any() and (name == "pearson" or (slope >= 0).all())


def test_gan_terms_are_the_logistic_loss():
    v = points(7, seed=1)
    gan, js = by_name("gan"), by_name("jensen-shannon")
    labels = torch.ones_like(v)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(-gan.output(v), loss(v, labels, reduction="none"))
    torch.testing.assert_close(gan.fake_term(v), loss(v, 0 * labels, reduction="none"))
    assert (js.bound(v, 2 * v) - gan.bound(v, 2 * v)).item() == pytest.approx(2 * LOG2)


@EVERY
def test_gradients(name):
    divergence = by_name(name)
    u = (0.5 * points(8, seed=2)).exp().requires_grad_()
    v = (2 * points(8, seed=3)).requires_grad_()
    t = divergence.output(v).detach().requires_grad_()
    for function, x in (("f", u), ("derivative", u), ("conjugate", t), ("output", v), ("fake_term", v)):
        assert gradcheck(getattr(divergence, function), (x,)), function
    assert gradcheck(divergence.bound, (v, (2 * points(5, seed=4)).requires_grad_()))


def test_the_conjugate_of_gan_has_its_gradient_near_the_edge_and_far_from_it():
    t = torch.tensor([-1e-12, -LOG2, -80.0], dtype=torch.float64, requires_grad=True)
    f = by_name("gan").conjugate(t)
    (slope,) = torch.autograd.grad(f.sum(), t)
    np.testing.assert_allclose(f.detach(), [-math.log(1e-12), LOG2, math.exp(-80)], rtol=1e-11)
    np.testing.assert_allclose(slope, [1e12, 1, math.exp(-80)], rtol=1e-11)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_gives_nan_out(name, dtype):
    divergence = by_name(name)
    x = torch.tensor([0.4, NAN], dtype=dtype)
    for function in ("f", "derivative", "conjugate", "output", "fake_term"):
        got = getattr(divergence, function)(x)
        assert got.dtype == dtype and got.isnan().tolist() == [False, True], function
    assert divergence.bound(x, x[:1]).isnan() and divergence.bound(x[:1], x).isnan()
    if name != "pearson":
        assert divergence.f(torch.tensor(-0.1)).isnan()


@pytest.mark.parametrize(
    ("real", "fake", "error", "text"),
    [
        (torch.zeros(0), torch.zeros(2), ValueError, r"real_outputs must hold at least one output, got shape \[0\]"),
        (torch.zeros(2), torch.zeros(3, 0), ValueError, r"fake_outputs must hold .* got shape \[3, 0\]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), TypeError, "fake_outputs must be a floating.*int64"),
        ([0.0], torch.zeros(2), TypeError, "real_outputs must be a tensor, got list"),
    ],
)
def test_bound_says_what_is_wrong(real, fake, error, text):
    with pytest.raises(error, match=text):
        by_name("kl").bound(real, fake)


# ----------------------------------------------------------------------------------------------------------------------
# The bound


def integral(function: object) -> float:
    return quad(function, -14, 14, limit=400, epsabs=1e-13, epsrel=1e-12)[0]


MEAN, STD = 0.8, 0.75  # of P; Q is the standard normal, and (p / q)^2 q can be integrated


def divergence_of(name: str) -> float:
    """D_f(P || Q) of the two normals, from closed forms where there are any and else by quadrature of its definition
    (not of f)."""

    def p(x: float) -> float:
        return norm.pdf(x, MEAN, STD)

    def kl(x: float, f: object) -> float:
        return f(x) * np.log(2 * f(x) / (p(x) + norm.pdf(x)))

    jsd = 0.5 * (integral(lambda x: kl(x, p)) + integral(lambda x: kl(x, norm.pdf)))
    return {
        "kl": -math.log(STD) + (STD**2 + MEAN**2 - 1) / 2,
        "reverse-kl": math.log(STD) + (1 + MEAN**2) / (2 * STD**2) - 0.5,
        "pearson": integral(lambda x: p(x) ** 2 / norm.pdf(x)) - 1,
        "squared-hellinger": 2 - 2 * math.sqrt(2 * STD / (1 + STD**2)) * math.exp(-(MEAN**2) / (4 * (1 + STD**2))),
        "jensen-shannon": 2 * jsd,
        "gan": 2 * jsd - 2 * LOG2,
    }[name]


def test_the_laws_differ_by_what_the_measures_say():
    assert 0 < divergence_of("jensen-shannon") < divergence_of("squared-hellinger") < divergence_of("kl")


@EVERY
def test_the_bound_is_tight_at_the_ratio_of_densities(name):
    """E_P T - E_Q f*(T) at T = f'(p / q), by quadrature, is the divergence; any other T gives less."""
    divergence = by_name(name)

    def value(change: object) -> float:
        def term(x: float) -> float:
            log_u = norm.logpdf(x, MEAN, STD) - norm.logpdf(x)
            t = divergence.derivative(torch.tensor(log_u + change(x), dtype=torch.float64).exp())
            conjugate = divergence.conjugate(t).item()
            return norm.pdf(x, MEAN, STD) * t.item() - norm.pdf(x) * conjugate

        return quad(term, -8, 8, limit=200, epsabs=1e-11)[0]

    truth = divergence_of(name)
    assert value(lambda x: 0.0) == pytest.approx(truth, abs=1e-8)
    for change in (lambda x: 0.3, lambda x: -0.3, lambda x: 0.2 * math.sin(3 * x)):
        assert value(change) < truth - 1e-3


@EVERY
def test_the_bound_of_samples(name):
    """At the best network's outputs it is the divergence up to the error of a mean; at shifted ones it is less."""
    divergence = by_name(name)
    x_p, x_q = MEAN + STD * points(200_000, seed=5), points(200_000, seed=6)

    def outputs(x: Tensor) -> Tensor:
        log_u = -0.5 * ((x - MEAN) / STD).square() - math.log(STD) + 0.5 * x.square()
        return {
            "kl": 1 + log_u,
            "reverse-kl": log_u,
            "pearson": 2 * torch.expm1(log_u),
            "squared-hellinger": log_u / 2,
            "jensen-shannon": log_u,
            "gan": log_u,
        }[name]

    terms = divergence.output(outputs(x_p)), divergence.fake_term(outputs(x_q))
    error = math.sqrt(sum(float(term.var()) / len(term) for term in terms))
    bound = divergence.bound(outputs(x_p), outputs(x_q))
    assert bound.shape == () and error < 0.02
    assert abs(bound.item() - divergence_of(name)) < 4 * error
    torch.testing.assert_close(
        divergence.bound(outputs(x_p).float().reshape(-1, 2), outputs(x_q).float()), bound.float(), rtol=1e-4, atol=1e-5
    )
    assert divergence.bound(outputs(x_p) + 0.5, outputs(x_q) + 0.5) < bound
