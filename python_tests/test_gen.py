"""GEN: refresh, training, repeatability, checkpoints."""

import copy
import functools
import json
import pickle
from itertools import chain

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from kdejsd import GaussianMixture, LaggedKDE
from kdejsd._modes import evaluating
from kdejsd.data import Digits
from kdejsd.divergence import DIVERGENCES
from kdejsd.models import FC, GEN, Conv, built
from kdejsd.models.autoencoder import CodeNorm
from kdejsd.models.stopwatch import Stopwatch
from kdejsd.runs.measuring import code_measures, encode_set

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU available but not used"
)


def make(seed: int = 0, **options) -> built.GEN:
    pl.seed_everything(seed, verbose=False)
    settings = {"latent_dim": 2, "num_lagged": 200, "bandwidth": 0.4, "learning_rate": 1e-3} | options
    return built.GEN(Digits.example_shape, **settings)


def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )


def train(model: GEN, epochs: int, *callbacks: pl.Callback, ckpt_path=None, data=None) -> pl.Trainer:
    run = trainer(epochs, *callbacks)
    run.fit(model, datamodule=data or Digits(train_size=300), ckpt_path=ckpt_path)
    return run


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


class Recorder(pl.Callback):
    """The indices of every batch, and the numbers of the batches that refreshed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.refreshed: list[int] = []

    def on_train_start(self, trainer, model):
        refresh = model.refresh

        def recorded():
            self.refreshed.append(len(self.batches) - 1)
            refresh()

        model.refresh = recorded

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.batches.append(batch[2].tolist())


def test_refresh_is_in_evaluation_mode_and_leaves_the_modes_as_they_were():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return x

    networks = FC(Digits.example_shape, 2)
    encoder = nn.Sequential(Spy(), nn.Dropout(0.5), networks.encoder)
    model = GEN(encoder, networks.decoder, 2, num_lagged=200, bandwidth=0.4)
    train(model, 1)
    model.train()
    encoder[1].eval()  # a part that the user has frozen stays so
    seen.clear()
    model.refresh()
    assert seen and not any(seen)
    assert encoder.training and encoder[0].training and not encoder[1].training and model.norm.training
    model.eval()
    expected = model.encode(Digits(train_size=300).training[model.lagged.indices][0])
    torch.testing.assert_close(model.lagged.codes, expected.detach())
    assert not model.lagged.codes.requires_grad


def test_refresh_schedule_and_batches():
    recorder = Recorder()
    train(make(refresh_every=2), 2, recorder, data=Digits(train_size=500))
    assert recorder.refreshed == [0, 2, 4, 4, 5, 7, 9, 9]  # anew in every epoch, and before it is measured
    first, second = (sorted(chain(*recorder.batches[i : i + 5])) for i in (0, 5))
    assert first == second == list(range(500))
    assert recorder.batches[:5] != recorder.batches[5:]


def test_rolling_refresh_leaves_no_code_older_than_its_period():
    class Recorded(pl.Callback):
        def on_train_start(self, trainer, model):
            self.parts, update = [], model.lagged.update

            def recorded(codes, start):
                self.parts.append((trainer.global_step, start, start + len(codes)))
                update(codes, start)

            model.lagged.update = recorded

    recorded = Recorded()
    model = make(refresh="rolling", refresh_every=3)
    train(model, 4, recorded)  # 12 steps
    for first in range(10):
        codes = torch.zeros(200)
        for step, start, end in recorded.parts:
            if first <= step < first + 3:
                codes[start:end] += 1
        assert (codes == 1).all()


@pytest.mark.parametrize(("kind", "of_mean", "of_variance"), [(built.GEN, 1e-5, 0.02), (built.StochasticGEN, 0.4, 0.4)])
def test_rolling_refresh_normalises_a_part_by_its_own_mean_and_variance(kind, of_mean, of_variance):
    pl.seed_everything(0, verbose=False)
    model = kind(Digits.example_shape, 2, num_lagged=200, bandwidth=0.4, refresh="rolling", refresh_every=3)
    train(model, 1)
    model.norm.running_mean += 5  # as it is where the encoder has moved on
    model.norm.running_var *= 9
    model._training_set = Digits(train_size=300).training
    before, running = model.lagged.codes.clone(), model.norm.running_mean.clone()
    model._refresh_part(1)
    assert torch.equal(model.norm.running_mean, running)  # by which codes are normalised at evaluation
    part = model.lagged.codes[66:133]
    assert torch.equal(before[:66], model.lagged.codes[:66]) and torch.equal(before[133:], model.lagged.codes[133:])
    torch.testing.assert_close(part.mean(0), torch.zeros(2), atol=of_mean, rtol=0)
    torch.testing.assert_close(part.var(0), torch.ones(2), atol=of_variance, rtol=0)


def test_a_small_part_is_normalised_as_the_minibatches_were():
    model = make(num_lagged=89, refresh="rolling", refresh_every=3)  # 29 or 30 codes
    train(model, 1)
    model.norm.running_mean += 5
    model._training_set = Digits(train_size=300).training
    model._refresh_part(1)
    assert model.lagged.codes[29:59].mean() < -2


def test_the_parts_of_a_rolling_refresh_are_drawn_from_all_of_the_training_set():
    model = make(refresh="rolling", refresh_every=4)
    train(model, 1)
    for part in model.lagged.indices.split(50):  # of 300, whose files may be in the order of their classes
        assert part.min() < 75 and part.max() > 225


@pytest.mark.parametrize("refresh", ["queue", "tracked"])
def test_the_queue_holds_the_last_examples_and_refreshes_once(refresh):
    recorder = Recorder()
    model = make(refresh=refresh)
    train(model, 4, recorder)
    assert recorder.refreshed == [-1]  # to begin with
    seen = list(chain(*recorder.batches))
    assert sorted(model.lagged.indices.tolist()) == sorted(seen[-200:])
    assert model._kept_examples is None and model._training_set is None


def staleness(refresh: str, **options) -> float:
    """Mean squared distance of the lagged codes from those of the encoder now, all normalised, over the last epoch."""

    class Distances(pl.Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_end(self, trainer, model, *_):
            if trainer.current_epoch == 9:
                with torch.no_grad(), evaluating(model.encoder):
                    fresh = model.encoder(data.training[model.lagged.indices][0])
                fresh, codes = ((x - x.mean(0)) / x.std(0) for x in (fresh, model.lagged.codes))
                self.found.append(float((codes - fresh).square().mean()))

    data, distances = Digits(train_size=1000), Distances()
    model = make(refresh=refresh, latent_dim=4, decay=False, **options)
    train(model, 10, distances, data=data)
    return float(np.mean(distances.found))


@pytest.mark.parametrize(("m", "share"), [(100, 1.2), (200, 1.2), (800, 0.4)])
def test_tracked_codes_stay_near_those_of_the_encoder(m, share):
    """No worse than a queue if all codes are of the last few steps, and far better if they are not."""
    tracked, queue = (staleness(refresh, num_lagged=m) for refresh in ("tracked", "queue"))
    assert tracked < share * queue


def test_tracked_codes_move_every_five_steps_and_only_with_a_step(monkeypatch):
    moves = []
    follow = LaggedKDE.follow
    monkeypatch.setattr(LaggedKDE, "follow", lambda self, *pairs: (moves.append(pairs), follow(self, *pairs)))
    model = make(refresh="tracked", network=Small)
    pl.Trainer(
        max_epochs=6,
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, datamodule=Digits(train_size=600))
    assert len(moves) == 2  # of 12 steps, after the sixth and the eleventh; of the first it only takes the codes
    for before, after, pushed in moves:
        assert pushed == [100] * 15
        assert before.dtype == torch.float32 and before.shape == (12, 2)
        assert 0 < (after - before).abs().max() < 1


@pytest.mark.parametrize(("data", "known"), [("same", True), ("other examples", False), ("indices not known", False)])
def test_a_run_goes_on_with_the_examples_that_it_followed_or_with_none(tmp_path, data, known):
    examples, labels, indices = Digits().training[torch.arange(300)]
    if data == "indices not known":
        indices = torch.full_like(indices, -1)

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if trainer.global_step == 3:
                found.append(copy.deepcopy(model._followed))

    def run(steps: int, examples: torch.Tensor, ckpt_path=None) -> pl.Trainer:
        silent = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, callbacks=[Start()], **silent)
        items = torch.utils.data.TensorDataset(examples, labels, indices)
        model = make(refresh="tracked", decay=False)
        trainer.fit(model, torch.utils.data.DataLoader(items, batch_size=100), ckpt_path=ckpt_path)
        assert model.lagged.codes.isfinite().all()
        return trainer

    found = []
    run(3, examples).save_checkpoint(tmp_path / "3.ckpt")
    run(12, 1 - examples if data == "other examples" else examples, tmp_path / "3.ckpt")
    assert [followed is not None for followed in found] == [known]
    if known:
        assert torch.equal(found[0].examples, examples[found[0].indices]) and found[0].pushed == [100, 100]


def test_tracked_codes_keep_the_mean_and_scale_of_the_target():
    target = GaussianMixture(torch.tensor([[9.0, -3.0], [13.0, -3.0]]), 0.5)
    model = make(refresh="tracked", target=target)
    train(model, 6)
    assert (model.lagged.codes.mean(0) - torch.tensor([11.0, -3.0])).abs().max() < 1e-3
    assert (model.lagged.codes.var(0) / torch.tensor([4.25, 0.25]) - 1).abs().max() < 0.01


def test_codes_are_given_the_mean_and_variance_that_normalised_ones_have():
    target = GaussianMixture(torch.tensor([[9.0, -3.0, 0.0], [13.0, -3.0, 0.0]]), 0.5)
    norm = CodeNorm(target, 3)
    torch.manual_seed(0)
    raw = torch.randn(40_000, 3) * torch.tensor([7.0, 1e-3, 0.0]) + 2
    norm.calibrate(raw.split(999))
    expected = norm.eval()(raw)
    codes = 3 * expected - 5
    for _ in range(20):
        norm.renormalize(codes)
    torch.testing.assert_close(codes[:, :2], expected[:, :2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(codes[:, 2], expected[:, 2])  # all the same, whose rounding does not grow
    assert expected[:, 1].var() < 0.1 * 0.25  # so small a variance is not brought to the target's


def test_tracked_codes_have_to_be_in_float32():
    with pytest.raises(ValueError, match='lagged_dtype must be "float32" for refresh "tracked", got "bfloat16"'):
        make(refresh="tracked", lagged_dtype="bfloat16")
    with pytest.raises(ValueError, match='refresh must be "full", "rolling", "queue" or "tracked", got \'both\''):
        make(refresh="both")
    with pytest.raises(ValueError, match=r"needs a model in float32 or float64, got torch\.bfloat16: take .queue."):
        train(make(refresh="tracked").to(torch.bfloat16), 1)


@pytest.mark.parametrize("decay", [True, False])
def test_the_learning_rate_falls_to_zero_along_a_half_cosine(decay):
    class Rates(pl.Callback):
        def __init__(self):
            self.rates = []

        def on_before_optimizer_step(self, trainer, model, optimizer):
            self.rates.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    train(make(decay=decay, learning_rate=0.01), 4, rates)  # 12 steps
    progress = torch.arange(12, dtype=torch.float64) / 12
    expected = 0.005 * (1 + torch.cos(torch.pi * progress)) if decay else torch.full_like(progress, 0.01)
    torch.testing.assert_close(torch.tensor(rates.rates, dtype=torch.float64), expected)


def test_the_encoder_does_not_see_all_pixels_of_a_minibatch():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = {True: [], False: []}

        def forward(self, x):
            self.seen[self.training].append((float(x.gt(0).float().mean()), float(x.mean())))
            return x

    spy, networks = Spy(), FC(Digits.example_shape, 2)
    encoder = nn.Sequential(spy, networks.encoder)
    train(GEN(encoder, networks.decoder, 2, num_lagged=300, bandwidth=0.4, input_dropout=0.4), 2)
    (lit, mean), (all_lit, all_mean) = (torch.tensor(spy.seen[mode]).mean(0).tolist() for mode in (True, False))
    assert lit == pytest.approx(0.6 * all_lit, rel=0.03)
    assert mean == pytest.approx(all_mean, rel=0.03)  # the others are scaled up


def test_lagged_examples_are_drawn_once_and_all_differ():
    model = make()
    train(model, 1)
    indices = model.lagged.indices.clone()
    assert len(indices.unique()) == 200 and int(indices.min()) >= 0 and int(indices.max()) < 300
    train(model, 1)
    assert torch.equal(model.lagged.indices, indices)


def test_training_lowers_error_and_divergence_on_held_out_digits():
    data = Digits()
    model = make(latent_dim=2, num_lagged=1000, bandwidth=0.39)

    def jsd(codes):
        return float(model.lagged.jsd(codes, torch.Generator().manual_seed(0)))

    before = encode_set(model, data.held_out)
    train(model, 15, data=data)
    after = encode_set(model, data.held_out)
    measures = code_measures(model, after, training=False)
    assert after.reconstruction_error < 0.4 * before.reconstruction_error
    assert jsd(after.codes) < 0.25 * jsd(before.codes)
    assert abs(measures["jsd_of_target"]) < 0.02 and abs(measures["jsd"]) < 0.15  # of few codes: either may be less
    assert 0.3 < measures["gradient_weight"] < 0.6


def test_same_seed_same_weights_and_another_seed_others():
    models = []
    for seed in (0, 0, 1):
        models.append(make(seed))
        train(models[-1], 2)
    assert_same_state(models[0], models[1])
    assert not torch.equal(models[0].lagged.codes, models[2].lagged.codes)


class DropoutFC(FC):
    """Uses the random state in training."""

    def __init__(self, example_shape, latent_dim):
        super().__init__(example_shape, latent_dim, hidden=(32,))
        self.encoder.insert(1, nn.Dropout(0.1))


def test_resumed_at_an_epochs_end_equals_uninterrupted(tmp_path):
    # A run that was to end after two epochs has come to the learning rate 0 by then, unless that stays as it is.
    whole, half, resumed = (make(network=DropoutFC, decay=False) for _ in range(3))
    pl.seed_everything(5, verbose=False)
    train(whole, 4)
    pl.seed_everything(5, verbose=False)
    train(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    pl.seed_everything(99, verbose=False)
    train(resumed, 4, ckpt_path=tmp_path / "half.ckpt")
    assert_same_state(resumed, whole)


class StopAt(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, model, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("step", "refresh", "storage"),
    [
        (7, "full", {"lagged_dtype": "bfloat16"}),
        (7, "queue", {"lagged_dtype": "bfloat16", "lagged_device": "cpu"}),
        (7, "rolling", {"lagged_dtype": "bfloat16", "keep_examples": False}),
    ],
)
def test_a_frugal_run_learns_and_resumes_bit_for_bit(tmp_path, step, refresh, storage):
    def data():
        return Digits(train_size=500)

    options = {"refresh": refresh, "refresh_every": 3} | storage
    whole, part, resumed, roomy = (make(**o) for o in (options, options, options, {"refresh": refresh}))
    before = encode_set(whole, data().held_out).reconstruction_error
    pl.seed_everything(5, verbose=False)
    train(whole, 3, data=data())
    assert encode_set(whole, data().held_out).reconstruction_error < 0.8 * before
    pl.seed_everything(5, verbose=False)
    train(part, 3, StopAt(step, tmp_path / "part.ckpt"), data=data())
    train(resumed, 3, ckpt_path=tmp_path / "part.ckpt", data=data())
    assert_same_state(resumed, whole)
    assert whole.lagged.codes.dtype == torch.bfloat16
    assert whole.settings()["lagged_dtype"] == "bfloat16" and roomy.settings()["lagged_device"] == "module"


@pytest.mark.parametrize("refresh", ["full", "rolling"])
@pytest.mark.parametrize("by_batches", [True, False])
def test_images_that_are_read_again_train_as_images_that_are_kept(refresh, by_batches):
    models = []
    for keep_examples in (True, False):
        model = make(refresh=refresh, refresh_every=3, keep_examples=keep_examples)
        pl.seed_everything(5, verbose=False)
        if by_batches:
            train(model, 2)
        else:
            items = torch.utils.data.Subset(Digits(train_size=300).training, range(300))
            order = torch.Generator().manual_seed(0)
            trainer(2).fit(model, torch.utils.data.DataLoader(items, 100, shuffle=True, generator=order))
        assert (model._kept_examples is not None) == keep_examples
        models.append(model)
    assert_same_state(*models)


def test_a_second_fit_keeps_the_images_of_its_own_training_set():
    model = make()
    for seed in (0, 1):
        data = Digits(train_size=300, seed=seed)
        train(model, 1, data=data)
        assert torch.equal(model._kept_examples, data.training[model.lagged.indices][0])


def test_calibration_by_parts_is_that_by_the_whole():
    codes = 3 + torch.randn(38, 2, generator=torch.Generator().manual_seed(0))
    norm = make().norm
    for parts in ([codes], codes.split([7, 1, 30])):
        norm.calibrate(iter(parts))
        torch.testing.assert_close(norm.running_mean, codes.mean(0))
        torch.testing.assert_close(norm.running_var, codes.var(0))


def test_the_running_statistics_are_those_of_the_codes_before_they_are_rounded():
    model = make(lagged_dtype="bfloat16", latent_dim=3)
    train(model, 1)
    model.refresh()
    images = Digits(train_size=300).training[model.lagged.indices][0]
    with torch.no_grad():
        encoded = model.eval().encoder(images)
        torch.testing.assert_close(model.norm.running_mean, encoded.mean(0))
        torch.testing.assert_close(model.norm.running_var, encoded.var(0))
        assert torch.equal(model.lagged.codes, model.encode(images).bfloat16())


def test_checkpoint_holds_plain_values_and_restores_the_model(tmp_path):
    model = make()
    train(model, 1).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["lagged.codes"].shape == (200, 2)
    restored = built.GEN.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_same_state(restored, model)
    own = GEN(
        *(getattr(FC(Digits.example_shape, 2), part) for part in ("encoder", "decoder")), latent_dim=2, bandwidth=0.4
    )
    assert "encoder" not in own.hparams


MODELS = ["AAE", "AE", "GAN", "GEN", "LCVAE", "SemiSupervisedGEN", "StochasticGEN", "VAE", "WAE"]
Small = functools.partial(FC, hidden=(16,))
MIXTURE = GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.5)


def model_of(kind: str, bandwidth: float = 0.4, **options) -> pl.LightningModule:
    if "GEN" in kind:
        options = {"num_lagged": 100, "bandwidth": bandwidth} | options
    if kind == "SemiSupervisedGEN":
        options["target"] = MIXTURE
    return getattr(built, kind)(Digits.example_shape, 2, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_the_state_of_every_model_is_tensors_of_their_own(tmp_path, kind):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, other = model_of(kind), model_of(kind, 0.5)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert_same_state(other, model)


@pytest.mark.parametrize("kind", ["GEN", "StochasticGEN", "SemiSupervisedGEN", "WAE"])
def test_a_model_is_built_on_the_meta_device_and_loaded(kind):
    model = model_of(kind)
    with torch.device("meta"):
        other = model_of(kind)
    other.load_state_dict(model.state_dict(), assign=True)
    assert not [name for name, t in chain(other.named_parameters(), other.named_buffers()) if t.is_meta]
    batch = torch.rand(9, 1, 8, 8)
    assert torch.equal(other.eval().encode(batch), model.eval().encode(batch))
    empty = model_of(kind).to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.eval().encode(batch), model.encode(batch))


@pytest.mark.parametrize(("kind", "refresh"), [("GEN", "queue"), ("GEN", "tracked"), ("StochasticGEN", "full")])
def test_a_trained_model_is_copied_and_keeps_no_graph(kind, refresh):
    model = model_of(kind, refresh=refresh, network=Small)
    train(model, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_state(other, model)
        assert other.run_measures() == model.run_measures()
    parts = [value for value in vars(model).values() if not isinstance(value, dict)]
    tensors = chain.from_iterable(part if isinstance(part, tuple) else [part] for part in parts)
    assert not [t for t in tensors if isinstance(t, torch.Tensor) and t.grad_fn is not None]


@pytest.mark.parametrize("refresh", ["full", "rolling", "queue", "tracked"])
def test_an_averaged_model_ends_with_codes_of_its_examples(tmp_path, refresh):
    """Also in its checkpoints, from which it goes on."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                self.codes, self.indices = model.lagged.codes.clone(), model.lagged.indices

    def averaged(**options):
        model = make(refresh=refresh, refresh_every=3, network=Small)
        train(model, 3, EMAWeightAveraging(decay=0.9), save, **options)
        return model

    save = Save()
    model = averaged()
    saved = make(refresh=refresh, network=Small)
    saved.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    if refresh in ("queue", "tracked"):
        assert torch.equal(saved.lagged.codes, save.codes) and torch.equal(saved.lagged.indices, save.indices)
    for found in (model, saved):
        indices = found.lagged.indices
        assert found.lagged.refreshed and int(indices.min()) >= 0 and int(indices.max()) < 300
        codes = found.eval().encode(Digits(train_size=300).training[indices][0]).detach()
        assert (codes - found.lagged.codes).norm(dim=1).mean() < 0.5 * torch.pdist(codes).mean()
    if refresh not in ("queue", "tracked"):  # which are encoded anew at the end
        assert_same_state(averaged(ckpt_path=tmp_path / "a.ckpt"), model)


