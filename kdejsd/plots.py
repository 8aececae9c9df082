"""Draws pictures of a trained model. Each function returns a figure; its `savefig(path)` writes it to a file.

Nothing here touches matplotlib's backend or its global state.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ._extras import train_extra
from ._modes import Map, evaluating
from ._numbers import integer, positive
from .diversity.bounds import uniform_radius_bound
from .diversity.labels import latent_labels, models_like
from .targets import GaussianMixture, Law, Target, as_law, checked_target, isotropic_variance, law_outline

with train_extra():
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Patch
    from matplotlib.ticker import LogLocator, NullFormatter

_POINTS = 5000  # more would only cover each other
_COLUMNS = 12  # that a picture has room for
_TARGET = {"color": "k", "label": "target"}
_LEGEND_ROOM = 0.52  # inches that a square figure has for a legend of classes
_APART = 0.6  # the grey between images, which have black and white at their own edges


def latent(codes: Tensor, labels: Tensor, target: Target, names: Sequence[object] = ()) -> Figure:
    """Draws codes by class, together with the distribution that they should follow.

    1-D codes are a histogram with the target's density, 2-D codes are points with the target's circles. For more
    dimensions their principal components are drawn, each as a histogram with the target's, and each pair as points with
    the target's circles. For l = 3 these are all components. For more they are the two of the largest and the two of
    the smallest variance, where codes that do not follow their target differ from it the most.

    The circles are of one, two and three standard deviations of a normal, or of two of each component of a mixture.
    Targets without an outline have samples in their place. The title says all this, and how many codes are drawn: 5000
    at most.

    Args:
        codes: [n, l].
        labels: [n] int64, -1 for none.
        target: the distribution that the codes should follow.
        names: of the classes, in the order of their numbers; a class without a name is shown by its number.

    Example:
        >>> import kdejsd, torch
        >>> from kdejsd import plots
        >>> codes = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> figure = plots.latent(codes, labels=torch.arange(100) % 10, target=kdejsd.StandardNormal(8))
        >>> [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
        ['component 2', 'component 7', 'component 8']
    """
    title = _counted(len(codes), "codes")
    codes, labels, law = codes[:_POINTS].double().cpu(), labels[:_POINTS].cpu(), as_law(target)
    color = _class_colors(int(labels.max()) + 1 if len(labels) else 0)
    if codes.shape[1] > 2:
        return _principal_components(title, codes, labels, color, law, names)
    figure, axes = _square_figure()
    if codes.shape[1] == 1:
        figure.suptitle(f"{title} and the density that they should follow")
        _histogram(axes, codes[:, 0], law)
        return figure
    _scatter(axes, codes, labels, color)
    _draw_law(axes, law, torch.zeros(2).double(), torch.eye(2).double())
    figure.suptitle(f"{title} and the distribution that they should follow")
    axes.set_title(_circles(law), fontsize="medium")
    axes.set(xlabel="code 1", ylabel="code 2")
    _fill_square(axes)
    _legend(axes, labels.unique().tolist(), color, names)
    return figure


def latent_classes(
    generator: Map | None,
    classifier: Map,
    *,
    codes: Tensor | None = None,
    labels: Tensor | None = None,
    target: Target | None = None,
    names: Sequence[object] = (),
    extent: float | None = None,
    resolution: int = 300,
) -> Figure:
    """Draws the regions of a 2-D latent space from which each class is generated, in the colours of `latent`.

    The target's circles are drawn over them, and codes as dots where they are given. A dot in a region of another
    colour is an example whose code is decoded to one of another class.

    Args:
        generator: [B, 2] -> what the classifier takes; None where the classifier acts on the latents.
        classifier: maps these to logits [B, K], K at least 2.
        codes: [n, 2], of examples; those outside the picture are left out.
        labels: [n] int64, the classes of the codes, -1 for none; None for no classes.
        target: the distribution of the latents, for its circles; None is the standard normal.
        names: of the classes, as in `latent`.
        extent: the picture goes from -extent to extent in both directions; None makes room for the circles.
        resolution: points of the latent space that are classified in each direction.

    Raises:
        ValueError: if codes, labels or the target have another shape, the extent is not positive and finite, the
            resolution is below 2; and where `latent_labels` does.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> figure = plots.latent_classes(None, lambda z: torch.stack([z[:, 0], -z[:, 0]], 1), resolution=50)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['0', '1']
    """
    law = checked_target(target, 2, "the picture")
    if codes is not None and (codes.ndim != 2 or codes.shape[1] != 2):
        raise ValueError(f"codes must have shape [n, 2], got {list(codes.shape)}")
    if labels is not None and (codes is None or labels.shape != codes.shape[:1]):
        raise ValueError(
            f"labels must have one entry for each of the codes, got {list(labels.shape)} for "
            f"{'no codes' if codes is None else f'{len(codes)} codes'}"
        )
    extent = positive("extent", _extent(law) if extent is None else extent)
    resolution = integer("resolution", resolution, 2)

    line = ((torch.arange(resolution).double() + 0.5) / resolution * 2 - 1) * extent  # centers of the pixels
    y, x = torch.meshgrid(line, line, indexing="ij")
    like = models_like(generator, classifier)
    regions, num_classes = latent_labels(generator, classifier, torch.stack([x, y], -1).reshape(-1, 2).to(like))
    regions = regions.cpu().reshape(resolution, resolution)
    color = _class_colors(max(num_classes, int(labels.max()) + 1 if labels is not None and len(labels) else 0))
    light = torch.tensor([[1 - 0.5 * (1 - channel) for channel in color(label)] for label in range(num_classes)])

    figure, axes = _square_figure()
    axes.imshow(
        light[regions].numpy(), origin="lower", extent=(-extent, extent, -extent, extent), interpolation="nearest"
    )
    if codes is not None:
        points = codes[:_POINTS].double().cpu()
        none = torch.full((len(points),), -1)
        _scatter(axes, points, none if labels is None else labels[:_POINTS].cpu(), color)
    _draw_law(axes, law, torch.zeros(2).double(), torch.eye(2).double())
    figure.suptitle("Areas: the class of what is made from a code")
    dots = "" if codes is None else f"Dots: {_counted(len(codes), 'codes')} of examples, by the examples' own class. "
    axes.set_title(dots + _circles(law), fontsize="medium", wrap=True)
    axes.set(xlabel="code 1", ylabel="code 2", xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    shown = regions if labels is None else torch.cat([regions.flatten(), labels.cpu()])
    _legend(axes, shown.unique().tolist(), color, names)
    return figure


def radius_vs_support(curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """Draws the class radius against the number of classes, with its bound for equal classes, `uniform_radius_bound`.

    Args:
        curves: for each name in the legend its points: number of classes (the support), mean class radius, and the
            radius's standard error (0 if it is not known). Bars are of two standard errors.

    Raises:
        ValueError: if there is no point, a point has fewer than 2 classes, or a radius or error is negative or not
            finite.

    Example:
        >>> from kdejsd import plots
        >>> figure = plots.radius_vs_support({"GEN": [(10, 0.41, 0.01)], "VAE": [(10, 0.45, 0.01)]})
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['bound, equal classes', 'GEN', 'VAE']
    """
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("curves must have at least one point, got none")
    for support, radius, error in points:
        if not (2 <= support < math.inf and 0 <= radius < math.inf and 0 <= error < math.inf):
            raise ValueError(
                "curves must be of (classes, at least 2; radius and error, not negative), all finite; "
                f"got {(support, radius, error)}"
            )
    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    most = max(2 * min(support for support, _, _ in points), max(support for support, _, _ in points))
    numbers = torch.logspace(1, math.log2(most), 200, base=2.0, dtype=torch.float64)
    axes.plot(numbers.numpy(), uniform_radius_bound(numbers).numpy(), color="k", lw=1, label="bound, equal classes")
    for name, curve in curves.items():
        classes, radii, errors = zip(*sorted(curve), strict=True)
        axes.errorbar(classes, radii, [2 * error for error in errors], fmt="o", ms=4, lw=1, capsize=3, label=name)
    axes.set(xscale="log", xlabel="number of classes", ylabel="mean class radius")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    return figure


def interpolation(
    generator: Callable[[Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    *,
    steps: int = 10,
    path: Literal["line", "arc"] = "line",
) -> Figure:
    """Draws images decoded on the way from one latent to another, a row for each pair.

    Args:
        generator: latents [B, d] -> images [B, C, H, W] in [0, 1].
        start, end: [n, d], the first and the last latents of the rows.
        steps: images in a row, with both ends.
        path: "line" is straight. "arc" turns the direction by equal angles and changes the length evenly. Use it in
            many dimensions, where the middle of a line between two normal samples is shorter than any sample is.

    Raises:
        ValueError: if shapes do not match, there are fewer than 2 steps, or the path is unknown; for an arc, if
            directions are opposite or have no length, so that no single arc leads from one to the other.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> generator = lambda z: torch.sigmoid(z)[:, None, :, None].expand(-1, 1, 2, 2)
        >>> figure = plots.interpolation(generator, torch.zeros(3, 2), torch.ones(3, 2), steps=5)
        >>> figure.axes[0].images[0].get_array().shape  # three rows of five images, 2 x 2 pixels with a line between
        (9, 15)
    """
    latents = between(start, end, steps=steps, path=path)
    with torch.no_grad(), evaluating(generator):
        images = generator(latents.flatten(0, 1).to(models_like(generator)))
    return grid(images, columns=steps)


def between(start: Tensor, end: Tensor, *, steps: int = 10, path: Literal["line", "arc"] = "line") -> Tensor:
    """Returns the latents of `interpolation`, from start [n, d] to end [n, d], as [n, steps, d] in float64.

    Raises:
        ValueError: as there.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> [plots.between(start, end, steps=3, path=path)[0, 1].tolist() for path in ("line", "arc")]
        [[0.5, 0.5], [0.7071..., 0.7071...]]
    """
    if start.ndim != 2 or start.shape != end.shape or start.numel() == 0:
        raise ValueError(
            f"start and end must have the same shape [n, d], got {list(start.shape)} and {list(end.shape)}"
        )
    steps = integer("steps", steps, 2)
    if path not in ("line", "arc"):
        raise ValueError(f'path must be "line" or "arc", got {path!r}')
    share = torch.linspace(0, 1, steps, dtype=torch.float64, device=start.device)[:, None]
    start, end = start.detach().double()[:, None], end.detach().double()[:, None]
    return start + share * (end - start) if path == "line" else _arc(start, end, share)


def grid(images: Tensor, columns: int = 10) -> Figure:
    """Draws images [n, C, H, W] in [0, 1], C = 1 or 3, row by row.

    Raises:
        ValueError: if images have another shape, or columns is below 1.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> plots.grid(torch.zeros(20, 1, 8, 8)).axes[0].images[0].get_array().shape
        (18, 90)
    """
    return _image_figure(_cells(images, columns))


def points(points: Tensor, modes: Tensor, radius: float, *, origins: Tensor | None = None) -> Figure:
    """Draws points of the plane, with circles around the modes of their distribution.

    The picture shows the modes with some room around them, and its title says how many points lie outside.

    Args:
        points: [n, 2]; those that are not finite lie outside.
        modes: [K, 2].
        radius: radius of the circles.
        origins: [n, 2], from which lines are drawn to the points.

    Raises:
        ValueError: if a shape is another.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> figure = plots.points(torch.zeros(100, 2), modes=torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), radius=1.0)
        >>> len(figure.axes[0].patches)
        2
    """
    for name, value in (("points", points), ("modes", modes), ("origins", points if origins is None else origins)):
        if value.ndim != 2 or value.shape[1] != 2:
            raise ValueError(f"{name} must have shape [n, 2], got {list(value.shape)}")
    if origins is not None and origins.shape != points.shape:
        raise ValueError(f"origins must be as many as points, {len(points)}, got {len(origins)}")
    points = points.double().cpu()
    figure, axes = _square_figure()
    if origins is not None:
        ways = torch.stack([origins.double().cpu(), points], 1)
        axes.add_collection(LineCollection(list(ways.numpy()), colors="0.6", linewidths=0.5))
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=_dot_size(len(points)), linewidths=0, color="C0")
    for x, y in modes.tolist():
        axes.add_patch(Circle((x, y), radius, fill=False, color="k", lw=0.8))
    # Of the modes, not of the points: one far point would leave the picture empty.
    low, high = modes.double().cpu().aminmax(dim=0)
    middle, half = (low + high) / 2, float(0.65 * (high - low).max()) + 6 * radius
    outside = int((~((points - middle).abs() <= half).all(1)).sum())
    figure.suptitle(f"{len(points)} points" + (f", {outside} of them outside of the picture" if outside else ""))
    lines = "" if origins is None else "; lines from the originals"
    axes.set_title(f"Circles of radius {radius:.3g} around the modes{lines}", fontsize="medium")
    x, y = middle.tolist()
    axes.set(xlabel="x", ylabel="y", aspect="equal", xlim=(x - half, x + half), ylim=(y - half, y + half))
    return figure


def reconstructions(images: Tensor, reconstructions: Tensor, columns: int = 10) -> Figure:
    """Draws images and, below each, its reconstruction; the rows are named. All are [n, C, H, W] in [0, 1], C = 1 or 3.

    Raises:
        ValueError: if images have another shape, reconstructions another than the images, or columns is below 1.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> images = torch.zeros(10, 1, 8, 8)
        >>> plots.reconstructions(images, 1 - images).axes[0].images[0].get_array().shape
        (18, 90)
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"reconstructions must have the shape of images, {list(images.shape)}, got {list(reconstructions.shape)}"
        )
    pairs = list(zip(images.split(columns), reconstructions.split(columns), strict=True))
    rows = [_cells(row, columns) for pair in pairs for row in pair]
    return _image_figure(torch.cat(rows), ["image", "decoded"] * len(pairs))


