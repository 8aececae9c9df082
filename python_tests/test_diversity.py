"""The diversity report, latent holes and comparisons: cases whose answers are known."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import DEVICES, generator, points
from scipy.stats import norm
from torch import Tensor, nn

from kdejsd import GaussianMixture, StandardNormal, compare_diversity, diversity_report, latent_holes
from kdejsd.diversity.labels import latent_labels
from kdejsd.diversity.radius import ClassRadius

HALF = 0.797884560803


def slabs(*probabilities: float):
    """A classifier of latents: slabs across the first axis, of these masses."""
    cuts = torch.from_numpy(norm.ppf(np.cumsum(probabilities)[:-1]))

    def classifier(z: Tensor) -> Tensor:
        place = torch.bucketize(z[:, 0].double(), cuts)
        return nn.functional.one_hot(place, len(probabilities)).float()

    return classifier


def sectors(count: int):
    """A classifier of 2-D latents: equal sectors around the origin."""
    angle = 2 * math.pi / count * torch.arange(count)
    directions = torch.stack([angle.cos(), angle.sin()])
    return lambda z: z @ directions.to(z)


def half_spaces(z: Tensor) -> Tensor:
    return torch.stack([z.sum(1), -z.sum(1)], 1)


def bound(p: float) -> float:
    x = norm.ppf(p)
    return p * x + norm.pdf(x)


@pytest.mark.parametrize(
    ("classifier", "dim", "probabilities", "radius"),
    [
        (half_spaces, 1, [0.5] * 2, HALF),
        (half_spaces, 2, [0.5] * 2, HALF),
        (sectors(5), 2, [0.2] * 5, 0.380956),
        (slabs(*[0.2] * 5), 1, [0.2] * 5, 0.307870),
        (slabs(*[0.2] * 5), 2, [0.2] * 5, 0.307870),
        (slabs(0.6, 0.1, 0.3), 2, [0.6, 0.1, 0.3], None),
    ],
)
def test_known_classes(classifier, dim, probabilities, radius):
    report = diversity_report(None, classifier, dim)
    assert report.num_classes == len(probabilities) and report.num_samples == 10_000
    assert report.probabilities == pytest.approx(probabilities, abs=4 * 0.5 / 100)
    collision = sum(p * p for p in probabilities)
    low, high = report.collision_entropy_interval
    assert low <= report.collision_entropy <= high
    assert report.collision_entropy == pytest.approx(-math.log(collision), abs=high - low + 1e-3)  # 4 deviations
    assert high - low < 0.035
    assert report.radius_bound == pytest.approx(sum(map(bound, report.probabilities)), rel=1e-9)
    k = len(probabilities)
    assert report.uniform_bound == pytest.approx(k * bound(1 / k), rel=1e-9)
    if collision < 0.198:
        shares = sum(p * p for p in report.probabilities)
        assert report.collision_bound == pytest.approx(bound(shares) / shares, rel=1e-9)
        assert report.max_collision_entropy > report.collision_entropy
    if radius is not None:
        found = report.class_radius
        bias = 9 * report.num_samples ** (-2 / (dim + 1))  # of the nearest sample of another class
        assert -4 * found.standard_error < found.mean - radius < 4 * found.standard_error + bias
        assert found.mean < report.radius_bound + 4 * found.standard_error + bias


def test_from_five_dimensions_on_the_radius_is_searched_for():
    report = diversity_report(nn.Linear(8, 8), half_spaces, 8, num_samples=500, radius_samples=300)
    assert report.class_radius.num_samples == 300 and "search" in str(report)
    told: list[tuple[int, int]] = []
    exact = diversity_report(
        None, half_spaces, 8, num_samples=500, radius_samples=300, progress=lambda *count: told.append(count)
    )
    assert told == [(256, 300), (300, 300)]
    assert exact.class_radius.mean == pytest.approx(HALF, abs=4 * exact.class_radius.standard_error)


def replicates(classifier, count: int, **settings):
    """Reports of so many sample sets of N(0, 1); called a mixture, they are spared the class radius."""
    settings = {"target": GaussianMixture([[0.0]])} | settings
    for seed in range(count):
        yield diversity_report(None, classifier, 1, rng=generator(seed), **settings)


@pytest.mark.parametrize(
    ("probabilities", "most"),
    [
        ([1 / k / sum(1 / j for j in range(1, 9)) for k in range(1, 9)], 0.985),
        ([0.55, 0.45], 1.0),
        ([0.2] * 5, 1.0),
        # Two samples in 500 of the rarer class: often none at all
        ([0.996, 0.004], 1.0),
    ],
)
def test_the_interval_holds_the_entropy_as_often_as_it_says(probabilities, most):
    exact = -math.log(sum(p * p for p in probabilities))
    held = [
        report.collision_entropy_interval[0] - 1e-12 <= exact <= report.collision_entropy_interval[1] + 1e-12
        for report in replicates(slabs(*probabilities), 300, num_samples=500)
    ]
    assert 0.91 <= sum(held) / len(held) <= most  # 0.95 with a standard deviation of 0.0126


def test_the_interval_is_that_of_the_delta_method_where_the_latter_holds():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    for confidence in (0.95, 0.5):
        (report,) = replicates(slabs(*p), 1, num_samples=40_000, confidence=confidence)
        p = np.array(report.probabilities)
        collision = (p**2).sum()
        deviation = 2 * math.sqrt(((p**3).sum() - collision**2) / report.num_samples) / collision
        low, high = report.collision_entropy_interval
        width = 2 * norm.ppf(0.5 + confidence / 2) * deviation
        assert high - low == pytest.approx(width, rel=0.07) and report.confidence == confidence
        assert (low + high) / 2 == pytest.approx(report.collision_entropy, abs=0.05 * width)


def test_the_entropy_is_of_the_unbiased_collision_probability():
    p = [0.4, 0.3, 0.2, 0.1]
    collisions = [math.exp(-r.collision_entropy) for r in replicates(slabs(*p), 1000, num_samples=20)]
    error = np.std(collisions) / math.sqrt(len(collisions))
    assert np.mean(collisions) == pytest.approx(0.3, abs=4 * error)  # of the shares themselves: 0.3 + 0.7 / 20
    assert 4 * error < 0.01


def test_one_class_is_not_taken_for_certain():
    report = diversity_report(None, lambda z: torch.stack([0 * z[:, 0], 0 * z[:, 0] - 1], 1), 2, num_samples=1000)
    assert report.counts == (1000, 0) and report.collision_entropy == 0
    low, high = report.collision_entropy_interval
    assert low == 0 and 1e-4 < high < 0.01
    assert report.class_radius.mean == math.inf and report.radius_bound == math.inf
    assert report.max_collision_entropy is None
    assert "1000 without another class" in str(report) and "-0.0" not in str(report)


def test_the_interval_stays_within_what_the_classes_can_have():
    for report in replicates(slabs(*[0.25] * 4), 20, num_samples=40):
        low, high = report.collision_entropy_interval
        assert 0 <= low <= report.collision_entropy <= high <= math.log(4) + 1e-12


class Chatty(nn.Module):
    """Identity in evaluation mode, noise in training mode; says what it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.99)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.batches: list[int] = []

    def forward(self, z: Tensor) -> Tensor:
        assert z.dtype == self.scale.dtype and not torch.is_grad_enabled()
        self.batches.append(len(z))
        return self.noise(z) * self.scale


