"""No run is lost: kills at any moment, a full disk, a folder that cannot be written, losses that are no numbers."""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data import write_mnist
from test_gen import DropoutFC
from torch import nn

from kdejsd.cli import main
from kdejsd.data import MNIST, Digits
from kdejsd.models import GAN, built
from kdejsd.models.base import LOSSES_KEPT
from kdejsd.runs import checkpoints
from kdejsd.runs.checkpoints import RunCheckpoint, WholeCheckpointIO, load_checkpoint

pytestmark = [
    pytest.mark.usefixtures("undrawn"),
    pytest.mark.filterwarnings(
        "ignore:.*does not have many workers",
        "ignore:.*LeafSpec",
        "ignore:.*GPU available but not used",
        "ignore:The number of training batches",
        "ignore:.*smaller than the logging interval",
    ),
]


def assert_same(a, b, name: str = "") -> None:
    """Equality bit for bit of what is in two checkpoints."""
    if isinstance(b, dict):
        assert a.keys() == b.keys(), name
        for key in b:
            assert_same(a[key], b[key], f"{name}.{key}")
    elif isinstance(b, (list, tuple)):
        assert len(a) == len(b), name
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{name}[{i}]")
    elif isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    else:
        assert a == b, name


STATE = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "rng_state", "planned_steps")


def state(path: Path) -> dict:
    """Returns what a checkpoint has of the run, but for the counters of Lightning's loops and the files' names."""
    checkpoint = torch.load(path, weights_only=True)
    order = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return {name: checkpoint[name] for name in STATE} | {"order": order}


# ----------------------------------------------------------------------------------------------------------------------
# Kills

SMALL = ["--data.train_size=300", "--model.latent_dim=2", "--trainer.accelerator=cpu", "--trainer.logger=false"]
SMALL += ["--model.network=FC", "--model.network.hidden=[16]", "--trainer.enable_progress_bar=false"]
KILLED = {
    "StochasticGEN": ["--model.num_lagged=200", "--model.bandwidth=1", "--model.refresh=rolling"],
    "AAE": ["--model.discriminator_hidden=[16,16]"],
}