def column_histograms(examples: Tensor, held_out: Tensor, names: Sequence[str], label: str = "generated") -> Figure:
    """Draws how the values of each column are distributed: examples as lines, held-out examples as areas.

    Of more than 12 columns, it draws those that differ the most. The number in brackets behind a column's name says how
    much: the Kolmogorov-Smirnov distance, the largest difference of the two distribution functions. Values that are not
    finite are left out, as are those far outside of the held-out ones that less than a hundredth of the examples have.

    Args:
        examples: [n, d].
        held_out: [m, d], finite.
        names: of the d columns.
        label: what the examples are, for the legend.

    Raises:
        ValueError: if a shape is another, or a set is empty.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> generated, held_out = torch.rand(100, 2), torch.rand(50, 2) + torch.tensor([0.0, 2.0])
        >>> figure = plots.column_histograms(generated, held_out, ["height", "weight"])
        >>> figure.axes[1].get_title()
        'weight (1.00)'
    """
    _check_columns(examples, held_out, names, "held_out", rows=None)
    drawn, others = (rows.detach().double().cpu().numpy() for rows in (examples, held_out))
    finite = [column[np.isfinite(column)] for column in drawn.T]
    with np.errstate(divide="ignore"):  # in the p-value of one example against one, which nobody asks for
        apart = np.array(
            [
                stats.ks_2samp(column, other, method="asymp")[0] if len(column) else 1.0
                for column, other in zip(finite, others.T, strict=True)
            ]
        )
    chosen, title = _chosen(-apart, "that differ the most")
    figure, panels = _panels(len(chosen))
    for axes, number in zip(panels, chosen, strict=True):
        other, column = others[:, number], finite[number]
        ends = np.concatenate([other, np.quantile(column, (0.005, 0.995))]) if len(column) else other
        edges = _edges(ends.min(), ends.max())
        shares = [np.histogram(values, edges)[0] / max(len(values), 1) for values in (other, column)]
        axes.stairs(shares[0], edges, fill=True, color="0.75", label=f"{len(others)} held-out")
        axes.stairs(shares[1], edges, color="C0", lw=1.2, label=f"{len(drawn)} {label}")
        axes.set_title(f"{_shortened(names[number])} ({apart[number]:.2f})", fontsize="small", parse_math=False)
        axes.set_yticks([])
    strange = int((~np.isfinite(drawn).all(1)).sum())
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        title=title + (f"; {strange} of the {label} are not finite" if strange else ""),
        title_fontsize="large",
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )
    figure.supxlabel("value; in brackets the Kolmogorov-Smirnov distance, 0 for equal distributions", fontsize="small")
    figure.supylabel("share of the examples", fontsize="small")
    return figure


