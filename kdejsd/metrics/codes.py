"""Measures latent codes and latents that come batch by batch, as metrics of torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._numbers import Integer, RealNumber, integer, positive
from .._tensors import check_finite, check_int64
from ..divergence import target_jsd
from ..diversity import class_radius
from ..entropy import kde_entropy
from ..targets import Law, Target, as_law, checked_target
from ._rows import MOST, RowsMeasure, checked_rows


class _CodesMeasure(RowsMeasure):
    """Keeps codes."""

    def __init__(self, max_codes: Integer, **kwargs: Any) -> None:
        super().__init__(integer("max_codes", max_codes, 2), "codes", **kwargs)

    def update(self, codes: Tensor) -> None:
        """Adds codes [n, l] of any floating dtype; n may be 0."""
        self._keep("codes", checked_rows("codes", codes))


class CodeJSD(_CodesMeasure):
    """Measures how far codes are from following a target: the Jensen-Shannon divergence of their KDE, in nats.

    The codes' KDE is compared with the target smoothed by the same kernel, or with the target itself where it has no
    `smoothed` (`kdejsd.jsd`). The value lies between 0 and log 2, apart from the noise of n samples. For codes that do
    follow the target it is small, not 0: compare it with the value for as many samples of the target.

    As for all metrics here, the value is that of all codes since the last `reset`, on all ranks together. It is the
    same bit for bit however they are divided into batches and ranks. It is computed on the metric's device in its
    dtype, which is float32 until `set_dtype` changes it. If the codes have no value it is NaN, with a warning that says
    why. Codes are kept until they are measured, in the main memory with `compute_on_cpu=True`; nothing is in a
    `state_dict`.

    Args:
        target: StandardNormal, GaussianMixture, a torch Distribution over vectors, or an object with the methods of
            `kdejsd.targets.Law`; None for the standard normal.
        bandwidth: h, the kernel's standard deviation; None is the optimal one for as many samples of the target
            (`kdejsd.optimal_bandwidth`), which depends on the target alone.
        seed: seeds the samples.
        max_codes: the number of codes that are measured, drawn by a fixed seed if there are more.
        kwargs: as in torchmetrics.Metric.

    Raises:
        TypeError, ValueError: if an argument is of another kind or out of range, at once; by `update` for codes of
            another shape or dtype.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, equation
    2.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import CodeJSD
        >>> metric, rng = CodeJSD(), torch.Generator().manual_seed(0)
        >>> for batch in range(10):
        ...     metric.update(torch.randn(100, 2, generator=rng))
        >>> print(f"{metric.compute():.3f} nats")
        0.001 nats
        >>> metric.reset()
        >>> metric.update(torch.randn(1000, 2, generator=rng) + 1)
        >>> print(f"{metric.compute():.3f} nats")
        0.194 nats
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = math.log(2)

    target: Law | None

    def __init__(
        self,
        target: Target | None = None,
        bandwidth: RealNumber | None = None,
        *,
        seed: Integer = 0,
        max_codes: Integer = MOST,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_codes, **kwargs)
        # No submodule, whose buffers the checkpoint of a model with this metric would get.
        object.__setattr__(self, "target", None if target is None else as_law(target))
        self.bandwidth = None if bandwidth is None else positive("bandwidth", bandwidth)
        self.seed = integer("seed", seed, 0)

    def update(self, codes: Tensor) -> None:
        """Adds codes [n, l] of any floating dtype; n may be 0."""
        checked_target(self.target, checked_rows("codes", codes).shape[1], like="each code")
        super().update(codes)

    def _measure(self, codes: Tensor) -> Tensor:
        check_finite("codes", codes)
        target = checked_target(self.target, codes.shape[1])
        return target_jsd(codes, target, torch.Generator(codes.device).manual_seed(self.seed), self.bandwidth)


class CodeEntropy(_CodesMeasure):
    """Estimates the entropy of whitened codes in nats (`kdejsd.kde_entropy`): the closer to normal, the higher it is.

    The estimate is too large, more so for fewer codes: compare it with the value for as many normal samples. It is NaN
    for codes that lie in fewer than l dimensions. Batches, ranks, dtype and memory are as in `CodeJSD`.

    Args:
        max_codes: the number of codes that are measured, drawn by a fixed seed if there are more.
        kwargs: as in torchmetrics.Metric.

    Raises:
        TypeError, ValueError: if max_codes is no integer of at least 2; by `update` for codes of another shape or
            dtype.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import CodeEntropy
        >>> metric = CodeEntropy()
        >>> metric.update(torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)))
        >>> print(f"{metric.compute():.2f} nats")  # 2.84, log(2 pi e), for the normal distribution itself
        2.85 nats
    """

    higher_is_better = True

    def __init__(self, *, max_codes: Integer = MOST, **kwargs: Any) -> None:
        super().__init__(max_codes, **kwargs)

    def _measure(self, codes: Tensor) -> Tensor:
        return kde_entropy(codes)


class ClassRadius(RowsMeasure):
    """Estimates the mean class radius by the distance of each latent to the nearest one of another class.

    It is `kdejsd.class_radius`, with its bias and its warning from 5 dimensions on. It is inf where there is only one
    class. Batches, ranks, dtype and memory are as in `CodeJSD`.

    Args:
        max_codes: the number of latents that are measured, drawn by a fixed seed if there are more.
        kwargs: as in torchmetrics.Metric.

    Attributes:
        standard_error: that of the value last computed, from the spread of the distances; NaN before.

    Raises:
        TypeError, ValueError: if max_codes is no integer of at least 2; by `update` for latents or labels of another
            shape or dtype, or labels too large for the metric's dtype (2^24 in float32).

    Example:
        >>> import torch
        >>> from kdejsd.metrics import ClassRadius
        >>> metric, rng = ClassRadius(), torch.Generator().manual_seed(0)
        >>> for batch in range(10):
        ...     latents = torch.randn(500, 2, generator=rng)
        ...     metric.update(latents, (latents[:, 0] > 0).long())  # two half-planes: 0.798
        >>> print(f"{metric.compute():.2f} +- {metric.standard_error:.2f}")
        0.81 +- 0.01
    """

    plot_lower_bound = 0.0

    def __init__(self, *, max_codes: Integer = MOST, **kwargs: Any) -> None:
        super().__init__(integer("max_codes", max_codes, 2), "latents", **kwargs)
        self.standard_error = math.nan

    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Adds latents [n, d] of any floating dtype with their classes [n] int64; n may be 0."""
        latents = checked_rows("latents", latents)
        if check_int64("labels", labels).shape != latents.shape[:1]:
            raise ValueError(f"labels must have shape [{len(latents)}], one per latent, got {list(labels.shape)}")
        numbers = labels.to(self.device, self.dtype)
        if not torch.equal(numbers.long(), labels.to(self.device)):
            raise ValueError(f"labels must be exact in {self.dtype}, got {int(labels.abs().max())}: number them from 0")
        self._keep("latents", torch.cat([latents.to(numbers), numbers.unsqueeze(1)], 1))

    def _measure(self, rows: Tensor) -> float:
        self.standard_error = math.nan
        radius = class_radius(rows[:, :-1].contiguous(), rows[:, -1].long())
        self.standard_error = radius.standard_error
        return radius.mean
