"""Measures how far two sets of samples are from each other, if nothing but the samples is known."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._extras import train_extra
from .._numbers import Integer, integer
from .._tensors import COMPUTE_DTYPE, check_companion, check_finite, check_tensor, compute_dtype
from ._rows import MOST, RowsMeasure

_DIRECTIONS = 50  # projected on at a time
_FOLDS = 5


class TwoSampleResult(NamedTuple):
    """Holds how well a classifier tells two sets of samples apart.

    Attributes:
        accuracy: the share of samples that are put into the set they are from.
        standard_error: the standard deviation of the accuracy if both sets are of one distribution, too large rather
            than too small. It is 1 / (2 sqrt(N)) for N samples that are judged independently of each other, times 1.5.
            The factor is there because the forests that judge them share most of their samples (Nadeau, Bengio,
            "Inference for the Generalization Error", 2003, whose factor for k parts is sqrt(1 + k / (k - 1))).

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
    values of a sample. W_2 is exact for the given samples, and the sets may differ in size: it is the root of the mean
    square of the differences of their quantiles. A shift by v counts |v| / sqrt(d).

    Two sets of one distribution are not at distance 0, because they are finite: compare with the distance of two sets
    of the data. For a shift, the relative standard error of `projections` directions is about 1 / sqrt(2 projections),
    which is 3 % for 500. For differences in every direction it is less. Everything is computed in float64, and nothing
    has a gradient.

    Args:
        first, second: [n, ...] and [m, ...] floating point, of samples of one shape, on one device.
        projections: the number of directions.
        seed: seeds the directions.

    Returns:
        The distance, a float.

    Raises:
        ValueError: if a set is empty, the shapes of the samples differ, a value is not finite, or a number is out of
            range.
        TypeError: if a set is no floating-point tensor, or a number no integer.
        RuntimeError: if the sets are on different devices.

    Source: Bonneel, Rabin, Peyre, Pfister, "Sliced and Radon Wasserstein Barycenters of Measures" (2015).

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

    An accuracy near 0.5 says that this classifier finds no difference in so many samples, not that there is none. One
    well below 0.5 says that samples of one set are in the other too, as if a generator repeats its training data: the
    forest has then seen the copy of a sample in the other set.

    The classifier is a forest of 100 extremely randomised trees (scikit-learn's `ExtraTreesClassifier`). Its features
    are the values of a sample, each replaced by its rank among all samples, so units and outliers do not matter. The
    samples are divided into five parts, and each is judged by a forest grown on the other four. If the sets differ in
    size, as many samples of the larger one are drawn as the smaller one has.

    Args:
        first, second: [n, ...] and [m, ...] floating point, at least 5 of each, of samples of one shape. They are moved
            to the CPU.
        seed: seeds the choice of samples, the parts and the trees.

    Returns:
        The accuracy, and its standard error if both sets are of one distribution.

    Raises:
        ValueError: if a set is too small, the shapes of the samples differ, a value is not finite, or the seed is
            negative.
        TypeError: if a set is no floating-point tensor, or the seed no integer.
        RuntimeError: if the sets are on different devices.

    Source: Lopez-Paz, Oquab, "Revisiting Classifier Two-Sample Tests", https://arxiv.org/abs/1610.06545; their
    classifiers are nearest neighbours and networks.

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
    state = seed % 2**32  # scikit-learn takes no larger one
    judged = cross_val_predict(
        ExtraTreesClassifier(100, min_samples_leaf=5, random_state=state),
        _places(torch.cat([first, second])).numpy(),
        is_second,
        cv=StratifiedKFold(_FOLDS, shuffle=True, random_state=state),
    )
    correlation = math.sqrt(1 + _FOLDS / (_FOLDS - 1))
    return TwoSampleResult(float((judged == is_second).mean()), correlation * 0.5 / math.sqrt(2 * count))


def _places(samples: Tensor) -> Tensor:
    """Returns the rank of each value of samples [n, d] among the distinct values of its column.

    Random thresholds between the least and the greatest value would all but miss the data where one value lies far
    away. Besides, the trees would take values in float32, and see no difference below 1e-7 of any unit.
    """
    return torch.stack([column.unique(return_inverse=True)[1] for column in samples.unbind(1)], 1)


class _TwoSampleMeasure(RowsMeasure):
    """Keeps real and generated samples."""

    higher_is_better = False
    plot_lower_bound = 0.0

    def __init__(self, seed: Integer, max_samples: Integer, **kwargs: Any) -> None:
        super().__init__(integer("max_samples", max_samples, _FOLDS), "real_samples", "generated_samples", **kwargs)
        self.seed = integer("seed", seed, 0)

    def update(self, samples: Tensor, real: bool) -> None:
        """Adds real or generated samples [n, ...] of any floating dtype; n may be 0."""
        compute_dtype("samples", check_tensor("samples", samples))
        if samples.ndim < 2 or math.prod(samples.shape[1:]) == 0:
            raise ValueError(f"samples must have shape [n, ...] with values in a sample, got {list(samples.shape)}")
        if not isinstance(real, (bool, np.bool_)):
            raise TypeError(f"real must be True or False, got {type(real).__name__}")
        self._keep("real_samples" if real else "generated_samples", samples.flatten(1))


class TwoSampleAccuracy(_TwoSampleMeasure):
    """Measures how well a classifier tells generated samples from real ones, as `two_sample_accuracy` does.

    It is NaN for fewer than 5 samples of a set. Batches, ranks, dtype and memory are as in `CodeJSD`.

    Args:
        seed: seeds the choice of samples, the parts and the trees.
        max_samples: the number of samples of each set that are measured, drawn by a fixed seed if there are more.
        kwargs: as in torchmetrics.Metric.

    Attributes:
        standard_error: that of the value last computed, if both sets are of one distribution; NaN before.

    Raises:
        TypeError, ValueError: if a number is no integer or too small; by `update` for samples of another shape or
            dtype.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import TwoSampleAccuracy
        >>> metric, rng = TwoSampleAccuracy(), torch.Generator().manual_seed(0)
        >>> for batch in range(5):
        ...     metric.update(torch.randn(100, 3, generator=rng), real=True)
        ...     metric.update(torch.randn(100, 3, generator=rng) + 1, real=False)
        >>> print(f"{metric.compute():.1f}; for equal distributions 0.5 +- {metric.standard_error:.2f}")
        0.8; for equal distributions 0.5 +- 0.02
    """

    plot_upper_bound = 1.0

    def __init__(self, *, seed: Integer = 0, max_samples: Integer = 2000, **kwargs: Any) -> None:
        super().__init__(seed, max_samples, **kwargs)
        self.standard_error = math.nan

    def _measure(self, real: Tensor, generated: Tensor) -> float:
        self.standard_error = math.nan
        accuracy, self.standard_error = two_sample_accuracy(real, generated, seed=self.seed)
        return accuracy


class SlicedWasserstein(_TwoSampleMeasure):
    """Measures how far generated samples are from real ones by `sliced_wasserstein`, in the units of their values.

    Batches, ranks, dtype and memory are as in `CodeJSD`.

    Args:
        projections: the number of directions.
        seed: seeds the directions.
        max_samples: the number of samples of each set that are measured, drawn by a fixed seed if there are more.
        kwargs: as in torchmetrics.Metric.

    Raises:
        TypeError, ValueError: if a number is no integer or too small; by `update` for samples of another shape or
            dtype.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import SlicedWasserstein
        >>> metric, rng = SlicedWasserstein(), torch.Generator().manual_seed(0)
        >>> for batch in range(10):
        ...     metric.update(torch.randn(100, 3, generator=rng), real=True)
        ...     metric.update(3 * torch.randn(100, 3, generator=rng), real=False)
        >>> print(f"{metric.compute():.1f}")
        2.0
    """

    def __init__(
        self, *, projections: Integer = 500, seed: Integer = 0, max_samples: Integer = MOST, **kwargs: Any
    ) -> None:
        super().__init__(seed, max_samples, **kwargs)
        self.projections = integer("projections", projections, 1)

    def _measure(self, real: Tensor, generated: Tensor) -> float:
        return sliced_wasserstein(real, generated, projections=self.projections, seed=self.seed)


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
