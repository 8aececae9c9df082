"""The density in data space: against closed forms, autograd's Jacobian, and what can go wrong."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import DTYPES, points, worst
from torch import nn
from torch.distributions import Independent, Laplace, MultivariateNormal

from kdejsd import GaussianMixture, LaggedKDE, novelty_score, residual_variance
from kdejsd.models import GEN
from kdejsd.models.networks import FC, Conv
from kdejsd.novelty import NoveltyScore


class Linear:
    """x' = A z + b, and the encoder that projects onto its images."""

    def __init__(self, count: int, dim: int, seed: int = 0, orthonormal: bool = False) -> None:
        self.matrix = points(count, dim, seed=seed)
        if orthonormal:
            self.matrix = torch.linalg.qr(self.matrix).Q
        self.shift = points(count, seed=seed + 1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.matrix.T + self.shift

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.shift) @ torch.linalg.pinv(self.matrix).T


def network(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A perceptron with tanh between its layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


@pytest.mark.parametrize("count, dim", [(2, 1), (7, 3), (40, 17)])
def test_a_linear_decoder_has_the_density_of_a_normal(count, dim):
    linear, variance = Linear(count, dim), 0.3
    x = 2 * points(50, count, seed=5)
    across = torch.eye(count).double() - linear.matrix @ torch.linalg.pinv(linear.matrix)
    covariance = linear.matrix @ linear.matrix.T + variance * across
    expected = MultivariateNormal(linear.shift, (covariance + covariance.T) / 2).log_prob(x)
    found = novelty_score(linear.encode, linear.decode, x, variance=variance)
    assert worst(found.score, -expected) < 1e-9
    log_det = 0.5 * torch.linalg.slogdet(linear.matrix.T @ linear.matrix).logabsdet
    assert worst(found.log_det, log_det.expand(50)) < 1e-10
    assert torch.equal(found.score, -(found.latent - found.log_det + found.residual))
    assert worst(found.reconstruction_error, ((x - linear.decode(linear.encode(x))) ** 2).mean(1)) < 1e-12


def test_probabilistic_pca_is_the_limit_of_little_noise():
    """With noise in all directions the density is another by what the noise adds along the surface."""
    linear = Linear(9, 4, orthonormal=True)
    x = linear.decode(points(30, 4, seed=7)) + 1e-3 * points(30, 9, seed=8)
    found = novelty_score(linear.encode, linear.decode, x, variance=1e-6)
    assert worst(found.log_det, torch.zeros(30)) < 1e-12
    covariance = linear.matrix @ linear.matrix.T + 1e-6 * torch.eye(9).double()
    assert worst(found.score, -MultivariateNormal(linear.shift, covariance).log_prob(x)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_log_determinant_is_that_of_autograds_jacobian(dtype):
    encoder, decoder = network(11, 20, 5), network(5, 30, 11, seed=1)
    x = points(23, 11)
    z = encoder(x).detach()
    jacobians = torch.stack([torch.autograd.functional.jacobian(decoder, code) for code in z])
    expected = 0.5 * torch.linalg.slogdet(jacobians.mT @ jacobians).logabsdet
    found = novelty_score(encoder.to(dtype), decoder.to(dtype), x.to(dtype), variance=0.1)
    assert all(part.dtype == dtype and part.shape == (23,) and not part.requires_grad for part in found)
    assert worst(found.log_det, expected) < (1e-12 if dtype == torch.float64 else 2e-5)
    squared = (x - decoder.double()(z)).square().sum(1)
    residual = -0.5 * 6 * math.log(2 * math.pi * 0.1) - squared / 0.2
    assert worst(found.residual, residual) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10_000])
def test_chunks_change_nothing(chunk):
    encoder, decoder = network(11, 20, 5), network(5, 30, 11, seed=1)
    x = points(23, 11)
    expected, found = (novelty_score(encoder, decoder, x, variance=0.1, chunk=size) for size in (1000, chunk))
    for part, whole in zip(found, expected, strict=True):
        assert worst(part, whole) < 1e-12
    whole = residual_variance(encoder, decoder, x)
    assert residual_variance(encoder, decoder, x, chunk=chunk) == pytest.approx(whole, rel=1e-12)


def test_no_more_decodings_at_a_time_than_asked_for():
    decoder, sizes = network(5, 30, 11, seed=1), []

    def counting(z: torch.Tensor) -> torch.Tensor:
        sizes.append(len(z))  # inside vmap too: of the codes, not of the directions
        return decoder(z)

    novelty_score(network(11, 20, 5), counting, points(50, 11), variance=0.1, chunk=20)
    assert max(sizes) == 4  # of l = 5 directions each


