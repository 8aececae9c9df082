"""Computes entropies and collision probabilities of distributions over classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numbers import real
from .._tensors import check_tensor, compute_dtype


def renyi_entropy(p: Tensor, order: float = 2) -> Tensor:
    """Returns the Renyi entropy of distributions over classes, log(sum_i p_i^a) / (1 - a), in nats.

    Its exponential is a number of classes: that many equally probable ones have the same entropy. Order 0 is the log of
    the number of classes with p_i > 0. Order 1 is Shannon's entropy -sum p_i log p_i (the limit), order 2 the collision
    entropy, and infinity the min-entropy -log max p. The entropy falls with the order.

    Args:
        p: [..., K], each row a distribution; a row that does not sum to 1 is divided by its sum.
        order: a, at least 0.

    Returns:
        [...], computed in float64, and without loss of digits near order 1; float64 for float64 input and float32
        otherwise. NaN where an entry is NaN or negative. The gradient is orthogonal to p, and equals that of the
        formula up to a constant. At an entry of 0 the gradient for an order of at most 1 is infinite; 0 is returned
        there.

    Raises:
        TypeError: if p is no floating-point tensor, or order no number.
        ValueError: if there is no class, or the order is negative or NaN.

    Example:
        >>> import kdejsd, torch
        >>> p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
        >>> kdejsd.renyi_entropy(p).exp()  # as many equal classes would have the same collision entropy
        tensor([4.0000, 1.9231])
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
    """Returns the probability that two independent draws are of one class, sum_i p_i^2.

    A small value means many classes. Use `collision_probability_from_counts` if you have samples instead of
    probabilities.

    Args:
        p: [..., K], each row a distribution.

    Returns:
        [...], float64 for float64 input and float32 otherwise; NaN where an entry is NaN.

    Raises:
        TypeError: if p is no floating-point tensor.
        ValueError: if there is no class.

    Example:
        >>> import kdejsd, torch
        >>> kdejsd.collision_probability(torch.tensor([0.5, 0.25, 0.25]))
        tensor(0.3750)
    """
    wide, dtype = _distribution(p)
    return wide.square().sum(-1).to(dtype)


def collision_probability_from_counts(counts: Tensor) -> Tensor:
    """Estimates the collision probability without bias, by the share of pairs of samples that are of one class.

    It is sum_i n_i (n_i - 1) / (N (N - 1)), N = sum_i n_i. For independent samples its expectation is sum_i p_i^2. The
    simpler estimate sum_i (n_i / N)^2 is too high by (1 - sum p_i^2) / N.

    Args:
        counts: [..., K], the number of samples in each class (as torch.bincount counts labels), int64 or any dtype that
            holds them.

    Returns:
        [...], float64. NaN where N < 2 or a count is negative or NaN.

    Raises:
        TypeError: if counts is no tensor of numbers.
        ValueError: if there is no class.

    Example:
        >>> import kdejsd, torch
        >>> kdejsd.collision_probability_from_counts(torch.tensor([2, 1, 1]))  # one pair of six
        tensor(0.1667, dtype=torch.float64)
    """
    if check_tensor("counts", counts).dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts must hold numbers, got {counts.dtype}")
    _check_classes("counts", counts)
    n = counts.double()
    total = n.sum(-1)
    share = (n * (n - 1)).sum(-1) / (total * (total - 1))
    return share.masked_fill(~((n >= 0).all(-1) & (total >= 2)), math.nan)


def _distribution(p: Tensor) -> tuple[Tensor, torch.dtype]:
    """Returns p in float64, and the dtype of the results that are computed from it."""
    dtype = compute_dtype("p", check_tensor("p", p))
    _check_classes("p", p)
    return p.double(), dtype


def _check_classes(name: str, values: Tensor) -> None:
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., classes] with at least one class, got {list(values.shape)}")
