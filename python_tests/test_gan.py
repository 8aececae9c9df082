"""GANs: their losses against closed forms, the order of training, repeatability, checkpoints, reports."""

import json
import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from helpers import generator, points, worst
from test_cli import export
from test_gen import assert_same_state, train
from torch import nn
from torch.distributions import Normal
from torch.nn.functional import binary_cross_entropy_with_logits

from kdejsd.cli import main
from kdejsd.data import Digits, ExampleData, ExampleSet, Grid2D
from kdejsd.models import FC, GAN, Conv, GenerativeModel, built, f_divergences, with_built_networks
from kdejsd.models.gan import gradient_penalty, losses, pack, real_gradient_penalty
from kdejsd.runs.measuring import divergence_measures
from kdejsd.runs.report import write_report

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*GPU available but not used",
)

OBJECTIVES = ["minimax", "non-saturating", "wgan", "wgan-gp", *(f"f-{name}" for name in f_divergences.NAMES)]


def make(objective: str = "non-saturating", seed: int = 0, shape=Digits.example_shape, **options) -> GAN:
    pl.seed_everything(seed, verbose=False)
    return built.GAN(shape, objective=objective, **{"latent_dim": 2} | options)


def grid(**options) -> Grid2D:
    return Grid2D(**{"num_samples": 1000, "batch_size": 100} | options)


# Losses


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    real, fake = points(30, seed=1) + 0.3, points(40, seed=2) - 0.2
    return real.requires_grad_(), fake.requires_grad_()


@pytest.mark.parametrize("objective", ["minimax", "non-saturating"])
def test_the_first_objectives_are_cross_entropies(objective):
    real, fake = outputs()
    ones, zeros = torch.ones(40).double(), torch.zeros(40).double()
    told = binary_cross_entropy_with_logits(real, ones[:30]) + binary_cross_entropy_with_logits(fake, zeros)
    fooled = binary_cross_entropy_with_logits(fake, ones)
    if objective == "minimax":
        fooled = -binary_cross_entropy_with_logits(fake, zeros)
    both = losses(objective)
    for got, expected in ((both.discriminator(real, fake), told), (both.generator(fake), fooled)):
        assert got.item() == pytest.approx(expected.item(), rel=1e-14)
        (slope,), (expected_slope,) = (torch.autograd.grad(value, fake, retain_graph=True) for value in (got, expected))
        assert worst(slope, expected_slope) < 1e-15
    assert both.divergence(real, fake).item() == pytest.approx(math.log(2) - told.item() / 2, rel=1e-14)


def test_the_losses_of_a_critic_are_differences_of_means():
    real, fake = outputs()
    for objective in ("wgan", "wgan-gp"):
        both = losses(objective)
        difference = float(real.mean() - fake.mean())
        assert float(both.discriminator(real, fake)) == pytest.approx(-difference, rel=1e-14)
        assert float(both.divergence(real, fake)) == pytest.approx(difference, rel=1e-14)
        assert float(both.generator(fake)) == pytest.approx(-float(fake.mean()), rel=1e-14)


@pytest.mark.parametrize("name", f_divergences.NAMES)
def test_the_generator_of_an_f_gan_lowers_the_bound_that_its_discriminator_raises(name):
    real, fake = outputs()
    both, f = losses(f"f-{name}"), f_divergences.by_name(name)
    bound = f.output(real).mean() - f.conjugate(f.output(fake)).mean()
    assert float(both.divergence(real, fake)) == pytest.approx(float(bound), rel=1e-12)
    assert float(both.discriminator(real, fake)) == pytest.approx(-float(bound), rel=1e-12)
    (slope,), (expected,) = (torch.autograd.grad(value, fake) for value in (both.generator(fake), bound))
    assert worst(slope, expected) < 1e-12


def test_f_gan_of_the_gan_divergence_is_minimax():
    real, fake = outputs()
    for of_f, of_minimax in zip(
        *((both.discriminator(real, fake), both.generator(fake)) for both in map(losses, ("f-gan", "minimax"))),
        strict=True,
    ):
        assert float(of_f) == float(of_minimax)


