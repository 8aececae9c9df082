"""LC-VAE: its loss, its constraints, its networks, its command and its script."""

import csv
import json
import math

import lightning.pytorch as pl
import matplotlib.image
import pytest
import torch
from helpers import generator, points, run_here
from test_data import write_mnist
from test_gen import assert_same_state, train
from test_models import FLOW, digits, make
from test_papers_images import PAPERS
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from kdejsd import omega
from kdejsd.cli import main
from kdejsd.data import Digits
from kdejsd.models import FC, LCVAE, DeepConv, HalfDeepConv, built

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*GPU available but not used",
    "ignore:.*trainer. reference is not registered",  # a training step without a trainer logs nothing
)

CONSTRAINTS = [
    pytest.param({"constraint": "clip", "clip": 0.03}, id="clip"),
    pytest.param({"constraint": "spectral"}, id="spectral"),
    pytest.param({"constraint": "none", "scale_free": True}, id="scale-free"),
]


def convolutional() -> nn.Module:
    """An encoder with everything that a constraint may touch or not."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()), nn.Flatten(), nn.Linear(128, 4)
    )


def layers(encoder: nn.Module) -> list[nn.Module]:
    return [layer for layer in encoder.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("scale_free", [False, True])
@pytest.mark.parametrize("options", [{}, FLOW], ids=["normal", "flow"])
def test_the_loss_is_its_parts(options, scale_free):
    model = make(
        built.LCVAE, omega_weight=7.0, scale_free=scale_free, observation_variance=0.07, constraint="none", **options
    ).double()
    if model.flow is not None:
        with torch.no_grad():
            for parameter in model.flow.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    batch, labels, index = digits(51)  # of which the last is in no pair
    batch = batch.double()
    torch.manual_seed(3)
    loss = model.training_step((batch, labels, index), 0)

    torch.manual_seed(3)
    mean, log_variance = model.posterior(batch)
    z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    q = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    if model.flow is None:
        kl = kl_divergence(q, Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)).mean()
    else:
        kl = (-q.entropy() - model.flow.log_prob(z)).mean()
    codes = model.encode(batch)
    total = sum(
        (codes[i] - codes[i + 25]).square().sum() / (batch[i] - batch[i + 25]).square().sum() for i in range(25)
    )
    if scale_free:
        total = total / torch.cov(codes[:50].T).trace() * 2
    error = (model.decoder(z) - batch).square().sum() / (51 * 64)
    expected = error + 0.14 / 64 * (kl + 7 * total / 25)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("options", [{}, FLOW], ids=["normal", "flow"])
def test_without_penalty_and_constraint_it_is_a_vae(options):
    plain, model = make(built.VAE, **options), make(built.LCVAE, omega_weight=0.0, constraint="none", **options)
    for each in (plain, model):
        pl.seed_everything(7, verbose=False)
        train(each, 2)
    assert_same_state(plain, model)


def test_the_penalty_spreads_codes_by_the_distance_of_images():
    found = []
    for weight in (0.0, 1e3):
        options = {"observation_variance": 0.02, "learning_rate": 3e-3, "scale_free": True}
        each = make(built.LCVAE, omega_weight=weight, constraint="none", **options)
        pl.seed_everything(7, verbose=False)
        train(each, 8, data=Digits())
        batch = Digits().held_out[torch.arange(300)][0]
        codes = each.eval().encode(batch).detach()
        found.append(float(omega(batch, codes, pairs="all", reduction="mean") / codes.var(0).mean()))
    assert found[1] < 0.98 * found[0]


def test_plain_omega_falls_with_the_scale_of_the_codes_and_scale_free_omega_does_not():
    batch = digits(40)[0].double()
    mean = points(40, 2)
    for scale_free, power in ((False, 2), (True, 0)):
        model = make(built.LCVAE, scale_free=scale_free)
        scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        value = model.penalty(batch, scale * mean)
        assert float(value) == pytest.approx(0.1**power * float(model.penalty(batch, mean)), rel=1e-12)
        (slope,) = torch.autograd.grad(value, scale)
        assert float(slope) == pytest.approx(power * float(value) / 0.1, rel=1e-10, abs=1e-10)


def test_equal_images_count_as_nothing_and_equal_codes_have_no_scale():
    batch = digits(20)[0].repeat(2, 1, 1, 1).double()
    assert float(make(built.LCVAE).penalty(batch, points(40, 2))) == 0
    other, same = digits(40)[0].double(), torch.ones(40, 2).double()
    assert float(make(built.LCVAE).penalty(other, same)) == 0
    assert math.isnan(make(built.LCVAE, scale_free=True).penalty(other, same))


def test_the_penalty_in_half_precision_is_that_of_the_rounded_codes():
    batch, mean = digits(40)[0], points(40, 2, dtype=torch.bfloat16)
    model = make(built.LCVAE)
    assert torch.equal(model.penalty(batch, mean), model.penalty(batch, mean.float()))


# Constraints


class AfterEveryStep(pl.Callback):
    def __init__(self, check):
        self.check, self.count = check, 0

    def on_train_batch_end(self, trainer, model, *_):
        self.check(model)
        self.count += 1


def test_clipping_bounds_the_weights_after_every_step_and_nothing_else():
    def check(model):
        for layer in layers(model.encoder):
            assert float(layer.weight.detach().abs().max()) == pytest.approx(0.03, rel=1e-6)
        assert float(model.encoder[0].bias.detach().abs().max()) > 0.1
        assert float(model.encoder[1].weight.detach().min()) > 0.9
        assert float(model.decoder[0].weight.detach().abs().max()) > 0.1

    checked = AfterEveryStep(check)
    train(LCVAE(convolutional(), FC((1, 8, 8), 2).decoder, 2, clip=0.03), 2, checked)
    assert checked.count == 6


def test_spectral_normalisation_bounds_the_singular_values_after_every_step():
    def largest(model):
        return [float(torch.linalg.matrix_norm(layer.weight.flatten(1).detach(), 2)) for layer in layers(model.encoder)]

    def check(model):
        model.eval()  # where the weights are looked at without another power iteration
        assert all(norm == pytest.approx(1, abs=0.03) for norm in largest(model))
        model.train()

    checked = AfterEveryStep(check)
    model = LCVAE(convolutional(), FC((1, 8, 8), 2).decoder, 2, constraint="spectral", learning_rate=1e-2)
    train(model, 4, checked)
    assert checked.count == 12
    model.train()
    for _ in range(200):
        model.encoder(digits(10)[0])
    assert all(norm == pytest.approx(1, abs=1e-4) for norm in largest(model.eval()))


def test_a_spectrally_normalised_encoder_of_linear_layers_puts_no_images_farther_apart():
    batch = digits(200)[0]
    model = make(built.LCVAE, constraint="spectral", omega_weight=0.0)
    train(model, 5)
    with torch.no_grad():
        for layer in layers(model.encoder):
            layer.parametrizations.weight.original.mul_(50)
        model.train()
        for _ in range(100):
            model.encode(batch)
        largest = omega(batch, model.eval().encode(batch), pairs="all", reduction="max").value
    assert 0 < float(largest) <= 1


@pytest.mark.parametrize("options", CONSTRAINTS)
def test_checkpoints_and_settings(tmp_path, options):
    made = make(built.LCVAE, omega_weight=3.0, **options)
    train(made, 1).save_checkpoint(tmp_path / "a.ckpt")
    restored = built.LCVAE.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert_same_state(restored, made)
    batch = digits(20)[0]
    assert torch.equal(restored.encode(batch), made.eval().encode(batch))
    assert torch.equal(restored.sample(5, generator(1)), made.sample(5, generator(1)))
    settings = made.settings()
    assert restored.settings() == settings and settings["name"] == "LCVAE" and settings["omega_weight"] == 3
    constraint = "clip at 0.03" if options["constraint"] == "clip" else options["constraint"]
    assert (settings["constraint"], settings["scale_free"]) == (constraint, "scale_free" in options)


# Networks


@pytest.mark.parametrize(("network", "first"), [(DeepConv, 128), (HalfDeepConv, 64)])
def test_networks(network, first):
    made = network((1, 28, 28), 10)
    sizes, batch = [], torch.rand(2, 1, 28, 28)
    for layer in made.encoder:
        batch = layer(batch)
        if isinstance(layer, (nn.Conv2d, nn.Flatten)):
            sizes.append(tuple(batch.shape[1:]))
    expected = [(first, 14, 14), (2 * first, 7, 7), (4 * first, 3, 3), (8 * first, 1, 1)]
    assert sizes == [*expected, (8 * first,)] and batch.shape == (2, 10)
    assert made.decoder[:2](batch).shape == (2, 2 * first, 7, 7)
    decoded = network((3, 28, 28), 10).decoder(batch)
    assert decoded.shape == (2, 3, 28, 28) and 0 <= decoded.min() < decoded.max() <= 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make(built.LCVAE, omega_weight=-1.0), r"omega_weight must be at least 0 and finite, got -1\.0"),
        (lambda: make(built.LCVAE, constraint="l2"), 'constraint must be "clip", "spectral" or "none", got \'l2\''),
        (lambda: make(built.LCVAE, clip=0.0), r"clip must be positive and finite, got 0\.0"),
        (lambda: make(built.LCVAE, clip=math.inf), "clip must be positive and finite, got inf"),
        (lambda: make(built.LCVAE).training_step(digits(1), 0), "LCVAE must have at least 2 examples, got 1"),
        (lambda: DeepConv((1, 32, 32), 2), r"^DeepConv takes images of 28 x 28, got example_shape \[1, 32, 32\]; FC"),
        (lambda: HalfDeepConv((1, 8, 8), 2), r"^HalfDeepConv takes images of 28 x 28, got example_shape \[1, 8, 8\]"),
        (lambda: DeepConv((1, 28, 28), 0), "latent_dim must be at least 1, got 0"),
        (lambda: DeepConv((1, 28, 28), 2, channels=0), "channels must be at least 1, got 0"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# Command and script


def test_configuration(tmp_path, monkeypatch, undrawn):
    write_mnist(tmp_path / "files", compressed=True)
    config = PAPERS / "configs" / "lcvae.yaml"
    small = ["--data.batch_size=5", "--data.train_size=20", "--trainer.max_steps=3", "--trainer.accelerator=cpu"]
    monkeypatch.chdir(tmp_path)
    assert main(["fit", f"--config={config}", "--data.root=files", *small, "--out=run"]) == 0
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    model = report["model"]
    assert (model["name"], model["latent_dim"], model["omega_weight"]) == ("LCVAE", 10, 30)
    assert (model["constraint"], model["scale_free"], report["run"]["steps"]) == ("clip at 0.3", False, 3)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"]["encoder.9.weight"].shape == (1024, 512, 4, 4)
    assert state["state_dict"]["encoder.13.weight"].shape == (20, 1024)
    settings = state["hyper_parameters"]
    assert (settings["learning_rate"], tuple(settings["betas"]), settings["decay"]) == (1e-3, (0.9, 0.999), False)
    assert "batch_size: 300" in config.read_text()


def test_figures(tmp_path, monkeypatch):
    def run():
        done = run_here(PAPERS / "lcvae_figures.py", "--quick", "--out", tmp_path, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    done, record = run(), (tmp_path / "lcvae_figures.csv").read_text()
    texts = ("data", "network", "model")
    rows = {
        row["model"]: {key: float(value) for key, value in row.items() if key not in texts}
        for row in csv.DictReader(record.splitlines())
    }
    assert list(rows) == [
        "VAE",
        *(f"LC-VAE, {kind}" for kind in ("clip", "spectral", "scale-free")),
        "scale-free, 30 lambda",
    ]
    for name, row in rows.items():
        assert name in done.stdout and f"{row['omega']:.4g}" in done.stdout
        assert row["omega_normalised"] == pytest.approx(row["omega"] / row["code_std"] ** 2, rel=1e-6)
        assert row["omega"] < row["largest"]
        assert 0 <= row["collision_entropy"] <= math.log(10) and 0 <= row["holes_samples"] <= 1
    assert rows["LC-VAE, clip"]["omega"] < 0.5 * rows["VAE"]["omega"]
    assert rows["scale-free, 30 lambda"]["omega_normalised"] < rows["VAE"]["omega_normalised"]
    pictures = {path: path.read_bytes() for path in tmp_path.glob("lcvae_figures_*.png")}

    def no_step(*_):
        raise AssertionError("a model that has its checkpoint was trained again")

    monkeypatch.setattr("kdejsd.models.LCVAE.training_step", no_step)
    again = run()
    assert again.stdout.partition("\n\n")[2] == done.stdout.partition("\n\n")[2]
    assert (tmp_path / "lcvae_figures.csv").read_text() == record
    assert len(pictures) == 4 and all(path.read_bytes() == picture for path, picture in pictures.items())
    for figure in ("2_2", "4_1", "4_2", "4_3"):
        assert matplotlib.image.imread(tmp_path / f"lcvae_figures_{figure}.png").std() > 0.05

    monkeypatch.undo()
    more = ("--latent_dim=3", "--models", "VAE", "LC-VAE, clip")
    done = run_here(PAPERS / "lcvae_figures.py", "--quick", *more, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    *before, vae, clipped = csv.DictReader((tmp_path / "lcvae_figures.csv").open())
    assert [row["omega"] for row in before] == [row["omega"] for row in csv.DictReader(record.splitlines())]
    assert (vae["model"], clipped["model"]) == ("VAE", "LC-VAE, clip") and vae["latent_dim"] == "3"
    assert float(clipped["omega"]) < 0.5 * float(vae["omega"]) and f"{float(vae['omega']):.4g}" in done.stdout
    assert {path.name for path in tmp_path.glob("lcvae_figures_l3_*.png")} == {  # samples and reconstructions
        "lcvae_figures_l3_4_2.png",
        "lcvae_figures_l3_4_3.png",
    }
    assert all(path.read_bytes() == picture for path, picture in pictures.items())
    refused = run_here(PAPERS / "lcvae_figures.py", cwd=tmp_path)
    assert refused.returncode == 2 and "MNIST needs --data" in refused.stderr
