"""The kde op and the divergences built on it in plain PyTorch: the truth, in float64, for the kernels' tests.

Everything here runs on any device torch has and composes with every torch transform, for n x m x l memory.
"""

from __future__ import annotations

import math
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
    """Same contract as `kdejsd.kde_log_prob`, computed from all n x m x l differences."""
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
    log_count: float | Tensor = math.log(m) if log_weights is None else 0.0
    if exclude_self is not False:
        own = torch.arange(n, device=query.device) if exclude_self is True else exclude_self
        excluded = own.unsqueeze(-1) == torch.arange(m, device=query.device)
        logits = logits.masked_fill(excluded, -math.inf)
        if log_weights is None:
            log_count = (m - excluded.sum(-1)).to(query.dtype).log()
    return logits.logsumexp(-1) - log_count - 0.5 * dim * math.log(2 * math.pi)


def normal_log_prob(z: Tensor, variance: float) -> Tensor:
    """Log-density of N(0, variance I) at z [..., l], as [...]."""
    return -0.5 * (z.square().sum(-1) / variance + z.shape[-1] * math.log(2 * math.pi * variance))


def normal_divergence_terms(
    codes: Tensor, centers: Tensor, bandwidth: float | Tensor, variance: float, divergence: str, **kde: Any
) -> Tensor:
    """The terms of `jsd_loss` with reduction="none", in float64, for the target N(0, variance I)."""
    log_prob = kde_log_prob(codes, centers, bandwidth, **kde).double()
    return _terms(log_prob - normal_log_prob(codes.double(), variance), divergence)


def _terms(log_ratio: Tensor, divergence: str) -> Tensor:
    return log_ratio if divergence == "kl" else math.log(2) + logsigmoid(log_ratio)


def _log_ratio(query: Tensor, centers: Tensor, bandwidth: float | Tensor, target: Any, **kde: Any) -> Tensor:
    """log p_e - log p_t at the queries, the subtraction in float64."""
    log_target = normal_log_prob(query.double(), 1.0) if target is None else target.log_prob(query).double()
    return kde_log_prob(query, centers, bandwidth, **kde).double() - log_target


def jsd_loss(
    codes: Tensor,
    lagged: Tensor,
    bandwidth: float | Tensor,
    *,
    target: Any = None,
    target_samples: Tensor | None = None,
    log_weights: Tensor | None = None,
    exclude_self: bool | Tensor = False,
    divergence: str = "js",
    reduction: str = "mean",
) -> Tensor:
    """Same contract as `kdejsd.jsd_loss`."""
    log_ratio = _log_ratio(codes, lagged, bandwidth, target, log_weights=log_weights, exclude_self=exclude_self)
    terms = _terms(log_ratio, divergence)
    if target_samples is not None:
        at_target = _log_ratio(target_samples, lagged, bandwidth, target, log_weights=log_weights)
        terms = terms.mean() + math.log(2) + logsigmoid(-at_target).mean()
    if reduction != "none":
        terms = terms.mean() if reduction == "mean" else terms.sum()
    return terms if codes.dtype == torch.float64 else terms.float()


def jsd(
    samples: Tensor, centers: Tensor, bandwidth: float | Tensor, target_samples: Tensor, *, target: Any = None
) -> Tensor:
    """Same contract as `kdejsd.jsd`."""
    return 0.5 * jsd_loss(samples, centers, bandwidth, target=target, target_samples=target_samples)