@pytest.mark.parametrize("objective", ["minimax", *(f"f-{name}" for name in f_divergences.NAMES)])
def test_the_divergence_of_the_optimal_discriminator_is_that_of_two_normals(objective):
    p, q = Normal(torch.tensor(0.5).double(), 1.0), Normal(torch.tensor(0.0).double(), 1.0)
    x = torch.linspace(-12, 12, 24_001).double()
    weight = float(x[1] - x[0])
    ratio = (p.log_prob(x) - q.log_prob(x)).exp()
    middle = ((p.log_prob(x).exp() + q.log_prob(x).exp()) / 2).log()
    jsd = float(
        ((p.log_prob(x).exp() * (p.log_prob(x) - middle) + q.log_prob(x).exp() * (q.log_prob(x) - middle)) / 2).sum()
        * weight
    )
    expected = {
        "minimax": jsd,
        "f-kl": 0.125,
        "f-reverse-kl": 0.125,
        "f-pearson": math.expm1(0.25),
        "f-squared-hellinger": 2 * -math.expm1(-0.25 / 8),
        "f-jensen-shannon": 2 * jsd,
        "f-gan": 2 * jsd - math.log(4),
    }[objective]
    # V with g_f(V) = f'(p / q), which the activations' inverses give.
    best = {
        "f-kl": 1 + ratio.log(),
        "f-reverse-kl": ratio.log(),
        "f-pearson": 2 * (ratio - 1),
        "f-squared-hellinger": ratio.log() / 2,
    }.get(objective, ratio.log())

    class Discriminator(nn.Module):
        def forward(self, packed):
            index = ((packed.flatten() + 12) / weight).round().long()
            return best[index]

    model = GAN(nn.Identity(), Discriminator(), 1, objective=objective)
    real, fake = (law.icdf((torch.arange(20_000).double() + 0.5) / 20_000)[:, None, None, None] for law in (p, q))
    assert float(model.divergence(real, fake)) == pytest.approx(expected, abs=2e-3)


def test_the_penalty_of_a_linear_critic_is_its_slope_s_distance_from_1():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1).double())
    real, fake = points(9, 3, 2, 2, seed=1), points(9, 3, 2, 2, seed=2)
    weight = critic[1].weight
    norm = weight.norm()
    penalty = gradient_penalty(critic, real, fake)
    assert float(penalty) == pytest.approx(float((norm - 1) ** 2), rel=1e-12)
    (slope,) = torch.autograd.grad(penalty, weight)
    assert worst(slope, 2 * (norm - 1) * weight / norm) < 1e-12


def test_the_penalty_is_along_the_lines_from_real_to_fake_and_has_second_derivatives():
    class Quadratic(nn.Module):  # V = a |x|^2 / 2, whose slope is a x
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x):
            seen.append(x.detach())
            return self.a * x.flatten(1).square().sum(1) / 2

    seen: list[torch.Tensor] = []
    critic = Quadratic()
    real, fake = points(50, 1, 1, 2, seed=1), 3 + points(50, 1, 1, 2, seed=2)
    torch.manual_seed(3)
    penalty = gradient_penalty(critic, real, fake)
    share = ((seen[0] - real) / (fake - real)).flatten(1)
    assert worst(share[:, 0], share[:, 1]) < 1e-9  # on the line
    assert 0 <= share.min() < 0.1 and 0.9 < share.max() <= 1 and len(share[:, 0].unique()) == 50
    lengths = seen[0].flatten(1).norm(dim=1)
    assert float(penalty) == pytest.approx(float((0.7 * lengths - 1).square().mean()), rel=1e-12)
    (slope,) = torch.autograd.grad(penalty, critic.a)
    assert float(slope) == pytest.approx(float((2 * (0.7 * lengths - 1) * lengths).mean()), rel=1e-12)


def test_the_penalty_at_real_examples_is_half_the_mean_squared_slope():
    class Cubic(nn.Module):  # V = a sum x^3 / 3, whose slope is a x^2
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x):
            return self.a * x.flatten(1).pow(3).sum(1, keepdim=True) / 3

    critic, real = Cubic(), points(50, 2, 3, 3, seed=1)
    penalty = real_gradient_penalty(critic, real)
    fourth = real.flatten(1).pow(4).sum(1).mean()
    assert float(penalty) == pytest.approx(float(0.49 * fourth / 2), rel=1e-12)
    (slope,) = torch.autograd.grad(penalty, critic.a)
    assert float(slope) == pytest.approx(float(0.7 * fourth), rel=1e-12)
    assert not real.requires_grad


