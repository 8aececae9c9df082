"""The scripts of the papers on novelty, the steady state and interpolation run, and find what must be found."""

import csv
import importlib
from pathlib import Path

import matplotlib.image
import pytest
import torch
from helpers import points

from kdejsd.data import ExampleSet

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPERS))
    return importlib.import_module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_gen_novelty(script, tmp_path, capsys):
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
        h, variance, law = (float(row[name]) for name in ("bandwidth", "variance", "law"))
        assert law == pytest.approx(1.0 if row["smoothed"] == "True" else 1 - h * h)
        if row["family"] == "kernel":
            assert variance == pytest.approx(law, rel=0.02)
        elif row["family"] == "linear" and h > 0.6:
            assert variance == pytest.approx(law, rel=0.1)
        elif row["family"] == "GEN":
            assert variance == pytest.approx(law, rel=0.15)
    assert {row["family"] for row in rows} == set(gen_steady_state.FAMILIES)
    assert "0.813" in capsys.readouterr().out and (tmp_path / "steady.png").stat().st_size > 5000


@pytest.mark.parametrize("smoothed", [False, True])
def test_the_steady_state_of_many_dimensions(script, smoothed):
    gen_steady_state = script("gen_steady_state")
    codes = gen_steady_state.steady_codes("kernel", 5, 400, 0.8, smoothed, steps=200, seed=1)
    assert codes.shape == (2, 400, 5)
    assert float(codes.var(1).mean()) == pytest.approx(gen_steady_state.law_of(0.8, smoothed), rel=0.05)


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