def test_models_run_in_evaluation_mode_in_batches_and_by_the_given_generator_alone():
    model = Chatty()
    model.noise.eval()
    model.train(True)
    model.noise.training = False
    state = torch.random.get_rng_state()
    report = diversity_report(model, sectors(3), 2, num_samples=2500, batch_size=1000, rng=generator(3))
    assert model.batches == [1000, 1000, 500]
    assert model.training and not model.noise.training
    assert torch.equal(torch.random.get_rng_state(), state)
    again = diversity_report(model, sectors(3), 2, num_samples=2500, batch_size=99, rng=generator(3))
    assert again.counts == report.counts and again.as_dict() == report.as_dict()
    other = diversity_report(model, sectors(3), 2, num_samples=2500, rng=generator(4))
    assert other.counts != report.counts


@pytest.mark.parametrize("device", DEVICES)
def test_models_on_any_device(device):
    model = Chatty(torch.float32).to(device)
    report = diversity_report(model, sectors(3), 2, num_samples=2000, codes=points(500, 2, device=device))
    assert report.probabilities == pytest.approx([1 / 3] * 3, abs=0.05) and 0 < report.holes.mass < 0.2


def test_labels_are_those_of_the_greatest_logit():
    logits = torch.tensor([[0.0, 1.0, -1.0], [math.inf, 0.0, 1.0], [-math.inf, -5.0, -6.0]])
    labels, count = latent_labels(None, lambda z: logits[z[:, 0].long()], torch.tensor([[2.0], [0.0], [1.0]]))
    assert labels.tolist() == [1, 1, 0] and count == 3


