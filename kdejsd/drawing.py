"""Draws examples of a data set, and examples that a model generates like them.

The shape of the examples decides how they are drawn. To draw a set of your own in another way, register a function:
`kdejsd.drawing.draw.register(MyData, my_function)`.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from . import plots
from ._extras import train_extra
from .data import ExampleData, Grid2D

with train_extra():
    from matplotlib.figure import Figure

__all__ = ["are_images", "draw", "draw_reconstructions"]

_ROWS = 10_000  # held-out examples that others are drawn beside


def are_images(data: ExampleData) -> bool:
    """Returns whether the examples of a set are drawn as images: those of shape (C, H, W), C = 1 or 3.

    Example:
        >>> from kdejsd.data import Digits, Grid2D
        >>> from kdejsd.drawing import are_images
        >>> are_images(Digits()), are_images(Grid2D())
        (True, False)
    """
    return len(data.example_shape) == 3 and data.example_shape[0] in (1, 3)


@singledispatch
def draw(data: ExampleData, examples: Tensor, name: str = "generated") -> Figure:
    """Draws examples [n, ...] in the way that suits their set, and returns the figure.

    Images become a grid. For examples of any other shape, the values of each column are drawn beside those of the
    held-out ones, in the units of their file (`plots.column_histograms`). For a `Grid2D` they become points, with
    circles of three standard deviations around the modes.

    Args:
        data: the set.
        examples: [n, ...].
        name: what the examples are, for a legend.

    Example:
        >>> import torch
        >>> from kdejsd.data import Grid2D
        >>> from kdejsd.drawing import draw
        >>> data = Grid2D(n=1, num_samples=100, batch_size=10)
        >>> figure = draw(data, torch.zeros(5, 2))
        >>> len(figure.axes[0].patches)  # a circle for each mode
        9
    """
    _refuse_method(data, "draw")
    if are_images(data):
        return plots.grid(examples)
    held_out = data.held_out[torch.arange(min(len(data.held_out), _ROWS))][0]
    return plots.column_histograms(_rows(data, examples), _rows(data, held_out), data.columns, name)


@singledispatch
def draw_reconstructions(data: ExampleData, examples: Tensor, reconstructions: Tensor) -> Figure:
    """Draws examples [n, ...] of a set beside their reconstructions, and returns the figure.

    The first 30 images stand above their reconstructions. For examples of any other shape, the decoded values of each
    column are drawn against the original ones, in the units of their file (`plots.column_reconstructions`). For a
    `Grid2D`, all reconstructions are drawn as points, with a line from each original to its reconstruction.

    Example:
        >>> import torch
        >>> from kdejsd.data import Digits
        >>> from kdejsd.drawing import draw_reconstructions
        >>> data = Digits()
        >>> examples, labels, indices = data.held_out[torch.arange(20)]
        >>> figure = draw_reconstructions(data, examples, torch.zeros_like(examples))
        >>> figure.axes[0].images[0].get_array().shape  # four rows of ten images
        (36, 90)
    """
    _refuse_method(data, "draw_reconstructions")
    if are_images(data):
        return plots.reconstructions(examples[:30], reconstructions[:30])
    return plots.column_reconstructions(_rows(data, examples), _rows(data, reconstructions), data.columns)


def _rows(data: ExampleData, examples: Tensor) -> Tensor:
    """Returns examples [n, ...] in the units of their file, as [n, d]."""
    return data.restored(examples.detach().cpu()).flatten(1)


def _refuse_method(data: ExampleData, name: str) -> None:
    """Refuses a data set with a method that would draw its examples, and that nobody calls.

    Raises:
        TypeError: if it has one.
    """
    if hasattr(data, name):
        kind = type(data).__name__
        raise TypeError(
            f"{kind}.{name} is not asked for pictures; register a function: "
            f"kdejsd.drawing.{name}.register({kind}, function)"
        )


@draw.register
def _(data: Grid2D, examples: Tensor, name: str = "generated") -> Figure:
    return plots.points(examples, data.modes, 3 * data.std)


@draw_reconstructions.register
def _(data: Grid2D, examples: Tensor, reconstructions: Tensor) -> Figure:
    return plots.points(reconstructions, data.modes, 3 * data.std, origins=examples)
