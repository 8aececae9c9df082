"""The study by latent dimensions: its measures on samples of known distributions, and a quick run."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU")


@pytest.fixture(scope="module")
def gen_latent_dims():
    sys.path.insert(0, str(PAPERS))
    import gen_latent_dims

    return gen_latent_dims


def test_a_classifier_tells_only_what_differs(gen_latent_dims):
    samples, others = (gen_latent_dims.normal_samples(4000, 3, seed) for seed in (0, 1))
    assert gen_latent_dims.told_apart(others, samples) == pytest.approx(0.5, abs=0.04)  # 2.5 standard errors
    wide = 2 * others
    # The best that can be: by the likelihood ratio, sampled.
    log_ratio = 3 * math.log(2) - 1.5 * samples.square().sum(1) / 4, 3 * math.log(2) - 1.5 * wide.square().sum(1) / 4
    best = float(((log_ratio[0] > 0).float().mean() + (log_ratio[1] <= 0).float().mean()) / 2)
    assert best - 0.05 < gen_latent_dims.told_apart(wide, samples) < best + 0.03


def test_sliced_wasserstein_distance_of_a_shift(gen_latent_dims):
    samples = gen_latent_dims.normal_samples(3000, 2, 0)
    assert gen_latent_dims.sliced_wasserstein(samples, samples) == 0
    shifted = samples + torch.tensor([3.0, 0.0])
    expected = 3 * 2 / math.pi  # the mean of |cos| over directions
    assert gen_latent_dims.sliced_wasserstein(shifted, samples) == pytest.approx(expected, rel=0.1)


def test_quick_run_and_its_record(gen_latent_dims, tmp_path, capsys):
    assert gen_latent_dims.main(["--quick", "--out", str(tmp_path), "--csv", str(tmp_path / "quick.csv")]) == 0
    with (tmp_path / "quick.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows[:2]] == ["GEN, paper", "GEN, smoothed"] and len(rows) == 8
    for row in rows:
        assert 0.3 < float(row["told_apart"]) <= 1 and 0 < float(row["least"]) < float(row["greatest"])
        assert float(row["sliced"]) > 0.8 * float(row["sliced_of_samples"]) > 0
    text = capsys.readouterr().out
    assert "told apart" in text

    # A second call takes its rows from the record.
    began = (tmp_path / "quick.csv").stat().st_mtime_ns
    assert gen_latent_dims.main(["--quick", "--out", str(tmp_path), "--csv", str(tmp_path / "quick.csv")]) == 0
    assert (tmp_path / "quick.csv").stat().st_mtime_ns == began
    assert capsys.readouterr().out.splitlines()[-8:] == text.splitlines()[-8:]


def test_a_model_whose_codes_are_not_finite_has_a_row(gen_latent_dims, tmp_path, capsys):
    for _ in range(2):  # as it is added, and as it is read
        rows = gen_latent_dims.Record(tmp_path / "rows.csv", gen_latent_dims.KINDS)
        if not rows.rows:
            rows.add({"model": "GEN, smoothed", "bandwidth": 2.0, "seconds": 3})
        gen_latent_dims.show(rows.rows[0])
        assert capsys.readouterr().out.split()[-7:] == ["smoothed", "2.000", "its", "codes", "are", "not", "finite"]