def fit(folder: Path, args: list[str], saved: Connection | None) -> None:
    """`kdejsd fit` in a process of its own; with `saved`, it has a checkpoint after every step and tells of each."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("out.txt", "a")  # noqa: SIM115  # to the end of the process
    if saved is not None:
        checkpoints.INTERVAL = checkpoints.COST = 0
        save = RunCheckpoint._save

        def save_and_tell(self, trainer):
            save(self, trainer)
            saved.send(self.step)

        RunCheckpoint._save = save_and_tell
    raise SystemExit(main(["fit", *args]))


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have imported all that takes long, with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdejsd.runs.fit", "test_resume"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


def newest(folder: Path) -> list[str]:
    """How a user goes on: in the folder of the run that has a checkpoint, if it came so far before it was killed."""
    runs = [path.parents[1] for path in folder.glob("runs/*/checkpoints/last.ckpt")]
    assert len(runs) < 2  # a run that goes on has no new folder
    return [f"--ckpt_path={runs[0]}"] if runs else []


@pytest.mark.parametrize("model", KILLED)
def test_a_run_killed_six_times_ends_as_one_that_never_was(tmp_path, processes, model):
    args = [f"--model={model}", *SMALL, *KILLED[model], "--trainer.max_steps=62"]  # within the 21st epoch of 3 batches
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    chance = random.Random(0)
    for folder in (whole, killed):
        folder.mkdir()

    def start(folder: Path, args: list[str], saved: Connection | None = None) -> multiprocessing.Process:
        process = processes.Process(target=fit, args=(folder, args, saved))
        process.start()
        return process

    uninterrupted = start(whole, args)
    found = []
    time_to_start = 0.0
    for kill in range(6):
        told, saved = processes.Pipe(duplex=False)
        began = time.monotonic()
        process = start(killed, newest(killed) or args, saved)
        saved.close()
        if kill % 3 == 2:  # at any moment of the start
            time.sleep(chance.uniform(0, time_to_start))
        else:  # at any moment after some steps
            for step in range(chance.randint(1, 6)):
                told.recv()
                if step == 0:
                    time_to_start = time.monotonic() - began
            time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (killed / "out.txt").read_text()
        found += [load_checkpoint(path)["global_step"] for path in killed.glob("runs/*/checkpoints/last.ckpt")]
    assert 0 < max(found) < 62 and len(set(found)) > 2
    process = start(killed, newest(killed))
    for ending in (process, uninterrupted):
        ending.join()
        assert ending.exitcode == 0, (killed / "out.txt").read_text() + (whole / "out.txt").read_text()
    ends = [Path(newest(folder)[0].partition("=")[2]) for folder in (whole, killed)]
    assert_same(*(state(end / "checkpoints/last.ckpt") for end in ends))
    measures = [json.loads((end / "metrics.json").read_text()) for end in ends]
    for part in ("held_out", "training"):
        assert measures[0][part] == measures[1][part]


def die_while_saving(path: Path) -> None:
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)
    os.fsync = lambda _: os.kill(
        os.getpid(), signal.SIGKILL
    )  # all is written, and nothing is certain to be on the disk
    WholeCheckpointIO().save_checkpoint({"step": 2}, path)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, processes):
    path = tmp_path / "last.ckpt"
    for _ in range(2):
        process = processes.Process(target=die_while_saving, args=(path,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and load_checkpoint(path) == {"step": 1}
        assert sorted(tmp_path.iterdir()) == [path, tmp_path / "last.ckpt.part"]
    WholeCheckpointIO().save_checkpoint({"step": 3}, path)
    assert load_checkpoint(path) == {"step": 3} and list(tmp_path.iterdir()) == [path]


def test_a_run_told_to_end_saves_its_last_step(tmp_path, processes):
    told, saved = processes.Pipe(duplex=False)
    args = ["--model=AE", *SMALL, "--trainer.max_steps=100000"]
    process = processes.Process(target=fit, args=(tmp_path, args, saved))
    process.start()
    saved.close()
    steps = [told.recv() for _ in range(4)]
    process.terminate()
    with contextlib.suppress(EOFError):
        while True:
            steps.append(told.recv())
    process.join()
    said = (tmp_path / "out.txt").read_text()
    assert process.exitcode == 128 + signal.SIGTERM and "Traceback" not in said
    path = "runs/digits-1"
    assert f"stopped; the last checkpoint is of step {steps[-1]}; to go on: kdejsd fit --ckpt_path {path}\n" in said
    assert load_checkpoint(tmp_path / path / "checkpoints/last.ckpt")["global_step"] == steps[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints after every step, each of which is gone on from

GEN = {"num_lagged": 200, "bandwidth": 0.4, "refresh_every": 3}
MODELS = {
    "full": (built.GEN, GEN),
    "rolling": (built.GEN, GEN | {"refresh": "rolling"}),
    "queue": (built.GEN, GEN | {"refresh": "queue"}),
    "tracked": (built.GEN, GEN | {"refresh": "tracked"}),
    "tracked means": (built.StochasticGEN, GEN | {"refresh": "tracked", "bandwidth": 1.0}),
    "frugal": (built.GEN, GEN | {"refresh": "rolling", "lagged_dtype": "bfloat16", "keep_examples": False}),
    "stochastic": (built.StochasticGEN, GEN | {"refresh": "rolling", "bandwidth": 1.0}),
    "ae": (built.AE, {}),
    "vae": (built.VAE, {}),
    "flow": (built.VAE, {"prior": "flow", "flow_layers": 2}),
    "clipped": (built.LCVAE, {"constraint": "clip", "clip": 0.03}),
    "spectral": (built.LCVAE, {"constraint": "spectral"}),
    "scale-free": (built.LCVAE, {"constraint": "none", "scale_free": True}),
    "wae": (built.WAE, {}),
    "aae": (built.AAE, {"discriminator_hidden": (16,)}),
    "gan": (built.GAN, {"discriminator_steps": 3}),
    "wgan": (built.GAN, {"objective": "wgan", "discriminator_steps": 3}),
    "wgan-gp": (built.GAN, {"objective": "wgan-gp", "discriminator_steps": 3}),
}


class EachStep(RunCheckpoint):
    """Keeps all checkpoints, each by the number of its step."""

    def _save(self, trainer):
        self.path = self.path.with_name(f"{trainer.global_step:02}.ckpt")
        assert not self.path.exists()  # once for each step, where it can be gone on from
        super()._save(trainer)


def make(kind: str, seed: int = 0, **options):
    pl.seed_everything(seed, verbose=False)
    model, settings = MODELS[kind]
    return model(Digits.example_shape, 2, DropoutFC, **settings | options)


def train(model, folder: Path, ckpt_path=None, data=None, callbacks=(), **limits) -> pl.Trainer:
    """Five batches an epoch; leaves FOLDER/STEP.ckpt after every step."""
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, EachStep(folder / "last.ckpt")],
        plugins=[WholeCheckpointIO()],
        **limits,
    )
    trainer.fit(model, datamodule=data or Digits(train_size=500), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(autouse=True)
def _each_step(monkeypatch):
    for name in ("INTERVAL", "COST"):
        monkeypatch.setattr(checkpoints, name, 0)


def assert_goes_on(folder: Path, kind: str, steps: list[int], before: dict, limits: dict, **options) -> None:
    """A run that was stopped by the limits `before` and goes on from each of the steps ends as one with `limits`."""
    make_one = functools.partial(make, kind, decay=before == limits, **options)
    train(make_one(), folder / "whole", **limits)
    if before != limits:
        train(make_one(), folder / "part", **before)
    (*_, end) = sorted((folder / "whole").glob("*.ckpt"))
    for step in steps:
        part = folder / ("whole" if before == limits else "part") / f"{step:02}.ckpt"
        pl.seed_everything(99, verbose=False)
        train(make_one(seed=9), folder / f"from-{step}", ckpt_path=part, **limits)
        assert_same(state(folder / f"from-{step}" / end.name), state(end), f"from step {step}")


@pytest.mark.parametrize("kind", MODELS)
def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(tmp_path, kind):
    limits = {"max_steps": 12} if kind in ("rolling", "gan") else {"max_epochs": 2}
    assert_goes_on(tmp_path, kind, [1, 4, 5, 7], limits, limits)


@pytest.mark.parametrize(
    ("before", "limits", "steps"),
    [
        ({"max_steps": 7}, {"max_steps": 12}, [7]),  # stopped within an epoch, at the end of one, by their number
        ({"max_steps": 5}, {"max_steps": 12}, [5]),
        ({"max_epochs": 1}, {"max_epochs": 2}, [5]),
        ({"max_epochs": 1}, {"max_steps": 12}, [5]),
        ({"max_epochs": 2, "val_check_interval": 2}, {"max_epochs": 2, "val_check_interval": 2}, [2, 4, 5]),
        ({"max_steps": 12, "limit_val_batches": 0}, {"max_steps": 12, "limit_val_batches": 0}, [5, 8]),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, {"max_epochs": 3, "check_val_every_n_epoch": 2}, [5, 10]),
        ({"max_steps": 7, "limit_train_batches": 3}, {"max_steps": 7, "limit_train_batches": 3}, [3, 4]),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, [1, 3, 4]),
    ],
)
def test_whatever_ends_or_divides_a_run_it_goes_on_as_if_it_had_not_stopped(tmp_path, before, limits, steps):
    assert_goes_on(tmp_path, "rolling", steps, before, limits)


# ----------------------------------------------------------------------------------------------------------------------
# What a user is told


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `kdejsd fit` in this process, in tmp_path; its exit code and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*args: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["fit", *map(str, args)])
        return code, capsys.readouterr().err

    return command


AE = ["--model=AE", *SMALL]


def test_a_run_goes_on_in_its_own_folder(command, tmp_path):
    logged = [*(arg for arg in AE if "logger" not in arg), "--trainer.log_every_n_steps=1"]
    last, config = tmp_path / "a/checkpoints/last.ckpt", tmp_path / "a/config.yaml"
    assert command(*logged, "--trainer.max_steps=4", "--out=a")[0] == 0
    fourth, settings = last.read_bytes(), config.read_text()
    for refused in (["--data.batch_size=50"], ["--model.latent_dim=3"], ["--trainer.accelerator=x"]):
        assert command("--ckpt_path=a", *refused, "--trainer.max_steps=8")[0] == 1
        assert last.read_bytes() == fourth and config.read_text() == settings
    for ckpt_path in ("a", "a/checkpoints/last.ckpt"):  # the second time as after a kill that has lost four steps
        last.write_bytes(fourth)
        assert command(f"--ckpt_path={ckpt_path}", "--trainer.max_steps=8")[0] == 0
        assert json.loads((tmp_path / "a/metrics.json").read_text())["run"]["steps"] == 8
    assert load_checkpoint(last)["global_step"] == 8 and "max_steps: 8" in config.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    logs = EventAccumulator(str(tmp_path / "a")).Reload()
    steps = [[event.step for event in logs.Scalars(name)] for name in logs.Tags()["scalars"]]
    assert list(range(8)) in steps and all(sorted(some) == some for some in steps)

    code, said = command("--ckpt_path=a")
    assert code == 0 and "nothing was left to train after step 8 of a/checkpoints/last.ckpt" in said
    copy = tmp_path / "before.ckpt"  # no run's newest one
    shutil.copy(last, copy)
    assert command(*logged, f"--ckpt_path={copy}", "--trainer.max_steps=9")[0] == 0
    assert load_checkpoint("runs/digits-1/checkpoints/last.ckpt")["global_step"] == 9


def test_a_resumed_run_begins_with_the_checkpoint_and_a_finished_one_is_reported_anew(command, tmp_path, monkeypatch):
    assert command(*AE, "--trainer.max_steps=4", "--out=a")[0] == 0
    first = tmp_path / "a/checkpoints/last.ckpt"
    assert command(f"--ckpt_path={first}", "--out=b")[0] == 0
    copy = tmp_path / "b/checkpoints/last.ckpt"
    assert copy.read_bytes() == first.read_bytes() and copy.stat().st_ino == first.stat().st_ino
    reports = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in "ab"]
    assert reports[0]["held_out"] == reports[1]["held_out"] and reports[1]["run"]["steps"] == 4

    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    assert command(f"--ckpt_path={first}", "--out=c")[0] == 0
    assert (tmp_path / "c/checkpoints/last.ckpt").read_bytes() == first.read_bytes()


def test_a_run_in_a_thread(tmp_path):
    """Where no signal can be waited for."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, make("ae"), tmp_path, max_steps=1).result()
    assert load_checkpoint(tmp_path / "01.ckpt")["global_step"] == 1