def test_numbers_of_numpy_reach_no_checkpoint(tmp_path):
    rate = np.logspace(-3, -1, 3)[0]
    numbers = {"latent_dim": np.int64(2), "num_lagged": np.int64(200), "bandwidth": np.float64(0.4)}
    numbers |= {"learning_rate": rate, "weight": np.float32(0.5), "betas": np.array([0.5, 0.999]).tolist()}
    numbers |= {"refresh_every": np.int32(3), "input_dropout": torch.tensor(0.125)}
    model = make(**numbers, network=Small)
    train(model, 1).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    found = checkpoint["hyper_parameters"]
    assert found | {"latent_dim": 2, "refresh_every": 3, "learning_rate": 1e-3, "input_dropout": 0.125} == found
    assert {type(found[name]) for name in ("latent_dim", "num_lagged", "refresh_every")} == {int}
    assert {type(value) for value in model.settings().values()} <= {int, float, bool, str}
    assert_same_state(built.GEN.load_from_checkpoint(tmp_path / "a.ckpt", network=Small), model)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("AAE", {"weight": 0.5}),
        ("GAN", {"packing": 2, "discriminator_steps": 3}),
        ("GEN", {"weight": 0.5}),
        ("LCVAE", {"omega_weight": 3.0, "clip": 0.25}),
        ("VAE", {"observation_variance": 0.25}),
        ("WAE", {"weight": 0.5}),
    ],
)
def test_numbers_of_numpy_are_plain_in_reports(kind, numbers):
    model = model_of(kind, **{name: np.asarray(value)[()] for name, value in numbers.items()})
    assert json.loads(json.dumps(model.settings())) == model_of(kind, **numbers).settings()
    assert {name: type(model.hparams[name]) for name in numbers} == {name: type(v) for name, v in numbers.items()}


