"""The targets: densities against SciPy, smoothing against the convolution, samples against their moments."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from helpers import DEVICES, DTYPES, generator, points, worst
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import chisquare, multivariate_normal
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck
from torch.distributions import (
    Beta,
    Categorical,
    Exponential,
    ExpTransform,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    Uniform,
)
from torch.distributions.transforms import AffineTransform, ComposeTransform, SigmoidTransform

import kdejsd
from kdejsd import GaussianMixture, LaggedKDE, StandardNormal, jsd_loss, plots
from kdejsd.models import AAE, AE, FC, GEN, WAE
from kdejsd.targets import IsotropicNormal, Target, as_law, checked_target, law_moments

MEANS = [[0.0, 0.0, 1.0], [2.0, -1.0, 0.0], [-3.0, 0.5, 0.5]]
SCALES = [0.5, 1.0, 1.7]
WEIGHTS = [0.2, 0.5, 0.3]


def mixture() -> GaussianMixture:
    return GaussianMixture(MEANS, SCALES, WEIGHTS)


def known_laws() -> dict[str, tuple[Target, list, list, list]]:
    """Each of our targets with its means, standard deviations and weights."""
    return {
        "standard normal": (StandardNormal(3), [[0.0] * 3], [1.0], [1.0]),
        "normal": (IsotropicNormal(3, 2.5), [[0.0] * 3], [math.sqrt(2.5)], [1.0]),
        "mixture": (mixture(), MEANS, SCALES, WEIGHTS),
        "mixture, one scale": (GaussianMixture(MEANS, 0.8), MEANS, [0.8] * 3, [1 / 3] * 3),
        "one component": (GaussianMixture(MEANS[1:2], 0.3), MEANS[1:2], [0.3], [1.0]),
    }


def all_targets() -> dict[str, Target]:
    return {name: law[0] for name, law in known_laws().items()} | {
        "multivariate normal": MultivariateNormal(
            torch.tensor([1.0, 0.0, -1.0]), torch.diag(torch.tensor([1.0, 2, 3]))
        ),
        "independent normal": Independent(Normal(torch.tensor([1.0, 0.0, -1.0]), 2.0), 1),
    }


LAWS, ALL = list(known_laws()), list(all_targets())


# ----------------------------------------------------------------------------------------------------------------------
# Densities


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAWS)
def test_log_prob_is_scipy(name, device):
    law, means, scales, weights = known_laws()[name]
    z = 3 * points(200, 3)
    each = [np.log(w) + multivariate_normal(m, s * s).logpdf(z) for m, s, w in zip(means, scales, weights, strict=True)]
    got = law.log_prob(z.to(device))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.cpu().numpy(), logsumexp(each, axis=0), rtol=1e-13, atol=1e-13)
    single = law.log_prob(z.to(device).float())
    assert single.dtype == torch.float32 and worst(single, got) < 1e-6


@pytest.mark.parametrize("name", LAWS)
def test_log_prob_keeps_the_leading_shape(name):
    law = known_laws()[name][0]
    z = points(2, 5, 3)
    values = law.log_prob(z)
    assert values.shape == (2, 5)
    assert law.log_prob(z[1, 2]).shape == () and law.log_prob(z[1, 2]).item() == pytest.approx(values[1, 2].item())
    assert law.log_prob(z[:0]).shape == (0, 5)
    assert worst(law.log_prob(z.transpose(0, 1)), values.T) < 1e-15


@pytest.mark.parametrize("name", LAWS)
def test_log_prob_gradient(name):
    assert gradcheck(known_laws()[name][0].log_prob, points(6, 3).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    z = points(9, 3).to(dtype)
    assert StandardNormal(3).log_prob(z).dtype == dtype
    value = mixture().log_prob(z)
    assert value.dtype == torch.float32 and worst(value, mixture().log_prob(z.double())) < 2e-2


def test_weights_are_scaled_to_sum_to_1():
    z = points(20, 3)
    assert worst(GaussianMixture(MEANS, SCALES, [2, 5, 3]).log_prob(z), mixture().log_prob(z)) < 1e-15
    assert mixture().log_weights.exp().sum().item() == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("name", LAWS)
def test_smoothed_is_the_convolution(name):
    """One dimension, by quadrature: the integral of p(x - u) N(u; 0, h^2)."""
    _, means, scales, weights = known_laws()[name]
    law: Target
    if "normal" in name:
        law = IsotropicNormal(1, scales[0] ** 2)
    else:
        law = GaussianMixture([[m[0]] for m in means], scales, weights)
    h = 0.7

    def density(x, law):
        return law.log_prob(torch.tensor([x], dtype=torch.float64)).exp().item()

    for x in (-4.0, 0.0, 0.3, 2.5):
        exact = quad(lambda u, x=x: density(x - u, law) * density(u, IsotropicNormal(1, h * h)), -6, 6, limit=200)[0]
        assert density(x, law.smoothed(h)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_smoothing_twice_adds_variances(name):
    law, z = known_laws()[name][0], points(20, 3)
    assert worst(law.smoothed(0.3).smoothed(0.4).log_prob(z), law.smoothed(0.5).log_prob(z)) < 1e-15
    assert law.smoothed(0.3).dim == 3


# ----------------------------------------------------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize("name", ALL)
def test_moments(name):
    """Mean and covariance of 100 000 samples, to 5 standard errors."""
    n, law = 100_000, all_targets()[name]
    if name in LAWS:
        _, means, scales, weights = known_laws()[name]
        w, mu = np.array(weights), np.array(means)
        mean = w @ mu
        second = sum(w[i] * (scales[i] ** 2 * np.eye(3) + np.outer(mu[i], mu[i])) for i in range(len(w)))
        covariance = second - np.outer(mean, mean)
    else:
        mean = law.mean.numpy()
        covariance = np.diag(law.variance.numpy())
    samples = as_law(law).sample(n, generator(3)).double().numpy()
    assert samples.shape == (n, 3)
    centered = samples - mean
    assert (abs(centered.mean(0)) < 5 * samples.std(0) / math.sqrt(n)).all()
    products = centered[:, :, None] * centered[:, None, :]
    assert (abs(products.mean(0) - covariance) < 5 * products.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAWS)
def test_sample_is_the_generators_alone(name, device):
    law = known_laws()[name][0]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = law.sample(10, torch.Generator(device).manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    source = torch.Generator(device).manual_seed(7)
    assert torch.equal(law.sample(10, source), first)
    assert not torch.equal(law.sample(10, source), first)
    assert first.shape == (10, 3) and first.dtype == torch.float32 and first.device.type == device


@pytest.mark.parametrize("name", LAWS)
def test_sample_without_a_generator_follows_the_global_seed(name):
    law = known_laws()[name][0]
    torch.manual_seed(5)
    first = law.sample(10)
    torch.manual_seed(5)
    assert torch.equal(law.sample(10), first) and first.device.type == "cpu"


@pytest.mark.parametrize("device", DEVICES)
def test_sample_with_component(device):
    """Components as often as their weights, and samples spread around the component they are said to be from."""
    n = 60_000
    samples, component = mixture().sample_with_component(n, torch.Generator(device).manual_seed(4))
    samples, component = samples.cpu().double(), component.cpu()
    assert samples.shape == (n, 3) and component.shape == (n,) and component.dtype == torch.int64
    counts = torch.bincount(component, minlength=3)
    assert chisquare(counts.numpy(), n * np.array(WEIGHTS)).pvalue > 1e-6
    for i in range(3):
        own = (samples[component == i] - torch.tensor(MEANS[i], dtype=torch.float64)) / SCALES[i]
        error = 5 / math.sqrt(len(own))
        assert own.mean(0).abs().max() < error and (own.square().mean(0) - 1).abs().max() < error * math.sqrt(2)
    again = mixture().sample(n, torch.Generator(device).manual_seed(4))
    assert worst(again, samples) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ALL)
def test_sampling_leaves_the_global_random_state(name, device):
    law = all_targets()[name]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    source = torch.Generator(device).manual_seed(7)
    first, second = (as_law(law).sample(10, source) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(as_law(law).sample(10, torch.Generator(device).manual_seed(7)), first)
    assert not torch.equal(first, second)
    assert first.shape == (10, 3) and first.device.type == device


# ----------------------------------------------------------------------------------------------------------------------
# Modules


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_dtype(dtype):
    law, z = mixture().to(dtype), points(20, 3)
    assert {b.dtype for b in law.buffers()} == {dtype}
    value = law.log_prob(z)
    assert value.dtype == torch.float64
    assert worst(value, mixture().log_prob(z)) < (1e-6 if dtype == torch.float32 else 1e-15)
    assert law.sample(4, generator()).dtype == torch.float32


def test_to_meta():
    assert {b.device.type for b in mixture().to("meta").buffers()} == {"meta"}
    value = mixture().to("meta").log_prob(torch.empty(4, 3, device="meta"))
    assert value.shape == (4,) and value.device.type == "meta"


@pytest.mark.parametrize("device", DEVICES[1:])
def test_buffers_follow_the_points(device):
    """A target left on the CPU and one moved to the device give the same there."""
    z = points(20, 3, device=device)
    assert torch.equal(mixture().log_prob(z), mixture().to(device).log_prob(z))
    assert mixture().to(device).smoothed(0.5).log_prob(z).device.type == device


def test_state_dict_round_trip():
    file = io.BytesIO()
    torch.save(mixture().state_dict(), file)
    file.seek(0)
    loaded = GaussianMixture(torch.ones(3, 3), 1.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    z = points(20, 3)
    assert torch.equal(loaded.log_prob(z), mixture().log_prob(z))
    assert torch.equal(loaded.sample(5, generator()), mixture().sample(5, generator()))
    assert StandardNormal(3).state_dict() == {}


def test_a_mixture_owns_its_numbers():
    means, scales, weights = torch.zeros(2, 3).double(), torch.ones(2).double(), torch.ones(2).double()
    mixture = GaussianMixture(means, scales, weights)
    smoothed = mixture.smoothed(0.5)
    before = mixture.log_prob(torch.ones(1, 3)), smoothed.log_prob(torch.ones(1, 3))
    for given in (means, scales, weights):
        given[0] = 7.0
    assert (mixture.log_prob(torch.ones(1, 3)), smoothed.log_prob(torch.ones(1, 3))) == before
    mixture.means[0] = 7.0
    assert smoothed.log_prob(torch.ones(1, 3)) == before[1]


def test_no_samples():
    for target in (StandardNormal(3), GaussianMixture(torch.zeros(2, 3))):
        assert target.sample(0).shape == (0, 3)


@pytest.mark.parametrize("name", LAWS)
def test_no_parameters_to_train_and_copies(name):
    law, z = known_laws()[name][0], points(5, 3)
    assert list(law.parameters()) == []
    assert torch.equal(copy.deepcopy(law).log_prob(z), law.log_prob(z))


COMPILED = {
    "tensors": lambda z, means: GaussianMixture(means, means[:, 0].abs(), means[:, 1].abs()).log_prob(z),
    "lists": lambda z, means: GaussianMixture([[0.0, 1, 2.0], [1, 2, 3]], [0.5, 1.0]).log_prob(z),
    "one scale": lambda z, means: GaussianMixture(means, 0.5).log_prob(z),
    "array": lambda z, means: GaussianMixture(np.eye(3), 0.5).log_prob(z),
    "smoothed": lambda z, means: GaussianMixture(means).smoothed(0.5).log_prob(z),
    "components": lambda z, means: GaussianMixture(means).component_log_prob(z),
    "moments": lambda z, means: torch.stack(GaussianMixture(means, 2.0).moments()) + z.sum(),
    "normal": lambda z, means: torch.stack(StandardNormal(3).smoothed(0.5).moments()) + z.sum(),
    "loss": lambda z, means: jsd_loss(z, z.detach() + 1, 0.5, target=GaussianMixture(means)),
}


@pytest.mark.parametrize("name", list(COMPILED))
def test_a_law_may_be_made_in_a_compiled_graph(name):
    torch.compiler.reset()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        arguments = points(5, 3, seed=seed).requires_grad_(), points(2, 3, seed=seed + 2)
        value, expected = compiled(*arguments), COMPILED[name](*arguments)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(v.sum(), arguments[0])[0] for v in (value, expected))
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_a_compiled_graph_refuses_what_can_be_no_mixture():
    torch.compiler.reset()
    compiled = torch.compile(COMPILED["tensors"], fullgraph=True, backend="aot_eager")
    compiled(points(5, 3), points(2, 3))
    with pytest.raises(ValueError, match="means must be finite"):
        compiled(points(5, 3), points(2, 3) + torch.tensor([0, 0, math.inf]))
    with pytest.raises(ValueError, match="scales must be positive and finite, got"):
        compiled(points(5, 3), points(2, 3) * torch.tensor([0, 1, 1]))


def test_a_fake_mixture():
    with FakeTensorMode():
        assert GaussianMixture(torch.empty(4, 3), 0.5).log_prob(torch.empty(5, 3)).shape == (5,)
    torch.library.opcheck(torch.ops.kdejsd.mixture.default, (points(4, 3).T, points(3).exp(), points(3).exp()))


def test_representations():
    assert repr(StandardNormal(3).smoothed(0.5)) == "IsotropicNormal(dim=3, variance=1.25)"
    assert repr(StandardNormal(3)) == "StandardNormal(dim=3, variance=1)"
    assert repr(mixture()) == "GaussianMixture(components=3, dim=3)"


@pytest.mark.parametrize("name", ALL)
def test_dim(name):
    assert as_law(all_targets()[name]).dim == 3


# ----------------------------------------------------------------------------------------------------------------------
# torch's distributions and laws of a user's own


def normal_distributions() -> dict[str, torch.distributions.Distribution]:
    scales, loc = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([1.0, 0.0, -1.0]).double()
    factor = points(3, 2, seed=5)
    weights = torch.tensor([0.3, 0.7]).double()
    return {
        "independent": Independent(Normal(loc, scales), 1),
        "independent twice": Independent(Independent(Normal(loc, scales), 0), 1),
        "multivariate": MultivariateNormal(loc, factor @ factor.T + torch.eye(3)),
        "low rank": LowRankMultivariateNormal(loc, factor, scales),
        "mixture": MixtureSameFamily(Categorical(weights), Independent(Normal(points(2, 3), scales), 1)),
        "correlated mixture": MixtureSameFamily(
            Categorical(weights), MultivariateNormal(points(2, 3), torch.eye(3).double() + factor @ factor.T)
        ),
    }


@pytest.mark.parametrize("name", list(normal_distributions()))
def test_normal_distributions_are_smoothed(name):
    """The mean density over the kernel's noise, by a quadrature of each dimension."""
    distribution, h, z = normal_distributions()[name], 0.8, points(7, 3, seed=9)
    law = as_law(distribution)
    nodes, shares = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(20))
    noise = h * torch.cartesian_prod(nodes, nodes, nodes)
    share = torch.cartesian_prod(shares, shares, shares).prod(-1) / (2 * math.pi) ** 1.5
    exact = (law.log_prob(z[:, None] - noise).exp() * share).sum(-1).log()
    torch.testing.assert_close(law.smoothed(h).log_prob(z), exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(law.smoothed(0.3).smoothed(0.4).log_prob(z), law.smoothed(0.5).log_prob(z))
    with pytest.raises(ValueError, match="bandwidth must be positive and finite, got 0"):
        law.smoothed(0)


def laws_of_two_dtypes():
    loc, scale, factor = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.5]), torch.tensor([[1.0], [0.3]])
    covariance = torch.diag(scale) + factor @ factor.T
    pair = Categorical(torch.ones(2))
    return {
        "multivariate": lambda d: MultivariateNormal(loc.to(d), covariance.to(d)),
        "low rank": lambda d: LowRankMultivariateNormal(loc.to(d), factor.to(d), scale.to(d)),
        "mixture": lambda d: MixtureSameFamily(
            pair, LowRankMultivariateNormal(loc.to(d).expand(2, 2), factor.to(d), scale.to(d))
        ),
        "transformed": lambda d: TransformedDistribution(
            LowRankMultivariateNormal(loc.to(d), factor.to(d), scale.to(d)), AffineTransform(0.0, 2.0)
        ),
    }


