"""Measures how many classes there are among examples that come batch by batch, as a metric of torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._numbers import Integer, integer
from .._tensors import check_int64, check_tensor
from ._rows import Measure


class CollisionEntropy(Measure):
    """Estimates how many classes there are among examples: the collision entropy (Renyi entropy of order 2), in nats.

    It is -log of the share of pairs of examples that are of one class (`kdejsd.collision_probability_from_counts`). The
    expectation of this share is the collision probability sum_i p_i^2 itself. The exponential of the entropy is a
    number of classes: that many equally frequent ones have the same entropy. The value is inf where no pair is of one
    class, and NaN where there is no pair. If a classifier gives probabilities, the share is the mean over pairs of the
    probability that they are of one class.

    States are sums, so the value is that of all ranks together; for labels it is exact.

    Args:
        num_classes: K.
        kwargs: as in torchmetrics.Metric.

    Raises:
        TypeError, ValueError: if num_classes is no positive integer; by `update` for labels that are out of range or of
            another shape or dtype.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import CollisionEntropy
        >>> metric = CollisionEntropy(num_classes=3)
        >>> metric.update(torch.tensor([0, 0, 1]))
        >>> metric.update(torch.tensor([1, 2, 2]))
        >>> metric.compute().exp()  # 3 pairs of 15 are of one class
        tensor(5.0000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0

    sums: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, num_classes: Integer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = integer("num_classes", num_classes, 1)
        self.add_state("sums", torch.zeros(self.num_classes, dtype=torch.float64), "sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("count", torch.tensor(0), "sum")

    def set_dtype(self, dst_type: str | torch.dtype) -> CollisionEntropy:
        """Leaves the sums in float64: in a shorter dtype they would not count every example."""
        return self

    def update(self, labels: Tensor) -> None:
        """Adds the classes [n] int64 of examples, or their probabilities [n, K], floating; n may be 0."""
        if check_tensor("labels", labels).is_floating_point():
            if labels.ndim != 2 or labels.shape[1] != self.num_classes:
                raise ValueError(f"labels must have shape [n] or [n, {self.num_classes}], got {list(labels.shape)}")
            p = labels.detach().to(self.device, torch.float64)
            totals = p.sum(1, keepdim=True)
            if not bool((p >= 0).all() & ((totals - 1).abs() < 0.01).all()):
                raise ValueError("labels must be probabilities that sum to 1, or int64; take softmax of logits")
            p = p / totals
            self.sums += p.sum(0)
            self.squares += p.square().sum()
        else:
            if check_int64("labels", labels).ndim != 1:
                raise ValueError(f"labels must have shape [n] or [n, {self.num_classes}], got {list(labels.shape)}")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"labels must be at least 0 and below num_classes = {self.num_classes}, "
                    f"got {int(labels.min())} to {int(labels.max())}"
                )
            self.sums += labels.to(self.device).bincount(minlength=self.num_classes)
            self.squares += len(labels)
        self.count += len(labels)

    def compute(self) -> Tensor:
        """Returns the entropy in nats, 0-dim float64."""
        pairs = self.count.double() * (self.count - 1)
        return -((self.sums.square().sum() - self.squares).clamp_min(0) / pairs).log() + 0.0  # 0 rather than -0