def test_every_objective_has_its_penalty():
    real, fake = torch.rand(2, 6, 1, 8, 8)
    for objective in OBJECTIVES:
        model = make(objective, packing=2)
        packed = pack(real, 2), pack(fake, 2)
        torch.manual_seed(0)
        got = model.penalty(*packed)
        torch.manual_seed(0)
        expected = (
            gradient_penalty(model.discriminator, *packed)
            if objective == "wgan-gp"
            else real_gradient_penalty(model.discriminator, packed[0])
        )
        assert float(got) == float(expected) > 0


def test_kl_can_diverge_without_its_penalty():
    data = Grid2D(2, num_samples=20_000)
    network = partial(FC, hidden=(192, 192, 192))
    options = {"shape": data.example_shape, "network": network, "seed": 3}
    with pytest.raises(FloatingPointError, match=r"the loss is -?inf"):
        train(make("f-kl", gradient_penalty=0.0, **options), 1, data=data)
    model = make("f-kl", **options)
    train(model, 1, data=data)
    assert model.sample(100).isfinite().all()


@pytest.mark.parametrize(
    ("objective", "given", "weight"),
    [("wgan-gp", None, 10), ("f-kl", None, 1), ("f-pearson", None, 1), ("f-gan", None, 0), ("minimax", 2.5, 2.5)],
)
def test_the_discriminators_loss_has_the_penalty(objective, given, weight):
    model = make(objective, gradient_penalty=given, discriminator_steps=1)
    assert model.gradient_penalty == weight
    told, penalties = [], []
    backward, penalty = model.manual_backward, model.penalty

    def recorded(loss):
        told.append(loss.detach())
        backward(loss)

    def noted(*examples):
        penalties.append(penalty(*examples))
        return penalties[-1]

    model.manual_backward, model.penalty = recorded, noted
    plain = type(model.losses).discriminator
    without = []

    class Noted(type(model.losses)):
        def discriminator(self, real, fake):
            without.append(plain(self, real, fake).detach())
            return plain(self, real, fake)

    model.losses = Noted(**vars(model.losses))
    train(model, 1)
    assert len(penalties) == (3 if weight else 0) and len(without) == 3
    for step, loss in enumerate(told[::2]):  # every second one is the generator's
        added = weight * float(penalties[step]) if weight else 0
        assert float(loss) == pytest.approx(float(without[step]) + added, rel=1e-5)


def test_packing_puts_images_side_by_side_as_channels():
    batch = points(6, 2, 3, 4)
    packed = pack(batch, 3)
    assert packed.shape == (2, 6, 3, 4)
    for i in range(2):
        assert torch.equal(packed[i], torch.cat(list(batch[3 * i : 3 * i + 3])))
    model = make(packing=3)
    assert model.discriminate(torch.rand(12, 1, 8, 8)).shape == (4,)
    assert model.discriminator[1].in_features == 3 * 64 and model.generator[0].in_features == 2


def test_nan_images_give_nan():
    for objective in OBJECTIVES:
        model = make(objective)
        assert model.divergence(torch.full((4, 1, 8, 8), math.nan), torch.rand(4, 1, 8, 8)).isnan()


# Training


