"""Draws examples of a data set, and examples that a model makes like them.

A set that is not to be drawn as a grid of images registers its own functions: `kdejsd.drawing.draw.register(MyData,
my_function)`.
"""

from __future__ import annotations

from functools import singledispatch

from torch import Tensor

from . import plots
from ._extras import train_extra
from .data import ExampleData, Grid2D

with train_extra():
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_reconstructions"]


@singledispatch
def draw(data: ExampleData, examples: Tensor) -> Figure:
    """Draws examples [n, ...] like those of a set.

    They become a grid of images. For a `Grid2D` they become points, with circles of three standard deviations around
    the modes.

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
    return plots.grid(examples)


@singledispatch
def draw_reconstructions(data: ExampleData, examples: Tensor, reconstructions: Tensor) -> Figure:
    """Draws the first 30 examples [n, ...] of a set above their reconstructions.

    For a `Grid2D` it draws all reconstructions as points, with a line from each original to its reconstruction.

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
    return plots.reconstructions(examples[:30], reconstructions[:30])


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
def _(data: Grid2D, examples: Tensor) -> Figure:
    return plots.points(examples, data.modes, 3 * data.std)


@draw_reconstructions.register
def _(data: Grid2D, examples: Tensor, reconstructions: Tensor) -> Figure:
    return plots.points(reconstructions, data.modes, 3 * data.std, origins=examples)
