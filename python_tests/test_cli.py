"""The command, as a user runs it."""

import contextlib
import csv
import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import matplotlib.image
import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from test_data import write_celeba, write_mnist, write_pictures, write_svhn

import kdejsd
from kdejsd import __version__, diversity_report, novelty_score, plots, residual_variance
from kdejsd.cli import main
from kdejsd.data import MNIST, Digits, FashionMNIST
from kdejsd.models import GEN, BuiltModel, built
from kdejsd.runs import progress

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = [
    "--data.train_size=300",
    "--model.latent_dim=2",
    "--model.num_lagged=200",
    "--model.bandwidth=0.4",
    "--model.decay=false",  # so that a run resumed for more epochs is the same as a longer one
    "--trainer.accelerator=cpu",
]
REPORT = {"report.html", "metrics.json", "latent.png", "samples.png", "reconstructions.png", "config.yaml"}


class Done(NamedTuple):
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Done]:
    """Runs the command in this process, in the folder `cwd`, and expects the exit code `status`, or one of these."""

    def run(*args: object, cwd: Path, status: int | tuple[int, ...] = 0) -> Done:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as exit:
            code = exit.code
        done = Done(*capsys.readouterr())
        assert code in (status if isinstance(status, tuple) else (status,)), done
        return done

    return run


def command(*args: object, code: str = "from kdejsd.cli import main; raise SystemExit(main())") -> list[str]:
    """The command line for a process of its own."""
    return [sys.executable, "-c", code, *map(str, args)]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Done]:
    """The folder in which `kdejsd fit` ran for two epochs, and what it said."""
    folder = tmp_path_factory.mktemp("fit")
    args = command("fit", *SMALL, "--trainer.max_epochs=2")
    done = subprocess.run(args, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, Done(done.stdout, done.stderr)


def test_a_run_that_fails_removes_nothing_but_its_own(run, tmp_path, monkeypatch):
    def fit(self, *args, **kwargs):
        for name in ("notes.txt", "sub/deep.txt"):
            (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "out" / name).write_text("somebody else's")
        raise RuntimeError("the first step failed")

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    (tmp_path / "out").mkdir()
    assert "the first step failed" in run("fit", *SMALL, "--out=out", cwd=tmp_path, status=1).err
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["deep.txt", "notes.txt", "sub"]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ("--model=VAE", "--model must be that of .*, GEN, got VAE"),
        ("--model.latent_dim=3", "--model.latent_dim must be that of .*, 2, got 3"),
        ("--out=", "--out must be a path, got an empty text"),
    ],
)
def test_a_run_does_not_go_on_as_another(trained, run, changed, text):
    out = trained[0] / "runs" / "digits-1"
    before = sorted(out.rglob("*"))
    err = run("fit", f"--ckpt_path={out}", "--trainer.max_epochs=4", changed, cwd=trained[0], status=1).err
    assert re.search(text, err) and sorted(out.rglob("*")) == before


def test_load_gives_the_model_of_a_run(trained, monkeypatch):
    out = trained[0] / "runs" / "digits-1"
    model = kdejsd.load(out)
    assert type(model) is kdejsd.models.GEN and not model.training and model.dtype == torch.float32
    images = torch.rand(5, *model.hparams["example_shape"])
    with torch.no_grad():
        assert model.encode(images).shape == (5, 2) and model.decode(model.encode(images)).shape == images.shape
    assert model.sample(7).shape == (7, 1, 8, 8)
    checkpoint = out / "checkpoints" / "last.ckpt"
    monkeypatch.chdir(trained[0])
    for other in (
        kdejsd.load("runs/digits-1"),
        kdejsd.load(str(checkpoint), device="cpu"),
        kdejsd.models.GEN.load_from_checkpoint(checkpoint),
        kdejsd.models.built.GEN.load_from_checkpoint(checkpoint),
        kdejsd.models.GenerativeModel.load_from_checkpoint(str(checkpoint)),
    ):
        assert type(other) is kdejsd.models.GEN
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(TypeError, match=r"last\.ckpt must be of a VAE, got one of a GEN"):
        kdejsd.models.VAE.load_from_checkpoint(checkpoint)


def test_load_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"runs/none does not exist"):
        kdejsd.load("runs/none")
    with pytest.raises(FileNotFoundError, match=r"is not that of a run with a checkpoint: there is no .*last\.ckpt"):
        kdejsd.load(tmp_path)
    (tmp_path / "x.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"x\.ckpt is damaged or no checkpoint of plain values"):
        kdejsd.load(tmp_path / "x.ckpt")
    model = kdejsd.models.built.AE((1, 8, 8))
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(model, Digits())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match=r"own\.ckpt was not written by kdejsd fit: .*"):
        kdejsd.load(tmp_path / "own.ckpt")
    assert type(kdejsd.models.AE.load_from_checkpoint(tmp_path / "own.ckpt")) is kdejsd.models.AE


def test_fit_leaves_a_report(trained):
    folder, done = trained
    out = folder / "runs" / "digits-1"
    assert {path.name for path in out.iterdir()} >= REPORT
    assert list(out.glob("events.out.tfevents*"))
    assert "report: runs/digits-1" in done.out
    for name in ("rec=", "excess=", "1-r=", "val_rec=", "val_jsd="):
        assert name in done.err
    assert yaml.safe_load((out / "hparams.yaml").read_text())["betas"] == [0.5, 0.999]  # without Python's own types
    assert "Tip" not in done.err + done.out and " latent=" not in done.err  # of which the excess tells more
    for picture in out.glob("*.png"):
        assert picture.stat().st_size > 5000
    report = metrics(out)
    for part, count in (("held_out", 359), ("training", 300)):
        numbers = report[part]
        assert numbers["count"] == count
        assert 0 < numbers["reconstruction_error"] < 0.25
        assert 0 < numbers["jsd_of_target"] < numbers["jsd"] < math.log(2)
        assert numbers["entropy"] < numbers["entropy_of_normal"] + 0.2
        assert 2.5 < numbers["entropy_of_normal"] < 3.3
        assert numbers["expected_variance"] == [1.0, 1.0] and len(numbers["variance"]) == 2
        assert sum(numbers["covariance_eigenvalues"]) == pytest.approx(sum(numbers["variance"]), rel=1e-4)
        assert 0 < numbers["gradient_weight"] < 1
    assert report["model"]["bandwidth"] == 0.4
    assert report["run"]["epochs"] == 2 and report["run"]["steps"] == 6 and report["run"]["seed"] == 0
    assert 0 < report["run"]["latent_time_share"] < 1 and report["run"]["wall_time_s"] > 0
    assert f"{report['held_out']['reconstruction_error']:.4g}" in done.out


