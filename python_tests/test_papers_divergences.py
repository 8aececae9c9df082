"""The study of divergences: what it takes as known is so, its quick mode runs and finds where gradients vanish."""

from __future__ import annotations

import csv
import importlib
import math
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import generator, points
from scipy.integrate import quad
from scipy.stats import norm, wasserstein_distance

import kdejsd

LOG2 = math.log(2)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench" / "papers"))
    yield importlib.import_module("divergences")
    for name in ("divergences", "gen_correlation"):
        sys.modules.pop(name, None)


def test_quick_run_and_its_record(study, tmp_path, capsys):
    threads = torch.get_num_threads()
    record, figure = tmp_path / "new" / "divergences.csv", tmp_path / "new" / "divergences.png"
    assert study.main(["--quick", "--csv", str(record), "--figure", str(figure)]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    with record.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[tuple, dict[float, float]] = {}
    for row in rows:
        key = (row["study"], int(row["latent_dim"]), float(row["spread"]), row["measure"], row["bandwidth"])
        found.setdefault(key, {})[float(row["shift"])] = float(row["value"])
    assert sum(map(len, found.values())) == len(rows)

    for (name, dim, spread, measure, h), values in found.items():
        for shift, value in values.items():
            if measure == "JSD, KDE":
                assert value == pytest.approx(found[name, dim, spread, "JSD, blurred", h][shift], abs=0.05)
            elif measure == "KL, KDE":
                assert value == pytest.approx(found[name, dim, spread, "KL, blurred", h][shift], rel=0.15, abs=0.15)
            elif measure == "JSD, discriminator":  # no network exceeds the truth, but for the error of 2000 samples
                assert -0.03 < value < found[name, dim, spread, "JSD", ""][shift] + 0.03
            elif measure == "W1, samples":
                assert value == pytest.approx(shift, abs=0.25 if name == "normals" else 0.02)
    lines = {key[3]: values for key, values in found.items() if key[0] == "lines"}
    assert all(value == pytest.approx(LOG2 if shift else 0) for shift, value in lines["JSD"].items())
    assert lines["JSD, discriminator"][2.0] > 0.6 and lines["KL"][0.05] == math.inf

    at_ten = {(key[3], key[4][:4]): values[10.0] for key, values in found.items() if key[:3] == ("gradient", 2, 0.1)}
    best = f"{kdejsd.optimal_bandwidth(2, 500).value:.6f}"[:4]
    order = [("itself", best), ("smoothed", best), ("smoothed", "1.0"), ("smoothed", "2.0"), ("smoothed", "4.0")]
    pulls = [at_ten[key] for key in [*order, ("kl", best)]]
    assert (np.diff(np.log(pulls)) > 2).all() and 0 < pulls[0] < 1e-15
    assert pulls[-1] == pytest.approx(10, abs=0.5) and at_ten["W1", ""] == pytest.approx(1, abs=0.02)
    assert at_ten["1 - r", best] < 1e-12 and at_ten["1 - r, normalised", best] == pytest.approx(0.5, abs=0.02)
    assert f"{pulls[0]:.1e}" in out


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0, 9.0])
def test_jsd_of_shifted_normals(study, shift):
    def term(x: float) -> float:
        p, q = norm.logpdf(x, shift), norm.logpdf(x)
        return 0.5 * sum(math.exp(a) * (a - np.logaddexp(p, q)) for a in (p, q))

    assert study.normal_jsd(shift) == pytest.approx(LOG2 + quad(term, -9, 18, epsabs=1e-12)[0], abs=1e-10)


@pytest.mark.parametrize("noise", [False, True])
def test_limit_of_the_gradient(study, noise):
    """It is what the loss of many codes has, and without noise the derivative of E log p_e / (p_e + p_t) there."""
    h, shift = 0.8, 2.0
    codes, lagged = points(2, 8000, 1, seed=1)
    moved = torch.full((1,), shift, dtype=torch.float64, requires_grad=True)
    form = "noise" if noise else "smoothed"
    loss = study.latent_loss(form, codes + moved, lagged + shift, h, generator(2)).mean()
    (measured,) = torch.autograd.grad(loss, moved)
    assert study.gradient_limit(shift, h, noise) == pytest.approx(float(measured), rel=0.04)

    v = 1 + h * h

    def loss_at(position: float) -> float:
        def term(x: float) -> float:
            gap = norm.logpdf(x, 0, math.sqrt(v)) - norm.logpdf(x, shift, math.sqrt(v))
            return norm.pdf(x, position, math.sqrt(v) if noise else 1) * -np.logaddexp(0, gap)

        return quad(term, -12, 15, epsabs=1e-12)[0]

    slope = (loss_at(shift + 1e-3) - loss_at(shift - 1e-3)) / 2e-3
    assert study.gradient_limit(shift, h, noise) == pytest.approx(slope, rel=1e-5)


def test_assignment_is_the_least_of_all(study):
    a, b = points(2, 6, 3, seed=3)
    least = min(float((a - b[list(order)]).norm(dim=1).mean()) for order in permutations(range(6)))
    cost = study.assignment(a.requires_grad_(), b)
    assert cost.item() == pytest.approx(least)
    # Each sample is pulled along the line to its partner, all with the same strength.
    (gradient,) = torch.autograd.grad(cost, a)
    torch.testing.assert_close(gradient.norm(dim=1), torch.full((6,), 1 / 6, dtype=torch.float64))
    x, y = a.detach()[:, :1], b[:, :1]
    assert study.assignment(x, y).item() == pytest.approx(wasserstein_distance(x[:, 0], y[:, 0]))
    assert study.w1(x, y) == pytest.approx(study.assignment(x, y).item())
