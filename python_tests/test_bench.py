"""The benchmarks run, compare with the truth before they time anything, and write down what they found."""

import contextlib
import csv
import dataclasses
import functools
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import run_here

import kdejsd
from kdejsd import reference
from kdejsd._native import cuda_problem, native
from kdejsd.data import Digits
from kdejsd.sklearn import KernelDensity

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
    return run_here(BENCH / script, *arguments)


def run_apart(*arguments, script="bench_kde.py"):
    """Runs a script in a process of its own, as a user does: one that starts others, and one for all."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(BENCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=50)


def test_csv_of_a_quick_run(tmp_path):
    table = tmp_path / "kde.csv"
    # The limits are measured with the system's compiler; without one they are given.
    limits = [] if shutil.which("g++") else ["--fma-gflops", "100", "--gexp", "10"]
    done = run_apart(
        *("--quick", "--sizes", "7,50,3", "33,300,40", "--threads", "1", "--budget", "0.5", "--csv", str(table)),
        *("--providers", "gemm", "attention", "differences", *limits),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "n = 33, m = 300, l = 40" in done.stdout
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    reduced = {"kdejsd bf16x2"} if kdejsd.build_info()["cpu_level"] == "amx" else set()
    assert {row["provider"] for row in rows} == {"kdejsd", "gemm", "attention", "differences"} | reduced
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
    level = kdejsd.build_info()["cpu_level"]
    reduced = {"kdejsd bf16x2"} if level == "amx" else set()
    assert rates.keys() == {f"kdejsd, {level}", "gemm"} | reduced
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
    assert "base, v3, v4, amx, got v5" in done.stderr
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


def in_eleven_bits(numbers):
    """Rounded to 11 bits."""
    return ((numbers.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def loss_in_eleven_bits(peers, left_out=0):
    """jsd_loss from products of numbers of 11 bits, as the CUDA kernel takes them; without some of the coordinates."""

    def both(codes, lagged, bandwidth):
        kept = codes.shape[1] - left_out
        z, centers = (in_eleven_bits(t[:, :kept].contiguous()) for t in (codes, lagged))
        squares = (z.square().sum(-1, keepdim=True) + centers.square().sum(-1) - 2 * z @ centers.T).clamp_min(0)
        exponents = squares * (-0.5 / bandwidth**2)
        log_sum = exponents.logsumexp(-1)
        mean = in_eleven_bits((exponents - log_sum.unsqueeze(-1)).exp()) @ in_eleven_bits(lagged)
        return log_sum + peers._constant(lagged, bandwidth), (mean - codes) * bandwidth**-2

    return peers._loss(lambda *arguments: peers._WithScore.apply(*arguments, both))


def test_eleven_bits_have_a_tolerance_of_its_own(bench_kde):
    peers, harness = sys.modules["peers"], sys.modules["harness"]
    problem = bench_kde.Problem.make((32, 500, 16), torch.float32, "cpu")
    loss, lossy = loss_in_eleven_bits(peers), loss_in_eleven_bits(peers, left_out=1)
    candidates = {
        "kdejsd": peers.Provider("kdejsd", lambda *a: kdejsd.jsd_loss(*a[:3], reduction=a[3])),
        "kdejsd float16": peers.Provider("kdejsd float16", loss, tolerance=peers.ELEVEN_BITS),
        "as float32": peers.Provider("as float32", loss),
        "lossy": peers.Provider("lossy", lossy, tolerance=peers.ELEVEN_BITS),
    }
    ours, few_bits, as_float32, wrong = harness.run_size(problem, candidates, "cpu", 0.01, {})
    assert not few_bits.note and few_bits.times.keys() == {"value", "value+gradient"}
    assert as_float32.note == wrong.note == "wrong: not timed"
    assert as_float32.value_error == few_bits.value_error and wrong.gradient_error > peers.ELEVEN_BITS.gradient
    assert not bench_kde.failed([ours, few_bits], candidates)
    # Exact kdejsd decides about the exit status; what has fewer bits, or is tuned, is printed with its errors.
    tuned = dataclasses.replace(candidates["kdejsd"], tuning={"splits": 1})
    for note, provider, failed in (
        ("", candidates["kdejsd"], False),
        ("wrong: not timed", candidates["kdejsd"], True),
        ("wrong: not timed", candidates["kdejsd float16"], False),
        ("wrong: not timed", tuned, False),
    ):
        result = bench_kde.Result("kdejsd and more", note=note)
        assert bench_kde.failed([result], {result.provider: provider}) == failed


@pytest.fixture
def flash_packages(bench_kde, monkeypatch):
    """The peers' functions for CUDA, with their packages' names and signatures, in plain torch."""

    def lse_splitn(x, y, bias, eps, *, num_splits, cost_scale=1.0, damping=1.0, allow_tf32=True, use_exp2=True):
        assert 1 <= num_splits <= len(y)
        return -eps * damping * torch.logsumexp(2 * cost_scale * x @ y.T / eps + bias, -1)

    def online_grad(x, y, a, b, f, g, *, eps, compute_grad_x=True, compute_grad_y=True, cost_scale=1.0):
        assert compute_grad_x and not compute_grad_y
        plan = torch.softmax((g - cost_scale * (x.unsqueeze(1) - y).square().sum(-1)) / eps + b.log(), -1)
        return 2 * cost_scale * a.unsqueeze(-1) * (x - plan @ y), None

    def densities(data, queries, bandwidth):
        points = (t if t.ndim == 2 else t.unsqueeze(-1) for t in (queries, data))
        return reference.kde.kde_log_prob(*points, bandwidth).exp()

    def kde_eval(data, queries, bandwidth, *, device="cuda"):
        return densities(data, queries, bandwidth)

    def score_triton(data, queries, bandwidth, *, device="cuda", synchronize=True):
        with torch.enable_grad():
            points = queries.detach().requires_grad_()
            density = densities(data, points, bandwidth)
            (slope,) = torch.autograd.grad(density.sum(), points)
        return slope / density.detach(), density.detach(), slope

    class SumsKernel:
        def __getitem__(self, grid):
            return self.launch

        def launch(self, data, query, pdf, weighted, n_data, n_query, s_data, s_query, s_weighted, inv_h2, **constants):
            assert (n_data, n_query, s_data, s_query, s_weighted) == (len(data), len(query), 16, 16, len(query))
            assert constants.keys() == {"BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"}
            phi = torch.exp(-0.5 * inv_h2 * (query.unsqueeze(1) - data).square().sum(-1))
            pdf += phi.sum(-1)
            weighted += (phi @ data).T

    class FlashSDKDE:
        def __init__(self, bandwidth, mode="sd_kde", device="cuda", eps=1e-12):
            assert (mode, device) == ("sd_kde", "cuda")
            self.bandwidth, self.eps = bandwidth, eps

        def fit(self, X):
            data = torch.from_numpy(np.asarray(X, np.float32))
            if data.shape[1] != 16:
                raise ValueError('mode="sd_kde" currently requires 16 features')
            squares = (data.unsqueeze(1) - data).square().sum(-1)
            score = (torch.softmax(squares * (-0.5 / self.bandwidth**2), -1) @ data - data) / self.bandwidth**2
            self.centers = data + self.bandwidth**2 / 2 * score
            return self

        def score_samples(self, X):
            density = kde_eval(self.centers, torch.from_numpy(np.asarray(X, np.float32)), self.bandwidth)
            return torch.log(density + self.eps).numpy()

    modules = {
        "flash_sinkhorn": {},
        "flash_sinkhorn.kernels": {"sinkhorn_geomloss_online_grad_sqeuclid": online_grad},
        "flash_sinkhorn.kernels.sinkhorn_splitn_sqeuclid": {"flashsinkhorn_lse_splitn": lse_splitn},
        "flash_sd_kde": {"kde_eval": kde_eval, "FlashSDKDE": FlashSDKDE},
        "kernels": {},
        "kernels.flash_sd_kde": {"gaussian_kde_score_triton": score_triton},
        "kernels.flash_sd_kde.empirical": {"_empirical_sd_kde_kernel_nd": SumsKernel()},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents, __spec__=importlib.machinery.ModuleSpec(name, None), __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    properties = types.SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


FLASH_SIZES = {"flash-sinkhorn": [(5, 300, 1), (130, 700, 20)], "flash-sd-kde": [(50, 300, 1), (70, 3000, 16)]}


@pytest.mark.parametrize("name", FLASH_SIZES)
def test_cuda_peers_compute_the_loss_from_what_their_packages_offer(bench_kde, flash_packages, name):
    provider = sys.modules["peers"].providers("cuda", ["base"])[name]
    for size in FLASH_SIZES[name]:
        problem, result = bench_kde.Problem.make(size, torch.float32, "cpu"), bench_kde.Result(name)
        assert provider.unfit(*size) == ""
        problem.check(provider, result)
        assert result.value_error < 2e-5 and result.gradient_error < 2e-5 and not result.note


def test_why_a_cuda_peer_has_no_row(bench_kde, flash_packages, monkeypatch):
    peers = sys.modules["peers"]
    assert peers.providers("cpu", ["base"])["flash-sd-kde"] == "needs a CUDA device"
    sd_kde = peers.providers("cuda", ["base"])["flash-sd-kde"]
    assert sd_kde.unfit(10, 100, 8) == "takes l = 1 and l = 16 alone"
    problem = bench_kde.Problem.make((6, 200, 4), torch.float32, "cpu")
    (result,) = sys.modules["harness"].run_size(problem, {"flash-sd-kde": sd_kde}, "cpu", 0.01, {})
    assert result.note == "takes l = 1 and l = 16 alone"
    # Another version of a package, and none.
    monkeypatch.delattr(sys.modules["flash_sinkhorn.kernels"], "sinkhorn_geomloss_online_grad_sqeuclid")
    monkeypatch.delattr(sys.modules["flash_sd_kde"], "kde_eval")
    found = peers.providers("cuda", ["base"])
    assert found["flash-sinkhorn"].startswith("ImportError: cannot import name 'sinkhorn_geomloss_online")
    assert found["flash-sd-kde"].startswith("ImportError: cannot import name 'kde_eval'")
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    for device in ("cpu", "cuda"):
        found = peers.providers(device, ["base"])
        assert {found[name] for name in ("pykeops", "torch-kde", "flash-sinkhorn", "flash-sd-kde")} == {"not installed"}


class TunedNative:
    """The compiled module with the tuning of a CUDA build."""

    def __init__(self, **tuning):
        self.tuning = tuning

    def __getattr__(self, name):
        return getattr(native(), name)

    def cuda_tuning(self):
        return dict(self.tuning)

    def set_cuda_tuning(self, name, value):
        assert abs(value) < 2**31  # what the module takes
        if name not in self.tuning or not 0 <= value <= 256:
            return False
        self.tuning[name] = value
        return True


@pytest.fixture
def tuned_native(bench_kde, monkeypatch):
    module = TunedNative(tensor_from=16, splits=3)
    monkeypatch.setattr(sys.modules["harness"], "native", lambda: module)
    monkeypatch.setattr(sys.modules["harness"], "cuda_problem", lambda: "")
    return module


def test_a_provider_is_timed_with_its_own_tuning(bench_kde, tuned_native):
    peers, seen = sys.modules["peers"], {}

    def provider(name, **options):
        def loss(*arguments):
            seen.setdefault(name, set()).add(tuple(tuned_native.tuning.values()))
            return kdejsd.jsd_loss(*arguments[:3], reduction=arguments[3])

        return peers.Provider(name, loss, **options)

    asked = peers.providers("cuda", ["base"], [("tensor_from", 2), ("splits", 1)])
    tunings = {name: p.tuning for name, p in asked.items() if name.startswith("kdejsd ") and p.tuning}
    assert tunings == {"kdejsd tensor_from=2": {"tensor_from": 2}, "kdejsd splits=1": {"splits": 1}}
    candidates = {name: provider(name, tuning=tuning) for name, tuning in {"kdejsd": {}, **tunings}.items()}
    problem = bench_kde.Problem.make((6, 200, 4), torch.float32, "cpu")
    results = sys.modules["harness"].run_size(problem, candidates, "cpu", 0.01, {})
    assert all(len(result.times["value"]) >= 3 for result in results)
    assert seen == {"kdejsd": {(16, 3)}, "kdejsd tensor_from=2": {(2, 3)}, "kdejsd splits=1": {(16, 1)}}
    assert tuned_native.tuning == {"tensor_from": 16, "splits": 3}


def test_tuning_is_looked_at_before_anything_runs(bench_kde, tuned_native, monkeypatch, capsys):
    def arguments(*given):
        monkeypatch.setattr(sys, "argv", ["bench_kde.py", *given])
        return bench_kde.parse_arguments()

    found = arguments("--device", "cuda", "--tune", "tensor_from=2,5", "--tune", "splits=1", "--graph")
    assert found.tune == [("tensor_from", 2), ("tensor_from", 5), ("splits", 1)] and found.graph
    assert tuned_native.tuning == {"tensor_from": 16, "splits": 3}
    assert arguments().tune == [] and not arguments().graph
    for given, said in (
        (("--tune", "warps=2"), "--tune: names must be among tensor_from, splits, got warps"),
        (("--tune", "splits=1,999"), "--tune: splits cannot be 999; the usual values are tensor_from=16, splits=3"),
        (("--tune", f"splits={2**40}"), f"--tune: splits cannot be {2**40}; the usual values"),
        (("--tune", "splits"), "invalid tuning value: 'splits'"),
    ):
        with pytest.raises(SystemExit):
            arguments("--device", "cuda", *given)
        assert said in capsys.readouterr().err
    for option in (("--tune", "splits=1"), ("--graph",)):
        with pytest.raises(SystemExit):
            arguments(*option)
        assert f"{option[0]} is for --device cuda" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["harness"], "native", lambda: types.SimpleNamespace(level=lambda: "base"))
    with pytest.raises(SystemExit):
        arguments("--device", "cuda", "--tune", "splits=1")
    assert "this build of kdejsd has no tuning" in capsys.readouterr().err


def test_kernels_alone_are_timed_by_graphs(bench_kde, monkeypatch, capsys):
    harness, peers = sys.modules["harness"], sys.modules["peers"]
    problem = bench_kde.Problem.make((6, 200, 4), torch.float32, "cpu")
    cuda = {name: mock.MagicMock() for name in ("current_stream", "Stream", "stream", "CUDAGraph", "graph", "Event")}
    gradients, capturing = [], []

    @contextlib.contextmanager
    def graph_context(graph, stream):
        gradients.append(problem.codes.grad)
        capturing.append(graph)
        try:
            yield
        except RuntimeError:
            raise RuntimeError("capture was invalidated") from None
        finally:
            capturing.clear()

    cuda["graph"].side_effect = graph_context
    cuda["stream"].return_value.__exit__.return_value = False
    cuda["Event"].return_value.elapsed_time.return_value = 24.0
    for name, replacement in cuda.items():
        monkeypatch.setattr(torch.cuda, name, replacement)

    def waits(*arguments):
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return kdejsd.jsd_loss(*arguments[:3], reduction=arguments[3])

    ours = peers.Provider("kdejsd", lambda *a: kdejsd.jsd_loss(*a[:3], reduction=a[3]))
    candidates = {"kdejsd": ours, "waits": peers.Provider("waits", waits), "absent": "not installed"}
    uncaptured = {}
    results = harness.run_size(problem, candidates, "cpu", 0.01, {}, uncaptured=uncaptured)
    assert gradients == [None, None]  # when a capture begins
    graph = cuda["CUDAGraph"].return_value
    replays = graph.replay.call_count // harness.ROUNDS - 1
    assert results[0].times["graph"] == [24.0 / replays] * harness.ROUNDS and 1 <= replays <= harness.MAX_REPLAYS
    said = "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert uncaptured == {"waits": said} and results[1].graph_note == said and "graph" not in results[1].times
    assert problem.codes.grad is None
    calls = cuda["graph"].call_count
    harness.run_size(problem, {"waits": candidates["waits"]}, "cpu", 0.01, {}, uncaptured=uncaptured)
    assert cuda["graph"].call_count == calls  # not tried again

    gpu = sys.modules["machine"].Peaks(3e9, 1e12, math.inf, "", one_unit=False, float16=9e9)
    for result in results:
        result.limits = {mode: problem.limit_ms(gpu, mode != "value") for mode in ("value+gradient", "value", "graph")}
    bench_kde.print_size(problem, results, gpu)
    printed = capsys.readouterr().out
    assert (
        "limits: float32 0.0032 ms, three in float16 0.0032 ms, one in float16 0.00107 ms; shares are of the first"
        in printed
    )
    assert "graph, ms" in printed and f"  {said}" in printed
    rows = list(bench_kde.csv_rows(problem, results, gpu))
    assert {name for row in rows for name in row} <= set(bench_kde.FIELDS)
    graphs = [(r["provider"], r["metric"], r.get("value"), r["note"]) for r in rows if r.get("mode") == "graph"]
    share = pytest.approx(0.0032 * replays / 24)
    assert graphs[:2] == [("kdejsd", "time", 24.0 / replays, ""), ("kdejsd", "share of limit", share, "")]
    assert graphs[2:] == [("waits", "time", None, said)]
    limits = {(row["mode"], row["metric"]): row["value"] for row in rows if row["metric"].startswith("limit")}
    assert limits["value+gradient", "limit, one in float16"] == pytest.approx(0.0032 / 3) and len(limits) == 4


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
    done = run(
        *("--sizes", "halves,8,16,4", "all,70,33,5", "--threads", "1", "--budget", "0.3", "--csv", str(table)),
        *("--fma-gflops", "100"),
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
    done = run(
        *("--quick", "--sizes", "3,7", "20,300", "--threads", "1", "--budget", "0.3", "--csv", str(table)),
        *("--fma-gflops", "100", "--gexp", "10"),
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
    loops = {"autoencoder, own loop", "full, own loop", "full, all logged"}
    assert set(rows) == {"autoencoder", "full", "rolling", "queue", "tracked"} | loops
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


def test_density_bench_times_and_finds_errors(tmp_path):
    table = tmp_path / "density.csv"
    options = ["--sizes", "200,1", "300,40", "5000,40", "--limit", "0.05", "--budget", "0.02", "--csv", str(table)]
    done = run(*options, "--providers", "sklearn", "sklearn exact", "scipy", script="bench_density.py")
    assert done.returncode == 0, done.stdout + done.stderr
    with table.open(newline="") as file:
        rows = {(row["n"], row["provider"]): row for row in csv.DictReader(file)}
    for n in ("200", "300"):
        ours, exact, scipy = (rows[n, name] for name in ("kdejsd", "sklearn exact", "scipy"))
        assert all(float(row["error"]) < 1e-10 and float(row["score_ms"]) > 0 for row in (ours, exact, scipy))
        assert float(ours["ratio"]) == 1 and float(ours["fit_ms"]) > 0
        assert 1e-9 < float(rows[n, "kdejsd float32"]["error"]) < 1e-4
    assert float(rows["300", "sklearn"]["error"]) > 0.1  # wrong in many dimensions
    assert re.fullmatch(r"left out: about \d+ s a call", rows["5000", "scipy"]["note"])
    assert done.stdout.count("kdejsd float32") == 3 and "commit" in done.stdout


def test_density_bench_tells_the_wrong_from_the_right(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("bench_density")
    problem = bench.Problem((200, 3))

    def measured(fit, debiased=False):
        return problem.measure(bench.Provider("peer", fit, debiased=debiased), 0.01)

    plain = functools.partial(bench.ours, np.float64)
    debiased = functools.partial(bench.ours, np.float64, debias=True)
    assert measured(plain).error < 1e-12 and measured(debiased, True).error < 1e-12
    assert measured(plain, True).error > 0.1 < measured(debiased).error
    assert measured(lambda x, h: lambda query: np.full(len(query), -np.inf)).error == math.inf
    broken = measured(lambda x, h: 1 / 0)
    assert broken.note == "ZeroDivisionError: division by zero" and not broken.score


@pytest.fixture
def density_on_cuda(flash_packages, monkeypatch):
    """The benchmark of density estimators, with the CPU in place of a CUDA device."""
    bench = importlib.import_module("bench_density")
    cpu = {"facts": bench.machine.facts("cpu"), "available_bytes": bench.machine.available_bytes("cpu")}
    for name, value in cpu.items():
        monkeypatch.setattr(bench.machine, name, lambda device, value=value: value)
    monkeypatch.setattr(bench, "cuda_problem", lambda: "")
    monkeypatch.setattr(bench, "KernelDensity", lambda *args, device=None, **kw: KernelDensity(*args, **kw))
    return bench


def test_density_bench_on_cuda(density_on_cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    arguments = ["--device", "cuda", "--sizes", "300,16", "300,8", "--budget", "0.01", "--csv", str(tmp_path / "a.csv")]
    density_on_cuda.main([*arguments, "--providers", "flash-sd-kde"])
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = {(row["l"], row["provider"]): row for row in csv.DictReader(file)}
    ours = ("kdejsd", "kdejsd float32", "kdejsd debiased")
    assert rows.keys() == {(dim, name) for dim in ("16", "8") for name in (*ours, "flash-sd-kde")}
    assert all(float(rows[dim, name]["error"]) < 1e-3 for dim in ("16", "8") for name in ours)
    assert all(row["device"] == "cuda" for row in rows.values())
    assert float(rows["16", "flash-sd-kde"]["score_ms"]) > 0
    assert rows["8", "flash-sd-kde"]["note"] == "takes l = 16 alone"


@pytest.mark.parametrize(("device", "made", "waited"), [("cpu", 1, 0), ("cuda", 2, 2)])
def test_density_bench_does_not_time_a_first_call_on_cuda(density_on_cuda, monkeypatch, device, made, waited):
    calls, waits = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(True))
    times, _ = density_on_cuda.repeated(lambda: calls.append(True), 0, device)
    assert (len(times), len(calls), len(waits)) == (1, made, waited)


def test_flash_sd_kde_is_debiased_as_kdejsd_is(density_on_cuda):
    problem = density_on_cuda.Problem((300, 16))
    problem.bandwidth = 1.2  # wide enough for the centers to move
    provider = density_on_cuda.providers("cuda")["flash-sd-kde"]
    found = provider.fit(problem.samples, problem.bandwidth)(problem.query)[problem.rows]
    expected = np.logaddexp(problem.truth(provider.debiased), np.log(1e-12))  # which the package adds to a density
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - np.logaddexp(problem.truth(False), np.log(1e-12))).max() > 0.1


def test_threads_bench_compares_busy_with_quiet():
    done = run_apart("--threads", "2", "--seconds", "0.05", script="bench_threads.py")
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.partition("2 threads, 1 neighbours\n")[2].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["kde"] * 3 + ["centers", "omega", "nearest", "radius"]
    for line in table:
        quiet, p90, most, busy, busy_p90, busy_most, alone = map(float, line.split()[-7:])
        assert quiet > 0 and 0 < p90 <= most and 0 < busy <= busy_p90 <= busy_most and 0 <= alone <= 1


def test_ranks_bench_holds_its_model_against_real_ranks(tmp_path):
    table = tmp_path / "ranks.csv"
    done = run_apart("--quick", "--csv", str(table), script="bench_ranks.py")
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


@pytest.mark.parametrize("name", ["gen_table1", "gen_table2"])
def test_records_of_printed_tables_are_what_their_scripts_print(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(str(BENCH / "papers"))
    monkeypatch.delenv("KDEJSD_DATA", raising=False)
    record = BENCH / "results" / "papers" / name
    assert importlib.import_module(name).main(["--csv", str(record.with_suffix(".csv"))]) == 0
    assert capsys.readouterr().out in record.with_suffix(".txt").read_text()


def test_entropies_of_digits_are_not_those_of_mnist(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCH / "papers"))
    table2 = importlib.import_module("gen_table2")
    table = tmp_path / "table2.csv"
    shutil.copy(BENCH / "results" / "papers" / "gen_table2.csv", table)  # has rows of GEN, 1000 images, seed 0
    trained = []

    def train_and_measure(row, make, data, seed, steps):
        trained.append((type(data), steps))
        row = {"row": row, "train_size": 1000, "seed": seed, "steps": steps, "entropy": 7.0, "normal": 7.5}
        return [row | {"codes": part, "error_per_pixel": 0.05} for part in ("training", "held-out")]

    monkeypatch.setattr(table2, "train_and_measure", train_and_measure)
    for _ in range(2):  # the second time they are known
        assert table2.main(["--quick", "--rows", "GEN", "--sizes", "1000", "--csv", str(table)]) == 0
        assert trained == [(Digits, 60)]
        assert "1000 images: GEN -0.500 from the normal row" in capsys.readouterr().out


def test_entropies_beside_the_printed_ones(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH / "papers"))
    table2 = importlib.import_module("gen_table2")
    # The errors of the means are 0.0231 / sqrt(5) and 0.01 / sqrt(2): three times both are 0.0376.
    assert table2.judged([11.711, 11.725], (11.681, 0.0231)) == "+0.037 agrees"
    assert table2.judged([11.634, 11.648], (11.681, 0.0231)) == "-0.040 DIFFERS"
    assert table2.judged([11.6], (11.681, 0.0231)) == "-0.081"
    row = {"train_size": 1000, "codes": "training", "entropy": 6.6, "normal": 11.7, "error_per_pixel": 0.02}
    table = table2.entropies([row | {"row": "AAE"}, row | {"row": "WAE"}], ["AAE", "WAE"], [1000, 300]).splitlines()
    lines = [line.split() for line in table[:7]]
    assert [line[-2:] for line in lines] == [
        ["1000", "300"],
        ["11.700", "-"],
        ["0.055", "-"],
        ["+0.032", "-"],
        ["6.600", "-"],
        ["1.816", "-"],
        ["+0.048", "-"],
    ]
    assert table[7].split() == ["WAE", "6.600", "-"] and "printed" not in "".join(table[8:])


def test_every_ingredient_of_the_recipe_can_be_changed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH / "papers"))
    table2 = importlib.import_module("gen_table2")
    data = Digits(batch_size=100, train_size=300)
    for name, make in table2.ABLATION.items():
        model, trained_on = make(data)
        assert len(model.lagged.codes) == len(trained_on.training) == (150 if name.endswith("apart") else 300)
    model, halves = table2.lagged_apart(data)
    together = torch.cat([halves.training.examples, model.apart]).flatten(1)
    assert len(together.unique(dim=0)) == len(data.training.examples.flatten(1).unique(dim=0)) == 300


def test_novelty_in_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    record = tmp_path / "novelty.csv"
    assert importlib.import_module("novelty_tables").main(["--quick", "--csv", str(record)]) == 0
    with record.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["data"], row["detector"]): float(row["auroc"]) for row in rows}
    assert len(found) == len(rows) == 7 + 6  # digits cannot be whitened
    assert all(0.85 < auroc <= 1 for auroc in found.values())
    printed = capsys.readouterr().out
    assert f"{100 * found['cancer', 'forest']:.1f} +-" in printed
    header = dict(re.findall(r"^(\w+) {2,}(.+)$", printed, re.M))
    assert rows[0].items() >= {name: header[name] for name in ("machine", "versions", "commit", "date")}.items()


def test_few_rows(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    assert importlib.import_module("few_rows").main(["--quick"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("none") and all(0 < float(figure) < 3 for figure in row.split()[1:])


def test_memory_of_large_tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    memory = importlib.import_module("bench_data_memory")
    for suffix, write in memory.LARGE.items():
        write(tmp_path / f"table{suffix}", 100_000)
        # GB. The table has 0.02, but what earlier tests have freed may be used again.
        assert 0 < memory.trained(tmp_path / f"table{suffix}", keep_in_memory=True) < 1
