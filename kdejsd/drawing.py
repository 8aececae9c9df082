"""Pictures of a data set's images, and of those that a model makes like them.

A set that is not to be drawn as a grid of images registers its own functions:
`kdejsd.drawing.draw.register(MyData, my_function)`.
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
    """Draws images [n, C, H, W] like those of a set: as a grid, or of a `Grid2D` as points with circles of three
    standard deviations around the modes."""
    return plots.grid(images)


@singledispatch
def draw_reconstructions(data: ImageData, images: Tensor, reconstructions: Tensor) -> Figure:
    """Draws the first 30 images [n, C, H, W] of a set beside their reconstructions; of a `Grid2D` all reconstructions,
    with lines from what they are of."""
    return plots.reconstructions(images[:30], reconstructions[:30])


@draw.register
def _(data: Grid2D, images: Tensor) -> Figure:
    return plots.points(images.flatten(1), data.modes, 3 * data.std)


@draw_reconstructions.register
def _(data: Grid2D, images: Tensor, reconstructions: Tensor) -> Figure:
    return plots.points(reconstructions.flatten(1), data.modes, 3 * data.std, origins=images.flatten(1))
