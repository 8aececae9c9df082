"""The class radius: both estimators against divisions of the latent space whose radius is known."""

from __future__ import annotations

import math
import statistics
import warnings

import pytest
import torch
from helpers import DEVICES, generator, points
from torch import Tensor, nn

import kdejsd
from kdejsd import RadiusBiasWarning, class_radius, class_radius_search

QUINTILES = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))


def half_space(z: Tensor) -> Tensor:
    return (z[:, 0] > 0).long()


def sectors(z: Tensor) -> Tensor:
    return (torch.atan2(z[:, 1], z[:, 0]) / (2 * math.pi) * 5 + 2.5).long().clamp(0, 4)


def slabs(z: Tensor) -> Tensor:
    return torch.bucketize(z[:, 0].double().contiguous(), QUINTILES)


def boxes(z: Tensor) -> Tensor:
    return 5 * slabs(z) + slabs(z[:, 1:])


# What E r(z) is, z ~ N(0, I), by integration.
KNOWN = {
    "half-space": (half_space, 0.797884560803),
    "sectors": (sectors, 0.380956),
    "slabs": (slabs, 0.307870),
    "boxes": (boxes, 0.142374816444),
}


# ----------------------------------------------------------------------------------------------------------------------
# By the nearest sample of another class


@pytest.mark.parametrize("name", KNOWN)
def test_known_divisions(name):
    divide, truth = KNOWN[name]
    latents = points(100_000, 2, dtype=torch.float32)
    found = class_radius(latents, divide(latents))
    bias = 10 * found.num_samples ** (-2 / 3)
    assert truth - 4 * found.standard_error < found.mean < truth + bias + 4 * found.standard_error
    assert found.num_samples == 100_000 and found.latent_dim == 2 and found.invertible
    assert found.num_without_boundary == 0 and found.per_sample.shape == (100_000,)
    assert not found.per_sample.requires_grad


@pytest.mark.parametrize("dim", [2, 3])
def test_bias_falls_as_it_is_said_to(dim):
    """Against each sample's own distance to the boundary, so that their spread does not matter."""
    biases = []
    for count in (2000, 16_000):
        trials = []
        for seed in range(4):
            latents = points(count, dim, seed=seed)
            trials.append(float((class_radius(latents, half_space(latents)).per_sample - latents[:, 0].abs()).mean()))
        biases.append(statistics.mean(trials))
    assert min(biases) > 0
    assert biases[0] / biases[1] == pytest.approx(8 ** (2 / (dim + 1)), rel=0.2)


def test_standard_error_by_replication():
    for divide in (half_space, boxes):
        trials = [class_radius(z := points(500, 2, seed=s), divide(z)) for s in range(300)]
        spread = statistics.stdev(t.mean for t in trials)
        assert 0.75 < statistics.mean(t.standard_error for t in trials) / spread < 1.1


@pytest.mark.parametrize("dim", [4, 5, 10])
def test_warns_where_it_must_not_be_inverted(dim):
    latents = points(2000, dim)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = class_radius(latents, half_space(latents))
    assert dim < 5 or found.mean > 1.1  # far over 0.798, the most that two classes can have
    assert found.invertible == (dim < 5)
    assert [w.category for w in caught] == ([] if dim < 5 else [RadiusBiasWarning])
    if caught:
        assert "class_radius_search" in str(caught[0].message) and caught[0].filename == __file__


