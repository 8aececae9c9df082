"""The script of class radius and mode collapse runs, goes on where it was stopped, and correlates what it should."""

import csv
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from helpers import run_here
from scipy.stats import spearmanr

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"


@pytest.fixture(scope="module")
def gan_collapse():
    sys.path.insert(0, str(PAPERS))
    import gan_collapse

    return gan_collapse


def test_quick(tmp_path):
    def run():
        done = run_here(PAPERS / "gan_collapse.py", "--quick", "--out", tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed, record = run(), (tmp_path / "gan_collapse.csv").read_text()
    rows = list(csv.DictReader(record.splitlines()))
    kinds = [(row["objective"], row["packing"], row["seed"]) for row in rows]
    assert kinds == [
        ("non-saturating", "1", "0"),
        ("non-saturating", "2", "1"),
        ("f-pearson", "1", "2"),
        ("f-pearson", "2", "3"),
    ]
    for row in rows:
        assert 0 <= float(row["modes_captured"]) <= 9 and 0 <= float(row["reverse_kl"]) <= np.log(9)
        # The estimate by the nearest sample is too large by some 0.01 to 0.02 at 10 000 samples.
        assert 0 < float(row["class_radius"]) < float(row["radius_bound"]) + 0.03
    radius = [float(row["class_radius"]) for row in rows]
    expected = spearmanr(radius, [float(row["collision_entropy"]) for row in rows]).statistic
    assert f"with collision entropy    {expected:.3f}" in printed
    for name in ("fewest_classes", "median_samples", "most_classes", "most_samples"):
        assert matplotlib.image.imread(tmp_path / f"gan_collapse_{name}.png").std() > 0.02
    assert run().splitlines()[4:] == printed.splitlines()[4:]  # below the progress
    assert (tmp_path / "gan_collapse.csv").read_text() == record  # nothing was trained again


def test_correlation_with_its_interval(gan_collapse):
    random = np.random.default_rng(1)
    modes = random.integers(2, 26, 40)

    def rows(radius):
        return [{"class_radius": r, "modes_captured": m} for r, m in zip(radius, modes, strict=True)]

    falling = rows(1 / np.sqrt(modes))
    assert gan_collapse.correlation(falling, "modes_captured") == pytest.approx((-1, -1, -1))
    value, low, high = gan_collapse.correlation(rows(random.random(40)), "modes_captured")
    assert low < value < high and low < 0 < high and 0.3 < high - low < 1
    # One class alone has no radius: counted as the largest. Samples that are not finite: left out.
    one_class = {"class_radius": np.inf, "modes_captured": 1}
    not_finite = {"class_radius": None, "modes_captured": np.nan}
    collapsed = [*falling, one_class, not_finite]
    assert gan_collapse.correlation(collapsed, "modes_captured")[0] == pytest.approx(-1)
    assert np.isnan(gan_collapse.correlation(falling[:2], "modes_captured")).all()