@pytest.mark.parametrize(
    "target",
    [
        GaussianMixture([[-1.0, 0.0, 2.0], [1.0, 1.0, 0.0]], 0.5),
        Independent(Laplace(torch.zeros(3).double(), torch.ones(3).double()), 1),
    ],
)
def test_the_latent_part_is_the_targets(target):
    linear, x = Linear(7, 3), points(20, 7, seed=5)
    found = novelty_score(linear.encode, linear.decode, x, variance=0.2, target=target)
    assert torch.equal(found.latent, target.log_prob(linear.encode(x)))
    normal = novelty_score(linear.encode, linear.decode, x, variance=0.2)
    assert worst(found.score - normal.score, normal.latent - found.latent) < 1e-12


def test_a_lagged_density_is_a_target():
    linear, x = Linear(7, 3), points(20, 7, seed=5)
    lagged = LaggedKDE(50, 3, bandwidth=0.4)
    lagged.refresh(points(50, 3, seed=9))
    found = novelty_score(linear.encode, linear.decode, x, variance=0.2, target=lagged)
    assert worst(found.latent, lagged.log_prob(linear.encode(x))) < 1e-6


def test_the_variance_is_the_most_likely_one():
    linear = Linear(12, 4)
    generator = torch.Generator().manual_seed(0)
    noise = 0.7 * torch.randn(4000, 12, generator=generator, dtype=torch.float64)
    x = linear.decode(torch.randn(4000, 4, generator=generator, dtype=torch.float64)) + noise
    variance = residual_variance(linear.encode, linear.decode, x)
    assert variance == pytest.approx(0.49, rel=0.03)

    def mean_score(variance: float) -> float:
        return float(novelty_score(linear.encode, linear.decode, x, variance=variance).score.mean())

    assert mean_score(variance) < min(mean_score(0.99 * variance), mean_score(1.01 * variance))


def test_a_gen_by_its_methods_is_scored_in_evaluation_mode():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = Conv((1, 28, 28), 3, channels=2)
        decoder = nn.Sequential(networks.decoder[0], nn.BatchNorm1d(8 * 9), nn.Dropout(), *networks.decoder[1:])
        gen = GEN(networks.encoder, decoder, 3, num_lagged=10, bandwidth=0.5)
        gen.encode(torch.rand(40, 1, 28, 28))  # statistics that are not the initial ones
        gen.decode(torch.randn(40, 3))
    images = points(9, 1, 28, 28, dtype=torch.float32).sigmoid()
    state = {name: value.clone() for name, value in gen.state_dict().items() if isinstance(value, torch.Tensor)}
    gen.train()
    gen.decoder[2].eval()
    found = novelty_score(gen.encode, gen.decode, images, variance=0.1, chunk=7)
    assert gen.training and gen.norm.training and not gen.decoder[2].training
    assert all(torch.equal(value, gen.state_dict()[name]) for name, value in state.items())
    assert all(parameter.grad is None for parameter in gen.parameters())
    gen.eval()
    expected = novelty_score(gen.encoder, gen.decoder, images, variance=0.1)
    assert not torch.allclose(expected.latent, found.latent)  # without the normalisation of the codes
    codes = gen.encode(images).detach()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: gen.decode(z[None]).flatten()))(codes).double()
    assert worst(found.log_det, 0.5 * torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet) < 1e-4
    error = (gen.reconstruct(images) - images).square().mean((1, 2, 3))
    assert worst(found.reconstruction_error, error) < 1e-6
    assert residual_variance(gen.encode, gen.decode, images) == pytest.approx(error.mean().item() * 784 / 781, rel=1e-5)


def test_nan_stays_with_its_example():
    encoder, decoder = network(11, 20, 5), network(5, 30, 11, seed=1)
    x = points(6, 11)
    expected = novelty_score(encoder, decoder, x, variance=0.1)
    x[2, 3] = math.nan
    found = novelty_score(encoder, decoder, x, variance=0.1)
    for part, whole in zip(found, expected, strict=True):
        assert part.isnan().tolist() == [i == 2 for i in range(6)]
        assert worst(part[[0, 1, 3, 4, 5]], whole[[0, 1, 3, 4, 5]]) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", ["narrow", "dead", "saturated", "in part"])