def column_reconstructions(examples: Tensor, reconstructions: Tensor, names: Sequence[str]) -> Figure:
    """Draws the decoded values of each column against the original ones, with the line where they are equal.

    Behind a column's name stands its `variance_explained`. Of more than 12 columns, it draws those with the lowest.

    Args:
        examples: [n, d], finite; at most 5000 are drawn.
        reconstructions: [n, d].
        names: of the d columns.

    Raises:
        ValueError: if a shape is another, or there is no example.

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> examples = torch.linspace(-1, 1, 50)[:, None]
        >>> plots.column_reconstructions(examples, 0.9 * examples, ["height"]).axes[0].get_title()
        'height: 99 %'
    """
    _check_columns(examples, reconstructions, names, "reconstructions", rows=len(examples))
    explained = variance_explained(examples, reconstructions).numpy()
    chosen, title = _chosen(np.nan_to_num(explained, nan=math.inf), "that are explained least")
    figure, panels = _panels(len(chosen))
    originals, decoded = (rows[:_POINTS].detach().double().cpu().numpy() for rows in (examples, reconstructions))
    size = _dot_size(len(originals)) / 3
    for axes, number in zip(panels, chosen, strict=True):
        share = f"{100 * explained[number]:.0f} %" if math.isfinite(explained[number]) else "unknown"
        axes.scatter(originals[:, number], decoded[:, number], s=size, linewidths=0, color="C0")
        axes.axline((originals[0, number],) * 2, slope=1, color="0.4", lw=0.8, ls="--")
        axes.set_title(f"{_shortened(names[number])}: {share}", fontsize="small", parse_math=False)
    strange = int((~np.isfinite(decoded).all(1)).sum())
    figure.suptitle(title + (f"; {strange} of the reconstructions are not finite" if strange else ""))
    figure.supxlabel("original value; behind the name the share of the variance that is explained", fontsize="small")
    figure.supylabel("decoded value", fontsize="small")
    return figure


