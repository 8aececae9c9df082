"""The benchmark of the nearest op runs, compares with the truth before it times, and writes down what it found."""

import csv
import importlib
from pathlib import Path

import pytest
import torch
from helpers import run_here

import kdejsd

BENCH = Path(__file__).resolve().parent.parent / "bench"


def test_csv_of_a_quick_run(tmp_path):
    table = tmp_path / "nearest.csv"
    arguments = ["--sizes", "300,2,sectors", "200,5,random", "--threads", "1", "--budget", "0.2"]
    done = run_here(BENCH / "bench_nearest.py", *arguments, "--fma-gflops", "100", "--csv", table)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "N = 200, d = 5, random" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"kdejsd", "gemm", "cdist", "scipy cKDTree"} <= {row["provider"] for row in rows}
    for n in ("300", "200"):
        ours = {r["metric"]: float(r["value"]) for r in rows if r["provider"] == "kdejsd" and r["n"] == n}
        assert ours["nearest found"] == 1 and ours["error"] < 1e-6
        assert ours["time"] > 0 and ours["ratio to kdejsd"] == 1


def test_wrong_answers_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("bench_nearest")

    def second_nearest(latents, labels):
        distances = torch.cdist(latents, latents).masked_fill(labels.unsqueeze(1) == labels, torch.inf)
        found = distances.topk(2, largest=False)
        return found.values[:, 1], found.indices[:, 1]

    problem = bench.Problem.make((120, 2, "sectors"), torch.float32, "cpu")
    candidates = {"kdejsd": bench.Provider("kdejsd", lambda x, y: tuple(kdejsd.nearest_other_class(x, y)))}
    candidates |= {"second": bench.Provider("second", second_nearest), "absent": "not installed"}
    right, wrong, absent = bench.harness.run_size(problem, candidates, "cpu", 0.01, {})
    assert not right.note and right.times and right.right == 1
    assert wrong.note == "wrong: not timed" and not wrong.times and wrong.right < 0.5
    assert absent.note == "not installed"


def test_work_is_that_of_pairs_of_different_classes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("bench_nearest")
    problem = bench.Problem.make((50, 3, "random"), torch.float32, "cpu")
    pairs = (problem.labels.unsqueeze(0) != problem.labels.unsqueeze(1)).sum()
    assert problem.multiply_adds() == pytest.approx(3 * int(pairs))
