"""Draws pictures of a trained model. Each function returns a figure, which its `savefig(path)` writes.

Nothing here touches matplotlib's backend or its global state.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
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
_APART = 0.6  # the grey between images, which have black and white at their own edges


def latent(codes: Tensor, labels: Tensor, target: Target) -> Figure:
    """Draws codes by class, with circles for the target.

    2-D codes are drawn as they are, others on their first two principal components, 1-D codes as a histogram. The
    circles are of one, two and three standard deviations of a normal, or of two of each component of a mixture. The
    title says all this, and how many codes are drawn: 5000 at most.

    Args:
        codes: [n, l].
        labels: [n] int64, -1 for none.
        target: law that the codes should follow.

    Example:
        >>> import kdejsd, torch
        >>> from kdejsd import plots
        >>> codes = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> figure = plots.latent(codes, labels=torch.arange(100) % 10, target=kdejsd.StandardNormal(8))
        >>> figure.axes[0].get_xlabel()
        'principal component 1 (... % of the variance)'
    """
    title = _counted(len(codes), "codes")
    codes, labels, law = codes[:_POINTS].double().cpu(), labels[:_POINTS].cpu(), as_law(target)
    figure, axes = _square_figure()
    if codes.shape[1] == 1:
        figure.suptitle(f"{title}, and the density that they are to follow")
        _histogram(axes, codes[:, 0], law)
        return figure
    shift, plane = torch.zeros(codes.shape[1]).double(), torch.eye(2).double()
    names = ["code 1", "code 2"]
    if codes.shape[1] > 2:
        title += f" of {codes.shape[1]} dimensions, on their first two principal components"
        shift = codes.mean(0)
        _, singular, directions = torch.linalg.svd(codes - shift, full_matrices=False)
        plane = directions[:2].T
        shares = singular.square() / singular.square().sum()
        names = [
            f"principal component {i + 1} ({100 * share:.0f} % of the variance)" for i, share in enumerate(shares[:2])
        ]
    else:
        title += ", and the law that they are to follow"
    color = _class_colors(int(labels.max()) + 1 if len(labels) else 0)
    _scatter(axes, (codes - shift) @ plane, labels, color)
    _draw_law(axes, law, shift, plane)
    figure.suptitle(title)
    axes.set_title(_circles(law), fontsize="medium")
    axes.set(xlabel=names[0], ylabel=names[1])
    _fill_square(axes)
    _legend(axes, labels.unique().tolist(), color)
    return figure


def latent_classes(
    generator: Map | None,
    classifier: Map,
    *,
    codes: Tensor | None = None,
    labels: Tensor | None = None,
    target: Target | None = None,
    extent: float | None = None,
    resolution: int = 300,
) -> Figure:
    """Draws the regions of a 2-D latent space from which each class is generated, in the colours of `latent`.

    The target's circles lie over them, and codes as dots where they are given. A dot in a region of another colour is
    an example whose code is decoded to an image of another class.

    Args:
        generator: [B, 2] -> what the classifier takes; None where the classifier acts on the latents.
        classifier: maps these to logits [B, K], K at least 2.
        codes: [n, 2], of examples; those outside the picture are left out.
        labels: [n] int64, the classes of the codes, -1 for none; None for no classes.
        target: law of the latents, for its circles; None is the standard normal.
        extent: the picture goes from -extent to extent in both directions; None is what holds the circles.
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
    _legend(axes, shown.unique().tolist(), color)
    return figure


def radius_vs_support(curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """Draws the class radius against the number of classes, below its bound for equal classes, `uniform_radius_bound`.

    Args:
        curves: for each name in the legend its points: number of classes (the support), mean class radius, and the
            radius's standard error (0 for none known). Bars are of two standard errors.

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
        path: "line" is straight; "arc" turns the direction by equal angles and changes the length evenly: in many
            dimensions the middle of a line between two normal samples is shorter than any sample is.

    Raises:
        ValueError: if shapes do not match, there are fewer than 2 steps, the path is another, or, for an arc,
            directions are opposite or of no length, so that no one arc leads from one to the other.

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
    """Returns the latents of `interpolation` from start [n, d] to end [n, d], as [n, steps, d] in float64.

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
    """Draws points of the plane, over circles around the modes of their law.

    The picture holds the modes with some room around them, and its title says how many points lie outside.

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
    """Draws named pairs of rows: images [n, C, H, W] in [0, 1], C = 1 or 3, and below each its reconstruction.

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


def _counted(count: int, name: str) -> str:
    """Returns the number of things, and of those that are drawn where not all are."""
    return f"{count} {name}" if count <= _POINTS else f"{_POINTS} of {count} {name}"


def _circles(law: Law) -> str:
    """Returns what the circles of `_draw_law` are."""
    if not law_outline(law):
        return ""
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


def _scatter(axes: Axes, points: Tensor, labels: Tensor, color: Callable[[int], tuple[float, float, float]]) -> None:
    size = _dot_size(len(points))
    for label in labels.unique().tolist():
        x, y = points[labels == label].T.numpy()
        axes.scatter(x, y, s=size, linewidths=0.1 * size**0.5, edgecolors="w", color=color(label))


def _dot_size(count: int) -> float:
    """Returns the area of each of so many dots in square points."""
    return min(36.0, max(6.0, 12_000 / max(count, 1)))


def _legend(axes: Axes, classes: list[int], color: Callable[[int], tuple[float, float, float]]) -> None:
    if 1 < len(classes) <= 50:
        names = [Patch(color=color(label), label="none" if label < 0 else str(label)) for label in classes]
        columns, length = -(-len(classes) // 25), 1.5 if len(classes) <= 10 else 0.8
        axes.legend(
            handles=names,
            title="class",
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            ncols=columns,
            handlelength=length,
        )


def _draw_law(axes: Axes, law: Law, shift: Tensor, plane: Tensor) -> None:
    for center, radius in law_outline(law):
        x, y = ((center - shift) @ plane).tolist()
        axes.add_patch(Circle((x, y), radius, fill=False, color="0.3", lw=0.8, ls="--"))


def _extent(law: Law) -> float:
    """Returns an extent that holds the law's circles with some room, or 4 if there are none."""
    return max((1.15 * (float(center.abs().max()) + radius) for center, radius in law_outline(law)), default=4.0)


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