def test_a_decoder_that_has_collapsed_has_no_density(decoder, dtype):
    encoder = network(11, 5, dtype=dtype)
    if decoder == "narrow":  # five dimensions pass through four
        net = network(5, 4, 30, 11, seed=1, dtype=dtype)
    elif decoder == "dead":
        net = nn.Sequential(network(5, 11, seed=1, dtype=dtype), nn.Threshold(1e3, 0.0))
    elif decoder == "saturated":
        net = network(5, 30, 11, seed=1, dtype=dtype)
        net = nn.Sequential(*net[:1], nn.Softshrink(0.0), *net[2:], nn.Sigmoid())
        with torch.no_grad():
            net[2].bias.fill_(1e3)
    else:  # for some of the codes
        net = nn.Sequential(network(5, 30, seed=1, dtype=dtype), nn.ReLU(), network(30, 11, seed=2, dtype=dtype))
        with torch.no_grad():
            net[0][0].weight[4:] = 0
            net[0][0].bias[:4] = 1e3
            net[0][0].weight[4, 0], net[0][0].bias[4] = 100, 0
            net[0][0].weight[:4, 0] = 0
    found = novelty_score(encoder, net, points(40, 11, dtype=dtype), variance=0.1)
    collapsed = found.log_det == -math.inf
    assert torch.equal(found.score == -math.inf, collapsed)
    assert not found.score.isnan().any() and found.residual.isfinite().all()
    if decoder == "in part":
        with torch.no_grad():
            assert torch.equal(collapsed, encoder(points(40, 11, dtype=dtype))[:, 0] <= 0)
        assert 0 < int(collapsed.sum()) < 40
    else:
        assert bool(collapsed.all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_of_very_different_lengths_are_not_taken_for_a_collapse(dtype):
    linear = Linear(9, 4, orthonormal=True)
    linear.matrix *= torch.tensor([1e-12, 1.0, 1e12, 1e-3], dtype=torch.float64)
    matrix = linear.matrix.to(dtype)
    found = novelty_score(lambda x: x[:, :4], lambda z: z @ matrix.T, points(3, 9, dtype=dtype), variance=1.0)
    assert worst(found.log_det, torch.full((3,), math.log(1e-3), dtype=torch.float64)) < (
        1e-10 if dtype == torch.float64 else 1e-5
    )


def test_no_examples():
    linear = Linear(7, 3)
    found = novelty_score(linear.encode, linear.decode, torch.zeros(0, 7).double(), variance=0.2)
    assert isinstance(found, NoveltyScore)
    assert all(part.shape == (0,) and part.dtype == torch.float64 for part in found)
    with pytest.raises(ValueError, match="x must have at least one example, got none"):
        residual_variance(linear.encode, linear.decode, torch.zeros(0, 7).double())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"variance": 0.0}, ValueError, "variance must be positive and finite, got 0.0"),
        ({"variance": math.nan}, ValueError, "variance must be positive and finite, got nan"),
        ({"variance": math.inf}, ValueError, "variance must be positive and finite, got inf"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"target": "normal"}, TypeError, r"target must have log_prob\(codes\), got str"),
        ({"x": torch.zeros(4, 7, dtype=torch.uint8)}, TypeError, "x must be a floating-point tensor, got torch.uint8"),
        ({"x": [[0.0]]}, TypeError, "x must be a floating-point tensor, got list"),
        ({"x": torch.zeros(7)}, ValueError, r"x must have shape \[n, ...\], got \[7\]"),
        ({"encoder": lambda x: x[:, 0]}, ValueError, r"encoder must return codes \[1, l\], got \[1\]"),
        ({"encoder": lambda x: x}, ValueError, "less than an example's 7 values, got 7"),
        ({"encoder": lambda x: x[:, :0]}, ValueError, "at least 1 dimension .*, got 0"),
        ({"decoder": lambda z: z}, ValueError, r"decoder must return the shape of x, \[4, 7\], got \[4, 3\]"),
    ],
)
def test_errors(change, error, message):
    linear = Linear(7, 3)
    arguments = {"encoder": linear.encode, "decoder": linear.decode, "x": torch.zeros(4, 7).double(), "variance": 0.2}
    with pytest.raises(error, match=message):
        novelty_score(**(arguments | change))


def test_fc_networks_of_images():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = FC((3, 4, 5), 6, hidden=(40, 50))
    images = points(8, 3, 4, 5, dtype=torch.float32).sigmoid()
    found = novelty_score(networks.encoder, networks.decoder, images, variance=0.05)
    with torch.no_grad():
        codes = networks.encoder(images)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: networks.decoder(z[None]).flatten()))(codes).double()
    assert worst(found.log_det, 0.5 * torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet) < 1e-4