class Steps(pl.Callback):
    """Notes what each minibatch changed, "discriminator", "generator" or both, and the former's largest weight."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []
        self.largest: list[float] = []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.before = {name: value.detach().clone() for name, value in model.named_parameters()}

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        after = dict(model.named_parameters())
        self.changed.append({n.split(".")[0] for n, value in self.before.items() if not torch.equal(value, after[n])})
        self.largest.append(max(float(w.detach().abs().max()) for w in model.discriminator.parameters()))
        assert all(weight.requires_grad for weight in after.values())


@pytest.mark.parametrize(("objective", "given", "every"), [("minimax", None, 1), ("wgan", None, 5), ("f-kl", 2, 2)])
def test_the_generator_trains_in_every_nth_step(objective, given, every):
    steps = Steps()
    run = train(make(objective, discriminator_steps=given, learning_rate=1e-3), 4, steps)  # of three minibatches
    assert run.global_step == 12 == run.estimated_stepping_batches
    both = {"discriminator", "generator"}
    assert steps.changed == [both if (i + 1) % every == 0 else {"discriminator"} for i in range(12)]
    if objective == "wgan":
        assert all(largest <= 0.01 for largest in steps.largest)
    else:
        assert min(steps.largest) > 0.01


def test_each_step_lowers_the_loss_of_its_own_network():
    """The gradients that the optimisers get are those of the losses, by the weights of one network alone."""
    model = make("wgan-gp", discriminator_steps=1, gradient_penalty=3.0)
    seen, backward = [], model.manual_backward

    def recorded(loss):
        for parameter in model.parameters():
            parameter.grad = None
        backward(loss)
        seen.append({name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None})

    model.manual_backward = recorded
    train(model, 1)
    assert seen == [{"discriminator"}, {"generator"}] * 3


def test_what_is_logged():
    run = train(make("non-saturating"), 2)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged.keys() == {"loss/discriminator", "loss/generator", "loss/divergence", "val/divergence"}
    assert logged["loss/divergence"] == pytest.approx(math.log(2) - logged["loss/discriminator"] / 2, rel=1e-5)
    for packing in (1, 3):
        model = make("wgan-gp", packing=packing)
        data = Digits(train_size=300, batch_size=99)
        run = train(model, 1, data=data)
        logged = run.callback_metrics
        assert logged["loss/discriminator"] > -logged["loss/divergence"]  # the penalty is in it
        measured = divergence_measures(model, data.held_out)
        assert measured["count"] == 359 // packing * packing
        assert float(run.callback_metrics["val/divergence"]) == pytest.approx(measured["divergence"], rel=1e-4)


class Normals(ExampleData):
    """Points of a normal with unit variance and mean (1, -0.5)."""

    example_shape = (2,)

    def load(self):
        shift = torch.tensor([1.0, -0.5])
        return tuple(
            ExampleSet(points(count, 2, dtype=torch.float32, seed=count) + shift, torch.zeros(count).long())
            for count in (2000, 1000)
        )


class Shift(nn.Module):
    """Latents, moved by what is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(2))

    def forward(self, latents):
        return latents + self.by


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_generator_that_can_only_shift_comes_to_the_mean(objective):
    pl.seed_everything(0, verbose=False)
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))
    model = GAN(Shift(), discriminator, 2, objective=objective, discriminator_steps=2, clip=1.0, learning_rate=0.05)
    run = train(model, 10, data=Normals())
    assert float((model.generator.by.detach() - torch.tensor([1.0, -0.5])).norm()) < 0.25
    # The divergence of equal laws; that of "gan" is 2 JSD - 2 log 2.
    expected = -math.log(4) if objective == "f-gan" else 0
    assert float(run.callback_metrics["val/divergence"]) == pytest.approx(
        expected, abs=0.2 if "wgan" in objective else 0.05
    )


@pytest.mark.parametrize("objective", ["non-saturating", "wgan-gp"])
def test_same_seed_same_weights_and_another_seed_others(objective):
    first, second, third = (make(objective, seed) for seed in (0, 0, 1))
    for model in (first, second):
        pl.seed_everything(7, verbose=False)
        train(model, 1)
    assert_same_state(first, second)
    assert not torch.equal(first.generator[0].weight, third.generator[0].weight)


def test_checkpoints_and_samples(tmp_path):
    model = make("wgan", packing=2, clip=0.02)
    train(model, 1).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    restored = built.GAN.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same_state(restored, model)
    assert restored.clip == 0.02 and restored.betas == model.betas == (0.0, 0.9)
    assert restored.settings() == model.settings()
    assert model.settings()["objective"] == "wgan" and model.settings()["packing"] == 2
    samples = model.train().sample(3, generator(1))
    assert model.training and samples.shape == (3, 1, 8, 8)
    assert torch.equal(samples, model.eval()(torch.randn(3, 2, generator=generator(1))).detach())


def test_convolutional_networks():
    model = make("wgan-gp", shape=(1, 28, 28), packing=2, network=lambda *args: Conv(*args, 4, False))
    assert model.discriminate(torch.rand(4, 1, 28, 28)).shape == (2,)
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.generator.modules())
    first, second = torch.rand(2, 2, 1, 28, 28)
    alone = model.discriminate(first)
    torch.testing.assert_close(model.discriminate(torch.cat([first, second]))[:1], alone)  # nothing of the others in it
    assert any(isinstance(part, nn.BatchNorm2d) for part in Conv((1, 28, 28), 1, 4).encoder.modules())


def test_points_are_not_kept_between_0_and_1():
    latents = 100 * torch.randn(200, 2, generator=generator())
    for shape, kept in (((2,), False), ((3, 4), False), ((2, 1, 1), True), ((1, 8, 8), True)):
        decoded = FC(shape, 2).decoder(latents).detach()
        assert decoded.shape == (200, *shape)
        assert (bool(((decoded >= 0) & (decoded <= 1)).all())) == kept


