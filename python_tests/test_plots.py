"""Plots: what is drawn, by its artists and by the pixels of the written file."""

import io
import itertools
import math
import subprocess
import sys

import matplotlib.image
import pytest
import torch
from helpers import points
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Independent, Laplace

from kdejsd import GaussianMixture, StandardNormal, drawing, plots
from kdejsd.data import Digits, Grid2D

GREY = 0.6  # between images
TAB10 = torch.tensor(colormaps["tab10"].colors)


def pixels(figure: Figure) -> Tensor:
    """[height, width, 3] of the written file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    return torch.from_numpy(matplotlib.image.imread(file))[..., :3]


def pixel_at(figure: Figure, x: float, y: float) -> Tensor:
    """Colour of the written file at a point in data coordinates."""
    drawn = pixels(figure)  # drawing also settles the layout
    column, row = figure.axes[0].transData.transform((x, y))
    return drawn[drawn.shape[0] - 1 - int(row), int(column)]


def light(label: int) -> Tensor:
    return 0.5 + 0.5 * TAB10[label]


def quadrants(z: Tensor) -> Tensor:
    """Logits of four classes: 0 and 1 where x < 0, even where y < 0."""
    right, up = z[:, 0], z[:, 1]
    return torch.stack([-right - up, -right + up, right - up, right + up], 1)


def circles(figure: Figure) -> list[tuple[tuple[float, float], float]]:
    return [(patch.center, patch.radius) for patch in figure.axes[0].patches]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def dots(figure: Figure) -> dict[tuple[float, ...], Tensor]:
    """Points [n, 2] by the colour they have."""
    return {
        tuple(round(float(channel), 4) for channel in group.get_facecolor()[0][:3]): torch.from_numpy(
            group.get_offsets().data
        )
        for group in figure.axes[0].collections
    }


def key(color: Tensor) -> tuple[float, ...]:
    return tuple(round(float(channel), 4) for channel in color)


def test_latent_classes_colours_each_region():
    figure = plots.latent_classes(None, quadrants)
    for x, y, label in ((-2.5, -0.5, 0), (-0.3, 0.2, 1), (1.5, -2.8, 2), (2.2, 2.2, 3)):
        assert torch.allclose(pixel_at(figure, x, y), light(label), atol=2 / 255), (x, y)
    assert circles(figure) == [((0, 0), 1), ((0, 0), 2), ((0, 0), 3)]
    assert legend(figure) == ["0", "1", "2", "3"]
    assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim() == pytest.approx((-3.45, 3.45))


def test_latent_classes_are_where_the_boundary_is():
    figure = plots.latent_classes(None, lambda z: torch.stack([z[:, 0] - 0.9, 0.9 - z[:, 0]], 1), extent=2)
    (image,) = figure.axes[0].images
    assert image.origin == "lower" and image.get_extent() == [-2, 2, -2, 2]
    regions = torch.from_numpy(image.get_array().data)
    right = torch.isclose(regions, light(0)).all(-1)
    line = (torch.arange(len(regions)) + 0.5) / len(regions) * 4 - 2
    assert torch.equal(right, (line > 0.9).expand(len(line), -1))


def test_latent_classes_puts_codes_over_the_regions():
    codes = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [1.2, 1.2], [2.0, -2.0], [0.5, 0.5]])
    labels = torch.tensor([0, 3, 3, 0, -1])
    figure = plots.latent_classes(None, quadrants, codes=codes, labels=labels)
    drawn = dots(figure)
    assert torch.equal(drawn[key(TAB10[0])], codes[labels == 0].double())
    assert torch.equal(drawn[key(TAB10[3])], codes[labels == 3].double())
    assert torch.equal(drawn[0.0, 0.0, 0.0], codes[4:].double())
    assert torch.allclose(pixel_at(figure, 2.0, -2.0), TAB10[0], atol=0.05)  # an example taken for another class
    assert legend(figure) == ["none", "0", "1", "2", "3"]
    assert "Dots: 5 codes" in figure.axes[0].get_title()
    unlabelled = plots.latent_classes(None, quadrants, codes=codes)
    assert torch.equal(dots(unlabelled)[0.0, 0.0, 0.0], codes.double())


def test_latent_classes_with_models_a_mixture_and_many_classes():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.9)).double()  # in training mode its regions would be noise
    classifier = nn.Linear(5, 12).double()
    target = GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], 0.5)
    figure = plots.latent_classes(generator, classifier, target=target)
    assert generator.training and generator[1].training
    assert circles(figure) == [((-4, 0), 1), ((4, 0), 1)]
    assert figure.axes[0].get_xlim() == pytest.approx((-5.75, 5.75))
    z = torch.tensor([[-5.0, 1.0], [0.5, 3.0], [3.0, -4.0]]).double()
    with torch.no_grad():
        labels = classifier(generator[0](z)).argmax(1).tolist()
    codes = plots.latent(points(12, 2), torch.arange(12), target)  # has the classes' colours in their order
    colors = torch.tensor([group.get_facecolor()[0][:3].tolist() for group in codes.axes[0].collections])
    for (x, y), label in zip(z.tolist(), labels, strict=True):
        assert torch.allclose(pixel_at(figure, x, y), 0.5 + 0.5 * colors[label].float(), atol=2 / 255)
    assert codes.axes[0].get_title() == "Circles: 2 standard deviations of each component of the target"


def class_legend(figure: Figure):
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    (found,) = (legend for legend in legends if legend.get_title().get_text() == "class")
    return found


@pytest.mark.parametrize("dim", [2, 5])
def test_classes_are_shown_by_their_names_as_they_are(dim):
    names = ["_hidden", "$a$b$", "c" * 30, 7]
    codes, labels = points(60, dim), torch.arange(60) % 6 - 1  # no class, those with names, and one without
    shown = class_legend(plots.latent(codes, labels, StandardNormal(dim), names)).get_texts()
    assert [text.get_text() for text in shown] == ["none", "_hidden", "$a$b$", "c" * 23 + "…", "7", "4"]
    assert not any(text.get_parse_math() for text in shown)
    alike = ["a" * 30 + "b", "a" * 30 + "c"]  # if they were cut
    shown = class_legend(plots.latent(codes, labels.clamp(0, 1), StandardNormal(dim), alike)).get_texts()
    assert [text.get_text() for text in shown] == alike


@pytest.mark.parametrize("dim", [2, 3, 5])
@pytest.mark.parametrize("count", [6, 13, 50])
def test_names_of_classes_stand_beside_the_codes_and_take_no_room_of_them(dim, count):
    codes, labels = points(100, dim), torch.arange(100) % count
    short, long = (
        plots.latent(codes, labels, StandardNormal(dim), [f"{label}{rest}" for label in range(count)])
        for rest in ("", "W" * 22)
    )
    for figure in (short, long):
        figure.draw_without_rendering()
    assert long.axes[0].get_window_extent().width > 0.95 * short.axes[0].get_window_extent().width
    box = class_legend(long).get_window_extent()
    assert box.x1 < long.bbox.x1 + 4 and box.y1 < long.bbox.y1 and box.y0 > 0
    assert not any(box.overlaps(axes.get_window_extent()) for axes in long.axes if axes.axison)


def test_regions_have_the_names_of_the_classes():
    assert legend(plots.latent_classes(None, quadrants, names=["up", "down"]))[:3] == ["up", "down", "2"]


@pytest.mark.parametrize("count", [10, 11, 20, 25])
def test_no_two_classes_have_colours_that_look_alike(count):
    figure = plots.latent(points(count, 2), torch.arange(count), StandardNormal(2))
    colors = [group.get_facecolor()[0][:3] for group in figure.axes[0].collections]
    apart = [math.dist(lab(a), lab(b)) for a, b in itertools.combinations(colors, 2)]
    assert len(legend(figure)) == count and min(apart) > 15


def lab(color) -> list[float]:
    """CIELAB of an sRGB colour, whose distances are those that the eye sees."""
    linear = torch.tensor([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]).double()
    weights = torch.tensor([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1094, 0.8729]]).double()
    x, y, z = (c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in (weights @ linear).tolist())
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


def test_a_class_has_one_colour_in_every_picture():
    codes, labels = points(300, 2), torch.arange(300) % 3 + 4  # no class below 4 among them
    over_regions = plots.latent_classes(None, quadrants, codes=codes, labels=labels)
    assert dots(plots.latent(codes, labels, StandardNormal(2))).keys() == dots(over_regions).keys()
    assert dots(over_regions).keys() == {key(TAB10[label]) for label in (4, 5, 6)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": torch.zeros(4, 3)}, r"codes must have shape \[n, 2\], got \[4, 3\]"),
        (
            {"labels": torch.zeros(4).long()},
            r"labels must have one entry for each of the codes, got \[4\] for no codes",
        ),
        ({"codes": torch.zeros(4, 2), "labels": torch.zeros(3).long()}, r"got \[3\] for 4 codes"),
        ({"target": StandardNormal(3)}, "target must have 2 dimensions, as the picture has, got 3"),
        ({"extent": math.inf}, "extent must be positive and finite, got inf"),
        ({"resolution": 1}, "resolution must be at least 2, got 1"),
    ],
)
def test_latent_classes_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.latent_classes(None, quadrants, **arguments)


def test_latent_draws_codes_by_class():
    codes, labels = points(400, 2), torch.arange(400) % 2 * 3
    figure = plots.latent(codes, labels, StandardNormal(2))
    assert torch.equal(dots(figure)[key(TAB10[3])], codes[labels == 3])
    assert circles(figure) == [((0, 0), 1), ((0, 0), 2), ((0, 0), 3)] and legend(figure) == ["0", "3"]
    assert figure.get_suptitle() == "400 codes and the distribution that they should follow"
    assert "1, 2 and 3 standard deviations" in figure.axes[0].get_title()


def test_the_picture_of_codes_is_square_whatever_their_spread_and_dots_are_larger_where_they_are_few():
    sizes = []
    for count in (100, 5000):
        figure = plots.latent(points(count, 2) * torch.tensor([3.0, 0.1]), torch.zeros(count), StandardNormal(2))
        axes = figure.axes[0]
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        assert right - left == pytest.approx(top - bottom) and axes.get_aspect() == 1
        figure.draw_without_rendering()
        across, up = axes.get_window_extent().size
        assert across == pytest.approx(up) and across > 0.8 * figure.bbox.width  # no bands left empty
        sizes.append(axes.collections[0].get_sizes()[0])
    assert sizes[0] >= 30 and sizes[1] >= 6


def test_a_picture_says_of_how_many_codes_it_is():
    figure = plots.latent(points(6000, 3), torch.zeros(6000), StandardNormal(3))
    title = figure.get_suptitle()
    assert title.startswith(
        "5000 of 6000 codes of 3 dimensions, all of their principal components\nCircles: 1, 2 and 3"
    )


def panels(figure: Figure) -> dict[tuple[int, int], Axes]:
    """The axes of a figure's grid by row and column, those that are switched off left out."""
    specs = {axes: axes.get_subplotspec() for axes in figure.axes if axes.axison}
    return {(spec.rowspan.start, spec.colspan.start): axes for axes, spec in specs.items()}


