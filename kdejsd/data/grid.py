"""Provides points of the plane around the places of a grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._numbers import between, integer
from .base import ExampleData, ExampleSet


class Grid2D(ExampleData):
    """Draws points from a mixture of (2n + 1)^2 normals on a square grid, to count the modes that a model reaches.

    Use it to see a model collapse onto some of the modes. This is the set 2D-Grid: the normals have equal weights, a
    variance of 0.0025 in each direction, and means on a square grid of spacing 2 around 0. An example is a point (x,
    y). Its label is its mode: 0 to (2n + 1)^2 - 1, y before x.

    Args:
        n: the number of places on either side of the middle; 2 makes 25 modes.
        num_samples: the number of points, held-out ones included.
        held_out: the share of the points held out.
        batch_size: points per training step.
        kwargs: as in `ExampleData`; the seed draws the points too.

    Attributes:
        modes: [(2n + 1)^2, 2] float32, the means.

    Raises:
        ValueError: if n is negative, num_samples is below 2, the share is not between 0 and 1 or leaves no point on
            either side, and in the cases of `ExampleData`.

    Example:
        >>> import torch
        >>> from kdejsd.data import Grid2D
        >>> data = Grid2D(n=2, num_samples=1000)
        >>> data.modes.shape, len(data.training), len(data.held_out)
        (torch.Size([25, 2]), 900, 100)
        >>> collapsed = torch.zeros(500, 2)  # a model that makes the middle alone
        >>> data.sample_measures(collapsed)["modes_captured"]
        1
    """

    example_shape = (2,)
    report_samples = 10_000
    spacing: ClassVar[float] = 2.0
    std: ClassVar[float] = 0.05

    def __init__(
        self, n: int = 2, num_samples: int = 100_000, held_out: float = 0.1, batch_size: int = 200, **kwargs: Any
    ) -> None:
        n, num_samples = integer("n", n, 0), integer("num_samples", num_samples, 2)
        held_out = between("held_out", held_out, 0, 1)
        if round(held_out * num_samples) == num_samples:
            raise ValueError(f"held_out must leave points to train on, got {held_out}")
        super().__init__(batch_size, **kwargs)
        self.num_samples = num_samples
        self.share_held_out = held_out
        line = self.spacing * torch.arange(-n, n + 1.0)
        self.modes = torch.cartesian_prod(line, line).flip(1)

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        rng = torch.Generator().manual_seed(self.seed)
        labels = torch.randint(len(self.modes), (self.num_samples,), generator=rng)
        points = self.modes[labels] + self.std * torch.randn(self.num_samples, 2, generator=rng)
        return self._split(ExampleSet(points, labels), self.share_held_out)

    def logits(self, points: Tensor) -> Tensor:
        """Returns the logits [n, K] of the modes for points [n, 2].

        Their softmax gives the exact probability of each mode, and the largest logit is that of the nearest mode.

        Raises:
            ValueError: if the points have another shape.
        """
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"points must have shape [n, 2], got {list(points.shape)}")
        # Not by products, as torch.cdist would for many modes: they lose digits.
        squared = (points[:, None] - self.modes.to(points)).square().sum(2)
        return -squared / (2 * self.std**2)

    def classify(self, points: Tensor) -> Tensor:
        """Returns the nearest mode of points [n, 2], as [n] int64."""
        return self.logits(points).argmax(1)

    def classifier(self) -> Callable[[Tensor], Tensor]:
        """Returns `logits`, which classifies points exactly."""
        return self.logits

    def sample_measures(self, points: Tensor) -> dict[str, float]:
        """Measures how well generated points [n, 2] cover the modes.

        The measures are those of VEEGAN and PacGAN. A point is of high quality if it is within three standard
        deviations of its nearest mode. Of points of the set itself, 1 - exp(-4.5) = 98.9 % are. If any point is NaN, so
        are all measures.

        Returns:
            * modes_captured: the number of modes that have a point of high quality.
            * high_quality_share: the share of the points that are of high quality.
            * reverse_kl: KL(Q || P) in nats. Q holds the shares of the points in the modes, each point counted for its
              nearest mode, and P the equal shares of the set. It is between 0 and log((2n + 1)^2). For N points of the
              set itself it is about (K - 1) / (2 N), K being the number of modes.

        Source: Srivastava et al., "VEEGAN", https://arxiv.org/abs/1705.07761; Lin, Khetan, Fanti, Oh, "PacGAN",
        https://arxiv.org/abs/1712.04086.
        """
        best, nearest = self.logits(points).max(1)
        if bool(best.isnan().any()):
            return dict.fromkeys(("modes_captured", "high_quality_share", "reverse_kl"), math.nan)
        good = best >= -4.5  # a squared distance of nine variances
        shares = torch.bincount(nearest, minlength=len(self.modes)).double() / len(nearest)
        return {
            "modes_captured": len(nearest[good].unique()),
            "high_quality_share": float(good.double().mean()),
            "reverse_kl": float(torch.special.xlogy(shares, shares * len(shares)).sum()),
        }