def test_what_no_checkpoint_can_hold_is_refused_or_left_out():
    with pytest.raises(TypeError, match=r"betas must be a plain value.*got ndarray of shape"):
        make(betas=np.array([0.5, 0.999]))

    class Own(built.GEN):
        def __init__(self, example_shape, judge, **kwargs):
            super().__init__(example_shape, **kwargs)

    model = Own(Digits.example_shape, nn.Linear(2, 2), num_lagged=200, bandwidth=0.4, target=MIXTURE)
    assert not {"judge", "target", "network"} & model.hparams.keys() and model.hparams["num_lagged"] == 200


def test_codes_are_normalised_to_the_mean_and_variance_of_the_target():
    target = GaussianMixture([[-3.0, 1.0], [5.0, 1.0]], 0.5, [0.75, 0.25])
    model = make(target=target, bandwidth=0.2)
    train(model, 3)
    mean, variance = torch.tensor([-1.0, 1.0]), torch.tensor([12.25, 0.25])
    model.train()
    batch = model.encode(Digits().training[torch.arange(100)][0])
    model.refresh()
    for codes in (batch, model.lagged.codes):
        torch.testing.assert_close(codes.mean(0), mean, rtol=0, atol=1e-3)
        torch.testing.assert_close(codes.var(0), variance, rtol=0.02, atol=0)
    assert model.sample(5).shape == (5, 1, 8, 8)