def test_a_second_run_has_a_folder_of_its_own_and_the_same_weights(run, trained):
    folder, _ = trained
    before = (folder / "runs/digits-1/metrics.json").read_bytes()
    run("fit", "--config", "runs/digits-1/config.yaml", cwd=folder)
    assert (folder / "runs/digits-1/metrics.json").read_bytes() == before
    first, second = last(folder / "runs/digits-1"), last(folder / "runs/digits-2")
    for name, value in first["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second["state_dict"][name]), name
    used = run("fit", *SMALL, "--out=runs/digits-1", cwd=folder, status=1)
    assert "kdejsd fit: error: out must be a new or empty folder, and runs/digits-1 is not" in used.err


def test_evaluate_writes_the_same_numbers_from_the_checkpoint_alone(run, trained, tmp_path):
    folder, _ = trained
    checkpoint = tmp_path / "moved.ckpt"
    checkpoint.write_bytes((folder / "runs/digits-1/checkpoints/last.ckpt").read_bytes())
    done = run("evaluate", checkpoint, cwd=tmp_path)
    out = tmp_path / "evaluation-1"
    assert f"report: {out}" in done.out
    assert {path.name for path in out.iterdir()} >= REPORT
    expected, got = metrics(folder / "runs/digits-1"), metrics(out)
    assert got["held_out"] == expected["held_out"] and got["training"] == expected["training"]
    assert got["model"] == expected["model"]
    other = run("evaluate", checkpoint, "--data.seed=1", "--out=other", cwd=tmp_path)
    assert "report: other" in other.out
    assert metrics(tmp_path / "other")["held_out"]["variance"] != expected["held_out"]["variance"]


def test_evaluate_refuses(run, trained, tmp_path):
    folder, _ = trained
    write_mnist(tmp_path, compressed=True)
    checkpoint = folder / "runs/digits-1/checkpoints/last.ckpt"
    done = run("evaluate", checkpoint, "--data=MNIST", f"--data.root={tmp_path}", cwd=tmp_path, status=1)
    assert "--data must have examples of shape (1, 8, 8), as the run's model, got (1, 28, 28)" in done.err
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    done = run("evaluate", "--out=out", checkpoint, cwd=tmp_path, status=1)
    assert done.err == "kdejsd evaluate: error: RUN must stand before the options, got --out=out there\n"
    done = run("evaluate", "other.ckpt", cwd=tmp_path, status=1)
    assert "other.ckpt was not written by kdejsd fit" in done.err


def export(network: torch.nn.Module, path: Path, size: int | None = None, shape: tuple[int, ...] = (1, 8, 8)) -> None:
    """Saves a classifier of batches of any size, or of one size."""
    batch = {} if size else {"dynamic_shapes": ({0: torch.export.Dim("n")},)}
    torch.export.save(torch.export.export(network, (torch.zeros(size or 2, *shape),), **batch), path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A classifier of digits in a file, and the network itself."""
    data = Digits()
    data.setup()
    images, labels, _ = data.training[torch.arange(len(data.training))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Dropout(0.2))
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=60)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(network.eval()(images), labels)
        value.backward()
        return value

    optimizer.step(loss)
    path = tmp_path_factory.mktemp("classifier") / "digits.pt2"
    export(network, path)
    return path, network


@pytest.mark.pictures
def test_evaluate_with_a_classifier_reports_the_diversity(run, classifier, tmp_path):
    enough = ["--trainer.max_steps=300", "--model.learning_rate=1e-3"]  # for the decoder to make different digits
    run("fit", *SMALL, *enough, "--out=run", cwd=tmp_path)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    path, network = classifier
    done = run("evaluate", checkpoint, f"--classifier={path}", "--out=out", cwd=tmp_path)
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == REPORT | {"classes.png"}
    assert f"classifier: {path}" in (out / "config.yaml").read_text()
    report = metrics(out)
    assert report["held_out"] == metrics(tmp_path / "run")["held_out"] and "diversity" not in metrics(tmp_path / "run")

    model = built.GEN.load_from_checkpoint(checkpoint).eval()
    data = Digits(train_size=300)
    data.setup()
    with torch.no_grad():
        codes = model.encode(data.training[torch.arange(300)][0])
    expected = diversity_report(model.decoder, network, 2, codes=codes)
    got = report["diversity"]
    assert got["probabilities"] == pytest.approx(expected.probabilities, abs=1e-3)
    assert got["collision_entropy"] == pytest.approx(expected.collision_entropy, abs=1e-3)
    assert 1 < got["collision_entropy"] < math.log(10)
    assert got["class_radius"]["mean"] == pytest.approx(expected.class_radius.mean, rel=1e-3)
    assert got["holes"]["mass"] == pytest.approx(expected.holes.mass, abs=2e-3) and got["holes"]["num_codes"] == 300
    assert f"{got['collision_entropy']:.4f}" in done.out and f"{got['class_radius']['mean']:.4f}" in done.out
    picture = matplotlib.image.imread(out / "classes.png")[..., :3].reshape(-1, 3)
    shown = {tuple(color) for color in (255 * picture).round().astype(int)[::7].tolist()}
    for label, share in enumerate(expected.probabilities):
        light = tuple(round(255 * (0.5 + 0.5 * channel)) for channel in matplotlib.colormaps["tab10"].colors[label])
        assert share < 0.01 or any(max(abs(a - b) for a, b in zip(light, s, strict=True)) < 2 for s in shown), label


def test_evaluate_of_many_dimensions_searches_for_the_radius(run, classifier, tmp_path):
    small = [arg for arg in SMALL if "latent_dim" not in arg]
    network = ["--model.network=FC", "--model.network.hidden=[16]"]
    run("fit", *small, *network, "--model.latent_dim=6", "--trainer.max_epochs=1", "--out=run", cwd=tmp_path)
    done = run("evaluate", "run/checkpoints/last.ckpt", f"--classifier={classifier[0]}", cwd=tmp_path)
    assert "class radius: 256 of 1000 samples" in done.err and "class radius: 1000 of 1000 samples\n" in done.err
    out = tmp_path / "run" / "evaluation-1"
    assert {file.name for file in out.iterdir()} == REPORT  # no plane to draw classes in
    diversity = metrics(out)["diversity"]
    assert diversity["class_radius"]["method"] == "search" and diversity["class_radius"]["num_samples"] == 1000
    assert 0 < diversity["class_radius"]["mean"] < diversity["radius_bound"]


def test_evaluate_refuses_a_classifier(run, trained, classifier, tmp_path):
    checkpoint = trained[0] / "runs/digits-1/checkpoints/last.ckpt"
    whole, network = classifier
    (tmp_path / "text.pt2").write_text("nothing of the kind")
    (tmp_path / "half.pt2").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    torch.save(network.state_dict(), tmp_path / "weights.pt2")
    export(network, tmp_path / "fixed.pt2", size=4)
    export(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), tmp_path / "mnist.pt2", shape=(1, 28, 28))
    export(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1)), tmp_path / "one.pt2")
    export(network.train(), tmp_path / "train.pt2")
    network.eval()
    must_take = "must take float32 examples [n, 1, 8, 8] for any n, and gave an error"
    for name, message in (
        ("missing.pt2", "does not exist"),
        ("text.pt2", "is damaged or not a program exported by torch.export.save"),
        ("half.pt2", "is damaged or not a program exported by torch.export.save"),
        ("weights.pt2", "is damaged or not a program exported by torch.export.save"),
        ("fixed.pt2", must_take),
        ("mnist.pt2", must_take),
        ("one.pt2", "must return logits [n, classes] of at least 2 classes, got [5, 1] for 5 examples"),
        ("train.pt2", "must give an example the same logits every time and in any batch"),
    ):
        done = run("evaluate", checkpoint, "--classifier", name, "--out=out", cwd=tmp_path, status=1)
        assert f"kdejsd evaluate: error: classifier {name} {message}" in done.err
        assert not (tmp_path / "out").exists()


def table(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("split", ["held_out", "training"])
def test_score_writes_the_density_of_each_image(run, trained, tmp_path, split):
    checkpoint = tmp_path / "moved.ckpt"
    checkpoint.write_bytes((trained[0] / "runs/digits-1/checkpoints/last.ckpt").read_bytes())
    done = run("score", checkpoint, f"--split={split}", cwd=tmp_path)
    path = tmp_path / "score-1" / "scores.csv"
    assert f"scores: {path}" in done.out and done.err.endswith(
        f"scores: {len(table(path))} of {len(table(path))} examples\n"
    )
    rows = table(path)
    model = built.GEN.load_from_checkpoint(checkpoint)
    data = Digits(train_size=300)
    images, labels, _ = getattr(data, split)[torch.arange(len(rows))]
    variance = residual_variance(model.encode, model.decode, data.training[torch.arange(300)][0])
    expected = novelty_score(model.encode, model.decode, images, variance=variance)
    assert [row["index"] for row in rows] == list(range({"held_out": 359, "training": 300}[split]))
    assert [row["label"] for row in rows] == labels.tolist()
    for name, values in expected._asdict().items():
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-4)
    places = [int(row["row"]) for row in rows]
    assert torch.equal(torch.from_numpy(load_digits().images[places]).float()[:, None] / 16, images)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["score"])
    assert f"\nmost likely, by row: {', '.join(str(places[i]) for i in order[:10])}\n" in done.out
    assert f"\nleast likely, by row: {', '.join(str(places[i]) for i in order[::-1][:10])}\n" in done.out
    for name, chosen in (("most", order[:100]), ("least", order[::-1][:100])):
        drawn, expected_picture = path.with_name(f"scores_{name}_likely.png"), tmp_path / "expected.png"
        plots.grid(images[chosen]).savefig(expected_picture)
        assert (matplotlib.image.imread(drawn) == matplotlib.image.imread(expected_picture)).all()


def test_score_of_other_images(run, tmp_path):
    write_mnist(tmp_path / "mnist", compressed=True, counts=(60, 30))
    write_mnist(tmp_path / "fashion-mnist", compressed=True, counts=(40, 20))
    small = ["--model.latent_dim=2", "--model.num_lagged=50", "--model.bandwidth=0.4", "--trainer.accelerator=cpu"]
    run(
        *("fit", "--data=MNIST", f"--data.root={tmp_path}", "--data.batch_size=20", *small),
        *("--trainer.max_epochs=1", "--out=run"),
        cwd=tmp_path,
    )
    checkpoint = "run/checkpoints/last.ckpt"
    other = ["--data=FashionMNIST", f"--data.root={tmp_path}"]
    done = run("score", checkpoint, *other, "--out=new/fashion.csv", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "fashion.csv",
        "fashion_most_likely.png",
        "fashion_least_likely.png",
    }
    rows = table(tmp_path / "new/fashion.csv")
    model = built.GEN.load_from_checkpoint(tmp_path / checkpoint)
    training = MNIST(str(tmp_path), batch_size=20).training[torch.arange(60)][0]
    variance = residual_variance(model.encode, model.decode, training)
    assert f"the residual's variance is {variance:.4g}" in done.out
    fashion = FashionMNIST(str(tmp_path), batch_size=20).held_out[torch.arange(20)][0]
    expected = novelty_score(model.encode, model.decode, fashion, variance=variance).score
    assert [row["score"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-4)
    used = run("score", checkpoint, "--out=new/fashion.csv", cwd=tmp_path, status=1)
    assert "kdejsd score: error: out must be a new file, and new/fashion.csv exists" in used.err

    # A decoder that gives one image for every code, and training images that are gone.
    state = torch.load(tmp_path / checkpoint, weights_only=True)
    for name, value in state["state_dict"].items():
        if name.startswith("decoder"):
            value.zero_()
    torch.save(state, tmp_path / "collapsed.ckpt")
    (tmp_path / "mnist").rename(tmp_path / "elsewhere")
    gone = run("score", "collapsed.ckpt", *other, "--out=gone.csv", cwd=tmp_path, status=1)
    assert "the examples that the model was trained on are not there" in gone.err and "--variance" in gone.err
    assert not (tmp_path / "gone.csv").exists()
    done = run("score", "collapsed.ckpt", *other, "--variance=0.1", "--out=none.csv", cwd=tmp_path)
    assert "20 examples have no finite score" in done.out
    assert {row["log_det"] for row in table(tmp_path / "none.csv")} == {-math.inf}
    assert not (tmp_path / "none_most_likely.png").exists()


def test_scores_of_pictures_name_their_files(run, tmp_path):
    write_pictures(tmp_path / "pictures", **{"train/cat": 6, "train/dog": 6, "test/cat": 2, "test/dog": 3})
    small = ["--model.latent_dim=2", "--model.bandwidth=0.4", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    run("fit", *PICTURES, "--data.labelled_size=8", "--data.train_size=10", *small, "--out=run", cwd=tmp_path)
    done = run("score", "run", "--out=held_out.csv", cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "held_out.csv").read_text().splitlines()))
    names = ["test/cat/0.png", "test/cat/1.png", "test/dog/0.png", "test/dog/1.png", "test/dog/2.png"]
    assert [row["file"] for row in rows] == names
    (worst,) = re.findall(r"^least likely, by file: (.*), ", done.out, re.MULTILINE)
    scores = {row["file"]: float(row["score"]) for row in rows}
    assert scores[worst] == max(scores.values())  # which all of a class have, whose pictures are alike
    run("score", "run", "--split=training", "--out=training.csv", cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "training.csv").read_text().splitlines()))
    assert len({row["file"] for row in rows}) == 10 and [row["label"] for row in rows].count("-1") == 2
    assert all(row["label"] in ("-1", str(["cat", "dog"].index(row["file"].split("/")[1]))) for row in rows)


def test_score_refuses(run, trained, tmp_path):
    checkpoint = trained[0] / "runs/digits-1/checkpoints/last.ckpt"
    write_mnist(tmp_path, compressed=True)
    done = run("score", checkpoint, "--data=MNIST", f"--data.root={tmp_path}", cwd=tmp_path, status=1)
    assert "--data must have examples of shape (1, 8, 8), as the run's model, got (1, 28, 28)" in done.err
    assert "PositiveFloat" in run("score", checkpoint, "--variance=-1", cwd=tmp_path, status=2).err
    assert "held_out" in run("score", checkpoint, "--split=all", cwd=tmp_path, status=2).err
    assert "run must be given" in run("score", cwd=tmp_path, status=2).err


def test_resume_goes_on_with_the_settings_of_the_run(run, trained):
    folder, _ = trained
    checkpoint = "runs/digits-1/checkpoints/last.ckpt"
    run("fit", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=3", "--out=resumed", cwd=folder)
    run("fit", *SMALL, "--trainer.max_epochs=3", "--out=whole", cwd=folder)
    resumed, whole = last(folder / "resumed"), last(folder / "whole")
    assert (resumed["epoch"], resumed["global_step"]) == (whole["epoch"], whole["global_step"])
    for name, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed["state_dict"][name]), name


def test_resume_of_a_finished_run_writes_its_report_and_says_so(run, trained):
    folder, _ = trained
    again = ["fit", "--ckpt_path=runs/digits-1/checkpoints/last.ckpt"]
    done = run(*again, "--out=finished", cwd=folder)
    assert "nothing was left to train after step 6 of runs/digits-1/checkpoints/last.ckpt, and its report" in done.err
    assert "move the run's end by --trainer.max_epochs" in done.err
    run("fit", *SMALL, "--trainer.max_epochs=4", "--out=longer", cwd=folder)
    done = run("fit", "--ckpt_path=longer", "--trainer.max_epochs=2", cwd=folder, status=1)
    assert done.err == (
        "kdejsd fit: error: --trainer.max_epochs must be at least 3, as longer/checkpoints/last.ckpt has so many "
        "epochs behind it, got 2\n"
    )
    assert metrics(folder / "finished")["held_out"] == metrics(folder / "runs/digits-1")["held_out"]


def test_yaml_network_mixture_and_mnist(run, tmp_path):
    write_mnist(tmp_path / "files" / "mnist", compressed=True, counts=(60, 30))
    (tmp_path / "settings.yaml").write_text(
        """
        seed_everything: 3
        data: {class_path: MNIST, init_args: {root: files, batch_size: 20}}
        model:
          latent_dim: 2
          num_lagged: 50
          bandwidth: 0.3
          network: {class_path: Conv, init_args: {channels: 4}}
          target: {class_path: GaussianMixture, init_args: {means: [[-2, 0], [2, 0]], scales: 0.5}}
        trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
        """
    )
    run("fit", "--config", "settings.yaml", "--model.divergence=kl", cwd=tmp_path)
    out = tmp_path / "runs" / "mnist-1"
    report = metrics(out)
    assert report["run"]["seed"] == 3 and report["run"]["steps"] == 3
    assert report["model"]["divergence"] == "kl" and "GaussianMixture" in report["model"]["target"]
    assert report["held_out"]["expected_variance"] == [4.25, 0.25]
    assert last(out)["state_dict"]["encoder.0.weight"].shape == (4, 1, 4, 4)
    run("evaluate", out / "checkpoints/last.ckpt", cwd=tmp_path)
    assert metrics(out / "evaluation-1")["held_out"] == report["held_out"]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("AE", []),
        ("AAE", ["--model.weight=0.1", "--model.discriminator_hidden=[16,16,16]"]),
        ("VAE", []),
        ("VAE", ["--model.prior=flow", "--model.flow_layers=2"]),
        ("LCVAE", ["--model.constraint=spectral", "--model.omega_weight=0.1", "--model.scale_free=true"]),
        ("WAE", ["--model.target=GaussianMixture", "--model.target.means=[[-2,0],[2,0]]", "--model.target.scales=0.5"]),
        ("GEN", ["--model.num_lagged=200", "--model.bandwidth=0.4"]),
        (
            "SemiSupervisedGEN",
            [
                "--data.labelled_size=50",
                "--model.num_lagged=200",
                "--model.bandwidth=0.4",
                "--model.target=GaussianMixture",
                f"--model.target.means={[[i // 5, i % 5] for i in range(10)]}",
                "--model.target.scales=0.3",
            ],
        ),
    ],
)
def test_every_model_is_trained_resumed_and_evaluated_by_its_short_name(run, tmp_path, model, settings):
    args = ["--data.train_size=300", f"--model={model}", "--model.latent_dim=2", "--model.network=FC"]
    args += ["--model.network.hidden=[32]", "--model.decay=false", "--trainer.accelerator=cpu", *settings]
    done = run("fit", *args, "--trainer.max_epochs=1", "--out=half", cwd=tmp_path)
    report = metrics(tmp_path / "half")
    assert report["model"]["name"] == model and report["run"]["steps"] == 3 and "3/3" in done.err
    assert ("gradient_weight" in report["held_out"]) == ("latent_time_share" in report["run"]) == ("GEN" in model)
    assert ("1 - r" in done.out) == ("GEN" in model) and ("posterior" in done.out) == ("VAE" in model)
    assert {path.name for path in (tmp_path / "half").iterdir()} >= REPORT
    run("evaluate", "half/checkpoints/last.ckpt", cwd=tmp_path)
    again = metrics(tmp_path / "half/evaluation-1")
    assert again["held_out"] == report["held_out"] and again["model"] == report["model"]

    ends = ["--trainer.max_epochs=2"]
    run("fit", "--ckpt_path=half/checkpoints/last.ckpt", *ends, "--out=resumed", cwd=tmp_path)
    run("fit", *args, *ends, "--out=whole", cwd=tmp_path)
    resumed, whole = last(tmp_path / "resumed"), last(tmp_path / "whole")
    assert resumed["global_step"] == whole["global_step"] == 6
    for name, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed["state_dict"][name]), name


def test_the_diversity_of_a_vae_is_that_of_what_its_flow_and_decoder_make(run, classifier, tmp_path):
    args = ["--model=VAE", "--model.prior=flow", "--model.latent_dim=2", "--trainer.max_epochs=6", "--out=run"]
    args += ["--model.observation_variance=0.03", "--model.learning_rate=3e-3", "--trainer.accelerator=cpu"]
    run("fit", *args, cwd=tmp_path)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    run("evaluate", checkpoint, f"--classifier={classifier[0]}", "--out=out", cwd=tmp_path)
    model = BuiltModel.load_from_checkpoint(checkpoint).eval()
    z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = classifier[1](model.decode(z)).argmax(1)
    shares = labels.bincount(minlength=10) / len(labels)
    assert metrics(tmp_path / "out")["diversity"]["probabilities"] == pytest.approx(shares.tolist(), abs=0.02)
    assert shares.max() < 0.99


@pytest.mark.pictures
@pytest.mark.parametrize(("name", "write"), [("SVHN", write_svhn), ("CelebA", write_celeba)])
def test_images_in_colour(run, tmp_path, name, write):
    write(tmp_path / "files")
    data = [f"--data={name}", "--data.root=files", "--data.batch_size=3"]
    small = ["--model.network=Conv", "--model.network.channels=4", "--model.num_lagged=3", "--model.bandwidth=1"]
    run("fit", *data, *small, "--trainer.max_steps=2", "--trainer.accelerator=cpu", cwd=tmp_path)
    out = tmp_path / "runs" / f"{name.lower()}-1"
    assert {path.name for path in out.iterdir()} >= REPORT
    run("evaluate", out / "checkpoints/last.ckpt", cwd=tmp_path)
    assert metrics(out / "evaluation-1")["held_out"] == metrics(out)["held_out"]


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(run, tmp_path):
    args = [*SMALL, "--trainer.max_epochs=100000", "--out=run"]
    process = subprocess.Popen(
        command("fit", *args), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run/checkpoints/last.ckpt").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "to go on: kdejsd fit --ckpt_path run\n" in out
    assert "Traceback" not in out
    interrupted = last(tmp_path / "run")
    steps = interrupted["global_step"]
    assert f"of step {steps};" in out
    assert interrupted["state_dict"]["lagged.codes"].shape == (200, 2)
    limits = ["--trainer.max_epochs=-1", f"--trainer.max_steps={steps + 4}"]
    run("fit", "--ckpt_path=run/checkpoints/last.ckpt", *limits, "--out=resumed", cwd=tmp_path)
    assert metrics(tmp_path / "resumed")["run"]["steps"] == steps + 4


PICTURES = ["--data=ImageFolder", "--data.root=pictures", "--data.batch_size=2"]
FILES = {
    "broken.yaml": "model: {latent_dim: [1",
    "list.yaml": "- 1",
    "typo.yaml": "modell: {class_path: GEN}",
    "nested.yaml": "model: {class_path: GEN, init_args: {latent_dims: 3}}",
    "text.ckpt": "no checkpoint",
}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--data=MNIST", "--data.root=nowhere"],
            "MNIST needs train-images-idx3-ubyte.gz .*--data.root; to get it: .*",
        ),
        (["--data=MNIST"], "MNIST needs --data.root"),
        (
            ["--data=MNST"],
            "--data must be one of Digits, .* or the import path of a class, got MNST; did you mean MNIST.*",
        ),
        (["--model=Diffusion"], "--model must be one of AAE, AE, GAN, .* or the import path of a class, got Diffusion"),
        (["--model=gen"], "--model must be one of .*, got gen; did you mean GEN.*"),
        (["--model=nope.Nope"], "--model nope.Nope is not the import path of a class: No module named 'nope'"),
        (["--model=AE", "--model.num_lagged=5"], "AE has no setting --model.num_lagged"),
        (["--model.latent-dim=3"], "GEN has no setting --model.latent-dim; did you mean --model.latent_dim.*"),
        (["--latent_dim", "3"], "there is no setting --latent_dim; did you mean --model.latent_dim.*"),
        (["--batch_size=3"], "there is no setting --batch_size; did you mean --data.batch_size.*"),
        (["--trainer.max_step=3"], "there is no setting --trainer.max_step; did you mean --trainer.max_steps.*"),
        (["--nope=3"], "there is no setting --nope; --help lists them"),
        (["--config=typo.yaml"], "there is no setting --modell; did you mean --model.*"),
        (["--config=nested.yaml"], "GEN has no setting --model.latent_dims; did you mean --model.latent_dim.*"),
        (["--config=nope.yaml"], "the file nope.yaml of --config cannot be read: No such file or directory"),
        (["--config=broken.yaml"], "the file broken.yaml of --config is not valid YAML: .* in line 1, column 23"),
        (["--config=list.yaml"], r"the file list.yaml of --config must hold settings by name \(.*\), got list"),
        (
            ["--model=GAN", "--model.objective=wgangp"],
            r"--model\.objective: expected one of 'minimax', .*'f-gan', got wgangp; did you mean wgan-gp.*",
        ),
        (["--model.latent_dim=three"], "--model.latent_dim: expected an integer, got three"),
        (["--model.latent_dim=0"], "latent_dim must be at least 1, got 0"),
        (["--model.target=GaussianMixture"], "--model.target.means must be given"),
        (["--model.network=Conv"], r"Conv takes square images of side 28, 32 or 64, got example_shape \[1, 8, 8\].*"),
        (
            [*PICTURES, "--data.size=33", "--model=AE", "--model.network=Conv"],
            r"Conv takes square images of side 28, 32 or 64, got example_shape \[3, 33, 33\]; FC takes any",
        ),
        (["--model.network=Nope"], "--model.network: expected the name or the import path of a class, got Nope"),
        (["--model.network.hiden=[3]"], "there is no setting --model.network.hiden"),
        (["--data.batch_size=0"], "batch_size must be at least 1, got 0"),
        (
            ["--model.num_lagged=9", "--data.batch_size=1"],
            "codes must be at least 2 .* take a batch_size of at least 2",
        ),
        (["--model.num_lagged=100000"], "num_lagged must be at most 1438, the size of the training set, got 100000"),
        (["--trainer.logger=WandbLogger"], ".*wandb.*pip install.*"),
        (["--trainer.precision=7"], "--trainer.precision: expected one of .*'64-true'.*"),
        (["--trainer.max_steps=-5"], "--trainer.max_steps must be at least 1, or -1 for no limit, got -5"),
        (["--trainer.max_steps=0"], "--trainer.max_steps must be at least 1, or -1 for no limit, got 0"),
        (["--trainer.max_epochs=0"], "--trainer.max_epochs must be at least 1, or -1 for no limit, got 0"),
        (["--trainer.accelerator=x"], r"ValueError: .*x.*\(--debug shows where\)"),
        (["--ckpt_path=nope.ckpt"], "the checkpoint nope.ckpt does not exist"),
        (["--ckpt_path=pictures"], "the folder pictures .*: there is no pictures/checkpoints/last.ckpt; name .*"),
        (
            ["--config=nothing.yaml", "--ckpt_path=text.ckpt"],
            "text.ckpt is damaged or no checkpoint of plain values: .*",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line_and_leaves_no_folder(run, tmp_path, args, message):
    write_pictures(tmp_path / "pictures", cat=4)
    for name, text in (FILES | {"nothing.yaml": "seed_everything: 0"}).items():
        (tmp_path / name).write_text(text)
    before = set(tmp_path.rglob("*"))
    done = run("fit", *args, cwd=tmp_path, status=(1, 2))
    said = [line for line in done.err.splitlines() if not line.startswith("ImageFolder: ")]
    assert len(said) == 1 and re.fullmatch(f"kdejsd fit: error: {message}", said[0])
    assert set(tmp_path.rglob("*")) == before and done.out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], "kdejsd: error: there is no command fitt; did you mean fit?"),
        (["train"], "kdejsd: error: there is no command train; --help lists them"),
        (["--hlep"], "kdejsd: error: there is no option --hlep; did you mean --help?"),
        (["info", "now"], "kdejsd info: error: unrecognized arguments: now"),
        (
            ["bandwidth", "--latent-dim=2"],
            "kdejsd bandwidth: error: there is no option --latent-dim; did you mean --latent_dim?",
        ),
        (
            ["bandwidth", "--latent_dim=2"],
            "kdejsd bandwidth: error: the following arguments are required: --num_centers",
        ),
        (
            ["bandwidth", "--latent_dim=2", "--num_centers=x"],
            "kdejsd bandwidth: error: argument --num_centers: expected an integer of at least 1, got x",
        ),
        (
            ["bandwidth", "--latent_dim=0", "--num_centers=5"],
            "kdejsd bandwidth: error: argument --latent_dim: expected an integer of at least 1, got 0",
        ),
        (
            ["bandwidth", "--latent_dim=2", "--num_centers=5", "--smoothed", "--method=fixed-point"],
            "kdejsd bandwidth: error: --smoothed needs --method root, got fixed-point",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_and_options_that_are_not_there(run, tmp_path, args, message):
    assert run(*args, cwd=tmp_path, status=2) == Done("", f"{message}\n")


def test_settings_in_a_file_for_another_class_are_told(run, tmp_path):
    (tmp_path / "aae.yaml").write_text(
        "model: {class_path: AAE, init_args: {latent_dim: 3, learning_rate: 1e-4, discriminator_hidden: [8]}}\n"
        "data: {class_path: Digits, init_args: {train_size: 200}}\ntrainer: {max_steps: 1}"
    )
    done = run("fit", "--config=aae.yaml", "--model=AE", "--model.latent_dim=5", "--out=a", cwd=tmp_path)
    assert done.err.splitlines()[0] == (
        "aae.yaml has settings for AAE, and the model is AE, which takes over latent_dim=5, learning_rate=0.0001 and "
        "leaves out discriminator_hidden"
    )
    assert "has settings for" not in run("fit", "--config=aae.yaml", "--out=b", cwd=tmp_path).err


@pytest.mark.parametrize("model", ["GEN", "AE"])
@pytest.mark.parametrize("limit", ["limit_train_batches=0", "max_time=00:00:00:00"])
@pytest.mark.parametrize("out", [True, False])
def test_a_run_without_a_step_says_so_and_leaves_no_folder(run, tmp_path, model, limit, out):
    lagged = ["--model.num_lagged=50", "--model.bandwidth=1"] if model == "GEN" else []
    (tmp_path / "out").mkdir()
    to = ["--out=out"] if out else []
    done = run("fit", f"--model={model}", *lagged, f"--trainer.{limit}", *to, cwd=tmp_path, status=1)
    assert "nothing was left to train: the trainer's limits must leave one step at least, got max_epochs=" in done.err
    assert limit in done.err and done.err.count("error") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]  # which this run has not made


@pytest.mark.parametrize("args", [["fit", "--debug"], ["--debug", "fit"]])
def test_the_traceback_is_there_when_it_is_asked_for(run, tmp_path, args):
    with pytest.raises(ValueError, match="train_size must be at least 1"):
        run(*args, "--data.train_size=0", cwd=tmp_path)


PRECISE = {
    "AE": [],
    "AAE": ["--model.discriminator_hidden=[8]"],
    "VAE": ["--model.prior=flow", "--model.flow_layers=2"],
    "LCVAE": [],
    "WAE": ["--model.target=GaussianMixture", "--model.target.means=[[-0.3,0],[0.3,0]]", "--model.target.scales=0.7"],
    "GEN": ["--model.num_lagged=30", "--model.bandwidth=0.5"],
    "StochasticGEN": ["--model.num_lagged=30", "--model.bandwidth=1", "--model.refresh=rolling"],
    "SemiSupervisedGEN": [
        *("--model.num_lagged=30", "--model.bandwidth=0.5", "--model.target=GaussianMixture"),
        f"--model.target.means={[[i // 5, i % 5] for i in range(10)]}",
    ],
    "GAN": ["--model.objective=wgan-gp"],
}


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("model", PRECISE)
def test_every_precision_is_trained_reported_evaluated_and_scored(run, tmp_path, model, precision):
    small = ["--data.train_size=40", "--data.batch_size=20", "--model.latent_dim=2", "--model.network=FC"]
    small += ["--model.network.hidden=[8]", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    args = [f"--trainer.precision={precision}", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    run("fit", f"--model={model}", *small, *args, *PRECISE[model], "--out=a", cwd=tmp_path)
    first = metrics(tmp_path / "a")["held_out"]
    assert model == "GAN" or math.isfinite(first["reconstruction_error"])
    if precision != "bf16-true":  # the checkpoint is read in float32, whatever the precision was: one stands for all
        return
    run("evaluate", "a/checkpoints/last.ckpt", "--out=b", cwd=tmp_path)
    assert first == metrics(tmp_path / "b")["held_out"]
    if model != "GAN":
        run("score", "a/checkpoints/last.ckpt", "--out=s.csv", cwd=tmp_path)
        assert len(table(tmp_path / "s.csv")) == 359


def test_progress_in_a_file_is_a_line_now_and_then(run, trained, tmp_path, monkeypatch):
    _, done = trained
    assert "\r" not in done.out + done.err and re.search(r"^epoch 2: step 6/6, rec=", done.err, re.MULTILINE)
    assert "epoch" not in done.out
    monkeypatch.setattr("kdejsd.runs.progress._LINE_INTERVAL", 0)
    done = run("fit", *SMALL, "--trainer.max_steps=4", "--out=a", cwd=tmp_path)
    assert re.findall(r"^epoch (\d): step (\d)/4", done.err, re.MULTILINE) == [
        ("1", "1"),
        ("1", "2"),
        ("1", "3"),
        ("2", "4"),
        ("2", "4"),
    ]
    run("fit", *SMALL, "--trainer.max_steps=2", "--out=b", cwd=tmp_path)
    done = run("fit", "--ckpt_path=b/checkpoints/last.ckpt", "--trainer.max_steps=3", "--out=c", cwd=tmp_path)
    assert re.findall(r"^epoch (\d): step (\d)/3", done.err, re.MULTILINE) == [("1", "3"), ("1", "3")]


@pytest.mark.parametrize("columns", [50, 80, 120])
def test_progress_on_a_terminal_is_a_bar_and_two_lines_of_figures_that_do_not_wrap(run, tmp_path, monkeypatch, columns):
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how the end of a terminal is told
            while part := os.read(ours, 10_000):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with open(its, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        patch.setenv("NO_COLOR", "1")
        run("fit", *SMALL, "--trainer.max_epochs=4", "--out=a", cwd=tmp_path)
    reader.join(timeout=10)
    os.close(ours)
    text = b"".join(shown).decode()
    assert "\x1b[" not in text.replace("\x1b[A", "")  # the cursor goes up a line, and nothing has a colour
    pieces = re.split(r"[\r\n]+", text.replace("\x1b[A", ""))
    assert max(map(len, pieces)) <= columns
    end = [piece.strip() for piece in pieces if piece.strip()][-3:]
    assert end[0].startswith("epoch 4: 100%") and end[1].startswith("rec=") and end[2].startswith("val_rec=")
    assert columns < 80 or ("1-r=" in end[1] and "val_jsd=" in end[2] and "12/12" in end[0])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("loss/reconstruction", "rec"),
        ("loss/latent", "latent"),
        ("train/gradient_weight", "1-r"),
        ("val/reconstruction", "val_rec"),
        ("val/jsd", "val_jsd"),
    ],
)
def test_logged_values_have_short_names_on_the_screen(name, short):
    assert progress._short(name) == short


def test_a_run_without_checkpoints_has_a_report(run, tmp_path):
    args = ["--trainer.enable_checkpointing=false", "--trainer.max_steps=2", "--out=a"]
    run("fit", *SMALL, *args, cwd=tmp_path)
    assert {path.name for path in (tmp_path / "a").iterdir()} >= REPORT and not list(tmp_path.rglob("*.ckpt"))


def test_the_command_needs_no_backend_of_matplotlib(tmp_path):
    code = "from kdejsd.cli import main\ncode = main(['evaluate', 'none.ckpt'])\nimport os, sys, matplotlib\n"
    code += "print(code, os.environ['MPLBACKEND'], matplotlib.get_backend(), 'matplotlib.pyplot' in sys.modules)"
    named = os.environ | {"MPLBACKEND": "module://not_there.backend"}
    done = subprocess.run(command(code=code), cwd=tmp_path, env=named, capture_output=True, text=True)
    assert done.stdout == "1 module://not_there.backend agg True\n", done.stderr
    assert done.stderr == "kdejsd evaluate: error: the checkpoint none.ckpt does not exist\n"


def test_bandwidth(run, tmp_path):
    out, err = run("bandwidth", "--latent_dim=2", "--num_centers=250", "--trials=4", cwd=tmp_path)
    assert err == "bandwidth of 250 centers in 2 dimensions: trial 1 of 4\n"
    value, spread = (float(x) for x in re.findall(r"\d+\.\d+", out))
    assert 0.3 < value < 0.7 and 0 < spread < 0.2
    assert "4 trials" in out
    out, err = run("bandwidth", "--latent_dim=8", "--num_centers=1000000", cwd=tmp_path)  # the mean over all sets
    assert out == "bandwidth           0.3808\n" and err == ""


def test_info(run, tmp_path):
    lines = run("info", cwd=tmp_path).out.splitlines()
    assert len(lines) > 3 and lines[0].startswith("version")
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in lines if " " in line}) == 1  # aligned


def test_help_names_the_settings(run, tmp_path):
    assert all(name in run("--help", cwd=tmp_path).out for name in ("fit", "evaluate", "bandwidth", "info", "--debug"))
    text = run("fit", "--help", cwd=tmp_path).out
    assert "--classifier" in run("evaluate", "--help", cwd=tmp_path).out
    places = [
        text.index(f"  --{name} ") for name in ("out", "model.num_lagged", "data.train_size", "trainer.max_steps")
    ]
    assert places == sorted(places) and "--ckpt_path" in text and "--model.network" in text
    assert "--model.discriminator_hidden" not in text and all(name in text for name in ("AAE", "AE", "VAE", "WAE"))
    assert "--trainer.num_nodes" not in text and "--help-all" in text
    assert "--trainer.num_nodes" in run("fit", "--help-all", cwd=tmp_path).out
    (tmp_path / "aae.yaml").write_text("model: {class_path: AAE}")
    for chosen in (["--model", "AAE"], ["--model=kdejsd.models.built.AAE"], ["--config=aae.yaml"]):
        text = run("fit", *chosen, "--help", cwd=tmp_path).out
        assert "--model.discriminator_hidden" in text and "--model.num_lagged" not in text
    assert "--data.channels" in run("fit", "--data=ImageFolder", "--help", cwd=tmp_path).out


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["bandwidth", "--help"], ["fitt"]])
def test_help_and_version_import_nothing_that_takes_long(args):
    code = "import atexit, sys\natexit.register(lambda: print(*sys.modules))\nfrom kdejsd.cli import main\nmain()"
    done = subprocess.run(command(*args, code=code), capture_output=True, text=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "kdejsd.cli" in modules and not {"torch", "numpy", "lightning"} & set(modules), done.stderr
    if args == ["--version"]:
        assert done.stdout.startswith(f"kdejsd {__version__}\n")


@pytest.mark.parametrize("package", ["lightning", "matplotlib", "sklearn"])
def test_missing_extra(package, tmp_path):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "import kdejsd, kdejsd.lagged; from kdejsd.cli import main; raise SystemExit(main())"
    )
    done = subprocess.run(command("fit", code=code), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    missing = rf'kdejsd fit: error: kdejsd needs the package "{package}[\w.]*" for this, and it is not installed: '
    assert re.fullmatch(missing + r'pip install "kdejsd\[train\]"\n', done.stderr)


def test_import_takes_nothing_of_the_extra():
    code = "import sys, kdejsd, kdejsd.lagged; print(*sys.modules)"
    modules = subprocess.run(command(code=code), capture_output=True, text=True, check=True).stdout.split()
    assert "kdejsd.lagged" in modules
    assert not {"lightning", "torchmetrics", "matplotlib", "sklearn", "jsonargparse", "PIL"} & set(modules)


def test_a_run_is_compiled_and_goes_on_so(run, monkeypatch, tmp_path):
    compiled, compile_ = [], torch.compile

    def recorded(model):
        compiled.append(model)
        return compile_(model, backend="eager")  # the default one takes half a minute

    monkeypatch.setattr(torch, "compile", recorded)
    run("fit", *SMALL, "--trainer.max_steps=2", "--compile", "--out=a", cwd=tmp_path)
    run("fit", "--ckpt_path=a", "--trainer.max_steps=4", cwd=tmp_path)
    assert [type(model) for model in compiled] == 2 * [GEN]
    assert yaml.safe_load((tmp_path / "a/config.yaml").read_text())["compile"] is True
