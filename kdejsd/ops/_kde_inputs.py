"""Checks the inputs of the kde op, and gives all of them one shape."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from .. import _tensors
from .._numbers import positive

# The least and the greatest positive number of a dtype; torch.finfo takes a microsecond to tell.
_RANGE = {
    dtype: (limits.smallest_normal * limits.eps, limits.max)
    for dtype, limits in ((dtype, torch.finfo(dtype)) for dtype in (torch.float32, torch.float64))
}

# Inputs in the shapes that the kernels take: query [B, n, l], centers [B, m, l], bandwidth [B, m] or [B, 1],
# log_weights [B, m], exclude [B, n]; without B for one mixture, else with a 1 for what all batch items share. A number
# for the bandwidth stays one: making a tensor of it would be a kernel of its own on CUDA.
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor | float, Tensor | None, Tensor | None]


def checked_inputs(
    names: tuple[str, str],
    query: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    log_weights: Tensor | None,
    exclude_self: bool | Tensor,
) -> tuple[Inputs, tuple[int, ...]]:
    """Returns the checked inputs, and the shape of the result."""
    query_name, centers_name = names
    for name, value in zip(names, (query, centers), strict=True):
        if _tensors.check_tensor(name, value).ndim < 2:
            raise ValueError(f"{name} must have shape [..., points, l], got {list(value.shape)}")
    n, dim, m = query.shape[-2], query.shape[-1], centers.shape[-2]
    dtype = _tensors.compute_dtype(query_name, query)
    if centers.shape[-1] != dim or dim == 0:
        raise ValueError(
            f"{query_name} and {centers_name} must have the same number of dimensions l, at least 1; got {query_name} "
            f"{list(query.shape)} and {centers_name} {list(centers.shape)}"
        )
    if m == 0:
        raise ValueError(f"{centers_name} must hold at least one point, got shape {list(centers.shape)}")

    if isinstance(bandwidth, Tensor):
        if bandwidth.ndim > 0 and bandwidth.shape[-1] not in (1, m):
            raise ValueError(
                f"bandwidth must be a number, a 0-dim tensor, or [..., {m}] or [..., 1]; got {list(bandwidth.shape)}"
            )
        h: Tensor | float = bandwidth if bandwidth.ndim > 0 else bandwidth.reshape(1)
    else:
        h = positive("bandwidth", bandwidth)
        least, most = _RANGE[dtype]
        if not least <= h <= most:
            raise ValueError(f"bandwidth must be in the range of {dtype}, got {h}")
    if log_weights is not None and _tensors.check_tensor("log_weights", log_weights).shape[-1:] != (m,):
        raise ValueError(f"log_weights must have shape [..., {m}], one per center; got {list(log_weights.shape)}")

    exclude = None if exclude_self is False else _checked_exclude(names, exclude_self, n, m, query.device)
    if exclude is not None and m == 1 and log_weights is None:
        raise ValueError(f"exclude_self needs at least 2 {centers_name}, got 1")

    allowed = (query.dtype, dtype)  # half-precision queries may come with a float32 bandwidth and weights
    _tensors.check_companion(centers_name, centers, query_name, query, allowed[:1])
    if isinstance(h, Tensor):
        _tensors.check_companion("bandwidth", h, query_name, query, allowed)
    if log_weights is not None:
        _tensors.check_companion("log_weights", log_weights, query_name, query, allowed)
    if exclude is not None:
        _tensors.check_companion("exclude_self", exclude, query_name, query, (torch.int64,))
    if query.dtype != dtype:
        query = query.to(dtype)
    if centers.dtype != dtype:
        centers = centers.to(dtype)
    if isinstance(h, Tensor) and h.dtype != dtype:
        h = h.to(dtype)
    if log_weights is not None and log_weights.dtype != dtype:
        log_weights = log_weights.to(dtype)
    if _tensors.checks_values():
        _check_values(names, query, centers, h, log_weights, exclude)

    if (  # no batch: the usual call, kept short
        query.ndim == centers.ndim == 2
        and (not isinstance(h, Tensor) or h.ndim == 1)
        and (log_weights is None or log_weights.ndim == 1)
        and (exclude is None or exclude.ndim == 1)
    ):
        return (query, centers, h, log_weights, exclude), (n,)

    return _in_batches(names, query, centers, h, log_weights, exclude)


def _checked_exclude(
    names: tuple[str, str], exclude_self: bool | Tensor, n: int, m: int, device: torch.device
) -> Tensor:
    """Returns the index of the center that each query leaves out, [..., n]."""
    if isinstance(exclude_self, Tensor):
        if exclude_self.dtype != torch.int64:
            raise TypeError(f"exclude_self must be a bool or an int64 tensor, got {exclude_self.dtype}")
        if exclude_self.ndim == 0 or exclude_self.shape[-1] != n:
            raise ValueError(f"exclude_self must have shape [..., {n}], one per query; got {list(exclude_self.shape)}")
        return exclude_self
    if not isinstance(exclude_self, bool):
        raise TypeError(f"exclude_self must be a bool or an int64 tensor, got {type(exclude_self).__name__}")
    if n != m:
        raise ValueError(f"exclude_self=True needs as many {names[0]} as {names[1]}, got {n} and {m}")
    return torch.arange(n, device=device)


def _in_batches(
    names: tuple[str, str],
    query: Tensor,
    centers: Tensor,
    h: Tensor | float,
    log_weights: Tensor | None,
    exclude: Tensor | None,
) -> tuple[Inputs, tuple[int, ...]]:
    """Returns inputs with leading dimensions, which broadcast, in the shapes of `Inputs`; and the result's shape."""
    query_name, centers_name = names
    n, dim, m = query.shape[-2], query.shape[-1], centers.shape[-2]
    # The batch of the mixture: dimensions before those that every argument has anyway.
    batches = {centers_name: centers.shape[:-2], "bandwidth": h.shape[:-1] if isinstance(h, Tensor) else torch.Size()}
    if log_weights is not None:
        batches["log_weights"] = log_weights.shape[:-1]
    mixture_batch = _tensors.broadcast_batch(batches)
    batches[query_name] = query.shape[:-2]
    if exclude is not None:
        batches["exclude_self"] = exclude.shape[:-1]
    batch = _tensors.broadcast_batch(batches)
    shape = (*batch, n)
    items = math.prod(batch)
    if math.prod(mixture_batch) == 1:
        # One mixture for all: every query of the batch is one more query of it.
        flat = query.expand(*batch, n, dim).reshape(items * n, dim)
        if exclude is not None:
            exclude = exclude.expand(*batch, n).reshape(items * n)
        centers = centers.reshape(m, dim)
        h = h.reshape(-1) if isinstance(h, Tensor) else h
        log_weights = None if log_weights is None else log_weights.reshape(m)
        return (flat, centers, h, log_weights, exclude), shape

    def flatten(t: Tensor, own: int) -> Tensor:
        if math.prod(t.shape[:-own]) == 1:
            return t.reshape(1, *t.shape[-own:])
        return t.expand(*batch, *t.shape[-own:]).reshape(items, *t.shape[-own:])

    inputs = (
        query.expand(*batch, n, dim).reshape(items, n, dim),
        flatten(centers, 2),
        flatten(h, 1) if isinstance(h, Tensor) else h,
        None if log_weights is None else flatten(log_weights, 1),
        None if exclude is None else flatten(exclude, 1),
    )
    return inputs, shape


