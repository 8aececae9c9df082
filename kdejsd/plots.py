"""Pictures of a trained model, written to files; nothing here touches matplotlib's backend or its global state."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ._extras import train_extra
from .targets import GaussianMixture, IsotropicNormal, Target

with train_extra():
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

_POINTS = 5000  # more would only cover each other


def plot_latent(path: str | Path, codes: Tensor, labels: Tensor, target: Target) -> None:
    """Writes a picture of the codes by class: 2-D codes as they are, others on their first two principal components,
    1-D codes as a histogram. Circles mark the target: one, two and three standard deviations of a normal, two of each
    component of a mixture.

    Args:
        path: the PNG file.
        codes: [n, l].
        labels: [n] int64, -1 for none.
        target: law that the codes should follow.
    """
    codes, labels = codes[:_POINTS].double().cpu(), labels[:_POINTS].cpu()
    figure = Figure(figsize=(6.4, 6), layout="constrained")
    axes = figure.add_subplot()
    if codes.shape[1] == 1:
        _histogram(axes, codes[:, 0], target)
    else:
        _scatter(axes, codes, labels, target)
    figure.savefig(path, dpi=150)


def plot_images(path: str | Path, images: Tensor, columns: int = 10) -> None:
    """Writes images [n, C, H, W] in [0, 1] as a grid, row by row."""
    grid = _grid(images, columns)
    figure = _image_figure(grid)
    figure.savefig(path, dpi=100)


def plot_reconstructions(path: str | Path, images: Tensor, reconstructions: Tensor, columns: int = 10) -> None:
    """Writes pairs of rows: images [n, C, H, W], and below each its reconstruction."""
    rows = [part for pair in zip(images.split(columns), reconstructions.split(columns), strict=True) for part in pair]
    figure = _image_figure(torch.cat([_grid(row, columns) for row in rows]))
    figure.savefig(path, dpi=100)


def _scatter(axes: Axes, codes: Tensor, labels: Tensor, target: Target) -> None:
    shift, plane = torch.zeros(codes.shape[1]).double(), torch.eye(2).double()
    names = ["code 1", "code 2"]
    if codes.shape[1] > 2:
        shift = codes.mean(0)
        _, singular, directions = torch.linalg.svd(codes - shift, full_matrices=False)
        plane = directions[:2].T
        shares = singular.square() / singular.square().sum()
        names = [
            f"principal component {i + 1} ({100 * share:.0f} % of the variance)" for i, share in enumerate(shares[:2])
        ]
    points = (codes - shift) @ plane
    classes = labels.unique().tolist()
    colors = colormaps["tab10" if len(classes) <= 10 else "turbo"]
    for place, label in enumerate(classes):
        color = colors(place) if len(classes) <= 10 else colors(place / (len(classes) - 1))
        x, y = points[labels == label].T.numpy()
        axes.scatter(x, y, s=5, linewidths=0, color=color, label=str(label))
    for center, radius in _circles(target):
        spot = (center.double() - shift) @ plane
        axes.add_patch(Circle((float(spot[0]), float(spot[1])), radius, fill=False, color="0.3", lw=0.8, ls="--"))
    axes.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    axes.autoscale_view()
    if 1 < len(classes) <= 20:
        axes.legend(title="class", markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _circles(target: Target) -> list[tuple[Tensor, float]]:
    """Centers [l] and radii; an isotropic law keeps its standard deviation in every projection."""
    if isinstance(target, IsotropicNormal):
        return [(torch.zeros(target.dim), k * math.sqrt(target.variance)) for k in (1, 2, 3)]
    if isinstance(target, GaussianMixture):
        return [(mean, 2 * float(scale)) for mean, scale in zip(target.means.cpu(), target.scales.cpu(), strict=True)]
    return []


def _histogram(axes: Axes, codes: Tensor, target: Target) -> None:
    axes.hist(codes.numpy(), bins=60, density=True, color="0.7", label="codes")
    z = torch.linspace(float(codes.min()) - 1, float(codes.max()) + 1, 400)
    axes.plot(z.numpy(), target.log_prob(z[:, None]).exp().detach().cpu().numpy(), color="k", label="target")
    axes.set(xlabel="code", ylabel="density")
    axes.legend(frameon=False)


def _grid(images: Tensor, columns: int) -> Tensor:
    """[n, C, H, W] -> [rows (H + 1), columns (W + 1), C], images apart by a line and missing ones white."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    cells = torch.ones(rows * columns, channels, height + 1, width + 1)
    cells[:n, :, :height, :width] = images.detach().float().cpu().clamp(0, 1)
    cells = cells.reshape(rows, columns, channels, height + 1, width + 1)
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)


def _image_figure(grid: Tensor) -> Figure:
    height, width, channels = grid.shape
    scale = max(1, 800 // width)  # whole pixels, so that small images stay sharp
    figure = Figure(figsize=(width * scale / 100, height * scale / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(
        grid.squeeze(-1).numpy(), cmap="gray" if channels == 1 else None, vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_axis_off()
    return figure