@pytest.mark.parametrize("of_codes", DTYPES)
@pytest.mark.parametrize("of_law", DTYPES)
@pytest.mark.parametrize("name", list(laws_of_two_dtypes()))
def test_codes_and_parameters_may_have_different_dtypes(name, of_law, of_codes):
    make = laws_of_two_dtypes()[name]
    z = points(5, 2).to(of_codes).requires_grad_()
    value = as_law(make(of_law)).log_prob(z)
    torch.testing.assert_close(value.double(), make(torch.float64).log_prob(z.double()), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(value.sum(), z)[0].dtype == of_codes
    if name != "transformed":
        assert as_law(make(of_law)).smoothed(0.5).log_prob(z).isfinite().all()


def laws_to_be_learnt(loc, scale):
    """Normal laws of leaf parameters [2], and what their covariance is."""
    matrix = scale.detach().diag().requires_grad_(scale.requires_grad)
    pair = Categorical(torch.ones(2))
    return {
        "independent": (Independent(Normal(loc, scale), 1), scale),
        "covariance": (MultivariateNormal(loc, matrix), matrix),
        "scale": (MultivariateNormal(loc, scale_tril=matrix), matrix),
        "precision": (MultivariateNormal(loc, precision_matrix=matrix), matrix),
        "low rank": (LowRankMultivariateNormal(loc, torch.ones(2, 1), scale), scale),
        "mixture": (MixtureSameFamily(pair, Independent(Normal(loc.detach().expand(2, 2), scale), 1)), scale),
    }


@pytest.mark.parametrize("name", list(laws_to_be_learnt(torch.zeros(2), torch.ones(2))))
def test_a_smoothed_law_follows_parameters_that_are_learnt(name):
    loc, scale = torch.tensor([0.5, -0.5], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    distribution, spread = laws_to_be_learnt(loc, scale)[name]
    with torch.no_grad():  # how the law was made says nothing of how it is used
        law = as_law(distribution).smoothed(0.3).smoothed(0.4)
    z = points(5, 2).float()
    gradients = [torch.autograd.grad(law.log_prob(z).sum(), spread)[0] for _ in range(2)]
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    with torch.no_grad():
        spread *= 1.5
    fresh = laws_to_be_learnt(loc.detach(), spread.detach() if spread is scale else spread.detach().diagonal())[name][0]
    exact = as_law(fresh).smoothed(0.5).log_prob(z)
    torch.testing.assert_close(law.log_prob(z), exact)
    if name == "independent":  # torch's others are not copied themselves where a parameter needs a gradient
        lagged = copy.deepcopy(LaggedKDE(4, 2, 0.5, distribution))
        torch.testing.assert_close(lagged.law.log_prob(z), exact)


def test_a_smoothed_law_is_computed_once_where_its_spread_is_fixed():
    loc = torch.zeros(2, requires_grad=True)
    law = as_law(Independent(Normal(loc, torch.ones(2)), 1)).smoothed(0.5)
    assert law.distribution is law.distribution
    with torch.no_grad():
        loc += 1
    assert law.log_prob(torch.ones(2)).item() == pytest.approx(-math.log(2 * math.pi * 1.25))


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("make", "inside", "outside"),
    [
        (lambda v: Independent(Uniform(torch.zeros(2), torch.ones(2), validate_args=v), 1, validate_args=v), 0.5, 1.5),
        (lambda v: Independent(Exponential(torch.ones(2), validate_args=v), 1, validate_args=v), 0.5, -1.0),
        (lambda v: Independent(Beta(torch.full((2,), 2.0), 3.0, validate_args=v), 1, validate_args=v), 0.4, -0.2),
        (
            lambda v: TransformedDistribution(
                Independent(Normal(torch.zeros(2), 1.0, validate_args=v), 1), ExpTransform(), validate_args=v
            ),
            1.0,
            -1.0,
        ),
    ],
)
def test_outside_of_the_support_the_density_is_0(make, inside, outside, validate):
    distribution = make(validate)
    z = torch.tensor([[inside, inside], [outside, inside], [math.nan, inside], [outside, outside]], requires_grad=True)
    exact = float(distribution.log_prob(z[:1].detach()))
    value = as_law(distribution).log_prob(z)
    assert value[0].item() == exact and value[[1, 3]].isneginf().all() and value[2].isnan()
    if value.requires_grad:  # the uniform law's does not
        (gradient,) = torch.autograd.grad(value[0] + value[1] + value[3], z)
        assert gradient.isfinite().all() and (gradient[1:] == 0).all()
    assert as_law(distribution).log_prob(z[1:2]).isneginf().all()
    assert as_law(distribution).log_prob(z[:0]).shape == (0,)

    centers = points(30, 2).float()
    terms = jsd_loss(z, centers, 0.5, target=distribution, reduction="none")
    assert terms[1].item() == pytest.approx(math.log(2)) and terms[2].isnan() and terms[0] < math.log(2)
    (gradient,) = torch.autograd.grad(terms[:2].sum(), z)
    assert gradient[:2].isfinite().all() and gradient[0].abs().sum() > 0
    assert jsd_loss(z, centers, 0.5, target=distribution, reduction="none", divergence="kl")[1].isposinf()


def affine(base, scale=2.0):
    return TransformedDistribution(base, [AffineTransform(3.0, scale)], validate_args=base._validate_args)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    ("make", "inside", "outside"),
    [
        (lambda v: affine(Independent(Exponential(torch.ones(2), validate_args=v), 1)), 3.5, 2.5),
        (lambda v: affine(Independent(Exponential(torch.ones(2), validate_args=v), 1), -2.0), 2.5, 3.5),
        (lambda v: affine(Independent(Uniform(torch.zeros(2), 1.0, validate_args=v), 1)), 3.5, 5.5),
        (lambda v: affine(Independent(Beta(torch.full((2,), 2.0), 3.0, validate_args=v), 1)), 4.5, 5.5),
        (lambda v: Independent(affine(Exponential(torch.ones(2), validate_args=v)), 1, validate_args=v), 3.5, 2.5),
        (lambda v: affine(affine(Independent(Exponential(torch.ones(2), validate_args=v), 1))), 9.5, 8.5),
        # What the last of several transforms can give is not all that they can give together.
        (
            lambda v: TransformedDistribution(
                Independent(Normal(torch.zeros(2), 1.0), 1), [ExpTransform(), AffineTransform(3.0, 2.0)], v
            ),
            *(3.5, 2.5),
        ),
        (
            lambda v: TransformedDistribution(
                Independent(Normal(torch.zeros(2), 1.0), 1),
                ComposeTransform([SigmoidTransform(), AffineTransform(3.0, 2.0)]),
                v,
            ),
            *(4.5, 5.5),
        ),
        (
            lambda v: TransformedDistribution(
                Independent(Exponential(torch.ones(2), validate_args=v), 1), ExpTransform(), v
            ),
            *(1.5, 0.5),
        ),
    ],
)
def test_outside_of_a_transformed_support_the_density_is_0(make, inside, outside, validate):
    distribution = make(validate)
    z = torch.tensor([[inside, inside], [outside, inside], [math.nan, inside], [outside, outside]], requires_grad=True)
    exact = distribution.log_prob(z[:1])
    value = as_law(distribution).log_prob(z)
    assert torch.equal(value[:1], exact) and value[[1, 3]].isneginf().all() and value[2].isnan()
    if exact.requires_grad:
        (gradient,) = torch.autograd.grad(value[[0, 1, 3]].sum(), z)
        assert torch.equal(gradient[0], torch.autograd.grad(exact, z)[0][0]) and (gradient[1:] == 0).all()
    assert as_law(distribution).log_prob(z[3:]).isneginf().all()
    law = as_law(distribution)
    assert law.log_prob(law.sample(1000, generator())).isfinite().all()