def variance_explained(examples: Tensor, reconstructions: Tensor) -> Tensor:
    """Returns the share of each column's variance that its reconstructions explain, as [d] in float64 on the CPU.

    It is R^2 = 1 - (mean squared error) / variance. It is 1 for no error, 0 for an error as large as that of the
    column's mean, and negative for a larger one. It is NaN for a column that has one value only.

    Args:
        examples, reconstructions: [n, d].

    Example:
        >>> import torch
        >>> from kdejsd import plots
        >>> examples = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
        >>> plots.variance_explained(examples, examples + 0.5)
        tensor([0.7500,    nan], dtype=torch.float64)
    """
    originals, decoded = (rows.detach().double().cpu() for rows in (examples, reconstructions))
    share = 1 - (originals - decoded).square().mean(0) / originals.var(0, correction=0)
    return share.masked_fill((originals == originals[:1]).all(0), math.nan)


def _square_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.8, 6.6), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _fill_square(axes: Axes) -> None:
    """Lets the axes have one scale, and as much in one direction as in the other, so that they fill their figure."""
    axes.autoscale_view()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    half = max(right - left, top - bottom) / 2
    x, y = (left + right) / 2, (bottom + top) / 2
    axes.set(xlim=(x - half, x + half), ylim=(y - half, y + half), aspect="equal")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Returns a figure of so many small axes, three in a row."""
    rows, across = -(-count // 3), min(count, 3)
    figure = Figure(figsize=(6.8, 1.3 + 1.7 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.remove()
    for used in axes[:count]:
        used.tick_params(labelsize="x-small")
        used.locator_params(axis="x", nbins=4)
    return figure, axes[:count]


def _chosen(order: np.ndarray, words: str) -> tuple[list[int], str]:
    """Returns the columns to be drawn, the first by their order where there are too many for all, and a title."""
    count = len(order)
    if count <= _COLUMNS:
        return list(range(count)), "1 column" if count == 1 else f"{count} columns"
    return order.argsort(kind="stable")[:_COLUMNS].tolist(), f"The {_COLUMNS} of {count} columns {words}"


def _edges(low: float, high: float) -> np.ndarray:
    """Returns the edges of at most 30 bins, fewer where float64 has not so many numbers between two large ones."""
    if low == high:
        half = max(0.5, float(np.spacing(abs(low))))
        low, high = low - half, high + half
    return np.unique(np.linspace(low, high, 31))


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}\N{HORIZONTAL ELLIPSIS}"


def _check_columns(examples: Tensor, others: Tensor, names: Sequence[str], other: str, rows: int | None) -> None:
    if examples.ndim != 2 or examples.numel() == 0:
        raise ValueError(f"examples must have shape [n, d], neither of them 0, got {list(examples.shape)}")
    count = "m" if rows is None else str(rows)
    if others.ndim != 2 or not len(others) or others.shape[1] != examples.shape[1] or rows not in (None, len(others)):
        raise ValueError(f"{other} must have shape [{count}, {examples.shape[1]}], got {list(others.shape)}")
    if len(names) != examples.shape[1]:
        raise ValueError(f"names must be one for each of the {examples.shape[1]} columns, got {len(names)}")


def _counted(count: int, name: str) -> str:
    """Returns the number of things, and of those that are drawn where not all are."""
    return f"{count} {name}" if count <= _POINTS else f"{_POINTS} of {count} {name}"


def _circles(law: Law) -> str:
    """Returns the words for what `_draw_law` draws."""
    if not law_outline(law):
        return "Grey dots: samples of the target"
    if isotropic_variance(law) is not None:
        return "Circles: 1, 2 and 3 standard deviations of the target (39, 86 and 99 % of it)"
    if isinstance(law, GaussianMixture):
        return "Circles: 2 standard deviations of each component of the target"
    return "Circles: the target's outline"


def _class_colors(count: int) -> Callable[[int], tuple[float, float, float]]:
    """Returns the colour of each of so many classes; a class has one colour in every picture of them."""

    def color(label: int) -> tuple[float, float, float]:
        if label < 0:
            return to_rgb("k")
        if count <= 10:
            return to_rgb(colormaps["tab10"](label))
        # Neighbours in hue differ in lightness: hues alone can be told apart for a dozen classes.
        return colorsys.hls_to_rgb(label / count, (0.3, 0.5, 0.72)[label % 3], 0.9)

    return color


def _scatter(
    axes: Axes,
    points: Tensor,
    labels: Tensor,
    color: Callable[[int], tuple[float, float, float]],
    size: float | None = None,
) -> None:
    size = _dot_size(len(points)) if size is None else size
    for label in labels.unique().tolist():
        x, y = points[labels == label].T.numpy()
        axes.scatter(x, y, s=size, linewidths=0.1 * size**0.5, edgecolors="w", color=color(label))


def _dot_size(count: int) -> float:
    """Returns the area of each of so many dots in square points."""
    return min(36.0, max(6.0, 12_000 / max(count, 1)))


def _legend(
    axes: Axes,
    classes: list[int],
    color: Callable[[int], tuple[float, float, float]],
    names: Sequence[object],
    over_empty: bool = False,
) -> None:
    """Names the colours of the classes right of the axes; short names from their upper right corner on if `over_empty`.

    The figure gets as much wider as the names need.
    """
    if not 1 < len(classes) <= 50:
        return
    own = {label: str(names[label]) for label in classes if 0 <= label < len(names)}
    short = {label: _shortened(name) for label, name in own.items()}
    own = short if len(set(short.values())) == len(set(own.values())) else own
    words = ["none" if label < 0 else own.get(label, str(label)) for label in classes]
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    look: dict[str, Any] = {
        "handles": [Patch(color=color(label), label=str(label)) for label in classes],
        "title": "class",
        "frameon": False,
        "handlelength": 1.5 if len(classes) <= 10 else 0.8,
    }
    inside = over_empty and max(map(len, words)) <= 4
    if inside:
        legend = axes.legend(loc="upper right", bbox_to_anchor=(1, 1), ncols=-(-len(classes) // 12), **look)
        legend.set_in_layout(False)
    elif over_empty:
        legend = figure.legend(loc="outside right center", ncols=-(-len(classes) // 25), **look)
    else:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=-(-len(classes) // 25), **look)
        axes.set_anchor("W")  # a square in a wider place would push the legend out of the figure
    # Not as the patches' labels, of which those that begin with _ are left out.
    for word, text in zip(words, legend.get_texts(), strict=True):
        text.set(text=word, parse_math=False)
    if not inside:
        needed = legend.get_window_extent().width / figure.dpi - (0 if over_empty else _LEGEND_ROOM)
        figure.set_figwidth(figure.get_figwidth() + max(0, needed))


def _draw_law(axes: Axes, law: Law, shift: Tensor, plane: Tensor) -> None:
    """Draws the circles of the distribution on a plane, or samples of it where it has no outline."""
    outline = law_outline(law)
    for center, radius in outline:
        x, y = ((center - shift) @ plane).tolist()
        axes.add_patch(Circle((x, y), radius, fill=False, color="0.3", lw=0.8, ls="--"))
    if not outline:
        x, y = ((_law_samples(law)[:1000] - shift) @ plane).T.numpy()
        axes.scatter(x, y, s=3, linewidths=0, color="0.7", zorder=0.5)


def _law_samples(law: Law) -> Tensor:
    """Draws enough samples of the distribution to show its density, [n, l] in float64 on the CPU."""
    n = max(1000, min(100_000, 4_000_000 // law.dim))
    return law.sample(n, torch.Generator().manual_seed(0)).detach().double().cpu()


def _extent(law: Law) -> float:
    """Returns an extent that holds the circles of the distribution with some room, or 4 if there are none."""
    return max((1.15 * (float(center.abs().max()) + radius) for center, radius in law_outline(law)), default=4.0)


def _principal_components(
    title: str,
    codes: Tensor,
    labels: Tensor,
    color: Callable[[int], tuple[float, float, float]],
    law: Law,
    names: Sequence[object],
) -> Figure:
    """Draws some principal components of the codes [n, l], l > 2, on a diagonal, and below it each pair of them."""
    dim = codes.shape[1]
    shift = codes.mean(0)
    variances, directions = (found.flip(-1) for found in torch.linalg.eigh((codes - shift).T.cov(correction=0)))
    chosen = list(range(3)) if dim == 3 else [0, 1, dim - 2, dim - 1]
    plane = directions[:, chosen]
    points, ideal = (codes - shift) @ plane, (_law_samples(law) - shift) @ plane
    low, high = torch.cat([points, ideal.quantile(torch.tensor([0.001, 0.999]).double(), dim=0)]).aminmax()
    room = 0.03 * float(high - low)
    limits = (float(low) - room, float(high) + room)
    edges = np.linspace(*limits, 41)
    size = _dot_size(len(points)) / 3

    figure = Figure(figsize=(6.8, 6.8), dpi=150, layout="constrained")
    count = len(chosen)
    grid = figure.subplots(count, count)
    for row, column in itertools.product(range(count), repeat=2):
        axes = grid[row, column]
        if column > row:
            axes.set_axis_off()
            continue
        axes.set_xlim(limits)
        axes.set_box_aspect(1)
        axes.tick_params(labelsize="x-small", labelbottom=row == count - 1, labelleft=column == 0, left=column < row)
        if column == row:
            for values, style in ((points, {"fill": True, "color": "0.75", "label": "codes"}), (ideal, _TARGET)):
                axes.stairs(np.histogram(values[:, row], edges)[0] / len(values), edges, **style)
            axes.set_yticks([])
        else:
            pair = [column, row]
            _scatter(axes, points[:, pair], labels, color, size)
            _draw_law(axes, law, shift, plane[:, pair])
            axes.set(ylim=limits)
        if row == count - 1:
            number = chosen[column]
            axes.set_xlabel(f"component {number + 1}\nvariance {variances[number]:.3g}", fontsize="small")
        if column == 0 < row:
            axes.set_ylabel(f"component {chosen[row] + 1}", fontsize="small")
    words = "all" if count == dim else "the first and the last two"
    figure.suptitle(
        f"{title} of {dim} dimensions, {words} of their principal components\n{_circles(law)}", size="medium"
    )
    # The legends stand in the empty half, and must not push the others aside.
    grid[0, 1].legend(*grid[0, 0].get_legend_handles_labels(), loc="upper left", frameon=False).set_in_layout(False)
    _legend(grid[0, -1], labels.unique().tolist(), color, names, over_empty=True)
    return figure


def _histogram(axes: Axes, codes: Tensor, law: Law) -> None:
    axes.hist(codes.numpy(), bins=60, density=True, color="0.7", label="codes")
    z = torch.linspace(float(codes.min()) - 1, float(codes.max()) + 1, 400)
    axes.plot(z.numpy(), law.log_prob(z[:, None]).exp().detach().cpu().numpy(), color="k", label="target")
    axes.set(xlabel="code 1", ylabel="density")
    axes.legend(frameon=False)


def _arc(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Returns [n, steps, d] from start [n, 1, d] to end [n, 1, d], for share [steps, 1] from 0 to 1."""
    lengths = [torch.linalg.vector_norm(ends, dim=-1, keepdim=True) for ends in (start, end)]
    a, b = start / lengths[0], end / lengths[1]
    # Of the unit vectors' difference and sum, which lose no digits where they are nearly parallel or nearly opposite.
    angle = 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))[..., None]
    if not bool((angle < math.pi - 1e-6).all()):
        raise ValueError("start and end must not be opposite nor 0 for an arc from one to the other to be a single one")
    # sin(s x) / sin(x) through sinc, which is 1 at 0: equal directions stay what they are.
    first, last = (s * torch.sinc(s * angle / math.pi) / torch.sinc(angle / math.pi) for s in (1 - share, share))
    latents: Tensor = (first * a + last * b) * (lengths[0] + share * (lengths[1] - lengths[0]))
    return latents


