"""The baselines: their losses against closed forms, training, repeatability, checkpoints."""

import copy
import math
import pickle
import statistics

import lightning.pytorch as pl
import pytest
import torch
from helpers import generator, points, worst
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from test_gen import assert_same_state, train
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from kdejsd import GaussianMixture, LaggedKDE, StandardNormal
from kdejsd.data import Digits
from kdejsd.divergence import target_jsd
from kdejsd.models import FC, Autoencoder, BuiltModel, built, with_built_networks
from kdejsd.models.aae import AAE
from kdejsd.models.ae import AE
from kdejsd.models.vae import VAE, kl_to_normal, normal_entropy
from kdejsd.models.wae import SCALES, WAE, imq_mmd
from kdejsd.runs.measuring import code_measures, encode_set

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:.*GPU available but not used",
    "ignore:.*trainer. reference is not registered",  # a training step without a trainer logs nothing
)

FLOW = {"prior": "flow", "flow_layers": 4, "flow_hidden": 16}
MODELS = [
    pytest.param(built.AE, {}, id="AE"),
    pytest.param(built.AAE, {}, id="AAE"),
    pytest.param(built.VAE, {}, id="VAE"),
    pytest.param(built.VAE, FLOW, id="VAE-flow"),
    pytest.param(built.WAE, {}, id="WAE"),
]
MIXTURE = GaussianMixture([[-3.0, 1.0], [5.0, 1.0]], 0.5, [0.75, 0.25])


def make(model: type[BuiltModel], seed: int = 0, **options) -> Autoencoder:
    pl.seed_everything(seed, verbose=False)
    return model(Digits.example_shape, **{"latent_dim": 2, "learning_rate": 1e-3} | options)


def digits(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return Digits().training[torch.arange(count)]


class ZeroEncoder(nn.Module):
    """Gives every example the standard normal as its posterior."""

    def forward(self, examples):
        return torch.zeros(len(examples), 64)


def test_the_validated_codes_of_a_posterior_are_independent_of_what_measures_them():
    model = VAE(ZeroEncoder(), FC(Digits.example_shape, 32).decoder, 32)
    none = torch.full((2000,), -1)
    loader = DataLoader(TensorDataset(torch.zeros(2000, *Digits.example_shape), none, none), batch_size=100)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = trainer.validate(model, loader, verbose=False)[0]["val/jsd"]
    draws = []
    for seed in range(10):
        rng = generator(seed)
        draws.append(float(target_jsd(torch.randn(2000, 32, generator=rng), model.target, rng)))
    mean, deviation = statistics.mean(draws), statistics.stdev(draws)
    assert abs(found - mean) < 3 * deviation < 0.1


# VAE


def posterior(n: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return points(n, dim, seed=1), points(n, dim, seed=2)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_kl_and_entropy_against_torch_distributions(dim):
    mean, log_variance = posterior(9, dim)
    law = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    expected = kl_divergence(law, Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1))
    assert worst(kl_to_normal(mean, log_variance), expected) < 1e-14
    assert worst(normal_entropy(log_variance), law.entropy()) < 1e-14


@pytest.mark.parametrize("options", [{}, FLOW], ids=["normal", "flow"])
def test_the_loss_of_a_vae_is_the_negative_evidence_lower_bound(options):
    model = make(built.VAE, observation_variance=0.07, **options)
    if model.flow is not None:
        with torch.no_grad():
            for parameter in model.flow.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    batch = digits(50)
    torch.manual_seed(3)
    loss = model.training_step(batch, 0)
    torch.manual_seed(3)
    mean, log_variance = (part.double() for part in model.posterior(batch[0]))
    z = mean + (log_variance / 2).exp() * torch.randn(50, 2).double()
    q = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    if model.flow is None:
        kl = kl_divergence(q, Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1))
    else:
        kl = -q.entropy() - model.flow.double().log_prob(z)
    images_law = Independent(Normal(model.double().decoder(z), math.sqrt(0.07)), 3)
    bound = (images_law.log_prob(batch[0].double()) - kl).mean()
    constant = 32 * math.log(2 * math.pi * 0.07)  # of 64 pixels
    assert float(loss) == pytest.approx(float(2 * 0.07 / 64 * (-bound - constant)), rel=1e-5)