def test_a_mixture_of_transformed_laws_has_the_supports_of_all_its_components():
    shifts, state = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.get_rng_state()
    components = TransformedDistribution(Uniform(torch.zeros(2, 2), 1.0), AffineTransform(shifts, 1.0))
    law = as_law(MixtureSameFamily(Categorical(torch.tensor([0.25, 0.75])), Independent(components, 1)))
    found = law.log_prob(torch.tensor([[0.5, 0.5], [1.5, 1.5], [0.5, 1.5], [math.nan, 1.5]]))
    expected = torch.tensor([math.log(0.25), math.log(0.75), -math.inf, math.nan])
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), state)


def uniform_components(validate):
    bounds = torch.tensor([[-1.0, -1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    return Independent(Uniform(*bounds, validate_args=validate), 1, validate_args=validate)


@pytest.mark.parametrize("validate", [True, False])
def test_a_mixture_has_the_supports_of_all_its_components(validate):
    weights = Categorical(torch.tensor([0.25, 0.75]))
    law = as_law(MixtureSameFamily(weights, uniform_components(validate), validate_args=validate))
    state = torch.get_rng_state()
    found = law.log_prob(torch.tensor([[-0.5, -0.5], [1.0, 1.0], [3.0, 3.0], [-0.5, 1.0], [math.nan, 1.0]]))
    assert torch.equal(torch.get_rng_state(), state)
    expected = [math.log(0.25), math.log(0.75 / 4), -math.inf, -math.inf, math.nan]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)
    assert law.log_prob(law.sample(100, generator(0))).isfinite().all()


def test_a_vector_of_mixtures_has_the_supports_of_all_their_components():
    components = Uniform(torch.tensor([[-1.0, 0.0]] * 2), torch.tensor([[0.0, 2.0]] * 2))
    law = as_law(Independent(MixtureSameFamily(Categorical(torch.ones(2, 2)), components), 1))
    found = law.log_prob(torch.tensor([[-0.5, 1.0], [1.0, 1.0], [3.0, 1.0], [math.nan, 1.0]]))
    expected = [math.log(0.5 * 0.25), math.log(0.25 * 0.25), -math.inf, math.nan]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


def test_smoothed_under_the_meta_device_keeps_its_numbers():
    target = MultivariateNormal(torch.zeros(2), torch.eye(2))
    with torch.device("meta"):
        lagged = LaggedKDE(4, 2, 0.5, target)
    assert float(as_law(target).smoothed(0.5).log_prob(torch.zeros(2))) == float(lagged.law.log_prob(torch.zeros(2)))


def test_moments_of_laws():
    for law in known_laws().values():
        mean, variance = law_moments(law[0])
        samples = law[0].sample(200_000, generator(1))
        torch.testing.assert_close(samples.mean(0).double(), mean.double(), atol=0.03, rtol=0.02)
        torch.testing.assert_close(samples.var(0).double(), variance.double(), atol=0.03, rtol=0.02)
    log_normal = TransformedDistribution(Independent(Normal(torch.zeros(2), 0.5), 1), ExpTransform())
    with pytest.raises(NotImplementedError):
        _ = log_normal.mean
    mean, variance = law_moments(as_law(log_normal))  # estimated
    exact = math.exp(0.125), (math.exp(0.25) - 1) * math.exp(0.25)
    torch.testing.assert_close(mean, torch.full((2,), exact[0]).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(variance, torch.full((2,), exact[1]).double(), rtol=0.05, atol=0)


class Ring:
    """A law of a user's own: no module, no moments, no smoothing."""

    dim = 2

    def log_prob(self, z):
        return Normal(3.0, 0.5).log_prob(z.norm(dim=-1)) - (2 * math.pi * z.norm(dim=-1)).log()

    def sample(self, n, generator=None):
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        radius = 3 + 0.5 * torch.randn(n, generator=generator)
        return radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)


class OutlinedRing(Ring):
    """A law of a user's own with moments and an outline."""

    def moments(self):
        return torch.zeros(2), torch.full((2,), 4.625)

    def outline(self):
        return [(torch.zeros(2), 2.5), (torch.zeros(2), 3.5)]


@pytest.mark.parametrize("model", [GEN, AE, WAE, AAE])
@pytest.mark.parametrize("law", [Ring(), OutlinedRing()], ids=["least", "most"])
def test_models_take_a_law_of_ones_own(model, law):
    networks = FC((1, 2, 2), 2)
    settings = {"num_lagged": 50, "bandwidth": 0.5, "smoothed": False} if model is GEN else {}
    made = model(networks.encoder, networks.decoder, 2, target=law, **settings)
    assert made.target is law and "target" not in made.hparams and made.sample(3).shape == (3, 1, 2, 2)


def test_pictures_of_a_law_of_ones_own():
    def radii(law):
        return [circle.radius for circle in plots.latent(law.sample(9), torch.zeros(9).long(), law).axes[0].patches]

    assert radii(OutlinedRing()) == [2.5, 3.5] and radii(Ring()) == []
    report = kdejsd.diversity_report(None, lambda z: z, 2, target=Ring(), num_samples=100)
    assert report.class_radius is None  # which is of the standard normal


def test_a_law_of_ones_own():
    law, z = checked_target(Ring(), 2), Ring().sample(4000, generator(2))
    assert law.dim == 2
    assert abs(float(jsd_loss(z[:2000], z[2000:], 0.3, target=law))) < 0.1
    assert float(jsd_loss(z[:2000], z[2000:], 0.3)) > 0.3
    lagged = LaggedKDE(2000, 2, target=law, smoothed=False)
    lagged.refresh(z[2000:], torch.arange(2000))
    assert 0.1 < lagged.bandwidth < 0.6 and abs(float(lagged.loss(z[:2000]))) < 0.1
    torch.testing.assert_close(law_moments(law)[1], torch.full((2,), (9 + 0.25) / 2).double(), rtol=0.02, atol=0)
    with pytest.raises(ValueError, match=r"smoothed=True needs a target that can be convolved.*got .*Ring"):
        LaggedKDE(10, 2, 0.5, law, smoothed=True)


def test_moments_that_are_not_finite_are_refused_where_they_are_needed():
    wide = Independent(StudentT(torch.full((2,), 1.0)), 1)
    code_norm = pytest.importorskip("kdejsd.models", reason="needs the extra `train`").autoencoder.CodeNorm
    with pytest.raises(ValueError, match="target must have a finite mean and variance for codes to be normalised to"):
        code_norm(as_law(wide), 2)


# ----------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("error", "text", "make"),
    [
        (ValueError, "dim must be at least 1, got 0", lambda: StandardNormal(0)),
        (ValueError, "variance must be positive and finite, got -1", lambda: IsotropicNormal(2, -1)),
        (ValueError, "variance must be positive and finite, got nan", lambda: IsotropicNormal(2, math.nan)),
        (ValueError, "variance must be positive and finite, got inf", lambda: IsotropicNormal(2, math.inf)),
        (ValueError, r"means must have shape \[K, dim\].*got \[2\]", lambda: GaussianMixture([0.0, 1.0])),
        (ValueError, r"means must have shape \[K, dim\].*got \[0, 2\]", lambda: GaussianMixture(torch.empty(0, 2))),
        (ValueError, "means must be finite", lambda: GaussianMixture([[math.nan, 0.0]])),
        (
            ValueError,
            r"scales must have shape \[3\], one per mean, got \[2\]",
            lambda: GaussianMixture(MEANS, [1.0, 2.0]),
        ),
        (ValueError, "scales must be positive and finite, got", lambda: GaussianMixture(MEANS, 0.0)),
        (ValueError, "scales must be positive and finite, got", lambda: GaussianMixture(MEANS, [1.0, math.inf, 1.0])),
        (ValueError, r"weights must have shape \[3\]", lambda: GaussianMixture(MEANS, 1.0, [1.0])),
        (ValueError, "weights must be positive and finite, got", lambda: GaussianMixture(MEANS, 1.0, [1.0, 0.0, 1.0])),
        (
            ValueError,
            "weights must be positive and finite, got",
            lambda: GaussianMixture(MEANS, 1.0, [1.0, math.nan, 1.0]),
        ),
        (ValueError, "bandwidth must be positive and finite, got 0", lambda: StandardNormal(2).smoothed(0)),
        (ValueError, "bandwidth must be positive and finite, got -0.3", lambda: mixture().smoothed(-0.3)),
        (
            ValueError,
            r"z must have shape \[..., 3\], got \[4, 2\]",
            lambda: StandardNormal(3).log_prob(torch.ones(4, 2)),
        ),
        (ValueError, r"z must have shape \[..., 3\], got \[\]", lambda: mixture().log_prob(torch.tensor(0.0))),
        (
            ValueError,
            r"got event_shape \[\] and batch_shape \[2\] \(torch.distributions.Independent",
            lambda: as_law(Normal(torch.zeros(2), 1.0)),
        ),
        (
            ValueError,
            r"got event_shape \[2\] and batch_shape \[5\]",
            lambda: as_law(Independent(Normal(torch.zeros(5, 2), 1.0), 1)),
        ),
        (TypeError, "integer", lambda: StandardNormal(2.5)),
        (
            TypeError,
            "target must be None, StandardNormal.*got the class StandardNormal, not an instance",
            lambda: as_law(StandardNormal),
        ),
        (
            TypeError,
            r"log_prob\(z\) and sample.*got Linear, which has no dim and no log_prob and no sample",
            lambda: as_law(torch.nn.Linear(2, 2)),
        ),
    ],
)
def test_errors(error, text, make):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 5, 3), (0, 3)])
def test_component_log_prob(shape):
    weights, scales, means = [0.5, 0.3, 0.2, 1.0], [0.1, 1.0, 30.0, 2.0], points(4, 3, seed=1) * 5
    mixture = GaussianMixture(means, scales, weights)
    z = points(*shape) * 4
    found = mixture.component_log_prob(z)
    assert found.shape == (*shape[:-1], 4)
    for k in range(4):
        law = multivariate_normal(means[k].numpy(), scales[k] ** 2 * np.eye(3))
        expected = math.log(weights[k] / 2) + law.logpdf(z.reshape(-1, 3).numpy())
        np.testing.assert_allclose(found[..., k].reshape(-1).numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(found.logsumexp(-1), mixture.log_prob(z))
    with pytest.raises(ValueError, match=r"z must have shape \[\.\.\., 3\], got \[4, 2\]"):
        mixture.component_log_prob(torch.zeros(4, 2))