def test_nothing_plausible_without_a_boundary():
    latents = points(50, 2)
    found = class_radius(latents, torch.zeros(50, dtype=torch.int64))
    assert found.mean == math.inf and found.num_without_boundary == 50 and not found.invertible
    latents[3] = math.nan
    found = class_radius(latents, half_space(latents))
    assert math.isnan(found.mean) and math.isnan(found.standard_error) and not found.invertible


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "latents must be a tensor, got list", ([[0.0]], torch.zeros(1).long())),
        (
            ValueError,
            r"latents must have shape \[N, d\], N at least 2; got \[1, 2\]",
            (torch.zeros(1, 2), torch.zeros(1)),
        ),
        (ValueError, r"latents must have shape .*got \[2, 3, 2\]", (torch.zeros(2, 3, 2), torch.zeros(2, 3).long())),
        (TypeError, "labels must be int64, got torch.float32", (torch.zeros(3, 2), torch.zeros(3))),
    ],
)
def test_errors(error, text, arguments):
    with pytest.raises(error, match=text):
        class_radius(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# By a search with the classifier


def linear(dim: int, classes: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(dim, classes, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(3 * points(classes, dim, seed=dim))
        layer.bias.zero_()
    return layer


def to_planes(z: Tensor, layer: nn.Linear) -> Tensor:
    """The distance from z to the nearest point where another of the layer's outputs is the largest, for two outputs."""
    normal = (layer.weight[1] - layer.weight[0]).detach()
    return (z @ normal + (layer.bias[1] - layer.bias[0]).detach()).abs() / normal.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [2, 10, 50])
def test_half_spaces(dim, device):
    layer = linear(dim, device=device)
    found = class_radius_search(None, layer, dim, 2000, steps=4, batch_size=500)
    truth = to_planes(found.latents, layer)
    assert (found.per_sample - truth).abs().max() < 1e-5
    assert abs(found.mean - 0.797884560803) < 4 * found.standard_error
    assert found.standard_error == pytest.approx(0.6028 / math.sqrt(2000), rel=0.1)  # sqrt(1 - 2/pi)
    assert found.invertible and found.num_samples == 2000 and found.latent_dim == dim
    assert found.per_sample.device.type == found.boundary.device.type == device


def sector_logits(z: Tensor) -> Tensor:
    angles = 2 * math.pi / 5 * torch.arange(5, dtype=z.dtype)
    return z @ torch.stack([angles.cos(), angles.sin()])


def slab_logits(z: Tensor) -> Tensor:
    rises = torch.cat([torch.zeros(1), QUINTILES.cumsum(0).to(z.dtype)])
    return z[:, :1] * torch.arange(5) - rises


@pytest.mark.parametrize("name", ["sectors", "slabs"])
def test_several_classes(name):
    logits = {"sectors": sector_logits, "slabs": slab_logits}[name]
    dim = 2 if name == "sectors" else 12
    found = class_radius_search(None, logits, dim, 2000, steps=10, batch_size=1000)
    z = found.latents
    if name == "sectors":
        off = torch.remainder(torch.atan2(z[:, 1], z[:, 0]) + math.pi / 5, 2 * math.pi / 5)
        truth = z.norm(dim=1) * torch.minimum(off, 2 * math.pi / 5 - off).sin()
    else:
        truth = (z[:, :1] - QUINTILES).abs().amin(1)
    assert (found.per_sample - truth).abs().max() < 1e-3
    assert abs(found.mean - KNOWN[name][1]) < 4 * found.standard_error


def test_curved_boundary():
    """A ball that does not lie in the middle, with logits that are far from linear."""
    center = torch.tensor([0.5, 0, 0, 0, 0])

    def logits(z: Tensor) -> Tensor:
        outside = (z - center).norm(dim=1) - 1.2
        return torch.stack([(3 * outside).tanh(), -outside.pow(3) - outside], 1)

    found = class_radius_search(None, logits, 5, 1000)
    truth = ((found.latents - center).norm(dim=1) - 1.2).abs()
    assert (found.per_sample - truth).abs().max() < 1e-3


class Decoder(nn.Module):
    """Latents through an orthogonal map with dropout and batch norm on the way, so that the mode matters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.turn = nn.utils.parametrizations.orthogonal(nn.Linear(dim, dim, bias=False))
        self.norm, self.drop = nn.BatchNorm1d(dim), nn.Dropout(0.5)

    def forward(self, z: Tensor) -> Tensor:
        return self.drop(self.norm(self.turn(z)))


def test_models_are_left_as_they_were():
    decoder, layer = Decoder(4), linear(4)
    decoder.drop.eval()  # a module of its own mind
    layer.weight.grad = torch.ones_like(layer.weight)
    running = decoder.norm.running_mean.clone()
    with torch.no_grad():
        found = class_radius_search(decoder, layer, 4, 200, steps=4)
    assert decoder.training and decoder.norm.training and not decoder.drop.training and layer.training
    assert (layer.weight.grad == 1).all() and layer.bias.grad is None
    assert all(p.grad is None and p.requires_grad for p in decoder.parameters())
    assert torch.equal(decoder.norm.running_mean, running)
    assert not found.per_sample.requires_grad and not found.boundary.requires_grad
    decoder.eval()
    truth = to_planes(decoder(found.latents).detach(), layer) * math.sqrt(1 + decoder.norm.eps)
    assert (found.per_sample - truth).abs().max() < 1e-4


def test_inside_inference_mode():
    model = network(3, 2)
    expected = class_radius_search(None, model, 3, 50, steps=3)
    with torch.inference_mode():
        assert torch.equal(class_radius_search(None, model, 3, 50, steps=3).per_sample, expected.per_sample)


def test_modes_come_back_after_an_error():
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = Broken(3, 2)
    with pytest.raises(ZeroDivisionError):
        class_radius_search(None, model, 3, 10)
    assert model.training


def network(dim: int, classes: int) -> nn.Module:
    torch.manual_seed(3)  # of the weights
    return nn.Sequential(nn.Linear(dim, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, classes)).double()


def test_every_distance_has_a_witness():
    model = network(3, 6)
    found = class_radius_search(None, model, 3, 600, batch_size=250)
    with torch.no_grad():
        assert torch.equal(model(found.latents).argmax(1), found.labels)
        assert (model(found.boundary).argmax(1) != found.labels).all()
        inside = found.latents + (1 - 1e-4) * (found.boundary - found.latents)
        assert torch.equal(model(inside).argmax(1), found.labels)
    torch.testing.assert_close((found.boundary - found.latents).norm(dim=1), found.per_sample)
    sampled = class_radius(found.latents, found.labels)
    assert (found.per_sample <= sampled.per_sample).all()


def test_hardly_anything_is_nearer():
    """Against many points in the ball that should be empty: the search may end at a local minimum, but rarely does."""
    model = network(3, 6)
    found = class_radius_search(None, model, 3, 200, steps=40)
    shortfalls = []
    for i in range(200):
        directions = torch.nn.functional.normalize(points(10_000, 3, seed=i), dim=1)
        radii = found.per_sample[i] * torch.rand(10_000, 1, generator=generator(i), dtype=torch.float64) ** (1 / 3)
        with torch.no_grad():
            other = model(found.latents[i] + radii * directions).argmax(1) != found.labels[i]
        shortfalls.append(float(found.per_sample[i] - radii[other].min()) if other.any() else 0.0)
    assert statistics.mean(shortfalls) < 0.01 * found.mean
    assert sum(s > 0.01 for s in shortfalls) < 0.05 * len(shortfalls)


def test_reproducible_and_batched():
    model = network(4, 3)
    first = class_radius_search(None, model, 4, 100, steps=5, batch_size=100, rng=generator(11))
    second = class_radius_search(None, model, 4, 100, steps=5, batch_size=100, rng=generator(11))
    assert torch.equal(first.per_sample, second.per_sample) and first.mean == second.mean
    parts = class_radius_search(None, model, 4, 100, steps=5, batch_size=33, rng=generator(11))
    torch.testing.assert_close(parts.per_sample, first.per_sample, rtol=1e-6, atol=1e-9)
    before = torch.get_rng_state()
    other = class_radius_search(None, model, 4, 100, steps=5, rng=generator(12))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(other.latents, first.latents) and first.latents.dtype == torch.float64


def test_no_other_class():
    seen = []
    found = class_radius_search(
        None,
        lambda z: torch.stack([z[:, 0].square() + 1, -z[:, 1].square()], 1),
        2,
        70,
        steps=3,
        batch_size=32,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found.per_sample.isposinf().all() and found.mean == math.inf and not found.invertible
    assert found.num_without_boundary == 70 and found.boundary.isnan().all()
    assert seen == [(32, 70), (64, 70), (70, 70)]


def test_nan_logits_are_no_class():
    """NaN on one side of the boundary: samples there are NaN, and nobody's way to another class leads there."""

    def logits(z: Tensor) -> Tensor:
        return torch.where(z[:, :1] > 1, math.nan, torch.cat([z[:, 1:2], -z[:, 1:2]], 1))

    found = class_radius_search(None, logits, 2, 400, steps=5)
    bad = found.latents[:, 0] > 1
    assert bad.any() and torch.equal(found.per_sample.isnan(), bad) and math.isnan(found.mean)
    assert found.boundary[bad].isnan().all()
    truth = found.latents[~bad, 1].abs()
    assert (found.per_sample[~bad] - truth).abs().max() < 1e-4


def test_a_classifier_without_slope_is_searched_by_bisection():
    found = class_radius_search(None, lambda z: (torch.cat([z, -z], 1) > 0).to(z.dtype) + 0 * z, 1, 500, steps=2)
    torch.testing.assert_close(found.per_sample, found.latents[:, 0].abs(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "arguments", "keywords"),
    [
        ("latent_dim must be at least 1, got 0", (None, linear(2), 0), {}),
        ("num_samples must be at least 2, got 1", (None, linear(2), 2, 1), {}),
        ("steps must be at least 1, got 0", (None, linear(2), 2), {"steps": 0}),
        ("num_targets must be at least 1, got -1", (None, linear(2), 2), {"num_targets": -1}),
        ("batch_size must be at least 1, got 0", (None, linear(2), 2), {"batch_size": 0}),
        (r"classifier must return logits \[9, K\], K at least 2; got \[9, 1\]", (None, linear(2, 1), 2, 9), {}),
        (r"classifier must return logits .*got \[9\]", (None, lambda z: z[:, 0], 2, 9), {}),
        ("must depend on z by differentiable operations", (None, lambda z: z.detach().clone(), 2, 9), {}),
    ],
)
def test_search_errors(text, arguments, keywords):
    with pytest.raises(ValueError, match=text):
        class_radius_search(*arguments, **keywords)


def test_public_names():
    for name in ("ClassRadius", "RadiusBiasWarning", "class_radius", "class_radius_search"):
        assert name in kdejsd.__all__