@pytest.mark.parametrize(
    ("tuner", "options"), [("LearningRateFinder", {"num_training_steps": 5}), ("BatchSizeFinder", {"max_trials": 2})]
)
def test_what_a_tuner_saves_and_deletes_is_not_the_runs(command, tmp_path, tuner, options):
    tune = [f"--trainer.callbacks+={tuner}", *(f"--trainer.callbacks.{key}={value}" for key, value in options.items())]
    assert command(*AE, *tune, "--trainer.max_steps=4", "--out=a")[0] == 0
    assert load_checkpoint("a/checkpoints/last.ckpt")["global_step"] == 4
    assert sorted(path.name for path in tmp_path.rglob("*.ckpt")) == ["last.ckpt"]


@pytest.mark.parametrize(
    ("callback", "options"),
    [("StochasticWeightAveraging", ["swa_lrs=0.01", "swa_epoch_start=1"]), ("EMAWeightAveraging", ["decay=0.5"])],
)
def test_averaged_weights_are_those_of_the_checkpoint_and_the_report(command, tmp_path, callback, options):
    average = [f"--trainer.callbacks+={callback}", *(f"--trainer.callbacks.{option}" for option in options)]
    assert command(*AE, "--trainer.max_epochs=3", "--out=plain")[0] == 0
    assert command(*AE, *average, "--trainer.max_epochs=3", "--out=a")[0] == 0
    assert main(["evaluate", "a/checkpoints/last.ckpt", "--out=again"]) == 0
    first, again, plain = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("a", "again", "plain"))
    assert first["held_out"] == again["held_out"] != plain["held_out"]


