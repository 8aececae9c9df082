"""Reports how many different things a generator makes, and whether two reports differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._modes import Map
from .._numbers import between, integer
from ..ops.radius import class_radius_bound
from ..targets import Target, checked_target, isotropic_variance
from .bounds import collision_radius_bound, max_collision_entropy, uniform_radius_bound
from .class_entropy import collision_probability_from_counts
from .holes import LatentHoles, latent_holes
from .labels import latent_labels, models_like
from .radius import ClassRadius, SearchedRadius, class_radius, class_radius_search

_SEARCH_FROM = 5  # dimensions: there the nearest sample of another class is too far away
_DRAWS = 2000  # of the bootstrap
_CHUNK = 2**22  # random numbers at a time
_SHOWN = 20  # classes whose probability is printed

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False, repr=False)  # eq: the radius of every sample is a tensor
class DiversityReport:
    """Holds the measures of `diversity_report`; it prints as a table, and `as_dict` gives plain values.

    Attributes:
        counts: number of samples of the prior in each class.
        prior: the distribution of the samples, in words.
        collision_entropy: -log of the probability that two samples are of one class, in nats; 0 to log K.
        collision_entropy_interval: its confidence interval, at the level `confidence`.
        confidence: level of the interval.
        class_radius: mean distance of a sample to the nearest latent of another class, with its standard error and the
            radius of every sample; None for a prior that is not N(0, I).
        radius_bound: the largest class radius possible for the class probabilities (`class_radius_bound`).
        collision_bound: the largest one possible for the collision probability (`collision_radius_bound`).
        uniform_bound: the largest one possible for classes of equal probability (`uniform_radius_bound`).
        max_collision_entropy: the largest collision entropy possible for the class radius; None where the radius may
            not be inverted. This and the bounds are None for a prior that is not N(0, I).
        holes: the latent holes of the codes; None where no codes were given.

    Example:
        >>> import kdejsd, torch
        >>> report = kdejsd.diversity_report(None, lambda z: torch.cat([z, -z], 1), latent_dim=1)
        >>> report.num_classes, report.num_samples, round(report.probabilities[0], 1)
        (2, 10000, 0.5)
    """

    counts: tuple[int, ...]
    prior: str
    collision_entropy: float
    collision_entropy_interval: tuple[float, float]
    confidence: float
    class_radius: ClassRadius | None
    radius_bound: float | None
    collision_bound: float | None
    uniform_bound: float | None
    max_collision_entropy: float | None
    holes: LatentHoles | None

    @property
    def num_classes(self) -> int:
        """Returns K, the number of classes, with those that have no sample."""
        return len(self.counts)

    @property
    def num_samples(self) -> int:
        """Returns the number of samples of the prior."""
        return sum(self.counts)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Returns the classes' probabilities under the prior, estimated by the share of the samples in each."""
        return tuple(count / self.num_samples for count in self.counts)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, without the radius of every sample; a number may be inf or NaN."""
        radius = self.class_radius
        return {
            "num_samples": self.num_samples,
            "prior": self.prior,
            "probabilities": list(self.probabilities),
            "collision_entropy": self.collision_entropy,
            "collision_entropy_interval": list(self.collision_entropy_interval),
            "confidence": self.confidence,
            "class_radius": None
            if radius is None
            else {
                "mean": radius.mean,
                "standard_error": radius.standard_error,
                "method": _method(radius),
                "num_samples": radius.num_samples,
                "num_without_boundary": radius.num_without_boundary,
            },
            "radius_bound": self.radius_bound,
            "collision_bound": self.collision_bound,
            "uniform_bound": self.uniform_bound,
            "max_collision_entropy": self.max_collision_entropy,
            "holes": None if self.holes is None else asdict(self.holes),
        }

    def __repr__(self) -> str:
        low, high = self.collision_entropy_interval
        rows = [
            (f"diversity under {self.prior}", f"{self.num_samples}", f"samples, {self.num_classes} classes"),
            (
                "collision entropy, nats",
                f"{self.collision_entropy:.4f}",
                f"{100 * self.confidence:g} % interval {low:.4f} to {high:.4f}; "
                f"at most log {self.num_classes} = {math.log(self.num_classes):.4f}",
            ),
            ("as many equal classes (its exponential)", f"{math.exp(self.collision_entropy):.2f}", ""),
        ]
        if self.class_radius is not None:
            radius = self.class_radius
            note = f"+- {radius.standard_error:.4f}; {_method(radius)}, {radius.num_samples} samples"
            if not isinstance(radius, SearchedRadius):
                note += f", some {4.5 * radius.num_samples ** (-2 / (radius.latent_dim + 1)):.2g} too large"
            if radius.num_without_boundary:
                note += f", {radius.num_without_boundary} without another class"
            rows.append(("mean class radius", f"{radius.mean:.4f}", note))
        for name, value in (
            ("  at most, at these class probabilities", self.radius_bound),
            ("  at most, at this collision entropy", self.collision_bound),
            (f"  at most, for {self.num_classes} equal classes", self.uniform_bound),
            ("collision entropy at most, at this radius", self.max_collision_entropy),
        ):
            if value is not None:
                rows.append((name, f"{value:.4f}", ""))
        if self.holes is not None:
            rows.append(
                (
                    "latent holes, share of the prior",
                    f"{self.holes.mass:.4f}",
                    f"+- {self.holes.standard_error:.4f}; {self.holes.level:g} if the codes follow it",
                )
            )
        order = sorted(range(self.num_classes), key=lambda i: -self.counts[i])[:_SHOWN]
        shares = "  ".join(f"{i}: {100 * self.probabilities[i]:.1f}" for i in order)
        more = f"  and {self.num_classes - _SHOWN} more" if self.num_classes > _SHOWN else ""
        lines = [f"{name:44}{value:>10}  {note}".rstrip() for name, value, note in rows]
        return "\n".join([*lines, f"class probabilities, %: {shares}{more}"])


def diversity_report(
    generator: Map | None,
    classifier: Map,
    latent_dim: int,
    *,
    num_samples: int = 10_000,
    radius_samples: int = 1000,
    codes: Tensor | None = None,
    hole_level: float = 0.05,
    target: Target | None = None,
    confidence: float = 0.95,
    batch_size: int = 256,
    rng: torch.Generator | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> DiversityReport:
    """Measures how many different things a generator makes, as a classifier sees them.

    It draws samples z of the prior and gives each the class argmax classifier(generator(z)). So the classes divide the
    latent space into regions. A class's probability is the probability of its region, estimated by the share of the
    samples in it. (The mean of the classifier's probabilities would mix in its doubts.) Use `compare_diversity` to
    compare two reports by the same classifier. The measures are:

    * Collision entropy: -log of the probability that two samples are of one class, in nats. The probability is
      estimated without bias (`collision_probability_from_counts`) and kept within what K classes can have. The interval
      comes from the Bayesian bootstrap: class probabilities are drawn from a Dirichlet distribution at the counts. One
      more sample is spread evenly over the classes, so that a class without samples does not count as impossible.
    * Class radius: the mean distance of a sample to the boundary of its class. For latent_dim up to 4 it is
      `class_radius` of all samples, which has a bias; above it is `class_radius_search` with `radius_samples` samples
      of its own. Bounds on the radius stand beside it, and the limit that the radius sets to the collision entropy.
    * Latent holes of the codes, where they are given (`latent_holes`).

    Models (`torch.nn.Module`) are in evaluation mode during the call and get their modes back. The samples are moved to
    the device of the models' parameters, and have their dtype.

    Args:
        generator: [B, d] -> what the classifier takes; None where the classifier acts on the latents.
        classifier: to logits or log-probabilities [B, K], K at least 2, by differentiable operations if latent_dim is 5
            or more.
        latent_dim: d.
        num_samples: N, the number of samples of the prior, at least 2.
        radius_samples: number of samples from which the class radius is searched for.
        codes: [n, d], the encoder's codes of the training images.
        hole_level: level of the density's quantile below which there is a hole.
        target: the prior; None is the standard normal. The class radius and its bounds are for that one alone.
        confidence: level of the interval, above 0 and below 1.
        batch_size: latents at a time.
        rng: draws all samples; None for a CPU generator seeded with 0. The global random state is not used.
        progress: as in `class_radius_search`, which takes nearly all of the time where it is used.

    Returns:
        A `DiversityReport`.

    Raises:
        ValueError: if a number is out of range, the target has another dimension, or logits have another shape or are
            NaN; and where `latent_holes` does.
        TypeError: if logits are no floating-point tensor, or `target` is no target.

    Example:
        >>> import kdejsd, torch
        >>> quadrants = lambda z: torch.stack([z[:, 0], z[:, 1], -z[:, 0], -z[:, 1]], 1)
        >>> print(kdejsd.diversity_report(None, quadrants, latent_dim=2))
        diversity under StandardNormal(dim=2, variance=1)     10000  samples, 4 classes
        collision entropy, nats                       1.38...  95 % interval 1.38... to 1.38...; at most log 4 = 1.3863
        as many equal classes (its exponential)           4.00
        mean class radius                             0.48...  +- 0.00...; nearest sample of another class, ...
          at most, at these class probabilities       0.59...
          at most, at this collision entropy          0.59...
          at most, for 4 equal classes                  0.5966
        collision entropy at most, at this radius     2.19...
        class probabilities, %: 2: 25...  1: 25...  3: 2...  0: 2...
    """
    latent_dim = integer("latent_dim", latent_dim, 1)
    num_samples = integer("num_samples", num_samples, 2)
    confidence = between("confidence", confidence, 0, 1)
    prior = checked_target(target, latent_dim)
    rng = torch.Generator().manual_seed(0) if rng is None else rng

    latents = prior.sample(num_samples, rng).to(models_like(generator, classifier))
    labels, num_classes = latent_labels(generator, classifier, latents, batch_size=batch_size)
    counts = torch.bincount(labels, minlength=num_classes).cpu()
    draws = _collision_draws(counts, stream=0)
    tail = (1 - confidence) / 2
    low, high = np.log(1 / np.quantile(draws, [1 - tail, tail]))

    radius = bound = of_collision = uniform = entropy = None
    if isotropic_variance(prior) == 1:
        if latent_dim < _SEARCH_FROM:
            radius = class_radius(latents, labels.to(latents.device))
        else:
            radius = class_radius_search(
                generator, classifier, latent_dim, radius_samples, batch_size=batch_size, rng=rng, progress=progress
            )
        shares = counts.double() / num_samples
        bound = float(class_radius_bound(shares))
        of_collision = float(collision_radius_bound(shares))
        uniform = float(uniform_radius_bound(num_classes))
        if radius.invertible:
            entropy = float(max_collision_entropy(radius.mean))
    return DiversityReport(
        counts=tuple(counts.tolist()),
        prior=str(prior),
        collision_entropy=math.log(1 / _attainable(float(collision_probability_from_counts(counts)), num_classes)),
        collision_entropy_interval=(float(low), float(high)),
        confidence=confidence,
        class_radius=radius,
        radius_bound=bound,
        collision_bound=of_collision,
        uniform_bound=uniform,
        max_collision_entropy=entropy,
        holes=None if codes is None else latent_holes(codes, prior, level=hole_level, rng=rng),
    )


@dataclass(frozen=True, repr=False)
class DiversityComparison:
    """Holds the result of `compare_diversity`; `str` says it in words.

    Attributes:
        entropy_difference: collision entropy of a minus that of b, in nats.
        entropy_interval: its confidence interval.
        radius_difference: mean class radius of a minus that of b; None where they cannot be compared.
        radius_interval: its confidence interval.
        confidence: level of the intervals.

    Example:
        >>> import kdejsd, torch
        >>> a = kdejsd.diversity_report(None, lambda z: torch.cat([z, -z], 1), latent_dim=1, num_samples=1000)
        >>> kdejsd.compare_diversity(a, a).more_diverse is None  # the data cannot tell
        True
    """

    entropy_difference: float
    entropy_interval: tuple[float, float]
    radius_difference: float | None
    radius_interval: tuple[float, float] | None
    confidence: float

    @property
    def more_diverse(self) -> Literal["a", "b"] | None:
        """Returns the generator with the greater collision entropy; None where the interval holds 0."""
        low, high = self.entropy_interval
        return "a" if low > 0 else "b" if high < 0 else None

    def __repr__(self) -> str:
        def row(name: str, difference: float, interval: Iterable[float]) -> str:
            low, high = interval
            return f"{name:32}{difference:>10.4f}  {100 * self.confidence:g} % interval {low:.4f} to {high:.4f}"

        verdict = self.more_diverse
        lines = [
            "the data cannot tell which is more diverse" if verdict is None else f"{verdict} is more diverse",
            row("collision entropy, a - b, nats", self.entropy_difference, self.entropy_interval),
        ]
        if self.radius_difference is not None and self.radius_interval is not None:
            lines.append(row("mean class radius, a - b", self.radius_difference, self.radius_interval))
        return "\n".join(lines)


def compare_diversity(a: DiversityReport, b: DiversityReport, *, confidence: float = 0.95) -> DiversityComparison:
    """Decides which of two generators is more diverse by collision entropy, and whether the data can tell.

    The intervals come from the Bayesian bootstrap of both reports' samples. If a and b change places, only signs
    change.

    A smaller class radius goes with more diversity, but the verdict does not rest on it. Radii are compared only if
    they were estimated in the same way, because the bias of the nearest-sample estimate depends on the number of
    samples and of dimensions. The radius interval takes the samples for independent, and is somewhat too narrow
    (`class_radius`).

    Args:
        a, b: reports by the same classifier.
        confidence: level of the intervals, above 0 and below 1.

    Returns:
        A `DiversityComparison`.

    Raises:
        ValueError: if the reports have different numbers of classes, or the confidence is out of range.

    Example:
        >>> import kdejsd, torch
        >>> even, uneven = lambda z: torch.cat([z, -z], 1), lambda z: torch.cat([z, 1 - z], 1)
        >>> a, b = (kdejsd.diversity_report(None, f, latent_dim=1, num_samples=1000) for f in (even, uneven))
        >>> print(kdejsd.compare_diversity(a, b))
        a is more diverse
        collision entropy, a - b, nats      0.11...  95 % interval 0.08... to 0.15...
        mean class radius, a - b           -0.09...  95 % interval -0.15... to -0.03...
    """
    if a.num_classes != b.num_classes:
        raise ValueError(
            f"a and b must be by the same classifier, got reports of {a.num_classes} and {b.num_classes} classes"
        )
    confidence = between("confidence", confidence, 0, 1)

    def interval(draws: list[Array]) -> tuple[float, float]:
        # Draws of a and of b come from two streams of random numbers. Each report takes either in turn, so that
        # neither order of the reports is preferred.
        a0, a1, b0, b1 = draws
        tail = (1 - confidence) / 2
        low, high = np.quantile(np.concatenate([a0 - b1, a1 - b0]), [tail, 1 - tail])
        return float(low), float(high)

    entropies = [-np.log(_collision_draws(torch.tensor(r.counts), stream)) for r in (a, b) for stream in (0, 1)]
    radius = radius_interval = None
    if _comparable(a.class_radius, b.class_radius):
        assert a.class_radius is not None and b.class_radius is not None
        radius = a.class_radius.mean - b.class_radius.mean
        radius_interval = interval(
            [_mean_draws(r.per_sample, stream) for r in (a.class_radius, b.class_radius) for stream in (0, 1)]
        )
    return DiversityComparison(
        a.collision_entropy - b.collision_entropy, interval(entropies), radius, radius_interval, confidence
    )


def _collision_draws(counts: Tensor, stream: int) -> Array:
    """Draws collision probabilities [_DRAWS] that the counts [K] leave possible, with mean at the unbiased estimate."""
    weights = np.random.default_rng(stream).standard_gamma(counts.numpy() + 1 / len(counts), (_DRAWS, len(counts)))
    draws = np.square(weights / weights.sum(1, keepdims=True)).sum(1)
    return _attainable(draws - draws.mean() + float(collision_probability_from_counts(counts)), len(counts))


def _attainable(collision: Array | float, num_classes: int) -> Array:
    """Moves collision probabilities to the nearest ones that so many classes can have."""
    return np.asarray(np.clip(collision, 1 / num_classes, 1))


def _mean_draws(values: Tensor, stream: int) -> Array:
    """Draws means [_DRAWS] that the values [N] leave possible."""
    values = values.double().cpu()
    random = np.random.default_rng(stream)
    rows = max(1, _CHUNK // len(values))
    means = []
    for start in range(0, _DRAWS, rows):
        weights = random.standard_exponential((min(rows, _DRAWS - start), len(values)))
        means.append(weights @ values.numpy() / weights.sum(1))
    return np.concatenate(means)


def _comparable(a: ClassRadius | None, b: ClassRadius | None) -> bool:
    if a is None or b is None or not (math.isfinite(a.mean) and math.isfinite(b.mean)):
        return False
    if _method(a) != _method(b):
        return False
    return isinstance(a, SearchedRadius) or (a.latent_dim, a.num_samples) == (b.latent_dim, b.num_samples)


def _method(radius: ClassRadius) -> str:
    return "search" if isinstance(radius, SearchedRadius) else "nearest sample of another class"
