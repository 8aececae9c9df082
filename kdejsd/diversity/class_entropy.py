"""Entropies of distributions over classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numbers import real
from ..ops._common import check_tensor, compute_dtype


def renyi_entropy(p: Tensor, order: float = 2) -> Tensor:
    """Renyi entropy of distributions over classes, log(sum_i p_i^a) / (1 - a), in nats.

    Order 0 is the log of the number of classes with p_i > 0, order 1 Shannon's entropy -sum p_i log p_i (the limit),
    order 2 the collision entropy, infinity the min-entropy -log max p. It falls with the order.

    Args:
        p: [..., K], each row a distribution.
        order: a, at least 0.

    Returns:
        [...], of p / sum p: computed in float64, near order 1 without loss of digits, and returned as float64 for
        float64 input and float32 otherwise. Its gradient is orthogonal to p, that of the formula above but for a
        constant. NaN where an entry is NaN or negative. At an entry of 0 the gradient for an order of at most 1 is
        infinite; 0 is returned.

    Raises:
        TypeError: p is no floating-point tensor, order no number.
        ValueError: no class; an order that is negative or NaN.
    """
    wide, dtype = _distribution(p)
    order = real("order", order)
    if not order >= 0:
        raise ValueError(f"order must be at least 0, got {order}")
    valid, present = (wide >= 0).all(-1), wide > 0
    if order <= 1:
        wide = torch.where(present, wide, wide.detach())
    log_p = wide.masked_fill(~present, 1.0).log() - wide.sum(-1, keepdim=True).log()
    q = wide / wide.sum(-1, keepdim=True)
    if order == 0:
        entropy = present.sum(-1).double().log() + 0 * wide.sum(-1)
    elif order == math.inf:
        entropy = -q.amax(-1).log()
    elif order == 1:
        entropy = -(q * log_p).sum(-1)
    elif abs(order - 1) < 0.5:
        # sum q^a = 1 + sum q (q^(a - 1) - 1), and the last sum is of the order of a - 1 to all its digits.
        powers = torch.where(present, torch.expm1((order - 1) * log_p), -1.0)
        entropy = torch.log1p((q * powers).sum(-1)) / (1 - order)
    else:
        entropy = (order * log_p).masked_fill(~present, -math.inf).logsumexp(-1) / (1 - order)
    return (entropy + 0.0).masked_fill(~valid, math.nan).to(dtype)  # 0 rather than -0


def collision_probability(p: Tensor) -> Tensor:
    """The probability that two independent draws are of one class, sum_i p_i^2.

    Args:
        p: [..., K], each row a distribution.

    Returns:
        [...], float64 for float64 input and float32 otherwise; NaN where an entry is NaN.

    Raises:
        TypeError: p is no floating-point tensor.
        ValueError: no class.
    """
    wide, dtype = _distribution(p)
    return wide.square().sum(-1).to(dtype)


def collision_probability_from_counts(counts: Tensor) -> Tensor:
    """The share of pairs of samples that are of one class: sum_i n_i (n_i - 1) / (N (N - 1)), N = sum_i n_i.

    Its expectation is sum_i p_i^2 for independent samples, where sum_i (n_i / N)^2 is too high by (1 - sum p_i^2) / N.

    Args:
        counts: [..., K], how many of the samples are of each class (as torch.bincount counts labels), int64 or any
            dtype that holds them.

    Returns:
        [...], float64. NaN where N < 2 or a count is negative or NaN.

    Raises:
        TypeError: counts is no tensor of numbers.
        ValueError: no class.
    """
    if check_tensor("counts", counts).dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts must hold numbers, got {counts.dtype}")
    _check_classes("counts", counts)
    n = counts.double()
    total = n.sum(-1)
    share = (n * (n - 1)).sum(-1) / (total * (total - 1))
    return share.masked_fill(~((n >= 0).all(-1) & (total >= 2)), math.nan)


def _distribution(p: Tensor) -> tuple[Tensor, torch.dtype]:
    """p in float64, and the dtype of what is computed from it."""
    dtype = compute_dtype("p", check_tensor("p", p))
    _check_classes("p", p)
    return p.double(), dtype


def _check_classes(name: str, values: Tensor) -> None:
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., classes] with at least one class, got {list(values.shape)}")
