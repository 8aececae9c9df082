"""The GEN with a random encoder: the law of its codes, what fills a space, repeatability."""

import lightning.pytorch as pl
import pytest
import torch
from helpers import generator, points
from test_gen import assert_same_state, train
from torch import nn

from kdejsd import GaussianMixture, optimal_bandwidth
from kdejsd.data import Digits
from kdejsd.models import FC, StochasticGEN, built
from kdejsd.runs.measuring import code_measures, encode_set

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*GPU available but not used",
)
MIXTURE = GaussianMixture([[-3.0, 1.0], [5.0, 1.0]], 0.5, [0.75, 0.25])


def make(latent_dim: int = 2, seed: int = 0, **options) -> built.StochasticGEN:
    pl.seed_everything(seed, verbose=False)
    settings = {"num_lagged": 300, "bandwidth": 1.2} | options
    return built.StochasticGEN(Digits.example_shape, latent_dim, **settings)


class Given(nn.Module):
    """An encoder of images [n, 1, 1, l] that are the signals, with these logits [l] of the shares of noise."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.flatten(1), self.logits.expand(len(x), -1)], 1)


def given(logits: list[float], target=None) -> StochasticGEN:
    model = StochasticGEN(Given(torch.tensor(logits)), nn.Identity(), 2, num_lagged=10, bandwidth=1.0, target=target)
    return model.double().eval()


@pytest.mark.parametrize("target", [None, MIXTURE], ids=["normal", "mixture"])
def test_codes_have_the_moments_of_the_target_whatever_their_share_of_noise(target):
    signals = torch.randn(40_000, 1, 1, 2, generator=generator(1)).double()
    for logits in ([-2.0, 1.5], [0.0, 60.0], [-60.0, -1e4]):
        model = given(logits, target)
        model.norm.calibrate([signals.flatten(1)])
        codes = model.posterior_samples(signals, generator(2))
        mean, variance = model.norm.shift, model.norm.scale.square()
        assert ((codes.mean(0) - mean).abs() < 5 * (variance / 40_000).sqrt()).all()
        torch.testing.assert_close(codes.var(0), variance, rtol=0.03, atol=0)


def test_a_share_of_nothing_is_the_signal_and_of_all_is_noise():
    signals = points(500, 1, 1, 2, seed=3)
    model = given([-1e4, 1e4])
    model.norm.calibrate([signals.flatten(1)])
    expected = model.norm(signals.flatten(1))
    means, deviations = model.posterior(signals)
    torch.testing.assert_close(means[:, 0], expected[:, 0])
    assert torch.equal(means[:, 1], torch.zeros(500).double())
    assert torch.equal(deviations, torch.tensor([[0.0, 1.0]]).double().expand(500, 2))
    torch.testing.assert_close(model.encode(signals), means)
    assert torch.equal(model.posterior_samples(signals, generator(5)), model.posterior_samples(signals, generator(5)))


def test_gradients_are_finite_at_shares_of_nothing_and_all():
    logits = torch.tensor([-120.0, 120.0], requires_grad=True)
    signals = points(50, 1, 1, 2, dtype=torch.float32).requires_grad_()
    model = StochasticGEN(Given(logits), nn.Identity(), 2, num_lagged=10, bandwidth=1.0)
    torch.manual_seed(0)
    model.training_codes(signals).square().sum().backward()
    assert bool(logits.grad.isfinite().all()) and bool(signals.grad.isfinite().all())


def test_it_fills_dimensions_that_a_map_of_the_images_cannot():
    found = {}
    for name, model in (
        ("random", make(32, num_lagged=500, bandwidth=3.0, learning_rate=2e-3)),
        ("map", built.GEN(Digits.example_shape, 32, num_lagged=500, bandwidth=3.0, kernel_noise=False)),
    ):
        pl.seed_everything(1, verbose=False)
        train(model, 15, data=Digits())
        found[name] = code_measures(model, encode_set(model, Digits().held_out), training=False)
        assert found[name]["reconstruction_error"] < 0.03  # of the mean image 0.135
    samples, codes = found["random"]["posterior"]["covariance_eigenvalues"], found["map"]["covariance_eigenvalues"]
    assert samples[0] > 0.3 and samples[-1] < 2
    assert codes[0] < 0.1 and codes[-1] > 2.2
    # Of the weight 1 - r = p_t / (p_e + p_t) what is reported is that of the samples, which follow the target.
    assert found["random"]["gradient_weight"] == pytest.approx(0.5, abs=0.1)


def test_the_bandwidth_is_one_and_a_half_times_the_least():
    least = optimal_bandwidth(3, 200, smoothed=True).value
    assert make(3, num_lagged=200, bandwidth=None).lagged.bandwidth == pytest.approx(1.5 * least)


def test_errors():
    model = StochasticGEN(nn.Flatten(), nn.Identity(), 3, num_lagged=10, bandwidth=1.0)
    with pytest.raises(ValueError, match=r"encoder must return \[4, 2 x latent_dim = 6\], got \[4, 3\]"):
        model.encode(torch.zeros(4, 1, 1, 3))
    with pytest.raises(ValueError, match="bandwidth must be given, got None: there must be more centers"):
        make(2, num_lagged=45, bandwidth=None)
    with pytest.raises(ValueError, match="refresh must be"):
        make(refresh="never")


def test_a_checkpoint_of_networks_of_ones_own_loads_with_others(tmp_path):
    networks = StochasticGEN.build_networks(FC, Digits.example_shape, 2, {})
    model = StochasticGEN(*networks, 2, num_lagged=100, bandwidth=0.5)
    train(model, 1).save_checkpoint(tmp_path / "a.ckpt")
    new = dict(zip(("encoder", "decoder"), StochasticGEN.build_networks(FC, Digits.example_shape, 2, {}), strict=True))
    restored = StochasticGEN.load_from_checkpoint(tmp_path / "a.ckpt", **new)
    assert_same_state(restored, model)
    assert restored.hparams == model.hparams and restored.settings() == model.settings()