@pytest.mark.parametrize("labelled", [True, False])
def test_codes_of_many_dimensions_are_pairs_of_principal_components_beside_the_target(labelled):
    codes = points(2000, 5) * torch.tensor([0.1, 3.0, 0.5, 1.0, 1.0]).double() + 1
    labels = torch.arange(2000) % 3 if labelled else torch.full((2000,), -1)
    figure = plots.latent(codes, labels, StandardNormal(5))
    drawn = panels(figure)
    assert drawn.keys() == {(row, column) for row in range(4) for column in range(row + 1)}
    assert figure.get_suptitle().startswith("2000 codes of 5 dimensions, the first and the last two of their principal")
    for place, (number, variance) in enumerate(((1, 9.0), (2, 1.0), (4, 0.25), (5, 0.01))):
        name, value = drawn[3, place].get_xlabel().split("\nvariance ")
        assert name == f"component {number}" and float(value) == pytest.approx(variance, rel=0.15)
        of_codes, of_target = (histogram.get_data() for histogram in drawn[place, place].patches)
        middles = (of_codes.edges[1:] + of_codes.edges[:-1]) / 2
        for heights, mean, spread in ((of_codes.values, 0.0, variance**0.5), (of_target.values, None, 1.0)):
            assert heights.sum() == pytest.approx(1, abs=0.01)
            mean = (heights * middles).sum() if mean is None else mean
            assert (heights * (middles - mean) ** 2).sum() ** 0.5 == pytest.approx(spread, abs=0.2)
    first = drawn[1, 0]
    dots_of = [torch.from_numpy(group.get_offsets().data) for group in first.collections]
    assert len(dots_of) == (3 if labelled else 1) and sum(map(len, dots_of)) == 2000
    if not labelled:  # nothing of the two directions that matter the most is lost
        assert dots_of[0].var(0).tolist() == pytest.approx(torch.linalg.eigvalsh(codes.T.cov())[[-1, -2]].tolist())
    (center, radius), *_ = [(patch.center, patch.radius) for patch in first.patches]
    shift = torch.tensor(center).double()  # of the target's mean, 0, from the codes' own
    assert radius == 1 and float(shift.norm()) <= float(codes.mean(0).norm()) + 1e-9 and float(shift.norm()) > 0.5
    assert any(axes.get_legend() and axes.get_legend().get_title().get_text() == "class" for axes in figure.axes) is (
        labelled
    )


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_codes_of_many_dimensions_are_drawn(count):
    figure = plots.latent(points(count, 300), torch.arange(count), StandardNormal(300))
    assert pixels(figure).isfinite().all() and len(panels(figure)) == 10


