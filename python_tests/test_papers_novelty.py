"""The scripts of the papers on novelty, the steady state and interpolation run, and find what must be found."""

import csv
import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from helpers import points

from kdejsd.data import ExampleSet

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"
RECORDS = PAPERS.parent / "results" / "papers"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPERS))
    return importlib.import_module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_gen_novelty(script, tmp_path, monkeypatch, capsys):
    gen_novelty = script("gen_novelty")
    assert gen_novelty.main(["--quick", "--out", str(tmp_path / "novelty")]) == 0
    rows = rows_of(tmp_path / "novelty.csv")
    found = {(row["experiment"], row["score"]): row for row in rows}
    assert len(rows) == len(found) == 2 * len(gen_novelty.SCORES)
    assert all(0 <= float(row["auroc"]) <= 1 and 0 <= float(row["average_precision"]) <= 1 for row in rows)
    for experiment, least in (("only 0", 0.97), ("0 to 4", 0.8)):
        assert float(found[experiment, "density"]["auroc"]) > least
        assert float(found[experiment, "density"]["average_precision"]) > least
    assert float(found["only 0", "density"]["novel_share"]) == pytest.approx(321 / 359, abs=1e-6)
    out = capsys.readouterr().out
    assert f"{100 * float(found['0 to 4', 'density']['auroc']):.1f} %" in out
    assert "The paper shows pictures and prints no numbers" in out
    for experiment in ("only_0", "0_to_4"):
        most, least = (tmp_path / f"novelty_{experiment}_{name}_likely.png" for name in ("most", "least"))
        assert (matplotlib.image.imread(most) != matplotlib.image.imread(least)).any()

    # A second call takes its rows from the record.
    monkeypatch.setattr(gen_novelty, "trained", None)
    record = (tmp_path / "novelty.csv").read_text()
    assert gen_novelty.main(["--quick", "--out", str(tmp_path / "novelty")]) == 0
    assert (tmp_path / "novelty.csv").read_text() == record
    again = capsys.readouterr().out
    assert again.partition("\n\n")[2] == out.partition("\n\n")[2] and again.count("from the record") == 2


def test_gen_novelty_takes_no_rows_of_other_settings(script, tmp_path, monkeypatch, capsys):
    gen_novelty = script("gen_novelty")
    record = Path(shutil.copy(RECORDS / "gen_novelty.csv", tmp_path))  # has rows of "only 0", a digit of MNIST
    trained = []

    def run(experiment, setting, pictures):
        trained.append((setting.latent_dim, setting.seed, experiment.name))
        row = {"auroc": 0.25 + 0.1 * setting.seed, "average_precision": 0.5, "novel_share": 0.5}
        return [row | {"score": name} for name in gen_novelty.SCORES]

    monkeypatch.setattr(gen_novelty, "run", run)
    settings = [(8, 0), (8, 1), (2, 0)]
    for dim, seed in [*settings, *settings]:
        options = ["--latent_dim", str(dim), "--seed", str(seed), "--out", str(record.with_suffix(""))]
        assert gen_novelty.main(["--quick", *options]) == 0
        assert f"AUROC of the density {25 + 10 * seed}.0 %" in capsys.readouterr().out
    assert trained == [(*setting, name) for setting in settings for name in ("only 0", "0 to 4")]


def test_gen_novelty_prints_its_committed_record(script, tmp_path, monkeypatch, capsys):
    gen_novelty = script("gen_novelty")
    images = ExampleSet(torch.zeros(10, 1, 1, 1), torch.arange(10))
    for name in ("MNIST", "FashionMNIST"):
        monkeypatch.setattr(gen_novelty, name, lambda root: SimpleNamespace(training=images, held_out=images))
    monkeypatch.setattr(gen_novelty, "run", None)
    record = Path(shutil.copy(RECORDS / "gen_novelty.csv", tmp_path))
    assert gen_novelty.main(["--data", "DIR", "--out", str(record.with_suffix(""))]) == 0
    table = capsys.readouterr().out.partition("\n\n")[2]
    assert "mean of 10" in table and table in (RECORDS / "gen_novelty.txt").read_text()


