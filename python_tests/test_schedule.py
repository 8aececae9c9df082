"""The learning rates' course: what it is, and that others can set rates."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, IterableDataset

from kdejsd.data import Digits
from kdejsd.models import FC, built
from kdejsd.models.schedule import HalfCosine

pytestmark = [
    pytest.mark.filterwarnings("error:.*lr_scheduler.step"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*LeafSpec",
        "ignore:.*GPU available but not used",
        "ignore:.*num_training_batches",
        "ignore:The number of training batches",
    ),
]

DIGITS = Digits(train_size=300)
small = functools.partial(FC, hidden=(4,))


class Rates(pl.Callback):
    """The rates of all optimisers at every step."""

    def __init__(self):
        self.used = []

    def on_train_batch_start(self, trainer, *_):
        self.used.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])


def make(model=built.AE, **options):
    pl.seed_everything(0, verbose=False)
    return model(Digits.example_shape, 2, small, **{"learning_rate": 0.01} | options)


def trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False} | options,
    )


def train(model, *callbacks, data=None, ckpt_path=None, **options) -> pl.Trainer:
    """Three batches an epoch."""
    run = trainer(*callbacks, **options)
    run.fit(model, DIGITS if data is None else data, ckpt_path=ckpt_path)
    return run


def half_cosine(total: int, rate: float = 0.01) -> list[float]:
    steps = torch.arange(total, dtype=torch.float64)
    return (rate / 2 * (1 + torch.cos(torch.pi * steps / total))).tolist()


@pytest.mark.parametrize(
    ("model", "options"),
    [(built.AE, {}), (built.AAE, {}), (built.GAN, {"discriminator_steps": 3})],
    ids=["AE", "AAE", "GAN"],
)
def test_every_rate_falls_to_zero_along_a_half_cosine(model, options):
    rates = Rates()
    run = train(make(model, **options), rates, max_steps=7)
    for used in zip(*rates.used, strict=True):
        assert used == pytest.approx(half_cosine(7))
    assert len(rates.used[0]) == len(run.optimizers)
    assert all(group["lr"] < 1e-17 for optimizer in run.optimizers for group in optimizer.param_groups)


def test_minibatches_whose_gradients_are_added_have_one_rate():
    rates = Rates()
    train(make(), rates, max_epochs=2, accumulate_grad_batches=2)  # a step after two batches and at the epoch's end
    assert [rate for (rate,) in rates.used] == pytest.approx([half_cosine(4)[i] for i in (0, 0, 1, 2, 2, 3)])


@pytest.mark.parametrize("known", ["epochs", "nothing"])
def test_the_rates_stay_where_the_end_of_the_run_is_not_known(known):
    digits = DIGITS.training

    class Stream(IterableDataset):
        def __iter__(self):
            yield from (digits[torch.arange(i, i + 100)] for i in (0, 100, 200))

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

    rates = Rates()
    data = DataLoader(Stream(), batch_size=None) if known == "epochs" else Digits(train_size=300)
    train(make(), rates, Stop(), data=data, max_epochs=2 if known == "epochs" else -1)
    assert [rate for (rate,) in rates.used] == [0.01] * 4


def test_the_rates_that_a_range_test_names_are_those_that_were_used():
    model, used = make(), []
    model.on_before_optimizer_step = lambda optimizer: used.append(optimizer.param_groups[0]["lr"])
    found = Tuner(trainer(max_epochs=50)).lr_find(
        model, datamodule=DIGITS, min_lr=1e-5, max_lr=0.1, num_training=20, early_stop_threshold=None
    )
    assert used == pytest.approx(found.results["lr"]) and used[0] == pytest.approx(1e-5)
    assert used[-1] > 0.05 and model.learning_rate == found.suggestion()


def test_a_run_goes_on_with_the_rate_that_a_tuner_has_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = Rates()
    model = make()
    train(model, LearningRateFinder(num_training_steps=20), rates, max_steps=6)
    assert model.learning_rate != 0.01 and model._planned_steps == 6
    assert [rate for (rate,) in rates.used] == pytest.approx(half_cosine(6, model.learning_rate))


def test_averaging_sets_the_rates_of_its_epochs():
    rates = Rates()
    averaging = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2, annealing_epochs=1)
    with pytest.warns(UserWarning, match="SWA is currently only supported every epoch"):
        train(make(), rates, averaging, max_epochs=4)
    used = [rate for (rate,) in rates.used]
    assert used[:3] == pytest.approx(half_cosine(12)[:3])
    assert used[6:] == pytest.approx([0.5] * 6)


def test_a_rate_that_a_callback_sets_falls_from_there():
    class Halve(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.optimizers[0].param_groups[0]["lr"] /= 2

    rates = Rates()
    train(make(), Halve(), rates, max_steps=5)
    expected = half_cosine(5)
    assert [rate for (rate,) in rates.used] == pytest.approx(expected[:2] + [rate / 2 for rate in expected[2:]])


def test_the_monitor_sees_the_rate(tmp_path):
    logged = []

    class Keep(CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.extend(value for name, value in metrics.items() if name == "lr-Adam")

    train(make(), LearningRateMonitor(), max_steps=4, log_every_n_steps=1, logger=Keep(tmp_path))
    assert logged == pytest.approx(half_cosine(4))


def resumed(path, steps: int = 8, **options) -> list[float]:
    rates = Rates()
    model = make(**options)
    train(model, rates, max_steps=steps, ckpt_path=path)
    return [rate for (rate,) in rates.used]


@pytest.fixture
def stopped(tmp_path):
    """A checkpoint after 3 of 8 steps."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "3.ckpt")

    train(make(), Save(), max_steps=8)
    return tmp_path / "3.ckpt"