def nan_for_some(z: Tensor) -> Tensor:
    return torch.stack([z[:, 0], torch.where(z[:, 0] > 0, math.nan, 0.0)], 1)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((None, lambda z: z[:, :1], 2), {}, ValueError, r"logits \[256, K\], K at least 2; got \[256, 1\]"),
        ((None, lambda z: z[:, 0], 2), {}, ValueError, r"logits \[256, K\], K at least 2; got \[256\]"),
        ((None, lambda z: z[:-1], 2), {}, ValueError, r"logits \[256, K\], K at least 2; got \[255, 2\]"),
        ((None, lambda z: z.argmax(1), 2), {}, TypeError, "floating-point tensor of logits, got torch.int64"),
        ((None, lambda z: z.numpy(), 2), {}, TypeError, "floating-point tensor of logits, got ndarray"),
        ((None, nan_for_some, 2), {}, ValueError, r"classifier must not return NaN, and did for \d+ of 10000 samples"),
        ((None, half_spaces, 0), {}, ValueError, "latent_dim must be at least 1, got 0"),
        ((None, half_spaces, 2), {"num_samples": 1}, ValueError, "num_samples must be at least 2, got 1"),
        ((None, half_spaces, 2), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ((None, half_spaces, 2), {"confidence": 1.0}, ValueError, "confidence must be above 0 and below 1, got 1.0"),
        ((None, half_spaces, 2), {"target": StandardNormal(3)}, ValueError, "target must have 2 dimensions"),
        ((None, half_spaces, 2), {"target": "normal"}, TypeError, "target must be None, StandardNormal"),
        (
            (None, half_spaces, 2),
            {"codes": points(100, 3)},
            ValueError,
            "dimensions, as codes has",
        ),
        ((None, half_spaces, 2), {"codes": points(100, 2), "hole_level": 0}, ValueError, "level must be above 0"),
    ],
)
def test_report_refuses(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        diversity_report(*arguments, **settings)


def test_a_classifier_must_know_as_many_classes_for_every_batch():
    def classifier(z: Tensor) -> Tensor:
        return torch.zeros(len(z), 2 + len(z) // 1000)

    with pytest.raises(ValueError, match=r"as many classes for every batch, got \[2, 3\]"):
        diversity_report(None, classifier, 2, num_samples=1500, batch_size=1000)


def test_another_prior_has_no_class_radius():
    target = GaussianMixture([[-3.0, 0.0], [3.0, 0.0]], 0.5, [0.2, 0.8])
    report = diversity_report(None, half_spaces, 2, target=target, codes=target.sample(4000, generator(1)))
    assert report.probabilities == pytest.approx([0.8, 0.2], abs=0.02)
    assert report.class_radius is None and report.radius_bound is None and report.max_collision_entropy is None
    assert report.holes.mass == pytest.approx(0.05, abs=4 * report.holes.standard_error)
    assert "radius" not in str(report) and report.prior == "GaussianMixture(components=2, dim=2)"


def test_a_report_prints_and_becomes_json():
    report = diversity_report(None, sectors(5), 2, num_samples=3000, codes=points(2000, 2))
    text = str(report)
    assert f"{report.collision_entropy:.4f}" in text and f"{report.class_radius.mean:.4f}" in text
    assert f"{report.holes.mass:.4f}" in text and "at most log 5 = 1.6094" in text
    assert f"{100 * report.probabilities[3]:.1f}" in text
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["probabilities"] == list(report.probabilities)
    assert plain["class_radius"]["mean"] == report.class_radius.mean
    assert plain["class_radius"]["method"] == "nearest sample of another class"
    assert plain["holes"]["level"] == 0.05 and plain["collision_entropy_interval"][0] < report.collision_entropy
    many = str(diversity_report(None, sectors(30), 2, num_samples=3000))
    assert "and 10 more" in many


# Latent holes


def test_codes_of_the_prior_leave_holes_of_their_level():
    for level in (0.05, 0.2):
        found = [
            latent_holes(points(600, 2, seed=seed), level=level, num_samples=800, rng=generator(seed))
            for seed in range(1000, 1100)
        ]
        masses = np.array([holes.mass for holes in found])
        assert masses.mean() == pytest.approx(level, abs=4 * masses.std() / math.sqrt(100))
        # The standard error is the spread of the results.
        assert np.mean([holes.standard_error for holes in found]) == pytest.approx(masses.std(), rel=0.25)


def test_a_hole_is_found_with_its_mass():
    codes = points(40_000, 2)
    radius = 1.0
    disc = 1 - math.exp(-(radius**2) / 2)  # 0.39
    codes = codes[codes.norm(dim=1) > radius]
    holes = latent_holes(codes, num_samples=20_000)
    # The kernel fills a rim of two bandwidths at most; outside, the level has its share of the mass.
    core = 1 - math.exp(-((radius - 2 * holes.bandwidth) ** 2) / 2)
    assert core - 4 * holes.standard_error < holes.mass < disc + 0.05 + 4 * holes.standard_error
    assert holes.mass > 0.25 and holes.num_codes == len(codes) and holes.level == 0.05


def test_codes_too_narrow_leave_more_and_codes_too_wide_less():
    assert latent_holes(0.5 * points(2000, 4)).mass > 0.5
    assert latent_holes(1.5 * points(2000, 4)).mass < 0.02


def test_holes_do_not_depend_on_the_order_of_the_codes():
    codes = points(4000, 2)
    sorted_codes = codes[codes[:, 0].argsort()]  # its halves are apart: only a random split will do
    assert latent_holes(sorted_codes).mass == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_holes_in_every_dtype(dtype):
    codes = points(2000, 2)
    assert latent_holes(codes.to(dtype)).mass == pytest.approx(latent_holes(codes).mass, abs=0.01)


def test_holes_refuse():
    for codes, settings, error, message in (
        (points(30, 2), {}, ValueError, r"codes must be at least 38 for a quantile of level 0.05, got 30"),
        (points(100, 2)[:, 0], {}, ValueError, r"codes must have shape \[n, l\]"),
        (points(100, 2).long(), {}, TypeError, "codes must be a floating-point tensor"),
        (points(100, 2) / 0, {}, ValueError, "codes must be finite"),
        (torch.zeros(100, 2), {}, ValueError, "codes must not all have an exact duplicate"),
        (points(100, 2), {"level": 1.0}, ValueError, "level must be above 0 and below 1, got 1.0"),
        (points(100, 2), {"num_samples": 1}, ValueError, "num_samples must be at least 2, got 1"),
        (points(100, 2), {"target": StandardNormal(1)}, ValueError, "target must have"),
    ):
        with pytest.raises(error, match=message):
            latent_holes(codes, **settings)


# Comparisons


def test_different_generators_are_told_apart_in_either_order():
    wide = diversity_report(None, slabs(*[0.25] * 4), 2, num_samples=3000)
    narrow = diversity_report(None, slabs(0.7, 0.1, 0.1, 0.1), 2, num_samples=3000, rng=generator(1))
    forth, back = compare_diversity(wide, narrow), compare_diversity(narrow, wide)
    assert forth.more_diverse == "a" and back.more_diverse == "b"
    exact = math.log(4) + math.log(0.52)
    assert forth.entropy_interval[0] < exact < forth.entropy_interval[1]
    assert forth.entropy_difference == -back.entropy_difference
    assert forth.entropy_interval == pytest.approx([-x for x in back.entropy_interval[::-1]], rel=1e-12)
    assert forth.radius_difference == -back.radius_difference < 0  # the more diverse, the nearer another class
    assert forth.radius_interval == pytest.approx([-x for x in back.radius_interval[::-1]], rel=1e-12)
    assert forth.radius_interval[0] < forth.radius_difference < forth.radius_interval[1] < 0
    assert str(forth).startswith("a is more diverse\n") and str(back).startswith("b is more diverse\n")
    assert f"{forth.entropy_difference:.4f}" in str(forth) and f"{forth.radius_difference:.4f}" in str(forth)


@pytest.mark.parametrize("probabilities", [[0.4, 0.3, 0.2, 0.1], [0.25] * 4])
def test_the_same_generator_is_seldom_told_from_itself(probabilities):
    found = list(replicates(slabs(*probabilities), 200, num_samples=300, target=StandardNormal(1)))
    comparisons = [compare_diversity(a, b) for a, b in zip(found[::2], found[1::2], strict=True)]
    told = sum(c.more_diverse is not None for c in comparisons)
    assert told <= 12  # of 100; 0.05 and 3.2 standard deviations
    assert "the data cannot tell which is more diverse" in {str(c).splitlines()[0] for c in comparisons}
    radii = sum(c.radius_interval[0] > 0 or c.radius_interval[1] < 0 for c in comparisons)
    assert radii <= 20  # neighbours are shared: the samples' radii are not independent


def test_a_report_compared_with_itself():
    report = diversity_report(None, slabs(0.5, 0.3, 0.2), 2, num_samples=500)
    same = compare_diversity(report, report)
    assert same.more_diverse is None and same.entropy_difference == same.radius_difference == 0
    low, high = same.entropy_interval
    assert low < 0 < high and low == pytest.approx(-high, rel=1e-9)
    low, high = report.collision_entropy_interval
    assert same.entropy_interval[1] == pytest.approx((high - low) / 2 * math.sqrt(2), rel=0.1)
    wider = compare_diversity(report, report, confidence=0.999)
    assert wider.entropy_interval[1] > same.entropy_interval[1] and wider.confidence == 0.999


def test_radii_are_compared_where_they_were_estimated_alike():
    first = diversity_report(None, half_spaces, 2, num_samples=500)
    more = diversity_report(None, half_spaces, 2, num_samples=600)
    deep = diversity_report(None, half_spaces, 6, num_samples=500, radius_samples=50)
    deeper = diversity_report(None, half_spaces, 7, num_samples=500, radius_samples=60)
    for a, b in ((first, more), (first, deep), (deep, first)):
        comparison = compare_diversity(a, b)
        assert comparison.radius_difference is None and comparison.radius_interval is None
        assert "radius" not in str(comparison)
    assert compare_diversity(deep, deeper).radius_difference is not None
    one_class = diversity_report(None, lambda z: torch.stack([0 * z[:, 0], 0 * z[:, 0] - 1], 1), 2, num_samples=500)
    assert isinstance(one_class.class_radius, ClassRadius)
    comparison = compare_diversity(first, one_class)
    assert comparison.radius_difference is None and comparison.more_diverse == "a"


def test_compare_refuses():
    two = diversity_report(None, half_spaces, 2, num_samples=50)
    three = diversity_report(None, sectors(3), 2, num_samples=50)
    with pytest.raises(ValueError, match="same classifier, got reports of 2 and 3 classes"):
        compare_diversity(two, three)
    with pytest.raises(ValueError, match="confidence must be above 0 and below 1, got 95"):
        compare_diversity(two, two, confidence=95)


def test_diversity_needs_nothing_of_the_extra():
    code = "import sys, kdejsd, kdejsd.diversity.report; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "kdejsd.diversity.report" in modules
    assert not {"lightning", "matplotlib", "sklearn", "scipy.stats", "scipy.optimize"} & set(modules)


def test_a_report_is_shown_as_its_table():
    """The last line of a notebook's cell shows it, too."""
    report = diversity_report(None, sectors(4), 2, num_samples=500)
    assert repr(report) == str(report) and "tensor" not in repr(report) and "class radius" in repr(report)
    assert "tensor" not in repr(report.class_radius) and "mean=" in repr(report.class_radius)
    comparison = compare_diversity(report, report)
    assert repr(comparison) == str(comparison) and "collision entropy" in repr(comparison)