@pytest.mark.parametrize("dim", [2, 4])
def test_a_law_without_circles_is_shown_by_its_samples(dim):
    law = Independent(Laplace(torch.zeros(dim), torch.ones(dim)), 1)
    figure = plots.latent(points(50, dim), torch.full((50,), -1), law)
    axes = figure.axes[0] if dim == 2 else panels(figure)[1, 0]
    assert sorted(len(group.get_offsets()) for group in axes.collections) == [50, 1000] and not axes.patches
    assert "Grey dots: samples of the target" in figure.get_suptitle() + axes.get_title()


def test_latent_of_one_dimension_is_a_histogram():
    figure = plots.latent(points(5000, 1), torch.zeros(5000).long(), StandardNormal(1))
    axes = figure.axes[0]
    area = sum(bar.get_width() * bar.get_height() for bar in axes.patches)
    assert area == pytest.approx(1)
    assert figure.get_suptitle() == "5000 codes and the density that they should follow"
    z, density = (torch.from_numpy(data) for data in axes.lines[0].get_data())
    assert torch.allclose(density.double(), torch.exp(-(z.double() ** 2) / 2) / math.sqrt(2 * math.pi), atol=1e-6)


def test_radius_vs_support_draws_points_bars_and_the_bound():
    curves = {"sectors": [(10, 0.25, 0.02), (5, 0.38, 0.01)], "slabs": [(5, 0.31, 0.0)]}
    figure = plots.radius_vs_support(curves)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and axes.get_ylim()[0] == 0
    assert set(legend(figure)) == {"bound, equal classes", "sectors", "slabs"}
    bound = dict(zip(*axes.lines[0].get_data(), strict=True))
    assert bound[2] == pytest.approx(0.797884560803, rel=1e-6) and max(bound) == pytest.approx(10)
    assert all(a > b for a, b in zip(list(bound.values()), list(bound.values())[1:], strict=False))
    figure.draw_without_rendering()
    ticks = {text.get_text() for text in axes.get_xticklabels(which="both") if text.get_text()}
    assert {"2", "5", "10"} <= ticks
    sectors, slabs = axes.containers
    assert sectors[0].get_data()[0].tolist() == [5, 10] and sectors[0].get_data()[1].tolist() == [0.38, 0.25]
    low, high = sectors[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((0.21, 0.29))
    assert slabs[0].get_data()[1].tolist() == [0.31]


@pytest.mark.parametrize(
    "curves", [{}, {"a": []}, {"a": [(1, 0.5, 0)]}, {"a": [(3, math.nan, 0)]}, {"a": [(3, 1, -1)]}]
)
def test_radius_vs_support_refuses(curves):
    with pytest.raises(ValueError, match="curves must"):
        plots.radius_vs_support(curves)


def cells(figure: Figure, size: int) -> Tensor:
    """[rows, columns] grey levels in the middles of the written cells, images being of size x size."""
    drawn = pixels(figure)[..., 0]
    left, _, width, _ = figure.axes[0].get_position().bounds
    drawn = drawn[:, round(left * drawn.shape[1]) :]
    scale = round(width * figure.get_figwidth() * 100) // figure.axes[0].images[0].get_array().shape[1]
    step = (size + 1) * scale
    return drawn[size * scale // 2 :: step, size * scale // 2 :: step]


def flat_images(levels: Tensor, size: int = 3) -> Tensor:
    return levels.flatten().float()[:, None, None, None].expand(-1, 1, size, size)


def test_grid_shows_every_image_in_order():
    levels = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8])
    expected = torch.tensor([[0.0, 0.2], [0.4, 0.6], [0.8, GREY]])
    assert torch.allclose(cells(plots.grid(flat_images(levels), columns=2), 3), expected, atol=2 / 255)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pixels(plots.grid(image, columns=1))
    scale = drawn.shape[0] // 9
    assert torch.allclose(
        drawn[scale // 2 :: scale, scale // 2 :: scale][:8, :8], image[0].permute(1, 2, 0), atol=1 / 255
    )
    assert bool(((drawn[-scale:] - GREY).abs() < 2 / 255).all())  # the line that keeps images apart


def test_reconstructions_stand_below_their_images():
    levels = torch.tensor([0.1, 0.2, 0.3])
    figure = plots.reconstructions(flat_images(levels), flat_images(levels + 0.5), columns=2)
    expected = torch.tensor([[0.1, 0.2], [0.6, 0.7], [0.3, GREY], [0.8, GREY]])
    assert torch.allclose(cells(figure, 3), expected, atol=2 / 255)
    assert [text.get_text() for text in figure.texts] == ["image", "decoded"] * 2


def test_columns_are_drawn_beside_the_held_out_ones():
    generated, held_out = points(400, 3), points(100, 3, seed=1)
    generated[:, 1] += 10
    generated[:, 2], held_out[:, 2] = 7.0, 7.0  # which never changes
    generated[0] = math.nan
    figure = plots.column_histograms(generated, held_out, ["a", "price in $ of $", "c" * 30], "made")
    _, second, third = figure.axes
    assert [axes.get_title() for axes in (second, third)] == ["price in $ of $ (1.00)", "c" * 23 + "… (0.00)"]
    held, made = (histogram.get_data() for histogram in second.patches)
    assert (held.values * made.values == 0).all() and made.values[-5:].sum() > 0 and held.values[-5:].sum() == 0
    for axes in figure.axes:
        for histogram in axes.patches:
            assert histogram.get_data().values.sum() == pytest.approx(1, abs=0.02)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["100 held-out", "400 made"]
    assert legend.get_title().get_text() == "3 columns; 1 of the made are not finite"
    assert pixels(figure).isfinite().all()


def test_a_decoded_column_is_drawn_against_its_original():
    examples = points(60, 2) * torch.tensor([1.0, 1e-6]).double()  # in any unit
    decoded = examples + 0.5 * examples.std(0, correction=0) * torch.tensor([1.0, 0.0])
    decoded[3, 1] = math.nan
    figure = plots.column_reconstructions(examples, decoded, ["a", "b"])
    assert [axes.get_title() for axes in figure.axes] == ["a: 75 %", "b: unknown"]
    assert torch.equal(
        torch.from_numpy(figure.axes[0].collections[0].get_offsets().data),
        torch.stack([examples[:, 0], decoded[:, 0]], 1),
    )
    assert (
        figure.get_suptitle() == "2 columns; 1 of the reconstructions are not finite"
        and pixels(figure).isfinite().all()
    )


@pytest.mark.parametrize(
    "held_out",
    [[1.0], [1e18], [-1.7e18, -1.7e18 + 1000], [1.5, 1.5 + 2**-52], [2**60, 2**60]],
    ids=["one", "one large", "a few numbers apart", "one number apart", "equal"],
)
@pytest.mark.filterwarnings("error")
def test_values_that_lie_close_are_drawn(held_out):
    column = torch.tensor(held_out, dtype=torch.float64)[:, None]
    areas = plots.column_histograms(column, column, ["a"]).axes[0].patches
    assert [area.get_data().values.sum() for area in areas] == pytest.approx([1, 1])


@pytest.mark.parametrize("draws", ["column_histograms", "column_reconstructions"])
def test_of_many_columns_the_telling_ones_are_drawn(draws):
    first, second = points(50, 300), points(50, 300)
    second[:, 100:105] += torch.arange(1, 6)
    names = [f"column {number}" for number in range(300)]
    figure = getattr(plots, draws)(first, second, names)
    titles = [axes.get_title().replace(":", "").split(" ")[1] for axes in figure.axes]
    assert titles[:5] == ["104", "103", "102", "101", "100"] and len(titles) == 12
    title = figure.get_suptitle() or figure.legends[0].get_title().get_text()
    assert title.startswith("The 12 of 300 columns that")


def test_the_variance_that_is_explained():
    examples = points(1000, 4)
    examples[:, 3] = 0.1
    decoded = examples.clone()
    decoded[:, 1], decoded[:, 2] = examples[:, 1].mean(), -examples[:, 2]
    found = plots.variance_explained(examples, decoded)
    assert found[:3].tolist() == pytest.approx([1.0, 0.0, -3.0], abs=0.1) and found[3].isnan()


@pytest.mark.parametrize(
    ("draws", "arguments", "message"),
    [
        (
            "column_histograms",
            ((0, 2), (5, 2), "ab"),
            r"examples must have shape \[n, d\], neither of them 0, got \[0, 2\]",
        ),
        ("column_histograms", ((5, 2), (0, 2), "ab"), r"held_out must have shape \[m, 2\], got \[0, 2\]"),
        ("column_histograms", ((5, 2), (5, 2), "abc"), "names must be one for each of the 2 columns, got 3"),
        ("column_reconstructions", ((5, 2), (4, 2), "ab"), r"reconstructions must have shape \[5, 2\], got \[4, 2\]"),
    ],
)
def test_pictures_of_columns_refuse(draws, arguments, message):
    first, second, names = arguments
    with pytest.raises(ValueError, match=message):
        getattr(plots, draws)(torch.zeros(first), torch.zeros(second), names)


class LengthAndAngle(nn.Module):
    """Images of the latent's length and direction: two flat halves."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.noise = nn.Dropout(0.9)

    def forward(self, z: Tensor) -> Tensor:
        angle = torch.atan2(z[:, 1], z[:, 0]) / math.pi
        both = torch.stack([torch.linalg.vector_norm(z, dim=1), angle], 1) * self.scale
        return self.noise(both)[:, None, :, None].repeat_interleave(2, 2).expand(-1, 1, 4, 4)


def shown(figure: Figure, steps: int) -> tuple[Tensor, Tensor]:
    """Length and angle [rows, steps] of what a figure of LengthAndAngle shows."""
    image = torch.from_numpy(figure.axes[0].images[0].get_array().data).reshape(-1, 5, steps, 5)
    return image[:, 0, :, 0], image[:, 3, :, 0]


def test_interpolation_by_lines_and_arcs():
    start = torch.tensor([[0.8, 0.0], [0.5, 0.0]])
    end = torch.tensor([[0.0, 0.8], [0.0, 0.9]])
    model = LengthAndAngle()
    length, angle = shown(plots.interpolation(model, start, end, steps=5, path="arc"), 5)
    even = torch.linspace(0, 1, 5)
    assert torch.allclose(length, torch.stack([0.8 + 0 * even, 0.5 + 0.4 * even]), atol=1e-6)
    assert torch.allclose(angle, (even / 2).expand(2, 5), atol=1e-6)
    length, angle = shown(plots.interpolation(model, start, end, steps=5), 5)
    z = start[:, None] + even[:, None] * (end - start)[:, None]
    assert torch.allclose(length, z.norm(dim=-1), atol=1e-6) and float(length[0, 2]) == pytest.approx(0.8 / 2**0.5)
    assert torch.allclose(angle, torch.atan2(z[..., 1], z[..., 0]) / math.pi, atol=1e-6)
    assert model.training and model.noise.training


def test_an_arc_between_equal_directions_is_a_line():
    start, end = torch.tensor([[0.3, 0.4]]), torch.tensor([[0.6, 0.8]])
    length, _ = shown(plots.interpolation(LengthAndAngle(), start, end, steps=3, path="arc"), 3)
    assert torch.allclose(length, torch.tensor([[0.5, 0.75, 1.0]]), atol=1e-6)


def test_the_latents_between():
    start, end = points(4, 3), points(4, 3, seed=1)
    line, arc = (plots.between(start, end, steps=5, path=path) for path in ("line", "arc"))
    assert line.shape == arc.shape == (4, 5, 3)
    for way in (line, arc):
        torch.testing.assert_close(way[:, 0], start)
        torch.testing.assert_close(way[:, -1], end)
    torch.testing.assert_close(line[:, 2], (start + end) / 2)
    torch.testing.assert_close(arc[:, 2].norm(dim=1), (start.norm(dim=1) + end.norm(dim=1)) / 2)


def test_a_method_of_a_model_is_asked_on_the_models_terms():
    model = ImageDecoder().double().train()
    figure = plots.interpolation(model.forward, torch.zeros(1, 2), torch.ones(1, 2), steps=3)
    assert model.modes == [False] and model.training and model.dtypes == [torch.float64]
    assert figure.axes


class ImageDecoder(torch.nn.Module):
    """Notes how it is called."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 4)
        self.modes, self.dtypes = [], []

    def forward(self, z):
        self.modes.append(self.training)
        self.dtypes.append(z.dtype)
        return self.linear(z).sigmoid().reshape(-1, 1, 2, 2)


def test_interpolation_refuses():
    a, model = torch.tensor([[1.0, 0.0]]), LengthAndAngle()
    for start, end, settings, message in (
        (a, a[:, :1], {}, r"same shape \[n, d\], got \[1, 2\] and \[1, 1\]"),
        (a, a, {"steps": 1}, "steps must be at least 2, got 1"),
        (a, a, {"path": "spline"}, 'path must be "line" or "arc", got \'spline\''),
        (a, -a, {"path": "arc"}, "must not be opposite nor 0"),
        (a, 0 * a, {"path": "arc"}, "must not be opposite nor 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.interpolation(model, start, end, **settings)


def test_image_grids_refuse():
    for images, columns, message in (
        (torch.zeros(3, 8, 8), 2, r"images must have shape \[n, C, H, W\], C = 1 or 3, got \[3, 8, 8\]"),
        (torch.zeros(3, 2, 8, 8), 2, r"got \[3, 2, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8), 2, r"got \[0, 1, 8, 8\]"),
        (torch.zeros(3, 1, 8, 8), 0, "columns must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.grid(images, columns)
    with pytest.raises(ValueError, match="reconstructions must have the shape of images"):
        plots.reconstructions(torch.zeros(3, 1, 8, 8), torch.zeros(2, 1, 8, 8))


def test_nothing_touches_the_state_of_matplotlib():
    code = (
        "import matplotlib as m, sys\n"
        "settings = lambda: {name: m.rcParams[name] for name in m.rcParams if name != 'backend'}; before = settings()\n"
        "import torch\nfrom kdejsd import plots\n"
        "plots.latent_classes(None, lambda z: z, resolution=9).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules and settings() == before"
    )
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True)


def test_points_stand_over_the_circles_of_their_modes():
    modes, drawn = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), points(50, 2)
    figure = plots.points(drawn, modes, 0.15)
    assert circles(figure) == [((0.0, 0.0), 0.15), ((2.0, 0.0), 0.15)]
    (found,) = dots(figure).values()
    assert torch.equal(found, drawn)
    lines, scattered = plots.points(drawn, modes, 0.15, origins=drawn + 1).axes[0].collections
    assert len(scattered.get_offsets()) == len(lines.get_segments()) == 50
    ends = torch.stack([torch.from_numpy(way) for way in lines.get_segments()])
    assert torch.equal(ends[:, 0], drawn + 1) and torch.equal(ends[:, 1], drawn)
    drawn[:] = 1.0
    assert plots.points(drawn, modes, 0.15).get_suptitle() == "50 points"
    drawn[2], drawn[3] = 1e9, math.nan  # one far point leaves the others where they can be seen
    figure = plots.points(drawn, modes, 0.15)
    assert figure.get_suptitle() == "50 points, 2 of them outside of the picture"
    assert figure.axes[0].get_xlim() == pytest.approx((1 - 2.2, 1 + 2.2)) and pixels(figure).isfinite().all()
    for arguments, message in (
        ((torch.zeros(4, 3), modes, 1.0), r"points must have shape \[n, 2\], got \[4, 3\]"),
        ((drawn, torch.zeros(2), 1.0), r"modes must have shape \[n, 2\], got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.points(*arguments)
    with pytest.raises(ValueError, match="origins must be as many as points, 50, got 3"):
        plots.points(drawn, modes, 0.15, origins=torch.zeros(3, 2))


def test_a_data_set_that_draws_by_a_method_is_told_to_register_it():
    class Own(Grid2D):
        pass

    class Other(Digits):
        def draw(self, images):
            return None

    assert len(drawing.draw(Own(n=1, num_samples=20, batch_size=5), torch.zeros(2, 2)).axes[0].patches) == 9
    with pytest.raises(TypeError, match=r"^Other.draw is not .*: kdejsd.drawing.draw.register\(Other, function\)"):
        drawing.draw(Other(), torch.zeros(2, 1, 8, 8))