def test_without_kernel_noise_a_codes_own_copy_is_left_out():
    model = make(kernel_noise=False)
    train(model, 1)
    model.refresh()
    codes, indices = model.lagged.codes[:20], model.lagged.indices[:20]
    torch.testing.assert_close(model.latent_terms(codes, indices), model.lagged.loss(codes, indices, reduction="none"))
    assert (model.latent_terms(codes, indices) < model.latent_terms(codes, None)).all()


def test_encode_decode_sample_reconstruct():
    model = make().eval()
    images = torch.rand(7, 1, 8, 8)
    codes = model(images)
    assert codes.shape == (7, 2)
    torch.testing.assert_close(model.reconstruct(images), model.decode(codes))
    samples = model.train().sample(3, torch.Generator().manual_seed(1))
    assert model.training and samples.shape == (3, 1, 8, 8) and samples.min() >= 0 and samples.max() <= 1
    assert torch.equal(samples, model.sample(3, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("example_shape", [(1, 28, 28), (3, 32, 32), (1, 64, 64), (3, 64, 64)])
@pytest.mark.parametrize("network", [FC, Conv])
def test_networks_fit_the_images(network, example_shape):
    networks = network(example_shape, 5)
    images = torch.rand(2, *example_shape)
    assert networks.encoder(images).shape == (2, 5)
    assert networks(images).shape == images.shape


def test_a_convolutional_gen_learns():
    model = built.GEN((1, 28, 28), 2, Conv, num_lagged=100, bandwidth=0.5, learning_rate=1e-3)
    images = torch.nn.functional.interpolate(Digits().training.examples[:200], size=28)
    items = [(image, -1, i) for i, image in enumerate(images)]  # any dataset and loader will do
    loader = torch.utils.data.DataLoader(items, batch_size=50, shuffle=True)
    before = torch.nn.functional.mse_loss(model.reconstruct(images), images)
    trainer(8).fit(model, loader)
    assert torch.nn.functional.mse_loss(model.eval().reconstruct(images), images) < 0.6 * before


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make(refresh_every=0), "refresh_every must be at least 1, got 0"),
        (lambda: make(weight=-1.0), r"weight must be at least 0 and finite, got -1\.0"),
        (lambda: make(lagged_device="cuda"), "lagged_device must be \"cpu\" or None, got 'cuda'"),
        (lambda: make(lagged_dtype="half"), r"lagged_dtype must be \"float32\" or \"bfloat16\", got 'half'"),
        (lambda: make(input_dropout=1.0), r"input_dropout must be at least 0 and below 1, got 1\.0"),
        (lambda: make(num_lagged=301) and train(make(num_lagged=301), 1), "num_lagged must be at most 300, .* got 301"),
        (lambda: FC((), 2), "example_shape must have at least one dimension, got none"),
        (lambda: FC((1, 8, 8), 2, hidden=()), "hidden must have one width at least"),
        (lambda: Conv((1, 30, 30), 2), r"side 28, 32 or 64, got example_shape \[1, 30, 30\]; FC takes any"),
        (lambda: GEN(nn.Flatten(), nn.Identity(), 2, bandwidth=1.0).encode(torch.zeros(3, 1, 8, 8)), r"got \[3, 64\]"),
        (lambda: train(GEN(FC((1, 8, 8), 2).encoder, nn.Identity(), 2, 200, bandwidth=1.0), 1), "decoder must return"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_batches_without_indices_are_refused():
    loader = torch.utils.data.DataLoader([(torch.zeros(1, 8, 8), 0)] * 300, batch_size=100)
    with pytest.raises(TypeError, match=r"must be \(examples, labels, indices in the training set\), got 2 parts"):
        trainer(1).fit(make(), loader)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_weight_from_the_terms(divergence):
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    model = make(divergence=divergence)
    model.lagged.refresh(torch.randn(200, 2))
    log_ratio = model.lagged.log_prob(z) - model.lagged.law.log_prob(z)
    expected = torch.sigmoid(-log_ratio).mean()  # p_t / (p_e + p_t)
    torch.testing.assert_close(model.gradient_weight(model.lagged.loss(z, reduction="none")), expected)


def test_stopwatch_shares():
    watch = Stopwatch(torch.device("cpu"))
    assert watch.share("part", "whole") == 0
    watch.start("whole")
    watch.start("part")
    watch.stop("part")
    watch.stop("whole")
    assert 0 < watch.share("part", "whole") < 1