def test_the_kl_of_a_flow_that_is_the_identity_is_that_of_the_normal_in_the_mean():
    model = make(built.VAE, **FLOW)
    mean, log_variance = posterior(5, 2)
    z = mean + (log_variance / 2).exp() * points(20_000, 5, 2, seed=3)
    terms = -(normal_entropy(log_variance) + model.flow.double().log_prob(z.flatten(0, 1)).reshape(-1, 5))
    error = terms.std(0) / math.sqrt(len(terms))
    assert ((terms.mean(0) - kl_to_normal(mean, log_variance)).abs() < 4 * error).all()


@pytest.mark.parametrize("options", [{}, FLOW], ids=["normal", "flow"])
def test_codes_of_a_vae(options):
    model = make(built.VAE, **options)
    train(model, 3)
    model.eval()
    batch = digits(200)[0]
    mean, log_variance = model.posterior(batch)
    torch.testing.assert_close(model.reconstruct(batch), model.decoder(mean), rtol=1e-4, atol=1e-5)
    repeated = model.posterior_samples(batch[:1].expand(4000, -1, -1, -1), generator(1))
    assert torch.equal(repeated, model.posterior_samples(batch[:1].expand(4000, -1, -1, -1), generator(1)))
    z = repeated if model.flow is None else model.flow.inverse(repeated)
    assert ((z.mean(0) - mean[0]).abs() < 5 * z.std(0) / 4000**0.5).all()
    torch.testing.assert_close(z.var(0).log(), log_variance[0], rtol=0, atol=0.15)
    if model.flow is not None:
        assert not torch.allclose(model.encode(batch), mean, atol=0.01)


# WAE


def test_mmd_against_a_double_loop():
    codes, samples = points(7, 3, seed=1), 0.5 + 2 * points(5, 3, seed=2)

    def kernel(x, y):
        return sum(6 * scale / (6 * scale + float((x - y).square().sum())) for scale in SCALES)

    def mean(pairs):
        pairs = list(pairs)
        return sum(kernel(x, y) for x, y in pairs) / len(pairs)

    expected = (
        mean((x, y) for i, x in enumerate(codes) for j, y in enumerate(codes) if i != j)
        + mean((x, y) for i, x in enumerate(samples) for j, y in enumerate(samples) if i != j)
        - 2 * mean((x, y) for x in codes for y in samples)
    )
    assert float(imq_mmd(codes, samples, 6.0)) == pytest.approx(expected, rel=1e-12)
    assert float(imq_mmd(codes.float(), samples.float(), 6.0)) == pytest.approx(expected, rel=1e-5)
    codes.requires_grad_()
    assert torch.autograd.gradcheck(lambda codes: imq_mmd(codes, samples, 6.0), (codes,))


def test_mmd_is_zero_in_the_mean_for_equal_laws_and_positive_for_others():
    rng = generator(0)
    same, other = (
        torch.stack(
            [imq_mmd(torch.randn(20, 2, generator=rng) * s, torch.randn(30, 2, generator=rng), 4.0) for _ in range(400)]
        )
        for s in (1.0, 1.5)
    )
    assert abs(float(same.mean())) < 4 * float(same.std()) / 20 and (same < 0).any()
    assert float(other.mean()) > 10 * float(other.std()) / 20


def test_the_kernels_of_a_wae_have_the_width_of_its_target():
    first, second = MIXTURE.sample(100_000, generator(1)), MIXTURE.sample(100_000, generator(2))
    expected = float((first - second).square().sum(1).mean())
    assert make(built.WAE, target=MIXTURE).mean_square == pytest.approx(expected, rel=0.01)
    assert make(built.WAE).mean_square == 4


# AAE


def test_the_losses_of_an_aae_are_cross_entropies():
    model = make(built.AAE)
    codes, samples = points(30, 2, dtype=torch.float32), 2 * points(40, 2, dtype=torch.float32, seed=1)
    told = binary_cross_entropy_with_logits(model.discriminator(samples), torch.ones(40))
    fooled = binary_cross_entropy_with_logits(model.discriminator(codes), torch.zeros(30))
    torch.testing.assert_close(model.discriminator_loss(codes, samples), told + fooled)
    expected = binary_cross_entropy_with_logits(model.discriminator(codes), torch.ones(30))
    torch.testing.assert_close(model.adversarial_loss(codes), expected)