def _cells(images: Tensor, columns: int) -> Tensor:
    """Lays images [n, C, H, W] out as [rows (H + 1), columns (W + 1), C], apart by a line; missing ones are grey."""
    if images.ndim != 4 or images.numel() == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape [n, C, H, W], C = 1 or 3, got {list(images.shape)}")
    columns = integer("columns", columns, 1)
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    cells = torch.full((rows * columns, channels, height + 1, width + 1), _APART)
    cells[:n, :, :height, :width] = images.detach().float().cpu().clamp(0, 1)
    cells = cells.reshape(rows, columns, channels, height + 1, width + 1)
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)


def _image_figure(pixels: Tensor, rows: Sequence[str] = ()) -> Figure:
    """Returns a figure of pixels [height, width, C] with names of rows; each is a square of whole pixels, so sharp."""
    height, width, channels = pixels.shape
    scale = max(1, 800 // width)
    margin = 70 if rows else 0  # for the names, left of the images
    across, up = margin + width * scale, height * scale
    figure = Figure(figsize=(across / 100, up / 100), dpi=100)
    axes = figure.add_axes((margin / across, 0, width * scale / across, 1))
    axes.imshow(
        pixels.squeeze(-1).numpy(), cmap="gray" if channels == 1 else None, vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_axis_off()
    for number, name in enumerate(rows):
        figure.text((margin - 6) / across, 1 - (number + 0.5) / len(rows), name, ha="right", va="center", fontsize=9)
    return figure