@pytest.mark.filterwarnings("ignore:the learning rate was to come to 0")
def test_a_resumed_run_has_the_rates_of_its_own_settings(stopped):
    assert resumed(stopped) == half_cosine(8)[3:]
    assert resumed(stopped, steps=10) == pytest.approx(half_cosine(10)[3:])
    assert resumed(stopped, learning_rate=0.04) == pytest.approx(half_cosine(8, 0.04)[3:])


def test_other_settings_are_the_optimisers_too(stopped):
    model = make(learning_rate=0.04, betas=(0.7, 0.9), decay=False)
    run = train(model, max_steps=4, ckpt_path=stopped)
    (group,) = run.optimizers[0].param_groups
    assert group["betas"] == (0.7, 0.9)


@pytest.mark.parametrize("form", [None, 0, 2])
def test_a_checkpoint_of_another_format_is_refused(stopped, form):
    checkpoint = torch.load(stopped, weights_only=True)
    del checkpoint["kdejsd_format"]
    if form is not None:
        checkpoint["kdejsd_format"] = form
        checkpoint["kdejsd_version"] = "9.9"
    else:
        del checkpoint["kdejsd_version"]
    torch.save(checkpoint, stopped)
    writer = "before 0.2.0" if form is None else "9.9"
    with pytest.raises(ValueError, match=f"cannot read this checkpoint, which a version of another .* \\({writer}\\)"):
        resumed(stopped)


def test_state_is_plain_and_takes_up_where_it_was():
    optimizers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0) for _ in range(2)]
    first, second = (HalfCosine(optimizer, lambda: 4) for optimizer in optimizers)
    for _ in range(2):
        first.step()
    assert all(type(value) in (int, float, bool, list) for value in first.state_dict().values())
    second.load_state_dict(first.state_dict())
    optimizers[1].param_groups[0]["lr"] = first.get_last_lr()[0]
    first.step()
    second.step()
    assert first.get_last_lr() == second.get_last_lr() == pytest.approx([half_cosine(4, 1.0)[3]])
    for _ in range(3):
        first.step()
    assert first.get_last_lr() == [0.0]
