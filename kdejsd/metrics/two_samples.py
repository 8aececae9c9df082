"""Measures how far two sets of samples are from each other, where only the samples are known."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._extras import train_extra
from .._numbers import Integer, integer
from .._tensors import COMPUTE_DTYPE, check_companion, check_finite, check_tensor, compute_dtype

_DIRECTIONS = 50  # projected on at a time
_FOLDS = 5


class TwoSampleResult(NamedTuple):
    """Holds how well a classifier tells two sets of samples apart.

    Attributes:
        accuracy: the share of samples that are put into the set they are from.
        standard_error: the standard deviation that the accuracy has, at most, where both sets are of one law. It is
            1 / (2 sqrt(N)) for N samples that are judged independently of each other, times 1.5, since the forests
            that judge them have most of their samples in common (Nadeau, Bengio, Inference for the Generalization
            Error, 2003, whose factor for k parts is sqrt(1 + k / (k - 1))).

    Example:
        >>> import torch
        >>> from kdejsd.metrics import two_sample_accuracy
        >>> first, second = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(0))
        >>> accuracy, standard_error = two_sample_accuracy(first, second)
        >>> abs(accuracy - 0.5) < 2 * standard_error  # nothing that chance does not explain
        True
    """

    accuracy: float
    standard_error: float


def sliced_wasserstein(first: Tensor, second: Tensor, *, projections: Integer = 500, seed: Integer = 0) -> float:
    """Returns the sliced Wasserstein-2 distance of two sets of samples, in the units of their values.

    It is sqrt(mean over directions u of W_2(first . u, second . u)^2), with u uniform on the unit sphere of the d
    values of a sample. W_2 is exact for the samples at hand, as many as there may be of each: it is the root of the
    mean square of the differences of their quantiles. Source: Bonneel, Rabin, Peyre, Pfister, Sliced and Radon
    Wasserstein Barycenters of Measures (2015).

    Two sets of one law are not at 0, because they are finite: compare with the distance of two sets of the data. A
    shift by v counts |v| / sqrt(d). Of `projections` directions the relative standard error is about
    1 / sqrt(2 projections) for such a shift, 3 % for 500, and less for differences in every direction. Everything is
    computed in float64, and nothing has a gradient.

    Args:
        first, second: [n, ...] and [m, ...] floating point, of samples of one shape, on one device.
        projections: the number of directions.
        seed: seeds the directions.

    Raises:
        ValueError: if a set is empty, the shapes of the samples differ, a value is not finite, or a number is out of
            range.
        TypeError: if a set is no floating-point tensor, or a number no integer.
        RuntimeError: if the sets are on different devices.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import sliced_wasserstein
        >>> first, second = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0))
        >>> for scale in (1, 2, 3):
        ...     print(f"{scale}: {sliced_wasserstein(first, scale * second[:800]):.1f}")
        1: 0.1
        2: 1.0
        3: 2.0
    """
    first, second = _checked(first, second, least=1)
    projections, seed = integer("projections", projections, 1), integer("seed", seed, 0)
    n, m = len(first), len(second)
    # Both quantile functions are constant between these levels, which are multiples of 1 / (n m).
    levels = torch.cat([m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)]).unique()
    weights = levels.diff(prepend=levels.new_zeros(1)).double().to(first.device) / (n * m)
    in_first, in_second = (((levels - 1) // size).to(first.device) for size in (m, n))
    directions = torch.randn(first.shape[1], projections, generator=torch.Generator().manual_seed(seed)).double()
    total = 0.0
    for u in torch.nn.functional.normalize(directions, dim=0).to(first.device).split(_DIRECTIONS, dim=1):
        quantiles = ((first @ u).sort(0).values[in_first], (second @ u).sort(0).values[in_second])
        total += float(weights @ (quantiles[0] - quantiles[1]).square().sum(1))
    return math.sqrt(total / projections)


def two_sample_accuracy(first: Tensor, second: Tensor, *, seed: Integer = 0) -> TwoSampleResult:
    """Returns how well a classifier tells two sets of samples apart: 0.5 is not at all, 1 is always.

    The classifier is a forest of 100 extremely randomised trees (scikit-learn's `ExtraTreesClassifier`), which sees
    every value of a sample as a feature, whatever its units. Each sample is judged by a forest grown on the other
    parts of five. Of the larger set as many samples are drawn as the smaller one has. Source: Lopez-Paz, Oquab,
    Revisiting Classifier Two-Sample Tests, arXiv 1610.06545; their classifiers are nearest neighbours and networks.

    An accuracy near 0.5 says that this classifier finds no difference in so many samples, not that there is none.

    Args:
        first, second: [n, ...] and [m, ...] floating point, at least 5 of each, of samples of one shape. They are moved
            to the CPU.
        seed: seeds the choice of samples, the parts and the trees.

    Returns:
        The accuracy, and its standard error where both sets are of one law.

    Raises:
        ValueError: if a set is too small, the shapes of the samples differ, a value is not finite, or the seed is
            negative.
        TypeError: if a set is no floating-point tensor, or the seed no integer.
        RuntimeError: if the sets are on different devices.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import two_sample_accuracy
        >>> first, second = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
        >>> for shift in (0, 1, 3):
        ...     print(f"{shift}: {two_sample_accuracy(first, second + shift).accuracy:.1f}")
        0: 0.5
        1: 0.8
        3: 1.0
    """
    with train_extra():
        from sklearn.ensemble import ExtraTreesClassifier
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
    first, second = _checked(first, second, least=_FOLDS)
    seed = integer("seed", seed, 0)
    rng = torch.Generator().manual_seed(seed)
    count = min(len(first), len(second))
    first, second = (samples.cpu()[torch.randperm(len(samples), generator=rng)[:count]] for samples in (first, second))
    is_second = torch.arange(2 * count).ge(count).numpy()
    judged = cross_val_predict(
        ExtraTreesClassifier(100, min_samples_leaf=5, random_state=seed),
        torch.cat([first, second]).numpy(),
        is_second,
        cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=seed),
    )
    correlation = math.sqrt(1 + _FOLDS / (_FOLDS - 1))
    return TwoSampleResult(float((judged == is_second).mean()), correlation * 0.5 / math.sqrt(2 * count))


def _checked(first: Tensor, second: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Returns both sets as [n, d] and [m, d] in float64."""
    for name, samples in (("first", first), ("second", second)):
        compute_dtype(name, check_tensor(name, samples))
        if samples.ndim < 2 or len(samples) < least or samples[0].numel() == 0:
            raise ValueError(
                f"{name} must have shape [n, ...] with n at least {least} and values in a sample, "
                f"got {list(samples.shape)}"
            )
        check_finite(name, samples)
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"second must have samples of the shape of first, {list(first.shape[1:])}, got {list(second.shape[1:])}"
        )
    check_companion("second", second, "first", first, tuple(COMPUTE_DTYPE))
    return first.detach().flatten(1).double(), second.detach().flatten(1).double()
