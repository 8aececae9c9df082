"""Implements the nearest op in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """Holds the nearest sample of another class for each sample.

    Attributes:
        distance: [..., N], Euclidean; inf where there is none, NaN where it is not defined.
        index: [..., N], int64, along the samples; -1 where distance is inf or NaN.
    """

    distance: Tensor
    index: Tensor  # type: ignore[assignment]  # stands before tuple.index


def nearest_other_class(latents: Tensor, labels: Tensor) -> Nearest:
    """Computes `kdejsd.nearest_other_class` from all N x N x d differences, under the same contract.

    Example:
        >>> import kdejsd, torch
        >>> latents, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
        >>> kdejsd.reference.nearest_other_class(latents, labels)
        Nearest(distance=tensor([3., 2., 2.]), index=tensor([2, 2, 1]))
    """
    if latents.dtype in (torch.float16, torch.bfloat16):
        latents = latents.float()
    known = torch.where(latents.isfinite(), latents, math.nan)
    distances = torch.linalg.vector_norm(known.unsqueeze(-2) - known.unsqueeze(-3), dim=-1)
    same_class = labels.unsqueeze(-1) == labels.unsqueeze(-2)
    undefined = distances.diagonal(dim1=-2, dim2=-1).isnan()
    distances = torch.where(same_class, math.inf, distances)
    if distances.shape[-1] == 0:
        return Nearest(distances.sum(-1), labels.expand(distances.shape[:-1]).clone())
    distance, index = distances.min(-1)  # of equal ones the first; NaN if any is
    distance = torch.where(undefined, math.nan, distance)
    return Nearest(distance, torch.where(distance.isfinite(), index, -1))
