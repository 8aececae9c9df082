"""Draws images of a data set, and images that a model makes like them.

A set that is not to be drawn as a grid of images registers its own functions: `kdejsd.drawing.draw.register(MyData,
my_function)`.
"""

from __future__ import annotations

from functools import singledispatch

from torch import Tensor

from . import plots
from ._extras import train_extra
from .data import Grid2D, ImageData

with train_extra():
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_reconstructions"]


@singledispatch
def draw(data: ImageData, images: Tensor) -> Figure:
    """Draws images [n, C, H, W] like those of a set.

    They become a grid of images. For a `Grid2D` they become points, with circles of three standard deviations around
    the modes.

    Example:
        >>> import torch
        >>> from kdejsd.data import Grid2D
        >>> from kdejsd.drawing import draw
        >>> data = Grid2D(n=1, num_samples=100, batch_size=10)
        >>> figure = draw(data, torch.zeros(5, 2, 1, 1))
        >>> len(figure.axes[0].patches)  # a circle for each mode
        9
    """
    _refuse_method(data, "draw")
    return plots.grid(images)


@singledispatch
def draw_reconstructions(data: ImageData, images: Tensor, reconstructions: Tensor) -> Figure:
    """Draws the first 30 images [n, C, H, W] of a set above their reconstructions.

    For a `Grid2D` it draws all reconstructions as points, with a line from each original to its reconstruction.

    Example:
        >>> import torch
        >>> from kdejsd.data import Digits
        >>> from kdejsd.drawing import draw_reconstructions
        >>> data = Digits()
        >>> images, labels, indices = data.held_out[torch.arange(20)]
        >>> figure = draw_reconstructions(data, images, torch.zeros_like(images))
        >>> figure.axes[0].images[0].get_array().shape  # four rows of ten images
        (36, 90)
    """
    _refuse_method(data, "draw_reconstructions")
    return plots.reconstructions(images[:30], reconstructions[:30])


def _refuse_method(data: ImageData, name: str) -> None:
    """Refuses a data set with a method that would draw its images, and that nobody calls.

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
def _(data: Grid2D, images: Tensor) -> Figure:
    return plots.points(images.flatten(1), data.modes, 3 * data.std)


@draw_reconstructions.register
def _(data: Grid2D, images: Tensor, reconstructions: Tensor) -> Figure:
    return plots.points(reconstructions.flatten(1), data.modes, 3 * data.std, origins=images.flatten(1))