def networks(packing: int = 1) -> tuple[nn.Module, nn.Module]:
    return GAN.build_networks(FC, (1, 8, 8), 2, {"packing": packing})


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make("hinge"), "objective must be one of minimax, non-saturating, wgan, .*, got 'hinge'"),
        (lambda: make(packing=0), "packing must be at least 1, got 0"),
        (lambda: make(discriminator_steps=0), "discriminator_steps must be at least 1, got 0"),
        (lambda: make("wgan", clip=0.0), r"clip must be positive and finite, got 0\.0"),
        (lambda: make("wgan-gp", gradient_penalty=-1.0), r"gradient_penalty must be at least 0 and finite, got -1\.0"),
        (
            lambda: make("wgan-gp", shape=(1, 28, 28), network=Conv),
            "discriminator must have no batch normalisation for .*--model.network.encoder_batch_norm false",
        ),
        (
            lambda: make("minimax", gradient_penalty=0.5, shape=(1, 28, 28), network=Conv),
            r'discriminator must have no batch normalisation for objective "minimax" with a gradient penalty of 0\.5',
        ),
        (lambda: train(make(packing=3), 1), "a batch must be a multiple of packing = 3 examples, got 100"),
        (
            lambda: GAN(*networks(), 2, packing=2).discriminate(torch.zeros(4, 1, 8, 8)),
            None,
        ),
        (
            lambda: GAN(networks()[0], FC((1, 8, 8), 2).encoder, 2).discriminate(torch.zeros(4, 1, 8, 8)),
            r"discriminator must return \[4\] or \[4, 1\], got \[4, 2\]",
        ),
        (
            lambda: train(GAN(FC((1, 4, 4), 2).decoder, networks()[1], 2), 1),
            r"generator must return the shape of the examples, \[100, 1, 8, 8\], got \[100, 1, 4, 4\]",
        ),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError if text else RuntimeError, match=text):
        call()


# Reports


