"""Entropies of distributions over classes, against exact arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch

from kdejsd import collision_probability, collision_probability_from_counts, renyi_entropy

ORDERS = [0, 0.2, 0.5, 0.7, 1 - 1e-3, 1 - 1e-9, 1, 1 + 1e-12, 1.001, 1.4, 1.6, 2, 3.5, 60, math.inf]


def exact_renyi(p, order):
    with mpmath.workdps(50):
        p = [mpmath.mpf(x) for x in p if x > 0]
        p = [x / sum(p) for x in p]
        if order == 1:
            return float(-sum(x * mpmath.log(x) for x in p))
        if order == math.inf:
            return float(-mpmath.log(max(p)))
        return float(mpmath.log(sum(x ** mpmath.mpf(order) for x in p)) / (1 - mpmath.mpf(order)))


@pytest.mark.parametrize("order", ORDERS)
def test_renyi_entropy_of_any_order(order):
    rows = torch.tensor(
        [[0.5, 0.25, 0.25, 0.0], [0.97, 0.01, 0.01, 0.01], [1e-300, 0.0, 0.4, 0.6], [0.25] * 4], dtype=torch.float64
    )
    got = renyi_entropy(rows, order)
    for value, p in zip(got.tolist(), rows.tolist(), strict=True):
        assert value == pytest.approx(exact_renyi(p, order), rel=2e-15, abs=4e-16)
    assert got[3].item() == pytest.approx(math.log(4), rel=1e-15)
    one = renyi_entropy(torch.eye(3, dtype=torch.float64), order)
    assert (one == 0).all() and not one.signbit().any()
    assert torch.equal(renyi_entropy(rows.reshape(2, 2, 4), order), got.reshape(2, 2))


@pytest.mark.parametrize("order", ORDERS)
def test_renyi_entropy_gradient(order):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: renyi_entropy(x.softmax(-1), order), (logits,))
    # At masses of 0: a / ((a - 1) sum p) above order 1, where the mass itself adds nothing; 0 below, for infinity.
    p = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(renyi_entropy(p, order), p)
    assert gradient.isfinite().all() and float(gradient.detach() @ p.detach()) == pytest.approx(0, abs=1e-15)
    expected = 0 if order <= 1 else 1 if order == math.inf else order / (order - 1)
    assert gradient[2].item() == pytest.approx(expected, rel=1e-3 if order < 1.0001 else 1e-12)


def test_renyi_entropy_falls_with_the_order_and_sees_nan():
    p = torch.tensor([[0.6, 0.3, 0.1], [math.nan, 0.5, 0.5], [1.1, -0.1, 0.0]])
    values = torch.stack([renyi_entropy(p, order) for order in ORDERS])
    assert values.dtype == torch.float32
    assert (values[:, 0].diff() <= 0).all() and values[0, 0] > values[-1, 0]
    assert values[:, 1:].isnan().all()


def test_collision_probability():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    value = collision_probability(p)
    assert value.tolist() == pytest.approx([0.5, 0.38])
    assert torch.equal(torch.autograd.grad(value.sum(), p)[0], 2 * p)
    assert renyi_entropy(p).tolist() == pytest.approx((-value.log()).tolist())
    assert collision_probability(p.half()).dtype == torch.float32


def test_collision_probability_from_counts_is_unbiased():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    counts = torch.from_numpy(np.random.default_rng(0).multinomial(6, p, size=200_000))
    estimates = collision_probability_from_counts(counts)
    error = float(estimates.std()) / len(estimates) ** 0.5
    assert float(estimates.mean()) == pytest.approx((p**2).sum(), abs=4 * error)
    assert float((counts / 6).square().sum(-1).mean()) > (p**2).sum() + 20 * error  # the plug-in estimate is not
    labels = torch.tensor([0, 0, 2, 2, 2])
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    assert float(collision_probability_from_counts(torch.bincount(labels))) == pytest.approx(
        sum(labels[i] == labels[j] for i, j in pairs) / len(pairs)
    )
    odd = torch.tensor([[1, 0], [0, 0], [3, -1], [2, 0]])
    assert collision_probability_from_counts(odd).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (TypeError, "p must be a tensor, got list", lambda: renyi_entropy([0.5, 0.5])),
        (TypeError, "p must be float32.*torch.int64", lambda: collision_probability(torch.tensor([1, 0]))),
        (ValueError, r"p must have shape.*got \[0\]", lambda: renyi_entropy(torch.empty(0))),
        (TypeError, "order must be a real number, got '2' of type str", lambda: renyi_entropy(torch.ones(1), "2")),
        (ValueError, "order must be at least 0, got -1", lambda: renyi_entropy(torch.ones(1), -1)),
        (ValueError, "order must be at least 0, got nan", lambda: renyi_entropy(torch.ones(1), math.nan)),
        (TypeError, "counts must hold numbers", lambda: collision_probability_from_counts(torch.tensor([True]))),
        (ValueError, r"counts must have shape", lambda: collision_probability_from_counts(torch.tensor(3))),
    ],
)
def test_errors_of_distributions(error, text, call):
    with pytest.raises(error, match=text):
        call()