def test_each_step_of_an_aae_touches_its_own_networks_alone():
    model = make(built.AAE)
    touched, changed, backward = [], [], model.manual_backward

    def weights():
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    def recorded(loss):
        changed.append(weights())
        for parameter in model.parameters():
            parameter.grad = None
        backward(loss)
        touched.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})

    model.manual_backward = recorded
    train(model, 2)
    discriminator = {name for name, _ in model.named_parameters() if name.startswith("discriminator")}
    others = {name for name, _ in model.named_parameters()} - discriminator
    assert len(discriminator) == 8 and len(touched) == 12  # three hidden layers; two steps in each of six minibatches
    assert all(names == (others if i % 2 else discriminator) for i, names in enumerate(touched))
    changed.append(weights())
    for i, names in enumerate(touched):
        assert {name for name in changed[i] if not torch.equal(changed[i][name], changed[i + 1][name])} == names


# All of them


def test_a_minibatch_is_one_step_of_every_model():
    for model in (built.AAE, built.AE):
        run = train(make(model), 2)
        assert run.global_step == 6 == run.estimated_stepping_batches


@pytest.mark.parametrize(("model", "options"), MODELS)
def test_training_lowers_the_error_and_the_divergence(model, options):
    data = Digits()
    trained = make(model, **options)
    before = encode_set(trained, data.held_out)
    run = train(trained, 15, data=data)
    after = encode_set(trained, data.held_out)
    assert after.reconstruction_error < 0.55 * before.reconstruction_error
    assert float(run.callback_metrics["val/reconstruction"]) == pytest.approx(after.reconstruction_error, rel=1e-3)
    assert all(math.isfinite(value) for value in run.callback_metrics.values())
    assert {"loss/reconstruction", "val/reconstruction", "val/jsd"} <= set(run.callback_metrics)
    assert ("loss/latent" in run.callback_metrics) == (model is not built.AE)
    assert ("loss/discriminator" in run.callback_metrics) == (model is built.AAE)

    first, last = (code_measures(trained, encoded, training=False) for encoded in (before, after))
    assert "gradient_weight" not in last and last["reconstruction_error"] == after.reconstruction_error
    assert ("posterior" in last) == (model is built.VAE)
    if model is built.VAE:
        first, last = first["posterior"], last["posterior"]
    assert float(run.callback_metrics["val/jsd"]) == pytest.approx(last["jsd"], abs=0.05)
    if model is not built.AE:
        assert last["jsd"] < 0.12
        assert model is built.VAE or last["jsd"] < 0.5 * first["jsd"]  # a VAE's samples begin at its prior
        assert max(abs(variance - 1) for variance in last["variance"]) < 0.5


def test_the_divergence_depends_on_codes_and_target_alone():
    codes = points(300, 2, dtype=torch.float32) + 0.5
    for target in (StandardNormal(2), MIXTURE):
        expected = LaggedKDE(300, 2, None, target).jsd(codes, generator(1))
        assert torch.equal(target_jsd(codes, target, generator(1)), expected)
        assert torch.equal(make(built.AE, target=target).jsd(codes, generator(1)), expected)
    law = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)  # which cannot be smoothed
    close = target_jsd(law.sample((300,)), law, generator(1))
    assert 0 < float(close) < 0.1 < float(target_jsd(codes + 1, law, generator(1)))


def test_a_trained_gen_reports_the_matched_divergence_too():
    model = make(built.GEN, num_lagged=200, bandwidth=0.9)
    train(model, 1)
    encoded = encode_set(model, Digits().held_out)
    measures = code_measures(model, encoded, training=False)
    assert encoded.posterior is None and "gradient_weight" in measures
    rng = generator(5)
    expected = [float(target_jsd(encoded.codes, model.target, rng)) for _ in range(20)]
    assert min(expected) - 0.02 < measures["matched_jsd"] < max(expected) + 0.02
    assert measures["jsd"] < min(expected)  # at a bandwidth of 0.9 everything looks alike


