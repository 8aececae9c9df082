"""Finds for every sample the nearest one of another class, exactly and without an N x N array: the nearest op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _tensors
from .._native import native
from ..reference import nearest as reference
from ..reference.nearest import Nearest
from . import _common

_MOST_SAMPLES = 2**31 - 1  # the kernels' indices


def nearest_other_class(latents: Tensor, labels: Tensor) -> Nearest:
    """Returns the distance and the index of each sample's nearest sample of another class.

    It is the exact nearest-neighbour search behind `class_radius`, without an N x N array. The result is exactly that
    of comparing all pairs, from differences of coordinates. Of samples at equal distances it is the one of lowest
    index. The distance has a gradient for both samples of the pair: the difference divided by the distance, and 0 where
    the distance is 0. Squares are taken in the dtype: in float32, distances under 1e-18 lose digits and end as 0. Scale
    such latents. Leading dimensions broadcast.

    Args:
        latents: [..., N, d], d at least 1. N may be 0. float32 and float64 are computed as such, float16 and bfloat16
            in float32.
        labels: [..., N], int64, any values: samples of equal labels are of one class.

    Returns:
        A named tuple: distance [..., N], float64 for float64 latents and float32 otherwise, and index [..., N], int64.
        Where there is no sample of another class, or none whose squared distance is finite in the dtype, the distance
        is inf and the index -1. A sample with a NaN or infinite coordinate has distance NaN and index -1. So has every
        sample with another label, since its nearest sample is then not known. With the environment variable
        KDEJSD_CHECK=1 such a coordinate raises an error instead (this waits for the device).

    Raises:
        ValueError: if shapes do not match, or d = 0.
        TypeError: if an argument is no tensor, latents are not floating point, or labels are not int64.
        RuntimeError: if devices are mixed, CUDA is needed but cannot be used, or there is no compiled module.

    Example:
        >>> import kdejsd, torch
        >>> latents = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 4.0]])
        >>> kdejsd.nearest_other_class(latents, torch.tensor([0, 0, 1]))
        Nearest(distance=tensor([5.6569, 5.0000, 5.0000]), index=tensor([2, 2, 1]))
    """
    dtype, batch = _check(latents, labels)
    n, dim = latents.shape[-2:]
    items = math.prod(batch)
    latents = latents.to(dtype).expand(*batch, n, dim).reshape(items, n, dim)
    labels = labels.expand(*batch, n).reshape(items, n)
    own = torch.arange(n, device=latents.device)
    undefined = _undefined(latents, labels)
    index = _index(latents, labels).masked_fill(undefined, -1)
    # Advanced indexing, since its backward adds in a fixed order. A sample without a neighbour takes itself: a
    # difference of 0, whose norm has the gradient 0.
    item = torch.arange(items, device=latents.device).unsqueeze(-1)
    neighbour = latents[item, torch.where(index < 0, own, index)]
    distance = torch.linalg.vector_norm(latents - neighbour, dim=-1)
    distance = distance.masked_fill(index < 0, math.inf).masked_fill(undefined, math.nan)
    return Nearest(distance.reshape(*batch, n), index.reshape(*batch, n))


def _check(latents: Tensor, labels: Tensor) -> tuple[torch.dtype, torch.Size]:
    """Returns the dtype to compute in, and the batch dimensions."""
    if _tensors.check_tensor("latents", latents).ndim < 2 or latents.shape[-1] == 0:
        raise ValueError(f"latents must have shape [..., N, d], d at least 1; got {list(latents.shape)}")
    dtype = _tensors.compute_dtype("latents", latents)
    n = latents.shape[-2]
    _tensors.check_int64("labels", labels)
    if n > _MOST_SAMPLES:
        raise ValueError(f"latents must hold at most {_MOST_SAMPLES} samples, got {n}")
    if labels.ndim == 0 or labels.shape[-1] != n:
        raise ValueError(f"labels must have shape [..., {n}], one per sample; got {list(labels.shape)}")
    _tensors.check_companion("labels", labels, "latents", latents, (torch.int64,))
    batch = _tensors.broadcast_batch({"latents": latents.shape[:-2], "labels": labels.shape[:-1]})
    if _tensors.checks_values():
        _tensors.check_finite("latents", latents)
    return dtype, batch


def _undefined(latents: Tensor, labels: Tensor) -> Tensor:
    """Marks, as [B, N], the samples that are not finite, and those that have such a one among the other classes."""
    finite = latents.isfinite().all(-1)
    if latents.shape[1] == 0:
        return ~finite
    limits = torch.iinfo(torch.int64)
    lowest = labels.masked_fill(finite, limits.max).amin(-1, keepdim=True)
    highest = labels.masked_fill(finite, limits.min).amax(-1, keepdim=True)
    among_others = (lowest <= highest) & ((lowest != labels) | (highest != labels))
    return ~finite | among_others


def _index(latents: Tensor, labels: Tensor) -> Tensor:
    """Returns [B, N], -1 where none is at a finite squared distance; to be corrected where it is not defined."""
    latents = latents.detach()
    road = _common.road((latents, labels))
    if road == "reference":
        return reference.nearest_other_class(latents, labels).index
    if road == "operator":
        return _operator(latents, labels)  # type: ignore[no-any-return]
    return _launch(latents, labels)


def _launch(latents: Tensor, labels: Tensor) -> Tensor:
    """Makes the raw call: from latents [B, N, d] and labels [B, N] to the index [B, N]."""
    _common.check_cuda("latents", latents)
    latents, labels = latents.contiguous(), labels.contiguous()
    index = torch.empty_like(labels)
    if index.numel() == 0:
        return index
    batch, n, dim = latents.shape
    args = native().NearestSearch(
        dtype=_common.KERNEL_DTYPE[latents.dtype],
        batch=batch,
        n=n,
        d=dim,
        latents=latents.data_ptr(),
        labels=labels.data_ptr(),
        index=index.data_ptr(),
    )
    _common.launch(native(), "nearest", latents.device, args)
    return index


def _fake(latents: Tensor, labels: Tensor) -> Tensor:
    return torch.empty_like(labels, memory_format=torch.contiguous_format)


_operator = _common.operator("nearest", _launch, _fake)
