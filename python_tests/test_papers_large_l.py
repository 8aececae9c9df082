"""The study of many dimensions: its measure against torch.distributions, its data, and what it must find."""

import csv
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"


@pytest.fixture(scope="module")
def gen_large_l():
    sys.path.insert(0, str(PAPERS))
    import gen_large_l

    return gen_large_l


def test_divergence_of_the_codes_in_closed_form(gen_large_l):
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes, target = (MultivariateNormal(torch.zeros(5).double(), c) for c in (root @ root.T, torch.eye(5).double()))
    eigenvalues = torch.linalg.eigvalsh(root @ root.T)
    assert gen_large_l.kl_from_normal(eigenvalues) == pytest.approx(float(kl_divergence(codes, target)), rel=1e-9)


def test_untrained_codes_are_the_data(gen_large_l):
    found = gen_large_l.train(6, lambda codes, centers: 0 * codes.sum(), 3, seed=2)
    torch.testing.assert_close(found, torch.logspace(-1, 0.5, 6).double(), rtol=1e-5, atol=0)


def test_a_background_bounds_the_loss_and_counts_a_tenth(gen_large_l):
    centers = torch.randn(gen_large_l.CENTERS, 4, generator=torch.Generator().manual_seed(1))
    far = torch.full((1, 4), 30.0)
    for divergence in ("js", "kl"):
        plain, bounded = (form(4, 0.5, divergence) for form in (gen_large_l.of_the_library, gen_large_l.background))
        assert float(plain(far, centers)) < -100 < math.log(0.1) < float(bounded(far, centers))
        near = centers[:1000]
        assert float(bounded(near, centers)) == pytest.approx(float(plain(near, centers)), abs=0.11)


def test_quick_run_and_its_record(gen_large_l, tmp_path, monkeypatch, capsys):
    command = ["--quick", "--csv", str(tmp_path / "quick.csv")]
    assert gen_large_l.main(command) == 0
    with (tmp_path / "quick.csv").open(newline="") as file:
        rows = {(row["form"], row["divergence"]): row for row in csv.DictReader(file)}
    assert len(rows) == 20 and {row["latent_dim"] for row in rows.values()} == {"8"}
    for row in rows.values():
        assert float(row["kl"]) < 0.75 * gen_large_l.kl_from_normal(torch.logspace(-1, 0.5, 8).double())
    # Against the target itself the codes end narrower than it, against the smoothed one they do not.
    assert float(rows["paper", "js"]["median"]) < 0.75 < float(rows["h x 1", "js"]["median"])
    out = capsys.readouterr().out
    assert "Abramson" in out

    # A second call takes its rows from the record, and trains what is missing there, which is all for another seed.
    trained = []
    monkeypatch.setattr(gen_large_l, "train", lambda dim, loss, steps, seed: trained.append(seed) or torch.ones(dim))
    record = (tmp_path / "quick.csv").read_text()
    assert gen_large_l.main(command) == 0 and not trained
    assert capsys.readouterr().out == out and (tmp_path / "quick.csv").read_text() == record
    (tmp_path / "quick.csv").write_text("".join(record.splitlines(keepends=True)[:16]))
    assert gen_large_l.main(command) == 0 and trained == [0] * 5
    assert capsys.readouterr().out.startswith("".join(out.splitlines(keepends=True)[:18]))
    assert gen_large_l.main([*command, "--seed", "1"]) == 0 and trained == [0] * 5 + [1] * 20


def test_the_script_prints_its_committed_record(gen_large_l, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gen_large_l, "train", None)
    record = PAPERS.parent / "results" / "papers" / "gen_large_l.csv"
    assert gen_large_l.main(["--csv", str(shutil.copy(record, tmp_path))]) == 0
    printed = record.with_suffix(".txt").read_text().partition("\n")[2].split()
    for ours, theirs in zip(capsys.readouterr().out.split(), printed, strict=True):
        # The text has four digits of numbers of which the record has six: the fourth can differ by one.
        assert ours == theirs or float(ours) == pytest.approx(float(theirs), rel=1e-3)