@pytest.mark.parametrize(("model", "options"), MODELS)
def test_same_seed_same_weights_and_another_seed_others(model, options):
    first, second, third = (make(model, seed, **options) for seed in (0, 0, 1))
    pl.seed_everything(7, verbose=False)
    train(first, 1)
    pl.seed_everything(7, verbose=False)
    train(second, 1)
    assert_same_state(first, second)
    assert not torch.equal(first.decoder[0].weight, third.decoder[0].weight)


@pytest.mark.parametrize(("model", "options"), MODELS)
def test_encode_decode_sample_and_checkpoint(tmp_path, model, options):
    made = make(model, **options)
    train(made, 1).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    restored = model.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same_state(restored, made)
    assert restored.settings() == made.settings() and made.settings()["name"] == model.__name__
    made.eval()
    batch = torch.rand(7, 1, 8, 8)
    codes = made(batch)
    assert codes.shape == (7, 2)
    torch.testing.assert_close(made.reconstruct(batch), made.decode(codes))
    samples = made.train().sample(3, generator(1))
    assert made.training and samples.shape == (3, 1, 8, 8)
    with torch.no_grad():
        expected = made.eval().decode(StandardNormal(2).sample(3, generator(1)))
    torch.testing.assert_close(samples, expected)


@pytest.mark.parametrize("model", [built.AE, built.AAE, built.WAE])
def test_a_mixture_as_the_target_and_normalised_codes(model):
    made = make(model, target=MIXTURE, normalize_codes=True)
    train(made, 1)
    codes = made.train().encode(digits(100)[0])
    torch.testing.assert_close(codes.mean(0), torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(codes.var(0), torch.tensor([12.25, 0.25]), rtol=0.02, atol=0)
    torch.testing.assert_close(made.expected_variance.float(), torch.tensor([12.25, 0.25]))
    drawn = made.target_samples(20_000, generator(1))
    assert float((drawn[:, 0] < 1).float().mean()) == pytest.approx(0.75, abs=0.02)
    assert make(model).norm(codes) is codes  # without being asked nothing is normalised


def test_a_model_of_ones_own_takes_the_form_for_images():
    class Halved(AE):
        def encode(self, images):
            return super().encode(images) / 2

    model = make(with_built_networks(Halved))
    assert type(model) is Halved and issubclass(with_built_networks(Halved), BuiltModel)

    class Derived(with_built_networks(Halved)):
        pass

    assert type(make(Derived)) is Derived  # of which the command knows the name
    with pytest.raises(TypeError, match="model must take its networks as arguments, got Derived, which builds them"):
        with_built_networks(Derived)
    assert model.encode(torch.rand(4, 1, 8, 8)).shape == (4, 2)


def networks(width: int = 2) -> tuple[nn.Module, nn.Module]:
    return FC((1, 8, 8), width).encoder, FC((1, 8, 8), 2).decoder


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: AAE(*networks(), 2, weight=-1.0), r"weight must be at least 0 and finite, got -1\.0"),
        (lambda: WAE(*networks(), 2, weight=-1.0), r"weight must be at least 0 and finite, got -1\.0"),
        (lambda: AAE(*networks(), 2, discriminator_hidden=()), "discriminator_hidden must have one width"),
        (
            lambda: AE(*networks(), 2, target=StandardNormal(3)),
            "target must have 2 dimensions, as latent_dim has, got 3",
        ),
        (lambda: VAE(*networks(4), 2, observation_variance=0.0), r"observation_variance must be positive .*, got 0\.0"),
        (lambda: VAE(*networks(4), 2, prior="mixture"), 'prior must be "normal" or "flow", got \'mixture\''),
        (lambda: VAE(*networks(2), 2, prior="flow", flow_layers=0), "layers must be at least 1, got 0"),
        (
            lambda: VAE(*networks(2), 2).encode(torch.zeros(3, 1, 8, 8)),
            r"return \[3, 2 x latent_dim = 4\], got \[3, 2\]",
        ),
        (
            lambda: AE(*networks(3), 2).encode(torch.zeros(3, 1, 8, 8)),
            r"must return \[3, latent_dim = 2\], got \[3, 3\]",
        ),
        (lambda: train(AE(networks()[0], nn.Identity(), 2), 1), "decoder must return the shape of the examples"),
        (lambda: imq_mmd(torch.zeros(1, 2), torch.zeros(5, 2), 4.0), "codes and samples must be at least 2 .* 1 and 5"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_batches_without_indices_are_refused():
    with pytest.raises(TypeError, match=r"must be \(examples, labels, indices in the training set\), got 2 parts"):
        make(built.AAE).training_step((torch.zeros(2, 1, 8, 8), torch.zeros(2)), 0)


@pytest.mark.parametrize("kind", ["images", "of a tuple", "data"])
def test_predictions_are_codes_and_reconstructions_by_name(kind):
    model = make(built.VAE)
    data = Digits()
    pixels = data.held_out.examples
    loaders = {"images": pixels, "of a tuple": torch.utils.data.TensorDataset(pixels)}
    loader = data if kind == "data" else torch.utils.data.DataLoader(loaders[kind], batch_size=100)
    run = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    found = run.predict(model, loader)
    assert all(part.keys() == {"codes", "reconstructions"} for part in found)
    with torch.no_grad():
        codes, reconstructions = model.eval().encode(pixels), model.reconstruct(pixels)
    torch.testing.assert_close(torch.cat([part["codes"] for part in found]), codes)
    torch.testing.assert_close(torch.cat([part["reconstructions"] for part in found]), reconstructions)
    if kind == "data":
        again = run.predict(model, data.val_dataloader())
        assert torch.equal(again[0]["codes"], found[0]["codes"])


def test_a_gan_predicts_from_latents():
    model = make(built.GAN)
    latents = torch.randn(5, 2)
    assert torch.equal(model.predict_step([latents], 0)["samples"], model.decode(latents))
    with pytest.raises(ValueError, match=r"latents must have shape \[n, latent_dim = 2\], got \[3, 1, 8, 8\]"):
        model.predict_step(torch.zeros(3, 1, 8, 8), 0)
    with pytest.raises(TypeError, match="a batch to predict from must be a tensor or begin with one, got dict"):
        model.predict_step({"latents": latents}, 0)


def test_a_model_samples_in_its_own_precision():
    model = make(built.AE).double()
    assert model.sample(3).dtype == torch.float64
    data = Digits(train_size=300)
    encoded = encode_set(model, data.training)
    single = encode_set(model.float(), data.training)
    assert encoded.codes.dtype == torch.float64 and worst(encoded.codes, single.codes) < 1e-5


# Logging


SILENT = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Course(pl.Callback):
    """The figures that callbacks see after each step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[dict[str, float]] = []
        self.stop_after = stop_after

    def on_train_batch_end(self, trainer, *_):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        trainer.should_stop = trainer.global_step == self.stop_after


class Written(Logger):
    """Keeps what a trainer writes for each step."""

    name, version = "", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_):
        pass


def course(model: BuiltModel, every: int, *, stop_after: int | None = None, **limits):
    """Trains with six minibatches in an epoch: what callbacks see, what is written, and the trainer."""
    watch, written = Course(stop_after), Written()
    run = pl.Trainer(accelerator="cpu", callbacks=[watch], logger=written, log_every_n_steps=every, **SILENT, **limits)
    run.fit(model, datamodule=Digits(train_size=600))
    return watch, written, run


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (built.AAE, {}),
        (built.GAN, {"discriminator_steps": 2}),
        (built.GEN, {"num_lagged": 100, "bandwidth": 0.5}),
        (built.LCVAE, {}),
        (built.VAE, {}),
        (built.WAE, {}),
    ],
)
def test_terms_are_logged_in_the_steps_that_are_written(model, options):
    """As by a trainer that writes every step; in the last steps of epochs too, and after the last of the run."""
    every, _, _ = course(make(model, **options), 1, max_steps=15)
    seen, written, run = course(make(model, **options), 4, max_steps=15)
    names = [name for name in every.seen[-1] if name.startswith(("loss/", "train/")) and "time_share" not in name]
    assert len(names) >= 2
    for step in range(1, 16):
        shown = max(due for due in (1, 4, 6, 8, 12) if due <= step)
        for name in names:
            assert seen.seen[step - 1].get(name) == every.seen[shown - 1].get(name), (step, name)
    assert all(float(run.callback_metrics[name]) == every.seen[-1][name] for name in names)
    steps = [step + 1 for step, metrics in written.steps.items() if names[0] in metrics]
    assert steps == [4, 8, 12, 15]
    for name in names:
        assert written.steps[7][name] == pytest.approx(every.seen[7][name], rel=1e-6)
        assert written.steps[14][name] == pytest.approx(every.seen[14][name], rel=1e-6)


def test_the_terms_of_the_step_that_a_callback_stops_after_are_logged():
    every, _, _ = course(make(built.VAE), 1, stop_after=3, max_epochs=5, min_epochs=0)
    seen, _, run = course(make(built.VAE), 50, stop_after=3, max_epochs=5, min_epochs=0)
    assert run.global_step == 3 and seen.seen[-1] == every.seen[0] != every.seen[-1]
    assert {name: float(run.callback_metrics[name]) for name in every.seen[-1]} == every.seen[-1]


def test_the_terms_of_the_step_that_a_validation_stops_after_are_logged():
    limits = {"val_check_interval": 2, "max_epochs": 5, "min_epochs": 0}
    found = []
    for every in (1, 50):
        stop = EarlyStopping("val/jsd", patience=1, min_delta=9)
        run = pl.Trainer(accelerator="cpu", logger=False, callbacks=[stop], log_every_n_steps=every, **limits, **SILENT)
        run.fit(make(built.VAE), datamodule=Digits(train_size=600))
        assert run.global_step == 4  # at the second validation of the first epoch
        found.append(run.callback_metrics)
    assert found[0] == found[1]


def test_a_model_is_copied_and_pickled_within_a_run():
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, model, *_):
            assert_same_state(copy.deepcopy(model), model)
            assert_same_state(pickle.loads(pickle.dumps(model)), model)

    train(make(built.GEN, num_lagged=100, bandwidth=0.5, refresh="tracked"), 1, Copies())


def test_terms_given_as_functions_are_computed_where_they_are_logged():
    computed = []

    class Counting(built.AE):
        def training_step(self, batch, batch_idx):
            step = self.trainer.global_step
            self.log_terms({"loss/twice": lambda: computed.append(step) or torch.tensor(2.0 * step)})
            return super().training_step(batch, batch_idx)

    seen, _, _ = course(make(Counting), 4, max_steps=9)
    assert computed == [0, 3, 5, 7, 8]
    assert [figures["loss/twice"] for figures in seen.seen] == [0, 0, 0, 6, 6, 10, 10, 14, 14]


def test_an_error_names_terms_that_were_not_logged():
    class Spoiled(built.VAE):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.trainer.global_step == 2 else loss

    with pytest.raises(FloatingPointError, match=r"after 2 steps\): loss/reconstruction is 0\.\d+, loss/latent is \d"):
        course(make(Spoiled), 50, max_steps=5)


# torch.compile


class Graphs(pl.Callback):
    """A backend of torch.compile that counts how often graphs run in a step."""

    def __init__(self) -> None:
        self.of_step = 0

    def __call__(self, graph, inputs):
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def run(*args):
            self.of_step += 1
            return compiled(*args)

        return run

    def on_train_batch_start(self, *_):
        self.of_step = 0


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (built.GAN, {"objective": "wgan-gp"}),
        (built.GEN, {"num_lagged": 100, "bandwidth": 0.5, "refresh": "tracked"}),
        (built.LCVAE, {"constraint": "spectral"}),
    ],
)
def test_a_compiled_model_is_trained_as_it_is(model, options):
    torch._dynamo.reset()
    trained = []
    for compiled in (False, True):
        trained.append(make(model, **options))
        graphs, limits = Graphs(), {"max_steps": 12, "limit_val_batches": 0}
        run = pl.Trainer(accelerator="cpu", precision="64-true", callbacks=[graphs], logger=False, **limits, **SILENT)
        run.fit(torch.compile(trained[-1], backend=graphs) if compiled else trained[-1], Digits(train_size=600))
        assert (graphs.of_step > 0) == compiled
    torch.testing.assert_close(*(each.state_dict() for each in trained), rtol=1e-6, atol=1e-6)
