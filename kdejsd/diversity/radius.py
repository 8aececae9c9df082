"""The mean class radius E r(z), z ~ N(0, I): the distance from a latent sample to the nearest boundary of its class.

Two estimators. `class_radius` takes the nearest sample of another class: quick, exact in the limit, biased upward.
`class_radius_search` walks from each sample to the boundary by gradients of a classifier: for dimensions in which
samples are too far from one another to tell where the boundary between them lies.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.nearest import nearest_other_class

_BIASED_FROM = 5  # dimensions


class RadiusBiasWarning(UserWarning):
    """The nearest sample of another class is too far away to say where the boundary is."""


@dataclass(frozen=True)
class ClassRadius:
    """An estimate of the mean class radius, in the units of the latent space.

    Attributes:
        mean: over the samples; inf if some of them have no other class, NaN if some are NaN.
        standard_error: of the mean, from the spread of the samples; it knows nothing of a bias that they share.
        per_sample: [N], the distance from each latent sample.
        latent_dim: d.
        invertible: whether the bound on the class radius may be inverted at this mean. False where the
            estimator's bias is known to carry it over what any division into classes can have.
    """

    mean: float
    standard_error: float
    per_sample: Tensor
    latent_dim: int
    invertible: bool

    @property
    def num_samples(self) -> int:
        return self.per_sample.numel()

    @property
    def num_without_boundary(self) -> int:
        """Samples for which no other class was found; their distance is inf."""
        return int(self.per_sample.isinf().sum())


@dataclass(frozen=True)
class SearchedRadius(ClassRadius):
    """What `class_radius_search` found, with its witnesses.

    Attributes:
        latents: [N, d], the samples.
        labels: [N], their classes, int64.
        boundary: [N, d], for each sample the point of another class at the distance per_sample; NaN where none was found.
    """

    latents: Tensor
    labels: Tensor
    boundary: Tensor


def _summary(per_sample: Tensor) -> tuple[float, float]:
    """Mean and its standard error, in float64."""
    wide = per_sample.double()
    return float(wide.mean()), float(wide.std() / math.sqrt(wide.numel()))


def class_radius(latents: Tensor, labels: Tensor) -> ClassRadius:
    """Estimates the mean class radius by the distance of each sample to the nearest one of another class.

    Biased upward by about N^(-2/(d+1)), as the nearest sample of another class lies behind the boundary and to its
    side. From d = 5 on the bias exceeds what is to be measured for any N that can be had: there a
    `RadiusBiasWarning` is given and the result is not `invertible`; use `class_radius_search`.

    The standard error is that of a mean of independent terms. They are not quite, samples having neighbours in common.

    Args:
        latents: [N, d], N at least 2, drawn from N(0, I); float32, float64 or a half type.
        labels: [N], int64, the class of what is generated from each.

    Returns:
        The estimate, its per_sample without a gradient (`nearest_other_class` has one).

    Raises:
        ValueError: shapes that do not match, fewer than 2 samples.
        TypeError: latents that are not floating point, labels that are not int64.
    """
    with torch.no_grad():
        distance = nearest_other_class(latents, labels).distance
    if latents.ndim != 2 or len(latents) < 2:
        raise ValueError(f"latents must have shape [N, d], N at least 2; got {list(latents.shape)}")
    count, dim = latents.shape
    if dim >= _BIASED_FROM:
        warnings.warn(
            f"the nearest of {count} samples in {dim} dimensions is some {count ** (-2 / (dim + 1)):.2g} further away than "
            "the boundary: this mean class radius is too large, and may not be inverted. Use class_radius_search",
            RadiusBiasWarning,
            stacklevel=2,
        )
    return ClassRadius(*_summary(distance), distance, dim, invertible=dim < _BIASED_FROM)