def test_gen_novelty_divides_the_classes(script):
    gen_novelty = script("gen_novelty")
    labels = torch.arange(40) % 5
    images = ExampleSet(torch.arange(40.0).reshape(40, 1, 1, 1), labels)
    made = gen_novelty.class_experiment(images, images, [1, 3], "1 and 3")
    assert set(made.training.labels.tolist()) == set(made.normal.labels.tolist()) == {1, 3}
    assert set(made.novel.labels.tolist()) == {0, 2, 4}
    assert (gen_novelty.images_of(made.novel).flatten() % 5 == made.novel.labels).all()


@pytest.mark.parametrize("name", ["gen_novelty", "gen_steady_state"])
def test_the_full_mode_asks_for_the_data(script, name, monkeypatch, capsys):
    monkeypatch.delenv("KDEJSD_DATA", raising=False)
    with pytest.raises(SystemExit):
        script(name).main([])
    assert "--data names the folder" in capsys.readouterr().err


def test_gen_steady_state(script, tmp_path, capsys):
    gen_steady_state = script("gen_steady_state")
    assert gen_steady_state.main(["--quick", "--out", str(tmp_path / "steady")]) == 0
    rows = rows_of(tmp_path / "steady.csv")
    for row in rows:
        h, variance, predicted = (float(row[name]) for name in ("bandwidth", "variance", "predicted"))
        assert predicted == pytest.approx(1.0 if row["smoothed"] == "True" else 1 - h * h)
        if row["family"] == "kernel":
            assert variance == pytest.approx(predicted, rel=0.02)
        elif row["family"] == "linear" and h > 0.6:
            assert variance == pytest.approx(predicted, rel=0.1)
        elif row["family"] == "GEN":
            assert variance == pytest.approx(predicted, rel=0.15)
    assert {row["family"] for row in rows} == set(gen_steady_state.FAMILIES)
    assert "0.813" in capsys.readouterr().out and (tmp_path / "steady.png").stat().st_size > 5000


@pytest.mark.parametrize("smoothed", [False, True])
def test_the_steady_state_of_many_dimensions(script, smoothed):
    gen_steady_state = script("gen_steady_state")
    codes = gen_steady_state.steady_codes("kernel", 5, 400, 0.8, smoothed, steps=200, seed=1)
    assert codes.shape == (2, 400, 5)
    predicted = gen_steady_state.predicted_variance(0.8, smoothed)
    assert float(codes.var(1).mean()) == pytest.approx(predicted, rel=0.05)


def test_gen_interpolation(script, tmp_path, capsys):
    gen_interpolation = script("gen_interpolation")
    assert gen_interpolation.main(["--quick", f"--out={tmp_path / 'digits'}", "--rows=3", "--steps=5"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith(("line", "arc"))}
    middle = {path: float(line.split()[4]) for path, line in lines.items()}
    assert middle["line"] < 0.95 and middle["line"] < middle["arc"]
    line, arc = (matplotlib.image.imread(tmp_path / f"digits_{path}.png") for path in ("line", "arc"))
    assert line.shape == arc.shape and (line != arc).any()


def test_interpolation_is_between_classes(script):
    gen_interpolation = script("gen_interpolation")
    images = ExampleSet(points(30, 1, 2, 2).float(), torch.arange(30) % 3)
    starts, ends = gen_interpolation.pairs(images, 10, seed=0)
    assert len(set(starts.tolist())) == len(set(ends.tolist())) == 10
    assert (images.labels[starts] != images.labels[ends]).all()
    unknown = ExampleSet(images.examples, torch.full((30,), -1))
    starts, ends = gen_interpolation.pairs(unknown, 10, seed=0)
    assert len(ends) == 10 and (starts != ends).all()
    with pytest.raises(ValueError, match="no image"):
        gen_interpolation.pairs(ExampleSet(images.examples, torch.zeros(30, dtype=torch.int64)), 10, seed=0)
