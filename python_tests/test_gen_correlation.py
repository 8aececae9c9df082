"""The correlation study of the GENs paper: its distributions and its networks are right, and it runs."""

from __future__ import annotations

import csv
import importlib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import generator, points
from scipy.integrate import quad
from scipy.stats import norm
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.nn.functional import leaky_relu, linear, logsigmoid, normalize

LOG2 = math.log(2)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench" / "papers"))
    yield importlib.import_module("gen_correlation")
    sys.modules.pop("gen_correlation", None)


def rows_of(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_quick_run_and_its_record(study, tmp_path, capsys):
    record, figure = tmp_path / "new" / "trials.csv", tmp_path / "new" / "figure.png"
    assert study.main(["--quick", "--csv", str(record), "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "from the record" not in out
    assert figure.read_bytes().startswith(b"\x89PNG")

    rows = rows_of(record)
    cells = {
        (dim, m): [r for r in rows if (r["latent_dim"], r["num_samples"]) == (dim, m)]
        for dim in study.QUICK_DIMS
        for m in study.QUICK_SAMPLES
    }
    assert sum(map(len, cells.values())) == len(rows) == 4 * study.QUICK_TRIALS
    for cell in cells.values():
        truth, kde, network = (np.array([r[name] for r in cell]) for name in ("truth", "kde", "discriminator"))
        assert cell[0]["separation"] == 0 and truth[0] == 0
        assert (np.diff(truth) > -1e-6).all() and truth[-1] == pytest.approx(0.2010, abs=1e-3)
        assert (network < truth + 0.02).all()  # 10 000 fresh samples of each: a standard error of about 0.003
        assert (kde < LOG2).all() and len(set(kde)) == len(set(network)) == study.QUICK_TRIALS
        assert {r["bandwidth"] for r in cell} == {cell[0]["bandwidth"]}
        assert all(r["steps"] % study.CHECK_EVERY == 0 and 0 < r["steps"] <= study.MOST_STEPS for r in cell)
    for m in study.QUICK_SAMPLES:
        columns = ([r[name] for r in cells[2, m]] for name in ("truth", "kde", "discriminator"))
        together = np.corrcoef(list(columns))
        assert (together > 0.9).all()
        for r in together[np.triu_indices(3, 1)]:
            assert f"{r:.3f} [" in out
        within = [r for r in cells[2, m] if r["separation"] <= 6]
        assert len(within) == 12
        for name in ("kde", "discriminator"):
            r = np.corrcoef([r["separation"] for r in within], [r[name] for r in within])[0, 1]
            assert f"{r:.3f} [" in out.partition("with s itself")[2]

    # What is recorded is not computed again, what is missing is, and is what it was.
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if not line.startswith("2,250,")))
    assert study.main(["--quick", "--csv", str(record)]) == 0
    again = capsys.readouterr().out
    assert again.count("from the record") == 3
    rows = [r for r in rows_of(record) if (r["latent_dim"], r["num_samples"]) == (2, 250)]
    for name in ("separation", "truth", "kde", "bandwidth"):
        assert [r[name] for r in rows] == pytest.approx([r[name] for r in cells[2, 250]], abs=2e-5)

    # Another study is not mixed in.
    for options in (["--seed", "1"], ["--trials", "5"]):
        with pytest.raises(SystemExit):
            study.main(["--quick", "--csv", str(record), *options])
        assert "holds 16 trials per cell with seed 0" in capsys.readouterr().err
    record.write_text("latent_dim,num_samples\n2,many\n")
    with pytest.raises(ValueError, match=r"trials\.csv is not a record of this study"):
        study.main(["--quick", "--csv", str(record)])


@pytest.mark.parametrize(("option", "text"), [("--trials=4", "at least 5.*got 4"), ("--seed=-1", "at least 0, got -1")])
def test_bad_options(study, capsys, option, text):
    with pytest.raises(SystemExit):
        study.main([option])
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.parametrize("separation", [0.0, 0.5, 3.0, 8.0])
def test_truth_is_the_integral(study, separation):
    variance = 1 + separation**2 / 4
    mean, std = separation / 2 / math.sqrt(variance), 1 / math.sqrt(variance)

    def integrand(t):
        p, q = 0.5 * (norm.pdf(t, mean, std) + norm.pdf(t, -mean, std)), norm.pdf(t)
        return 0.5 * sum(a * np.log(2 * a / (p + q)) for a in (p, q) if a > 0)

    exact = 2 * quad(integrand, 0, 12, points=[mean], epsabs=1e-12, limit=200)[0]
    assert study.true_jsd(torch.tensor(separation)).item() == pytest.approx(exact, abs=1e-10)


def test_samples_follow_the_whitened_mixture(study):
    """In three dimensions, by the densities of the mixture written with its full covariance."""
    n, separation = 100_000, torch.tensor([0.0, 2.5, 8.0], dtype=torch.float64)
    direction = normalize(points(3, 3, dtype=torch.float32, seed=1), dim=1)
    samples = study.sample_mixture(separation, direction, n, generator(2)).double()
    normal = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    at_normal = points(n, 3, seed=3)
    for s, u, codes, truth in zip(separation, direction.double(), samples, study.true_jsd(separation), strict=True):
        assert codes.mean(0).abs().max() < 5 / math.sqrt(n)
        assert (codes.T @ codes / n - torch.eye(3)).abs().max() < 5 * math.sqrt(2 / n)
        variance = 1 + s**2 / 4
        means = torch.stack((-0.5 * s * u, 0.5 * s * u)) / variance.sqrt()
        covariance = torch.eye(3).double() - (1 - 1 / variance) * torch.outer(u, u)
        mixture = MixtureSameFamily(Categorical(torch.ones(2).double()), MultivariateNormal(means, covariance))
        terms = [
            logsigmoid(mixture.log_prob(codes) - normal.log_prob(codes)),
            logsigmoid(normal.log_prob(at_normal) - mixture.log_prob(at_normal)),
        ]
        estimate = LOG2 + 0.5 * sum(t.mean() for t in terms)
        error = 0.5 * math.hypot(*(t.std().item() / math.sqrt(n) for t in terms))
        assert abs(estimate - truth) <= 5 * error + 1e-6


def test_stacked_networks_are_separate_networks(study):
    networks = study.Discriminators(3, 4, generator(0))
    z = points(3, 11, 4, dtype=torch.float32, seed=1)
    for trial, logits in enumerate(networks(z)):
        x = z[trial]
        for layer in range(4):
            weights, biases = (p[trial] for p in networks.parameters[2 * layer : 2 * layer + 2])
            x = linear(x if layer == 0 else leaky_relu(x, 0.2), weights.T, biases[0])
        torch.testing.assert_close(logits, x[:, 0], rtol=1e-5, atol=1e-5)
    assert [p.shape[-1] for p in networks.parameters[::2]] == [40, 20, 10, 1]


def test_networks_stop_one_by_one(study):
    """Distributions that are the same, hard to tell apart, and disjoint: each network is at its best held-out loss."""
    codes, normal = (points(2, 3, 400, 2, dtype=torch.float32, seed=seed) for seed in (0, 1))
    shift = torch.tensor([0.0, 1.5, 30.0])[:, None, None]
    networks = study.Discriminators(3, 2, generator(2))
    steps = networks.fit((codes[0] + shift, normal[0]), (codes[1] + shift, normal[1]), generator(3), 1500)
    assert len(networks.parameters[0]) == 3
    assert steps[0] < steps[2] == 1500
    fresh = [points(3, 5000, 2, dtype=torch.float32, seed=seed) for seed in (4, 5)]
    found = LOG2 - networks.evaluate(fresh[0] + shift, fresh[1])
    assert found[0].item() == pytest.approx(0, abs=0.02)
    assert found[2].item() == pytest.approx(LOG2, abs=0.01)
    # Two normals of unit variance 1.5 sqrt(2) apart.
    d = 1.5 * math.sqrt(2)
    exact = LOG2 + quad(lambda t: -norm.pdf(t) * np.logaddexp(0, -(d * t + d * d / 2)), -10, 10)[0]
    assert exact - 0.05 < found[1].item() < exact + 0.015