def checked_own(own: Tensor, query_name: str, query: Tensor, inputs: Inputs, shape: tuple[int, ...]) -> Tensor:
    """Returns the own centers, one for each query of checked inputs, in the shape of these."""
    flat, _, bandwidth, log_weights, _ = inputs
    dim = flat.shape[-1]
    batch = _tensors.check_tensor("own", own).shape[:-2]
    if own.shape[-2:] != (shape[-1], dim):
        raise ValueError(
            f"own must have shape [..., {shape[-1]}, {dim}], one center for each of {query_name}; got {list(own.shape)}"
        )
    whole = torch.Size(shape[:-1])
    if batch != whole and _tensors.broadcast_batch({query_name: whole, "own": batch}) != whole:
        raise ValueError(
            f"own must have no leading dimensions beside {list(whole)}, those of the result; got {list(own.shape)}"
        )
    if log_weights is not None:
        raise ValueError(f"log_weights must be None where own is given, got shape {list(log_weights.shape)}")
    if is_per_center(bandwidth):
        raise ValueError(
            "bandwidth must be a number, a 0-dim tensor, or [..., 1] where own is given; got one per center"
        )
    _tensors.check_companion("own", own, query_name, query, (query.dtype,))
    if _tensors.checks_values():
        _tensors.check_finite("own", own)
    if own.dtype != flat.dtype:
        own = own.to(flat.dtype)
    return own if own.shape == flat.shape else own.expand(*shape, dim).reshape(flat.shape)


def _check_values(
    names: tuple[str, str],
    query: Tensor,
    centers: Tensor,
    bandwidth: Tensor | float,
    log_weights: Tensor | None,
    exclude: Tensor | None,
) -> None:
    """Raises an error for values that only the data can show to be wrong (KDEJSD_CHECK=1)."""
    for name, value in zip(names, (query, centers), strict=True):
        _tensors.check_finite(name, value)
    if isinstance(bandwidth, Tensor) and not bool(((bandwidth > 0) & bandwidth.isfinite()).all()):
        raise ValueError(
            f"bandwidth must be positive and finite, got {float(bandwidth.min())} to {float(bandwidth.max())}"
        )
    if log_weights is not None and not bool((log_weights < math.inf).all()):
        raise ValueError("log_weights must be below infinity and not NaN")
    if (
        exclude is not None
        and exclude.numel()
        and not (-1 <= int(exclude.min()) <= int(exclude.max()) < centers.shape[-2])
    ):
        raise ValueError(
            f"exclude_self must hold -1 or the index of a center, 0 to {centers.shape[-2] - 1}; "
            f"got {int(exclude.min())} to {int(exclude.max())}"
        )


def all_tensors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Returns the inputs as the operator's schema has them."""
    query, centers, bandwidth, *others = inputs
    if not isinstance(bandwidth, Tensor):
        bandwidth = query.new_full((1,) * (query.ndim - 1), bandwidth)
    return (query, centers, bandwidth, *others)


def is_per_center(bandwidth: Tensor | float) -> bool:
    return isinstance(bandwidth, Tensor) and bandwidth.shape[-1] > 1
