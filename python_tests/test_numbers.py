"""One rule for the numbers that the public functions take."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import points

import kdejsd
from kdejsd import plots
from kdejsd.data import Digits, Grid2D, ImageFolder
from kdejsd.models import FC, GAN, GEN, VAE, WAE, Conv, DeepConv, RealNVP, built
from kdejsd.targets import IsotropicNormal, as_law

Q, C = points(4, 2), points(8, 2, seed=1)
P = torch.tensor([0.5, 0.5]).double()
HALVES = torch.nn.Linear(2, 2)


def lagged() -> kdejsd.LaggedKDE:
    module = kdejsd.LaggedKDE(3, 2, 1.0)
    module.refresh(torch.zeros(3, 2), torch.arange(3))
    return module


def updated(start):
    module = lagged()
    module.update(torch.ones(1, 2), start)
    return module.codes


def reserved(num_examples):
    module = lagged()
    module.reserve(num_examples)
    return len(module.own_copies.places)


def decode(z):
    return torch.cat((z, z), 1)


def gen(**settings):
    return GEN(HALVES, HALVES, 2, **({"num_lagged": 3, "bandwidth": 1.0} | settings))


def gan(**settings):
    return GAN(HALVES, HALVES, 2, **settings)


# name of the argument -> a call with it, and a number that it takes
REAL = {
    "variance of IsotropicNormal": (lambda v: IsotropicNormal(2, v).log_prob(Q), 1),
    "bandwidth of smoothed": (lambda h: kdejsd.StandardNormal(2).smoothed(h).log_prob(Q), 1),
    "bandwidth of LaggedKDE": (lambda h: kdejsd.LaggedKDE(3, 2, h).bandwidth, 1),
    "bandwidth of kde_log_prob": (lambda h: kdejsd.kde_log_prob(Q, C, h), 1),
    "bandwidth of jsd_loss": (lambda h: kdejsd.jsd_loss(Q, C, h), 1),
    "bandwidth of jsd": (lambda h: kdejsd.jsd(Q, C, h, C), 1),
    "bandwidth of kde_entropy": (lambda h: kdejsd.kde_entropy(C, h), 1),
    "order of renyi_entropy": (lambda a: kdejsd.renyi_entropy(P, a), 1),
    "lipschitz of collision_radius_bound": (lambda c: kdejsd.collision_radius_bound(P, lipschitz=c), 1),
    "lipschitz of uniform_radius_bound": (lambda c: kdejsd.uniform_radius_bound(2, lipschitz=c), 1),
    "lipschitz of max_collision_entropy": (lambda c: kdejsd.max_collision_entropy(0.5, lipschitz=c), 1),
    "num_classes of uniform_radius_bound": (lambda k: kdejsd.uniform_radius_bound(k), 2),
    "radius of max_collision_entropy": (lambda r: kdejsd.max_collision_entropy(r), 1),
    "variance of novelty_score": (
        lambda v: kdejsd.novelty_score(lambda x: x[:, :2], decode, points(3, 4), variance=v).score,
        1,
    ),
    "level of latent_holes": (lambda a: kdejsd.latent_holes(points(40, 2), level=a, num_samples=10).mass, 0.5),
    "confidence of diversity_report": (
        lambda a: kdejsd.diversity_report(None, HALVES, 2, num_samples=20, confidence=a).collision_entropy,
        0.5,
    ),
    "extent of latent_classes": (
        lambda e: plots.latent_classes(None, HALVES, extent=e, resolution=2).axes[0].get_xlim()[1],
        2,
    ),
    "held_out of Grid2D": (lambda h: len(Grid2D(num_samples=40, held_out=h, batch_size=1).held_out), 0.5),
    "held_out of ImageFolder": (lambda h: ImageFolder("x", held_out=h).held_out_share, 0.5),
    "learning_rate of VAE": (lambda r: VAE(HALVES, HALVES, 2, learning_rate=r).learning_rate, 0.5),
    "observation_variance of VAE": (lambda v: VAE(HALVES, HALVES, 2, v).observation_variance, 1),
    "omega_weight of LCVAE": (lambda w: built.LCVAE((1, 8, 8), latent_dim=2, omega_weight=w).omega_weight, 1),
    "clip of LCVAE": (lambda c: built.LCVAE((1, 8, 8), latent_dim=2, clip=c).clip, 1),
    "weight of WAE": (lambda w: WAE(HALVES, HALVES, 2, weight=w).weight, 1),
    "weight of GEN": (lambda w: gen(weight=w).weight, 1),
    "input_dropout of GEN": (lambda p: gen(input_dropout=p).input_dropout, 0.5),
    "clip of GAN": (lambda c: gan(clip=c, objective="wgan").hparams["clip"], 1),
    "gradient_penalty of GAN": (lambda p: gan(gradient_penalty=p).hparams["gradient_penalty"], 1),
}
INTEGER = {
    "dim of StandardNormal": (lambda n: kdejsd.StandardNormal(n).log_prob(Q), 2),
    "num_centers of LaggedKDE": (lambda n: kdejsd.LaggedKDE(n, 2, 1.0).num_centers, 3),
    "latent_dim of LaggedKDE": (lambda n: kdejsd.LaggedKDE(3, n, 1.0).codes.shape[1], 2),
    "latent_dim of optimal_bandwidth": (lambda n: kdejsd.optimal_bandwidth(n, 5, trials=1).value, 2),
    "start of update": (updated, 2),
    "num_examples of reserve": (reserved, 5),
    "n of StandardNormal.sample": (lambda n: len(kdejsd.StandardNormal(2).sample(n)), 4),
    "n of GaussianMixture.sample": (lambda n: len(kdejsd.GaussianMixture([[0.0, 0.0]]).sample(n)), 4),
    "n of a distribution's sample": (
        lambda n: len(as_law(torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))).sample(n)),
        4,
    ),
    "num_centers of optimal_bandwidth": (lambda n: kdejsd.optimal_bandwidth(2, n, trials=1).value, 5),
    "trials of optimal_bandwidth": (lambda n: kdejsd.optimal_bandwidth(2, 5, trials=n).value, 2),
    "seed of optimal_bandwidth": (lambda n: kdejsd.optimal_bandwidth(2, 5, trials=1, seed=n).value, 2),
    "num_samples of latent_holes": (lambda n: kdejsd.latent_holes(points(40, 2), num_samples=n).mass, 9),
    "latent_dim of diversity_report": (
        lambda n: kdejsd.diversity_report(None, HALVES, n, num_samples=20).collision_entropy,
        2,
    ),
    "steps of class_radius_search": (lambda n: kdejsd.class_radius_search(None, HALVES, 2, 3, steps=n).mean, 2),
    "chunk of residual_variance": (
        lambda n: kdejsd.residual_variance(lambda x: x[:, :2], decode, points(3, 4), chunk=n),
        2,
    ),
    "resolution of latent_classes": (
        lambda n: plots.latent_classes(None, HALVES, resolution=n).axes[0].images[0].get_array().shape[0],
        2,
    ),
    "steps of between": (lambda n: plots.between(Q, Q, steps=n), 3),
    "columns of grid": (lambda n: plots.grid(torch.zeros(2, 1, 2, 2), n).axes[0].images[0].get_array().shape[1], 2),
    "latent_dim of Conv": (lambda n: Conv((1, 28, 28), n).encoder[-1].out_features, 2),
    "channels of DeepConv": (lambda n: DeepConv((1, 28, 28), 2, n).encoder[0].out_channels, 2),
    "hidden of FC": (lambda n: FC((1, 2, 2), 2, [n]).encoder[1].out_features, 2),
    "batch_size of Digits": (lambda n: Digits(n).batch_size, 2),
    "train_size of Digits": (lambda n: Digits(1, n).train_size, 2),
    "labelled_size of Digits": (lambda n: Digits(labelled_size=n).labelled_size, 2),
    "seed of Digits": (lambda n: Digits(seed=n).seed, 2),
    "n of Grid2D": (lambda n: len(Grid2D(n).modes), 2),
    "num_samples of Grid2D": (lambda n: Grid2D(num_samples=n).num_samples, 2),
    "size of ImageFolder": (lambda n: ImageFolder("x", size=n).example_shape[1], 2),
    "channels of ImageFolder": (lambda n: ImageFolder("x", channels=n).example_shape[0], 3),
    "latent_dim of VAE": (lambda n: VAE(HALVES, HALVES, n).latent_dim, 2),
    "layers of RealNVP": (lambda n: len(RealNVP(2, n).couplings), 2),
    "hidden of RealNVP": (lambda n: sum(p.numel() for p in RealNVP(2, 1, n).parameters()), 2),
    "refresh_every of GEN": (lambda n: gen(refresh_every=n).refresh_every, 2),
    "packing of GAN": (lambda n: gan(packing=n).packing, 2),
    "discriminator_steps of GAN": (lambda n: gan(discriminator_steps=n).discriminator_steps, 2),
    "discriminator_hidden of AAE": (
        lambda n: built.AAE((1, 8, 8), latent_dim=2, discriminator_hidden=[n]).discriminator[0].out_features,
        2,
    ),
}


@pytest.mark.parametrize("name", [*REAL, *INTEGER])
def test_numbers_of_every_kind(name):
    call, number = (REAL | INTEGER)[name]
    kinds = [np.float32, np.float64, np.float16, Fraction, lambda x: np.array(x, np.float32), torch.tensor]
    whole = [np.int64, np.uint8, np.array]
    expected = torch.as_tensor(call(number)).double()
    for kind in [*(kinds if name in REAL else [torch.tensor]), *(whole if number == int(number) else [])]:
        of_kind = kind(number)
        if isinstance(of_kind, torch.Tensor) and of_kind.is_floating_point():
            of_kind = of_kind.double()
        elif isinstance(of_kind, torch.Tensor) and name.startswith("bandwidth"):
            continue  # a tensor has the dtype of the queries
        torch.testing.assert_close(torch.as_tensor(call(of_kind)).double(), expected)


@pytest.mark.parametrize("name", [*REAL, *INTEGER])
def test_what_is_no_number(name):
    call, number = (REAL | INTEGER)[name]
    argument = name.split()[0]
    for wrong in (True, np.bool_(True), np.array(True), str(number), 1j, [number], np.array([number]), object()):
        with pytest.raises(TypeError, match=f"{argument} must be (a real number|an integer), got"):
            call(wrong)
    if name in INTEGER:
        for wrong in (2.0, np.float64(2), np.array(2.0)):
            with pytest.raises(TypeError, match=f"{argument} must be an integer, got"):
                call(wrong)
        with pytest.raises(ValueError, match=f"{argument} must be at least"):
            call(np.int64(-1))
    else:
        with pytest.raises(ValueError, match=f"{argument} must be"):
            call(np.float32(math.nan))


@pytest.mark.parametrize("wrong", [True, np.bool_(True), np.array(True), "1", 1j])
def test_one_scale_of_a_mixture_is_a_real_number(wrong):
    with pytest.raises(TypeError, match="scales must be a real number, got"):
        kdejsd.GaussianMixture([[0.0, 0.0], [1.0, 1.0]], wrong)


@pytest.mark.parametrize("argument", ["means", "scales", "weights"])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: [[True, *row[1:]] for row in x],
        lambda x: [[str(value) for value in row] for row in x],
        lambda x: [[None] * len(row) for row in x],
        lambda x: [torch.ones(len(row), dtype=torch.bool) for row in x],
        lambda x: np.array(x, bool),
        lambda x: np.array(x, complex),
        lambda x: np.array(x, object) > 0,
        lambda x: torch.tensor(x).bool(),
        lambda x: torch.tensor(x) * 1j,
    ],
)
def test_the_numbers_of_a_mixture_are_real(argument, make):
    arguments = {"means": [[0.0, 0.0], [1.0, 1.0]], "scales": [1.0, 2.0], "weights": [0.5, 0.5]}
    rows = arguments[argument]
    arguments[argument] = make(rows) if argument == "means" else make([rows])[0]
    with pytest.raises(TypeError, match=rf"{argument} must be (a real number|real numbers), got"):
        kdejsd.GaussianMixture(**arguments)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        tuple,
        lambda x: np.array(x, np.float32),
        lambda x: np.array(x, object),
        lambda x: [np.array(row) for row in x],
        lambda x: [torch.tensor(row) for row in x],
        lambda x: [[Fraction(value) for value in row] for row in x],
        lambda x: [[int(value) for value in row] for row in x],
        lambda x: torch.tensor(x).long(),
    ],
)
def test_the_numbers_of_a_mixture_are_of_every_kind(kind):
    means = kdejsd.GaussianMixture(kind([[0.0, 2.0], [1.0, 3.0]])).means
    assert torch.equal(means, torch.tensor([[0, 2], [1, 3]]).double())
    with pytest.raises(ValueError, match="means must be rows of one length, got rows of several"):
        kdejsd.GaussianMixture([[0.0, 2.0], [1.0]])