def test_the_end_of_averaging_is_saved(tmp_path):
    class Average(pl.Callback):  # as StochasticWeightAveraging does
        def on_train_end(self, trainer, model):
            with torch.no_grad():
                model.decoder[0].weight.mul_(0.5)

    model = make("ae")
    run = pl.Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=[Average(), RunCheckpoint(tmp_path / "last.ckpt")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(model, Digits(train_size=500))
    assert torch.equal(
        load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["decoder.0.weight"], model.decoder[0].weight
    )


def test_a_run_stopped_by_the_clock_goes_on(tmp_path):
    class Stop(pl.Callback):  # as Lightning's Timer does
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 7

    stopped = train(make("rolling", decay=False), tmp_path / "part", callbacks=[Stop()], max_epochs=3)
    assert stopped.global_step == 7
    train(make("rolling", 9, decay=False), tmp_path / "rest", ckpt_path=tmp_path / "part/07.ckpt", max_epochs=3)
    train(make("rolling", decay=False), tmp_path / "whole", max_epochs=3)
    assert_same(*(state(tmp_path / run / "15.ckpt") for run in ("rest", "whole")))


def test_the_report_of_a_run_stopped_by_the_clock_is_of_its_checkpoint(command, tmp_path):
    args = ["--model=StochasticGEN", *SMALL, *KILLED["StochasticGEN"], "--trainer.max_time=00:00:00:01"]
    assert command(*args, "--out=a")[0] == 0
    assert main(["evaluate", "a/checkpoints/last.ckpt", "--out=again"]) == 0
    first, again = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("a", "again"))
    assert first["held_out"] == again["held_out"]
    assert all(first["run"][name] == again["run"][name] for name in ("epochs", "steps"))


