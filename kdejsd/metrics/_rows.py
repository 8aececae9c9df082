"""Gathers rows of numbers, batch by batch and rank by rank, for measures that need all of them at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._extras import train_extra
from .._tensors import check_tensor, compute_dtype

with train_extra():
    from torchmetrics import Metric

MOST = 10_000  # rows of a set that are measured where nothing else is said: the cost can grow with their square


class Measure(Metric):
    """Holds what all metrics here have in common: no gradient, states that can be merged, and a plot of the values."""

    is_differentiable = False
    full_state_update = False

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draws the value, or those of several steps, and returns Matplotlib's figure and axes.

        Args:
            val: what `forward` or `compute` has returned, once or several times; None computes the value.
            ax: the axes to draw in; None makes new ones.
        """
        return self._plot(val, ax)


class RowsMeasure(Measure):
    """Keeps sets of rows until they are measured by `_measure`, which a metric defines.

    The value does not depend on the order of the rows, or on how they are divided into batches and ranks. For this the
    rows of a set are sorted before it is computed. If there are too many, some of the sorted ones are drawn by a fixed
    seed. All rows must be kept until then: a choice made while they come would not have this property.

    Args:
        most: the number of rows of a set that are measured.
        sets: the names of the sets.
        kwargs: as in torchmetrics.Metric.

    Attributes:
        _measure: returns the value of the sets, each [n, d], n at least 1 and sorted; a ValueError says that they have
            none.
    """

    _measure: Callable[..., float | Tensor]
    width: Tensor

    def __init__(self, most: int, *sets: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.most = most
        self.sets = sets
        # A rank without rows has an empty tensor of one dimension for torchmetrics: so all of them have one dimension.
        for name in sets:
            self.add_state(name, [], "cat")
        self.add_state("width", torch.tensor(0), _common_width)

    def _keep(self, name: str, rows: Tensor) -> None:
        """Adds rows [n, d] to a set, in the metric's dtype and on its device."""
        self.width = _common_width(torch.stack([self.width, self.width.new_tensor(rows.shape[1])]))
        if len(rows):
            # A copy, since the caller may write the next batch into the same memory.
            getattr(self, name).append(rows.detach().to(self.device, self.dtype, copy=True).flatten())

    def compute(self) -> Tensor:
        """Returns the value, 0-dim in the metric's dtype; NaN, with a warning that says why, where there is none."""
        # An error here would end a training run, and leave a metric of several ranks with the samples of all of them.
        try:
            value = self._measure(*map(self._kept, self.sets))
        except ValueError as error:
            warnings.warn(f"{type(self).__name__} is NaN: {error}", stacklevel=2)
            value = math.nan
        return torch.as_tensor(value, dtype=self.dtype, device=self.device)

    def _kept(self, name: str) -> Tensor:
        """Returns the rows [n, d] of a set that are to be measured, sorted.

        Raises:
            ValueError: if there is none.
        """
        parts = getattr(self, name)
        parts = [parts] if isinstance(parts, Tensor) else parts  # a tensor where ranks have been gathered
        if not sum(map(len, parts)):
            raise ValueError(f"update must be given {name.replace('_', ' ')} first")
        rows = torch.cat(parts).view(-1, int(self.width))
        order = torch.arange(len(rows), device=rows.device)
        for column in reversed(rows.unbind(1)):
            order = order[column[order].argsort(stable=True)]
        if len(rows) > self.most:
            drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: self.most]
            order = order[drawn.sort().values.to(order.device)]
        return rows[order]


def checked_rows(name: str, rows: Tensor) -> Tensor:
    """Returns rows [n, d], n at least 0, of any floating dtype.

    Raises:
        ValueError: if they have another shape.
        TypeError: if they are no floating-point tensor.
    """
    compute_dtype(name, check_tensor(name, rows))
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name} must have shape [n, l] with l at least 1, got {list(rows.shape)}")
    return rows


def _common_width(widths: Tensor) -> Tensor:
    """Returns the number of values in the rows of several batches or ranks, 0-dim; 0 stands for no rows."""
    known = widths[widths > 0].unique()
    if len(known) > 1:
        raise ValueError(f"every update must have samples of one shape, got samples of {known.tolist()} values")
    return widths.max()
