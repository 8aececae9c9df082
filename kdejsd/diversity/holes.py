"""Finds latent holes: regions where the prior has samples but the encoder puts no codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._numbers import between, integer
from ..bandwidth import check_codes, entropy_bandwidth
from ..ops.kde import kde_log_prob
from ..targets import Target, checked_target

_DRAWS = 2000  # of the threshold, for the standard error


@dataclass(frozen=True)
class LatentHoles:
    """Holds the result of `latent_holes` as plain values.

    Attributes:
        mass: the share of the prior in regions of low density. The density is that of the codes, and low means below
            its quantile of this level among held-out codes.
        standard_error: standard error of the mass, from the prior samples and the held-out codes; it takes the density
            as given.
        level: level of the quantile. It is the expected mass if the codes follow the prior.
        bandwidth: bandwidth of the codes' density.
        num_codes: number of codes that were given.

    Example:
        >>> import kdejsd, torch
        >>> codes = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> holes = kdejsd.latent_holes(codes)
        >>> abs(holes.mass - holes.level) < 3 * holes.standard_error  # codes that follow the prior
        True
    """

    mass: float
    standard_error: float
    level: float
    bandwidth: float
    num_codes: int


@torch.no_grad()
def latent_holes(
    codes: Tensor,
    target: Target | None = None,
    *,
    level: float = 0.05,
    num_samples: int = 10_000,
    rng: torch.Generator | None = None,
) -> LatentHoles:
    """Measures latent holes: how much of the prior lies in regions with hardly any codes.

    A generator is not trained for latents from such regions. Call it with the codes of the training examples, and
    compare the result with `level`. Codes that follow the prior give the mass `level` in expectation, whatever the
    bandwidth. (The expectation is exact up to 1 in the number of held-out codes.) Codes that leave parts of the prior
    empty give more. Codes that are more spread out than the prior give less.

    One half of the codes, drawn at random, are the centers of a KDE. A hole is where its density is lower than at all
    but a share `level` of the other half. If the codes follow the prior, prior samples and held-out codes are alike,
    which is why the expectation is known.

    The bandwidth is `entropy_bandwidth` of the centers, which adapts to the codes as they are. `optimal_bandwidth`
    would assume that they follow the target, and be too wide for the gaps.

    Args:
        codes: [n, d], of the training images, finite, floating point.
        target: the prior; None is the standard normal.
        level: the quantile's level, above 0 and below 1.
        num_samples: number of samples of the prior.
        rng: draws the split and the samples; None for a CPU generator seeded with 0.

    Returns:
        A `LatentHoles`, with the mass and its standard error.

    Raises:
        ValueError: if the codes have another shape than [n, d] with d the target's dimension, are not finite, or too
            few for the level; if a number is out of range; and where `entropy_bandwidth` does.
        TypeError: if the codes are not a floating-point tensor, or `target` is no target.

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), Definition 2.4: a hole
    is a point that is the code of no image. The density and its threshold are ours.

    Example:
        >>> import kdejsd, torch
        >>> codes = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> for name, kept in (("all", codes), ("right half", codes[codes[:, 0] > 0])):
        ...     print(f"{name}: {kdejsd.latent_holes(kept).mass:.2f}")
        all: 0.06
        right half: 0.37
    """
    check_codes(codes)
    prior = checked_target(target, codes.shape[1], "codes")
    level = between("level", level, 0, 1)
    num_samples = integer("num_samples", num_samples, 2)
    least = max(3, 2 * (math.ceil(1 / min(level, 1 - level)) - 1))
    if len(codes) < least:
        raise ValueError(f"codes must be at least {least} for a quantile of level {level:g}, got {len(codes)}")
    held_out = len(codes) // 2
    rank = round(level * (held_out + 1))

    rng = torch.Generator().manual_seed(0) if rng is None else rng
    order = torch.randperm(len(codes), generator=rng, device=rng.device).to(codes.device)
    centers = codes[order[held_out:]]
    bandwidth = entropy_bandwidth(centers)
    samples = prior.sample(num_samples, rng).to(codes)
    of_codes, of_prior = (
        kde_log_prob(z, centers, bandwidth).double().sort().values.cpu() for z in (codes[order[:held_out]], samples)
    )
    below = (
        torch.searchsorted(of_prior, of_codes).double() / num_samples
    )  # prior mass below each held-out code's density
    mass = float(below[rank - 1])
    # Of other held-out codes the threshold would have had another rank among these ones: the order statistics of
    # uniform variables say which.
    ranks = np.random.default_rng(0).beta(rank, held_out + 1 - rank, _DRAWS) * held_out
    spread = float(below[torch.from_numpy(ranks).long().clamp_max(held_out - 1)].std())
    error = math.hypot(spread, math.sqrt(mass * (1 - mass) / num_samples))
    return LatentHoles(mass, error, level, bandwidth, len(codes))
