"""The nearest op: for every sample the nearest one of another class, exact, without an N x N array."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..reference.nearest import Nearest
from . import _common


def nearest_other_class(latents: Tensor, labels: Tensor) -> Nearest:
    """Distance and index of each sample's nearest sample with another label.

    Exact: what comparing all pairs finds, from differences of coordinates; of samples at the same distance the one of
    lowest index. The distance has a gradient for both samples of the pair, the difference divided by the distance, and
    0 where the distance is 0; the index has none.

    Args:
        latents: [..., N, d], d at least 1. N may be 0.
        labels: [..., N], int64, any values: samples of equal labels are of one class.

    Leading dimensions broadcast. float32 and float64 are computed as such, float16 and bfloat16 in float32.

    Returns:
        A named tuple: distance [..., N], float64 for float64 latents and float32 otherwise, and index [..., N], int64.
        Where there is no sample of another class, or none whose squared distance is finite in the dtype, the distance
        is inf and the index -1. A sample with a NaN or infinite coordinate has distance NaN and index -1, and so has
        every sample with another label than its: which one is nearest to them is not known. With the environment
        variable KDEJSD_CHECK=1 such a coordinate is an error instead (this waits for the device).

    Raises:
        ValueError: shapes that do not match, d = 0.
        TypeError: an argument that is no tensor, latents that are not floating point, labels that are not int64.
        RuntimeError: mixed devices; a CUDA tensor where CUDA cannot be used; no compiled module.
    """
    dtype, batch = _check(latents, labels)
    n, dim = latents.shape[-2:]
    latents = latents.to(dtype).expand(*batch, n, dim).reshape(-1, n, dim)
    labels = labels.expand(*batch, n).reshape(-1, n)
    own = torch.arange(n, device=latents.device)
    undefined = _undefined(latents, labels)
    index = _index(latents, labels)
    index = torch.where(undefined, -1, index)
    # Advanced indexing, since its backward adds in a fixed order. A sample without a neighbour takes itself: a
    # difference of 0, whose norm has the gradient 0.
    item = torch.arange(latents.shape[0], device=latents.device).unsqueeze(-1)
    neighbour = latents[item, torch.where(index < 0, own, index)]
    distance = torch.linalg.vector_norm(latents - neighbour, dim=-1)
    distance = torch.where(index < 0, math.inf, distance)
    distance = torch.where(undefined, math.nan, distance)
    return Nearest(distance.reshape(*batch, n), index.reshape(*batch, n))


def _check(latents: Tensor, labels: Tensor) -> tuple[torch.dtype, torch.Size]:
    """The dtype to compute in, and the batch dimensions."""
    if _common.check_tensor("latents", latents).ndim < 2 or latents.shape[-1] == 0:
        raise ValueError(f"latents must have shape [..., N, d], d at least 1; got {list(latents.shape)}")
    dtype = _common.compute_dtype("latents", latents)
    n = latents.shape[-2]
    if _common.check_tensor("labels", labels).dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.ndim == 0 or labels.shape[-1] != n:
        raise ValueError(f"labels must have shape [..., {n}], one per sample; got {list(labels.shape)}")
    _common.check_companion("labels", labels, "latents", latents, (torch.int64,))
    try:
        batch = torch.broadcast_shapes(latents.shape[:-2], labels.shape[:-1])
    except RuntimeError:
        shapes = f"latents {list(latents.shape)} and labels {list(labels.shape)}"
        raise ValueError(f"the leading dimensions of latents and labels must broadcast, got {shapes}") from None
    checked = os.environ.get("KDEJSD_CHECK") == "1" and not torch.compiler.is_compiling()
    if checked and (bad := int((~latents.isfinite()).sum())):
        raise ValueError(f"latents must be finite, got {bad} values that are NaN or infinite")
    return dtype, batch


def _undefined(latents: Tensor, labels: Tensor) -> Tensor:
    """[B, N]: the samples that are not finite, and those that have such a one among the other classes."""
    finite = latents.isfinite().all(-1)
    if latents.shape[1] == 0:
        return ~finite
    limits = torch.iinfo(torch.int64)
    lowest = labels.masked_fill(finite, limits.max).amin(-1, keepdim=True)
    highest = labels.masked_fill(finite, limits.min).amax(-1, keepdim=True)
    among_others = (lowest <= highest) & ((lowest != labels) | (highest != labels))
    return ~finite | among_others


def _index(latents: Tensor, labels: Tensor) -> Tensor:
    """[B, N]"""
    rows = max(1, 2**22 // max(1, latents[0].numel() if len(latents) else 1))
    out = torch.full_like(labels, -1)
    with torch.no_grad():
        for b in range(len(latents)):
            for i in range(0, latents.shape[1], rows):
                d2 = (latents[b, i : i + rows, None] - latents[b]).square().sum(-1)
                d2 = torch.where(labels[b, i : i + rows, None] == labels[b], math.inf, d2)
                best, at = d2.min(-1)
                out[b, i : i + rows] = torch.where(best < math.inf, at, -1)
    return out
