"""Implements the omega op in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OmegaMax(NamedTuple):
    """Holds the largest ratio of all pairs, and the two samples that have it."""

    value: Tensor  # []
    indices: Tensor  # [2], int64


def omega(inputs: Tensor, codes: Tensor, *, pairs: str = "halves", reduction: str = "sum") -> Tensor | OmegaMax:
    """Computes `kdejsd.omega` from all pairs' differences, under the same contract.

    Example:
        >>> import kdejsd, torch
        >>> inputs, codes = torch.tensor([[0.0], [1.0], [2.0], [4.0]]), torch.tensor([[0.0], [3.0], [2.0], [3.0]])
        >>> kdejsd.reference.omega(inputs, codes, reduction="none")
        tensor([1., 0.])
    """
    inputs = inputs.flatten(1)
    if inputs.dtype in (torch.float16, torch.bfloat16):
        inputs, codes = inputs.float(), codes.float()
    b = inputs.shape[0]
    first, second = pair_indices(b, pairs, inputs.device)
    ratios = pair_ratios(inputs[first] - inputs[second], codes[first] - codes[second])
    if reduction == "sum":
        return ratios.sum()
    if reduction == "mean":
        return ratios.mean()
    if reduction == "max":
        largest = ratios.argmax().reshape(1)
        indices = torch.cat([first.index_select(0, largest), second.index_select(0, largest)])
        return OmegaMax(ratios.index_select(0, largest).squeeze(0), indices)
    if pairs == "halves":
        return ratios
    matrix = ratios.new_zeros(b, b).index_put((first, second), ratios)
    return matrix + matrix.mT


def pair_indices(b: int, pairs: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the two samples of each pair, [pairs] each, in the order that decides between equal ratios."""
    if pairs == "halves":
        samples = torch.arange(b, device=device)
        return samples[: b // 2], samples[b // 2 :]
    first, second = torch.triu_indices(b, b, 1, device=device).unbind()
    return first, second


def pair_ratios(inputs: Tensor, codes: Tensor) -> Tensor:
    """Returns |codes|^2 / |inputs|^2 of differences [..., d] and [..., l].

    Equal inputs give 0, unless the codes are NaN.
    """
    distance, code_distance = inputs.square().sum(-1), codes.square().sum(-1)
    nothing = (distance == 0) & ~code_distance.isnan()
    # Divided by 1 where nothing counts: the gradient of a quotient that is not taken would be NaN.
    return torch.where(nothing, 0.0, code_distance / torch.where(nothing, 1.0, distance))
