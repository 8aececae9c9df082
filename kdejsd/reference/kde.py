"""Implements the kde op and the divergences built on it in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # softplus, as torch has it, leaves out what is below 2e-9


def kde_log_prob(
    query: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    *,
    log_weights: Tensor | None = None,
    exclude_self: bool | Tensor = False,
) -> Tensor:
    """Computes `kdejsd.kde_log_prob` from all n x m x l differences, under the same contract.

    Example:
        >>> import kdejsd, torch
        >>> query, centers = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
        >>> truth = kdejsd.reference.kde_log_prob(query.double(), centers.double(), 0.5)
        >>> torch.allclose(kdejsd.kde_log_prob(query, centers, 0.5).double(), truth, atol=1e-5)
        True
    """
    n, m, dim = query.shape[-2], centers.shape[-2], query.shape[-1]
    if query.dtype in (torch.float16, torch.bfloat16):
        query, centers = query.float(), centers.float()
        log_weights = None if log_weights is None else log_weights.float()
    h = torch.as_tensor(bandwidth, dtype=query.dtype, device=query.device)
    h = torch.where((h > 0) & (h < math.inf), h, math.nan)
    if h.ndim > 0:
        h = h.unsqueeze(-2)  # [..., 1, m or 1] beside the logits [..., n, m]
    squared_distance = (query.unsqueeze(-2) - centers.unsqueeze(-3)).square().sum(-1)
    logits = -squared_distance / (2 * h * h) - dim * h.log()
    if log_weights is not None:
        logits = logits + log_weights.where(log_weights < math.inf, math.nan).unsqueeze(-2)
    if exclude_self is not False:
        place = torch.arange(n, device=query.device) if exclude_self is True else exclude_self
        logits = logits.masked_fill(place.unsqueeze(-1) == torch.arange(m, device=query.device), -math.inf)
    log_prob = logits.logsumexp(-1) - float(dim) * (0.5 * math.log(2 * math.pi))
    return log_prob if log_weights is not None else log_prob - center_count(log_prob, m, exclude_self).log()


def center_count(log_prob: Tensor, m: int, exclude_self: bool | Tensor) -> Tensor:
    """Returns how many of m centers are in each query's density, 0-dim or [..., n], in the dtype of log_prob."""
    if isinstance(exclude_self, Tensor):
        return m - ((exclude_self >= 0) & (exclude_self < m)).to(log_prob.dtype)
    return log_prob.new_full((), m - int(exclude_self))


def with_own_center(log_prob: Tensor, count: Tensor, query: Tensor, own: Tensor, bandwidth: float | Tensor) -> Tensor:
    """Returns log p_e if each query has a center of its own in addition to `count` equal ones that all queries share.

        log [(count p_e + N(query; own, h^2 I)) / (count + 1)]

    Args:
        log_prob: [..., n], log p_e of the shared centers; everything is computed in its dtype.
        count: [..., n] or 0-dim, the number of shared centers.
        query: [..., n, l].
        own: [..., n, l].
        bandwidth: h, a number, a 0-dim tensor or [..., 1].

    Returns:
        [..., n], differentiable in all of them but `count`.
    """
    query, own = query.to(log_prob.dtype), own.to(log_prob.dtype)
    # A tensor of a number is filled, not copied from the host, which a GPU would be waited for.
    h = bandwidth.to(log_prob.dtype) if isinstance(bandwidth, Tensor) else log_prob.new_full((), bandwidth)
    step = (query - own) / (h.unsqueeze(-1) if h.ndim > 0 else h)
    kernel = normal_log_prob(step, 1.0) - query.shape[-1] * h.log()
    return torch.logaddexp(log_prob + count.log(), kernel) - (count + 1).log()


def log_prob_with_own(
    query: Tensor, centers: Tensor, bandwidth: float | Tensor, own: Tensor | None, **kde: Any
) -> Tensor:
    """Returns `kde_log_prob`, where each query has a center of its own too unless `own` is None."""
    log_prob = kde_log_prob(query, centers, bandwidth, **kde)
    if own is None:
        return log_prob
    count = center_count(log_prob, centers.shape[-2], kde.get("exclude_self", False))
    return with_own_center(log_prob, count, query, own, bandwidth)


def normal_log_prob(z: Tensor, variance: float) -> Tensor:
    """Returns the log-density of N(0, variance I) at z [..., l], as [...]."""
    dim = float(z.shape[-1])  # torch.jit.trace has an integer tensor there, whose product with a number is float32
    return -0.5 * (z.square().sum(-1) / variance + dim * math.log(2 * math.pi * variance))


_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "js": lambda log_ratio: math.log(2) + logsigmoid(log_ratio),
    "kl": lambda log_ratio: log_ratio,
}


def _log_ratio(
    query: Tensor, centers: Tensor, bandwidth: float | Tensor, own: Tensor | None, target: Any, **kde: Any
) -> Tensor:
    """Returns log p_e - log p_t at the queries; the subtraction is in float64."""
    log_target = normal_log_prob(query.double(), 1.0) if target is None else target.log_prob(query).double()
    return log_prob_with_own(query, centers, bandwidth, own, **kde).double() - log_target


def jsd_loss(
    codes: Tensor,
    lagged: Tensor,
    bandwidth: float | Tensor,
    *,
    target: Any = None,
    target_samples: Tensor | None = None,
    log_weights: Tensor | None = None,
    exclude_self: bool | Tensor = False,
    own: Tensor | None = None,
    divergence: str = "js",
    reduction: str = "mean",
) -> Tensor:
    """Computes `kdejsd.jsd_loss` from all differences, under the same contract.

    Example:
        >>> import kdejsd, torch
        >>> codes, lagged = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> loss, truth = kdejsd.jsd_loss(codes, lagged, 0.5), kdejsd.reference.jsd_loss(codes, lagged, 0.5)
        >>> torch.allclose(loss, truth)
        True
    """
    log_ratio = _log_ratio(codes, lagged, bandwidth, own, target, log_weights=log_weights, exclude_self=exclude_self)
    terms = _TERMS[divergence](log_ratio)
    if target_samples is not None:
        at_target = _log_ratio(target_samples, lagged, bandwidth, None, target, log_weights=log_weights)
        terms = terms.mean() + math.log(2) + logsigmoid(-at_target).mean()
    if reduction != "none":
        terms = terms.mean() if reduction == "mean" else terms.sum()
    return terms if codes.dtype == torch.float64 else terms.float()


def jsd(
    samples: Tensor, centers: Tensor, bandwidth: float | Tensor, target_samples: Tensor, *, target: Any = None
) -> Tensor:
    """Computes `kdejsd.jsd` from all differences, under the same contract.

    Example:
        >>> import kdejsd, torch
        >>> samples, centers, target_samples = torch.randn(3, 100, 3, generator=torch.Generator().manual_seed(0))
        >>> truth = kdejsd.reference.jsd(samples, centers, 0.5, target_samples)
        >>> torch.allclose(kdejsd.jsd(samples, centers, 0.5, target_samples), truth, atol=1e-5)
        True
    """
    return 0.5 * jsd_loss(samples, centers, bandwidth, target=target, target_samples=target_samples)