def test_other_settings_are_told_or_refused(command, tmp_path):
    assert command(*AE, "--trainer.max_steps=4", "--out=a")[0] == 0  # within the second epoch
    go_on = ["--ckpt_path=a/checkpoints/last.ckpt"]
    code, said = command(*go_on, "--data.batch_size=50", "--out=b")
    assert code == 1 and "batch_size must stay 100, got 50" in said and "after 1 batches" in said
    with pytest.warns(UserWarning) as told:
        assert command(*go_on, "--data.seed=5", "--model.betas=[0.9,0.99]", "--trainer.max_steps=6", "--out=c")[0] == 0
    texts = "\n".join(str(warning.message) for warning in told)
    assert "--data.seed was 0 and is 5" in texts and "--model.betas was [0.5, 0.999] and is [0.9, 0.99]" in texts
    assert "the learning rate was to come to 0 after 4 steps, and is now to after 6" in texts
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*goes? on")
        assert command(*go_on, "--out=d")[0] == 0
    moved = tmp_path / "elsewhere.ckpt"
    shutil.copy("a/checkpoints/last.ckpt", moved)
    assert "there is no" in command(f"--ckpt_path={moved}", *AE, "--trainer.max_steps=5", "--out=e")[1]


def test_a_full_disk_leaves_the_last_checkpoint(command, tmp_path):
    assert command(*AE, "--trainer.max_steps=4", "--out=a")[0] == 0
    last = tmp_path / "a/checkpoints/last.ckpt"
    before = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # no file may become as large
    try:
        code, said = command(f"--ckpt_path={last}", "--trainer.max_steps=8", "--out=b")
        fresh, _ = command(*AE, "--trainer.max_steps=8", "--out=c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "bytes cannot be written to b/checkpoints/last.ckpt: File too large" in said
    assert "the last checkpoint is of step 4; to go on: kdejsd fit --ckpt_path b\n" in said
    assert last.read_bytes() == before
    assert [path.name for path in (tmp_path / "b/checkpoints").iterdir()] == ["last.ckpt"]
    assert fresh == 1 and not list((tmp_path / "c/checkpoints").iterdir())
    assert command("--ckpt_path=b/checkpoints/last.ckpt", "--trainer.max_steps=8", "--out=d")[0] == 0


@pytest.mark.pictures
def test_a_log_or_a_report_that_cannot_be_written(command, tmp_path):
    tiny = [*(arg for arg in AE if "logger" not in arg), "--model.network.hidden=[2]", "--trainer.log_every_n_steps=1"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # more than a checkpoint, less than a long log
        code, said = command(*tiny, "--trainer.max_steps=1000", "--out=a")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # more than a table, less than a picture
        ends = ["--trainer.max_steps=1", "--trainer.logger=false"]
        report, told = command("--ckpt_path=a/checkpoints/last.ckpt", *ends, "--out=b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "the run cannot write to a: File too large" in said
    assert "stopped by an error; the last checkpoint is of step " in said
    assert report == 1 and "the report cannot be written to b: " in told
    assert "once it can: kdejsd evaluate b/checkpoints/last.ckpt" in told


def test_folders_that_cannot_be_made(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, said = command(*AE, "--out=file/run")
    assert code == 1 and "the folder file/run cannot be made: Not a directory; name another one with --out" in said
    (tmp_path / "runs").write_text("in the way")
    code, said = command(*AE)
    assert code == 1 and "the folder runs/digits-1 cannot be made" in said
    with pytest.raises(OSError, match=r"bytes cannot be written to .*/file/01.ckpt: File exists"):
        train(make("ae"), tmp_path / "file", max_steps=2)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_checkpoint_that_is_missing_damaged_or_of_another_kind(command, tmp_path):
    assert command(*AE, "--trainer.max_steps=1", "--out=a")[0] == 0
    content = (tmp_path / "a/checkpoints/last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "object.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name, text in (
        ("none", "the checkpoint none.ckpt does not exist"),
        ("half", "half.ckpt is damaged or no checkpoint of plain values"),
        ("object", "object.ckpt is damaged or no checkpoint of plain values"),
        ("list", "list.ckpt must hold a checkpoint, a dict, got list"),
    ):
        code, said = command(*AE, f"--ckpt_path={name}.ckpt", f"--out={name}")
        assert code == 1 and f"kdejsd fit: error: {text}" in said
        assert main(["evaluate", f"{name}.ckpt"]) == 1
    with pytest.raises(ValueError, match=r"config.yaml is damaged or no checkpoint of plain values: [^\n]+$"):
        load_checkpoint(tmp_path / "a/config.yaml")


# ----------------------------------------------------------------------------------------------------------------------
# Losses, weights and images that are not finite


class Spoil(pl.Callback):
    """Makes all that the decoder or discriminator gives NaN from step 7 on."""

    def on_train_batch_start(self, trainer, model, *_):
        if trainer.global_step == 7:
            part = model.discriminator if isinstance(model, GAN) else model.decoder
            part.register_forward_hook(lambda module, inputs, output: output * torch.nan)
            self.before = {name: value.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_are_spoiled(tmp_path, kind):
    model, spoil = make(kind), Spoil()
    with pytest.raises(FloatingPointError) as error:
        train(model, tmp_path, callbacks=[spoil], max_epochs=3)
    text = str(error.value)
    assert "the loss is nan in epoch 2, batch 3 of 5 (after 7 steps): " in text
    term = "discriminator" if "gan" in kind else "reconstruction"
    assert f"loss/{term} is nan" in text and "examples and the weights are finite" in text
    for name, value in model.named_parameters():
        assert torch.equal(value, spoil.before[name]) or (kind, name.split(".")[0]) == ("aae", "discriminator"), name
    assert max(path.name for path in tmp_path.glob("*.ckpt")) == "07.ckpt"


def test_a_loss_that_is_looked_at_late_is_named_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES_KEPT, "cpu", LOSSES_KEPT["cuda"])
    monkeypatch.setattr(checkpoints, "INTERVAL", 1000)  # but for the first step, not before the end
    for epochs, name in ((3, "end"), (100, "never")):
        expected = r"is nan in epoch 2, batch 3 of 5 \(after 7 steps\): loss/reconstruction is nan"
        with pytest.raises(FloatingPointError, match=expected):
            train(make("full"), tmp_path / name, callbacks=[Spoil()], max_epochs=epochs)
        assert [path.name for path in (tmp_path / name).glob("*.ckpt")] == ["01.ckpt"]


def test_a_diverging_run_says_where_the_last_checkpoint_is(command, tmp_path):
    code, said = command(*AE, "--model.learning_rate=1e30", "--trainer.max_steps=50", "--out=run")
    assert (
        code == 1
        and "kdejsd fit: error: the loss is " in said
        and ("batch 2 of 3 (after 1 steps): loss/reconstruction is " in said)
    )
    assert "the last checkpoint is of step 1; to go on: kdejsd fit --ckpt_path run\n" in said
    assert load_checkpoint("run/checkpoints/last.ckpt")["global_step"] == 1


@pytest.mark.parametrize("kind", ["full", "rolling", "queue", "tracked", "aae"])
def test_weights_that_a_gradient_has_spoiled_are_never_saved(tmp_path, kind):
    class SpoilGradient(pl.Callback):
        def on_train_batch_start(self, trainer, model, *_):
            if trainer.global_step == 6:
                weight = next(model.decoder.parameters())
                weight.register_hook(lambda gradient: gradient * torch.nan)

    with pytest.raises(FloatingPointError, match=r"the weights decoder.0.weight are not finite after 7 steps"):
        train(make(kind), tmp_path, callbacks=[SpoilGradient()], max_epochs=3)
    assert max(path.name for path in tmp_path.glob("*.ckpt")) == "06.ckpt"


@pytest.mark.parametrize("refresh", ["full", "rolling", "queue", "tracked"])
def test_codes_that_spoiled_weights_give_are_explained(tmp_path, monkeypatch, refresh):
    monkeypatch.setattr(checkpoints, "INTERVAL", 1000)  # the loss comes before the next checkpoint

    class SpoilWeight(pl.Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step == 5:
                next(model.encoder.parameters()).data[0, 0] = torch.inf

    with pytest.raises(FloatingPointError, match=r" in epoch .*weights that are not finite: encoder\.2\.weight"):
        train(make(refresh), tmp_path, callbacks=[SpoilWeight()], max_epochs=3)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["01.ckpt"]


@pytest.mark.parametrize("kind", ["full", "queue", "vae", "gan"])
def test_images_that_are_not_finite_are_named(tmp_path, kind):
    digits = Digits(train_size=500).training
    pixels = digits.examples.clone()
    pixels[[17, 333], 0, 3, 4] = torch.tensor([torch.nan, torch.inf])
    loader = torch.utils.data.DataLoader(list(zip(pixels, digits.labels, range(500), strict=True)), batch_size=100)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(FloatingPointError, match=r"in epoch 1, batch 1.*not finite in the training set: 17") as error:
        trainer.fit(make(kind, **({"num_lagged": 500} if kind in ("full", "queue") else {})), loader)
    assert "333" in str(error.value) or kind not in ("full", "queue")


# ----------------------------------------------------------------------------------------------------------------------
# Files of images that vanish


def test_a_run_needs_its_files_when_it_starts_and_not_later(command, tmp_path):
    write_mnist(tmp_path / "mnist", compressed=True, counts=(60, 30))
    args = ["--model=AE", "--data=MNIST", f"--data.root={tmp_path}", "--data.batch_size=20", *SMALL[1:]]

    class Vanish(pl.Callback):
        def on_train_start(self, *_):
            shutil.move(tmp_path / "mnist", tmp_path / "elsewhere")

    data = MNIST(str(tmp_path), batch_size=20)
    pl.seed_everything(0, verbose=False)
    train(built.AE(MNIST.example_shape, 2, DropoutFC), tmp_path / "run", data=data, callbacks=[Vanish()], max_epochs=2)
    shutil.move(tmp_path / "elsewhere", tmp_path / "mnist")
    assert command(*args, "--trainer.max_steps=2", "--out=a")[0] == 0
    (tmp_path / "mnist/train-labels-idx1-ubyte.gz").unlink()
    code, said = command("--ckpt_path=a/checkpoints/last.ckpt", "--trainer.max_steps=4", "--out=b")
    assert code == 1 and "kdejsd fit: error: MNIST needs train-labels-idx1-ubyte.gz" in said
    assert "Name its folder with --data.root; to get it: curl -O" in said