def cli(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.mark.usefixtures("undrawn")
def test_the_command_trains_evaluates_and_resumes_a_gan_of_points(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--model=GAN", "--model.objective=wgan-gp", "--data=Grid2D", "--data.num_samples=2000", "--model.packing=2"]
    args += ["--data.batch_size=500"]
    args += ["--model.network=FC", "--model.network.hidden=[16]", "--model.decay=false", "--trainer.accelerator=cpu"]
    assert cli("fit", *args, "--trainer.max_epochs=2", "--out=half") == 0
    out = capsys.readouterr().out
    pictures = {"samples.png", "classes.png"}
    assert {path.name for path in (tmp_path / "half").iterdir()} >= {"metrics.json", "config.yaml", *pictures}
    assert not (tmp_path / "half/latent.png").exists()
    report = json.loads((tmp_path / "half/metrics.json").read_text())
    assert report["model"]["name"] == "GAN" and report["model"]["objective"] == "wgan-gp"
    assert report["run"]["steps"] == 6 and report["held_out"]["count"] == 200 and report["training"]["count"] == 1800
    model = built.GAN.load_from_checkpoint(tmp_path / "half/checkpoints/last.ckpt")
    expected = Grid2D().sample_measures(model.sample(10_000, generator()))
    assert {"count": 10_000, **expected}.items() <= report["samples"].items()
    assert f"{report['held_out']['divergence']:.4g}" in out and "modes captured" in out
    shares = torch.tensor(report["diversity"]["probabilities"])
    assert len(shares) == 25 and report["diversity"]["class_radius"]["mean"] > 0
    drawn = Grid2D().classify(model.sample(50_000, generator(1))).bincount(minlength=25) / 50_000
    assert worst(shares, drawn) < 0.03

    assert cli("evaluate", "half/checkpoints/last.ckpt", "--out=again") == 0
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    assert all(again[part] == report[part] for part in ("held_out", "training", "samples", "model", "diversity"))
    assert cli("score", "half/checkpoints/last.ckpt") == 1
    assert "error: RUN must have a model with an encoder" in capsys.readouterr().err

    assert cli("fit", "--ckpt_path=half/checkpoints/last.ckpt", "--trainer.max_epochs=4", "--out=resumed") == 0
    assert cli("fit", *args, "--trainer.max_epochs=4", "--out=whole") == 0
    resumed, whole = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("resumed", "whole")
    )
    assert resumed["global_step"] == whole["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_the_command_trains_a_gan_of_images_and_a_gen_of_points(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
    assert cli("fit", "--model=GAN", "--data.train_size=300", *small, "--out=images") == 0
    report = json.loads((tmp_path / "images/metrics.json").read_text())
    assert report["held_out"].keys() == {"count", "divergence"} and "samples" not in report
    assert "JSD, nats" in capsys.readouterr().out and (tmp_path / "images/samples.png").stat().st_size > 5000
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    export(network, tmp_path / "digits.pt2")
    assert cli("evaluate", "images/checkpoints/last.ckpt", "--classifier=digits.pt2", "--out=classes") == 0
    found = json.loads((tmp_path / "classes/metrics.json").read_text())
    assert found["held_out"] == report["held_out"] and found["diversity"]["holes"] is None
    model = built.GAN.load_from_checkpoint(tmp_path / "images/checkpoints/last.ckpt")
    drawn = network(model.sample(20_000, generator(1))).argmax(1).bincount(minlength=10) / 20_000
    assert worst(torch.tensor(found["diversity"]["probabilities"]), drawn) < 0.03
    assert {path.name for path in (tmp_path / "classes").iterdir()} == {
        *("metrics.json", "report.html", "samples.png", "classes.png", "config.yaml")
    }
    options = ["--model.num_lagged=200", "--model.bandwidth=0.4"]
    assert cli("fit", "--model=GEN", "--data=Grid2D", "--data.num_samples=2000", *options, *small, "--out=gen") == 0
    report = json.loads((tmp_path / "gen/metrics.json").read_text())
    assert 0 < report["held_out"]["reconstruction_error"] < 9 and report["samples"]["modes_captured"] <= 25
    assert report["diversity"]["holes"]["num_codes"] == 1800
    for name in ("latent", "samples", "reconstructions", "classes"):
        assert (tmp_path / f"gen/{name}.png").stat().st_size > 5000


def test_the_help_lists_the_settings_of_a_gan(capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--model", "GAN", "--help")
    text = " ".join(capsys.readouterr().out.split())  # whatever the width of the terminal
    for name in ("objective", "packing", "discriminator_steps", "clip", "gradient_penalty", "betas", "network"):
        assert f"--model.{name}" in text
    assert "default: non-saturating" in text and "--model.num_lagged" not in text


@pytest.mark.usefixtures("undrawn")
def test_the_defaults_are_those_of_the_chosen_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aae.yaml").write_text("model: {class_path: AAE, init_args: {decay: false}}")
    for name, args in (("gan", ["--model=GAN", "--data=Grid2D"]), ("aae", ["--config=aae.yaml"])):
        assert cli("fit", *args, "--trainer.max_steps=1", "--trainer.accelerator=cpu", f"--out={name}") == 0
    settings = {
        name: torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("gan", "aae")
    }
    gan, aae = (settings[name]["hyper_parameters"] for name in ("gan", "aae"))
    assert gan["betas"] is None and gan["learning_rate"] == 1e-3
    assert settings["gan"]["datamodule_hyper_parameters"]["batch_size"] == Grid2D().batch_size
    assert aae["weight"] == 0.02 and aae["learning_rate"] == 2e-4 and not aae["decay"]


def test_a_gan_that_has_diverged_still_has_a_report(tmp_path):
    model = make(shape=(2,))
    with torch.no_grad():
        model.generator[0].weight.fill_(math.nan)
    text = write_report(tmp_path, model, grid(), {})
    assert "no diversity: 10000 of 10000 samples are not finite" in text
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["held_out"]["divergence"] is None and report["samples"]["modes_captured"] is None
    assert (tmp_path / "samples.png").exists() and "diversity" not in report


def test_a_model_of_ones_own_has_a_report_of_its_samples(tmp_path):
    class Decoder(GenerativeModel):
        def __init__(self, generator, unused, latent_dim):
            super().__init__(latent_dim, 1e-3, False, (0.5, 0.999))
            self.generator = generator
            self.target = torch.distributions.Independent(Normal(torch.zeros(latent_dim), torch.ones(latent_dim)), 1)

        @staticmethod
        def build_networks(network, example_shape, latent_dim, settings):
            return network(example_shape, latent_dim).decoder, nn.Identity()

        def training_step(self, batch, batch_idx):
            raise NotImplementedError

    model = with_built_networks(Decoder)((2,))
    write_report(tmp_path, model, grid(), {"steps": 0})
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report.keys() == {"samples", "model", "run", "diversity"}
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.html", "samples.png", "classes.png"}
