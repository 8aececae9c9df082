"""Sizes whose products pass 2^31 and 2^32: indices that were kept in 32 bits would show.

What is expected comes from repetition: many copies of a few points say what the few say. Arrays of more than 2^31
numbers take 9 to 18 GB; they are tested with KDEJSD_LARGE=1 where the machine has that much to spare.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from helpers import points

import kdejsd

COPIES, FEW = 1000, 66  # 66 000 points: 4.4e9 pairs, more than 2^32
ROWS, COLUMNS = 2**20 + 1, 2**11  # more than 2^31 numbers


def available_gib() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20


def large(gib: int):
    """For tests that need so much memory."""
    if os.environ.get("KDEJSD_LARGE") != "1":
        return pytest.mark.skip(reason="KDEJSD_LARGE=1 runs it")
    return pytest.mark.skipif(available_gib() < gib, reason=f"needs {gib} GiB of free memory")


def test_kde_of_more_than_2_32_pairs():
    few = points(FEW, 1, dtype=torch.float32)
    query, centers = (few.repeat(COPIES, 1).requires_grad_() for _ in range(2))
    small, lagged = few.clone().requires_grad_(), few.clone().requires_grad_()
    value, expected = kdejsd.kde_log_prob(query, centers, 0.3), kdejsd.kde_log_prob(small, lagged, 0.3)
    torch.testing.assert_close(value, expected.repeat(COPIES))
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(query.grad, small.grad.repeat(COPIES, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(centers.grad, lagged.grad.repeat(COPIES, 1), rtol=1e-3, atol=1e-3)


def test_omega_of_more_than_2_31_pairs():
    x, z = points(FEW, 1, dtype=torch.float32), points(FEW, 1, dtype=torch.float32, seed=1)
    inputs, codes = x.repeat(COPIES, 1), z.repeat(COPIES, 1)
    total, expected = kdejsd.omega(inputs, codes, pairs="all"), kdejsd.omega(x.double(), z.double(), pairs="all")
    assert total.item() == pytest.approx(COPIES**2 * expected.item(), rel=1e-4)


def test_nearest_of_more_than_2_32_pairs():
    n = FEW * COPIES
    latents = torch.arange(n, dtype=torch.float64).unsqueeze(-1)
    index = kdejsd.nearest_other_class(latents, torch.arange(n) // 2).index  # 0 0 1 1 2 2 ...
    own = torch.arange(n)
    expected = own - 1 + 2 * (own % 2)
    expected[0], expected[-1] = 2, n - 3  # across their neighbours of the same class
    assert torch.equal(index, expected)


@large(12)
@pytest.mark.parametrize("many", ["queries", "batch", "centers"])
def test_kde_of_more_than_2_31_coordinates(many):
    row = torch.linspace(-1, 1, COLUMNS)
    last = torch.cat((torch.zeros(ROWS - 1), torch.ones(1))).unsqueeze(-1)  # the last point is another one
    several = row.expand(ROWS, COLUMNS) + last
    h = 10.0
    near, far = (kdejsd.kde_log_prob(row.unsqueeze(0), row.unsqueeze(0) + shift, h).item() for shift in (0, 1))
    if many == "centers":
        weights = torch.full((ROWS,), -math.inf)
        weights[-1] = 0
        assert kdejsd.kde_log_prob(row.unsqueeze(0), several, h, log_weights=weights).item() == pytest.approx(far)
        return
    query = several.unsqueeze(1) if many == "batch" else several
    value = kdejsd.kde_log_prob(query, row.expand(ROWS, 1, COLUMNS)[:1] if many == "batch" else row.unsqueeze(0), h)
    value = value.flatten()
    assert value[-1].item() == pytest.approx(far)
    torch.testing.assert_close(value[:-1], torch.full((ROWS - 1,), near))


@large(14)
@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (1, ROWS * COLUMNS)])
def test_radius_of_more_than_2_31_masses(shape):
    rows, classes = shape
    masses = torch.full((1, 1), 1 / classes).expand(shape)
    value = kdejsd.class_radius_bound(masses)
    expected = classes * kdejsd.class_radius_bound(torch.full((1,), 1 / classes)).double().item()
    torch.testing.assert_close(value.double(), torch.full((rows,), expected, dtype=torch.float64), rtol=1e-5, atol=0)


@large(12)
def test_omega_ratios_of_more_than_2_31_pairs():
    few, b = 66, 46_400
    x, z = points(few, 1, dtype=torch.float32), points(few, 1, dtype=torch.float32, seed=1)
    ratios = kdejsd.omega(x.repeat(704, 1)[:b], z.repeat(704, 1)[:b], pairs="all", reduction="none")
    expected = kdejsd.omega(x, z, pairs="all", reduction="none").repeat(704, 2)[:b, : 2 * few]
    for first in (0, b // 2 // few * few, b // few * few - few):
        assert torch.equal(ratios[:, first : first + 2 * few][:, : b - first], expected[:, : b - first])
