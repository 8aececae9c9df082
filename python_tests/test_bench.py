"""The benchmarks run, compare with the truth before they time anything, and write down what they found."""

import csv
import dataclasses
import importlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdejsd
from kdejsd import reference
from kdejsd._native import cuda_problem
from kdejsd.data import Digits

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench_kde(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_kde")


@pytest.fixture
def bench_omega(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_omega")


def run(*arguments, script="bench_kde.py"):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(BENCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50)


def test_csv_of_a_quick_run(tmp_path):
    table = tmp_path / "kde.csv"
    # The limits are measured with the system's compiler; without one they are given.
    limits = [] if shutil.which("g++") else ["--fma-gflops", "100", "--gexp", "10"]
    done = run(
        *("--quick", "--sizes", "7,50,3", "33,300,40", "--threads", "1", "--budget", "0.5", "--csv", str(table)),
        *("--providers", "gemm", "attention", "differences", *limits),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "n = 33, m = 300, l = 40" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"kdejsd", "gemm", "attention", "differences"}
    for size in (("7", "50", "3"), ("33", "300", "40")):
        ours = [r for r in rows if r["provider"] == "kdejsd" and (r["n"], r["m"], r["l"]) == size]
        found = {(r["metric"], r["mode"]): float(r["value"]) for r in ours}
        assert found["value error", "value+gradient"] < 2e-5
        assert found["gradient error", "value+gradient"] < 1e-5
        for mode in ("value+gradient", "value"):
            (time,) = (r for r in ours if (r["metric"], r["mode"]) == ("time", mode))
            assert 0 < float(time["p20"]) <= float(time["value"]) <= float(time["p80"])
            assert int(time["repeats"]) >= 3
            assert found["share of limit", mode] > 0
    for row in rows:
        assert row["kernel"] == "jsd_loss"
        assert (row["dtype"], row["device"], row["threads"]) == ("float32", "cpu", "1")
        assert row["level"] == kdejsd.build_info()["cpu_level"]
        assert f"kdejsd {kdejsd.__version__}" in row["versions"]
        assert row["machine"] and row["commit"] and row["date"]


def test_roofline(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra `train`")
    monkeypatch.syspath_prepend(str(BENCH))
    roofline = importlib.import_module("roofline")
    table = tmp_path / "kde.csv"
    done = run(
        *("--sizes", "40,300,5", "40,300,70", "--budget", "0.5", "--csv", str(table), "--providers", "gemm"),
        *("--fma-gflops", "1000", "--gexp", "100"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rates, roof = roofline.read(table)
    assert rates.keys() == {f"kdejsd, {kdejsd.build_info()['cpu_level']}", "gemm"}
    for dim in (5, 70):
        # GFLOP/s of 4 l operations and an exponential for each pair, at 1000 and 100
        assert roof[40, 300, dim] == pytest.approx(4 * dim / (4 * dim / 1000 + 1 / 100))
        assert all(0 < of_provider[40, 300, dim] < roof[40, 300, dim] for of_provider in rates.values())
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(table), "--out", str(tmp_path / "a.png"), "--smallest", "1"])
    roofline.main()
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_what_cannot_be_run_is_said():
    done = run("--quick", "--levels", "v5")
    assert done.returncode != 0
    assert "base, v3, v4, got v5" in done.stderr
    if cuda_problem():
        done = run("--device", "cuda")
        assert done.returncode != 0
        assert cuda_problem() in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("size", [(5, 40, 3), (20, 1000, 30)])
def test_truth_is_the_reference(bench_kde, monkeypatch, size):
    problem = bench_kde.Problem.make(size, torch.float32, "cpu")
    codes = problem.codes.detach().double().requires_grad_()
    lagged = problem.lagged.double().requires_grad_()
    terms = reference.kde.jsd_loss(codes, lagged, problem.bandwidth, reduction="none")
    gradients = torch.autograd.grad(terms.sum(), (codes, lagged))
    # Small chunks of centers, so that there are several to merge.
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda t, _: split(t, 7))
    found = bench_kde.truth(problem.codes, problem.lagged, problem.bandwidth)
    torch.testing.assert_close(found[0], terms.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1:], gradients, rtol=1e-10, atol=1e-12)


def test_a_wrong_provider_is_not_timed(bench_kde):
    peers = sys.modules["peers"]

    def off_in_value(*arguments):
        return kdejsd.jsd_loss(*arguments[:3], reduction=arguments[3]) + 0.01

    def off_in_gradient(codes, *arguments):
        return kdejsd.jsd_loss(codes, *arguments[:2], reduction=arguments[2]) + 0.01 * (codes - codes.detach()).sum()

    def broken(*_):
        raise RuntimeError("no such kernel\nand more")

    problem = bench_kde.Problem.make((6, 200, 4), torch.float32, "cpu")
    (ours,) = (p for p in peers.providers("cpu", ["base"]).values() if not isinstance(p, str) and p.name == "kdejsd")
    candidates = {"kdejsd": dataclasses.replace(ours, level=None), "absent": "not installed"}
    candidates |= {f.__name__: peers.Provider(f.__name__, f) for f in (off_in_value, off_in_gradient, broken)}
    right, absent, value, gradient, error = sys.modules["harness"].run_size(problem, candidates, "cpu", 0.01, {})
    assert not right.note and right.times.keys() == {"value", "value+gradient"}
    assert absent.note == "not installed"
    assert error.note == "RuntimeError: no such kernel"
    assert value.note == gradient.note == "wrong: not timed"
    assert not value.times and not gradient.times
    assert value.value_error == pytest.approx(0.01, rel=1e-3) and value.gradient_error < 1e-5
    assert gradient.gradient_error > 1e-2


def test_limit_counts_the_work(bench_kde):
    peaks = sys.modules["machine"].Peaks
    cpu = peaks(multiply_adds=1e9, exponentials=1e8, bytes=math.inf, source="", one_unit=True)
    n, m, dim = 10, 1000, 20
    assert cpu.limit_ms(n, m, dim, 4, gradient=True) == pytest.approx(2 * n * m * dim * 1e-6 + n * m * 1e-5)
    assert cpu.limit_ms(n, m, dim, 4, gradient=False) == pytest.approx(n * m * dim * 1e-6 + n * m * 1e-5)
    gpu = dataclasses.replace(cpu, one_unit=False)
    assert gpu.limit_ms(n, m, dim, 4, gradient=True) == pytest.approx(2 * n * m * dim * 1e-6)
    slow = dataclasses.replace(cpu, bytes=1e3)
    assert slow.limit_ms(n, m, dim, 4, gradient=False) == pytest.approx(4 * (m * dim + n * dim + n))


def test_csv_of_omega(tmp_path):
    table = tmp_path / "omega.csv"
    limits = [] if shutil.which("g++") else ["--fma-gflops", "100"]
    done = run(
        *("--sizes", "halves,8,16,4", "all,70,33,5", "--threads", "1", "--budget", "0.3", "--csv", str(table), *limits),
        script="bench_omega.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pairs = all, b = 70, d = 33, l = 5" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    peers = {"differences", "cdist", "pdist", "cdist mm", "gemm", "gemm by hand"}
    assert {row["provider"] for row in rows if row["pairs"] == "all"} == {"kdejsd", *peers}
    assert {row["provider"] for row in rows if row["pairs"] == "halves"} == {"kdejsd", "composed"}
    assert not any(row["note"] for row in rows)
    found = {(r["pairs"], r["provider"], r["metric"], r["mode"]): float(r["value"]) for r in rows}
    for pairs in ("halves", "all"):
        for mode in ("value+gradient", "value"):
            assert found[pairs, "kdejsd", "time", mode] > 0
            assert found[pairs, "kdejsd", "share of limit", mode] > 0
        for metric in ("error", "error, offset"):
            assert found[pairs, "kdejsd", metric, "value+gradient"] < 1e-5
    # Expanded squares lose what differences keep.
    assert found["all", "gemm", "error, offset", "value+gradient"] > 1e-4


@pytest.mark.parametrize("pairs", ["halves", "all"])
def test_truth_of_omega_is_the_reference(bench_omega, pairs):
    problem = bench_omega.Problem.make((pairs, 20, 7, 3), torch.float64, "cpu")
    value = reference.omega(problem.inputs, problem.codes, pairs=pairs)
    expected = (value.detach(), *torch.autograd.grad(value, (problem.inputs, problem.codes)))
    for got, wanted in zip(bench_omega.truth(problem.inputs, problem.codes, pairs), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_wrong_omega_is_not_timed(bench_omega):
    problem = bench_omega.Problem.make(("all", 20, 7, 3), torch.float32, "cpu")
    ours = bench_omega.PROVIDERS["all"]["kdejsd"]
    off = dataclasses.replace(ours, ratio_sum=lambda x, z, pairs: kdejsd.omega(x, z, pairs=pairs) * 1.1)
    right, wrong = sys.modules["harness"].run_size(problem, {"kdejsd": ours, "off": off}, "cpu", 0.01, {})
    assert not right.note and right.times.keys() == {"value", "value+gradient"}
    assert wrong.note == "wrong: not timed" and not wrong.times
    assert wrong.errors["error"] == pytest.approx(0.1, rel=1e-3)


def test_radius_bench_compares_and_writes(tmp_path):
    table = tmp_path / "radius.csv"
    limits = [] if shutil.which("g++") else ["--fma-gflops", "100", "--gexp", "10"]
    done = run(
        *("--quick", "--sizes", "3,7", "20,300", "--threads", "1", "--budget", "0.3", "--csv", str(table), *limits),
        script="bench_radius.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows = 20, classes = 300" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"kdejsd", "plain", "scipy"}
    for rows_classes in (("3", "7"), ("20", "300")):
        ours = [r for r in rows if r["provider"] == "kdejsd" and (r["rows"], r["classes"]) == rows_classes]
        found = {(r["metric"], r["mode"]): float(r["value"]) for r in ours}
        for error in ("value error", "gradient error"):
            assert found[error, "value+gradient"] < 4 * torch.finfo(torch.float32).eps
        for mode in ("value+gradient", "value"):
            assert found["share of limit", mode] > 0
            (time,) = (r for r in ours if (r["metric"], r["mode"]) == ("time", mode))
            assert 0 < float(time["p20"]) <= float(time["value"]) <= float(time["p80"])


def test_step_bench_takes_every_way_to_refresh(tmp_path):
    table = tmp_path / "step.csv"
    done = run("--quick", "--threads", "1", "--csv", str(table), script="bench_step.py")
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(newline="") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"autoencoder", "full", "rolling", "queue"}
    assert float(rows["autoencoder"]["ratio"]) == 1
    assert all(0 < float(row["p20"]) <= float(row["ms"]) <= float(row["p80"]) for row in rows.values())


def test_large_m_bench_keeps_memory_small_and_says_what_rounding_does(tmp_path):
    table = tmp_path / "large_m.csv"
    options = ("--quick", "--threads", "1", "--rounds", "2", "--csv", str(table))
    done = run(*options, script="bench_large_m.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bfloat16: time grows like m to the" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    terms = {(row["codes"], row["m"]): row for row in rows if row["part"] == "term"}
    assert terms.keys() == {(codes, m) for codes in ("float32", "bfloat16") for m in ("1000", "10000")}
    for (codes, m), row in terms.items():
        assert 0 < float(row["p20"]) <= float(row["ms"]) <= float(row["p80"])
        assert float(row["codes_mib"]) == pytest.approx(int(m) * 64 * (4 if codes == "float32" else 2) / 2**20)
        assert float(row["plain_mib"]) == pytest.approx(4 * 256 * int(m) / 2**20)
        assert (float(row["gradient_change"]) == 0) == (codes == "float32")
        assert abs(float(row["value_change"])) < 1e-3 and float(row["gradient_change"]) < 0.02
    trained = [row for row in rows if row["part"] == "training"]
    assert [(row["codes"], row["refresh"]) for row in trained] == [
        ("float32", "queue"),
        ("bfloat16", "queue"),
        ("bfloat16", "rolling"),
    ]
    assert all(float(row["last_rec"]) < 0.8 * float(row["first_rec"]) for row in trained)


def test_ranks_bench_holds_its_model_against_real_ranks(tmp_path):
    table = tmp_path / "ranks.csv"
    done = run("--quick", "--csv", str(table), script="bench_ranks.py")
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["part"] == "measured"]
    assert [(row["m"], row["l"]) for row in measured] == [("2000", "8"), ("4000", "64")]
    for row in measured:
        parts = [float(row[f"{part}_ms"]) for part in ("kernel", "gather", "sum")]
        assert min(parts) > 0 and float(row["model_ms"]) == pytest.approx(sum(parts))
        assert 0 < float(row["p20"]) <= float(row["ms"]) <= float(row["p80"])
    reckoned = {(row["ranks"], row["m"], row["l"]): row for row in rows if row["part"] == "reckoned"}
    alone, many = (reckoned[ranks, "1000000", "64"] for ranks in ("1", "64"))
    # The work of a rank, its own share of pairs, stays the same; memory and refresh are shared.
    assert float(alone["kernel_ms"]) == pytest.approx(float(many["kernel_ms"]), rel=0.01)
    assert float(alone["kernel_ms"]) == pytest.approx(1e3 * 2 * 512 * 1_000_000 * 64 / 33.5e12 / 0.7)
    assert float(alone["codes_mib"]) == pytest.approx(64 * float(many["codes_mib"]))
    assert float(alone["gather_ms"]) == float(alone["sum_ms"]) == 0


@pytest.mark.parametrize("ablation", [False, True])
def test_entropies_of_codes_go_on_where_they_stopped(tmp_path, ablation):
    table = tmp_path / "table2.csv"
    names = ("GEN", "no kernel noise") if ablation else ("GEN",)
    arguments = ["--quick", "--threads", "1", "--csv", str(table), "--sizes", "300", *["--ablation"][: int(ablation)]]
    first = run(*arguments, "--rows", "GEN", script="papers/gen_table2.py")
    assert first.returncode == 0, first.stdout + first.stderr
    before = table.read_text()
    done = run(*arguments, "--rows", *names, script="papers/gen_table2.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert table.read_text().startswith(before)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["row"], r["codes"]) for r in rows] == [(n, c) for n in names for c in ("training", "held-out")]
    normal = kdejsd.kde_entropy(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)))
    for row in rows:
        assert (row["train_size"], row["count"], row["seed"], row["steps"]) == ("300", "300", "0", "60")
        assert float(row["normal"]) == pytest.approx(float(normal), abs=1e-3)
        assert 9 < float(row["entropy"]) < float(normal) + 0.2
        assert 0.03 < float(row["error_per_pixel"]) < 0.1
    if ablation:
        gap = float(rows[2]["entropy"]) - float(rows[2]["normal"])
        assert f"{gap:+.2f} / " in next(line for line in done.stdout.splitlines() if line.startswith("no kernel noise"))
    else:
        assert f"300 images: GEN {float(rows[0]['entropy']) - float(rows[0]['normal']):+.3f} from" in done.stdout


def test_every_ingredient_of_the_recipe_can_be_changed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH / "papers"))
    table2 = importlib.import_module("gen_table2")
    data = Digits(batch_size=100, train_size=300)
    for name, make in table2.ABLATION.items():
        model, trained_on = make(data)
        assert len(model.lagged.codes) == len(trained_on.training) == (150 if name.endswith("apart") else 300)
    model, halves = table2.lagged_apart(data)
    together = torch.cat([halves.training.images, model.apart]).flatten(1)
    assert len(together.unique(dim=0)) == len(data.training.images.flatten(1).unique(dim=0)) == 300


def test_gpu_suite_is_a_script():
    subprocess.run(["bash", "-n", str(BENCH / "gpu_suite.sh")], check=True)
    assert os.access(BENCH / "gpu_suite.sh", os.X_OK)
