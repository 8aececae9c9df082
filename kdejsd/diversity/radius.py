"""Estimates the mean class radius: the mean distance of a sample z ~ N(0, I) to the nearest boundary of its class.

There are two estimators. `class_radius` takes the nearest sample of another class. It is quick and exact in the limit,
but biased upward. `class_radius_search` walks from each sample to the boundary along gradients of a classifier. It is
for higher dimensions, where samples are too far apart to show where the boundary between them lies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._modes import evaluating
from .._numbers import integer
from ..ops.nearest import nearest_other_class

_BIASED_FROM = 5  # dimensions


class RadiusBiasWarning(UserWarning):
    """Warns that `class_radius` is strongly biased: samples are too far apart to show where the boundary is.

    Example:
        >>> import kdejsd, torch, warnings
        >>> latents = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", kdejsd.RadiusBiasWarning)
        ...     kdejsd.class_radius(latents, (latents[:, 0] > 0).long()).invertible
        False
    """


@dataclass(frozen=True)
class ClassRadius:
    """Holds an estimate of the mean class radius, in the units of the latent space.

    Attributes:
        mean: mean over the samples; inf if some of them have no other class, NaN if some are NaN.
        standard_error: standard error of the mean, from the spread of the samples. It does not include a bias that all
            samples share.
        per_sample: [N], the distance from each latent sample.
        latent_dim: d.
        invertible: whether `max_collision_entropy` may be asked at this mean. False where a distance is not finite, and
            where the estimator's bias carries the mean above what any division into classes can have.

    Example:
        >>> import kdejsd, torch
        >>> radius = kdejsd.class_radius(torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]))
        >>> radius.per_sample, radius.num_samples, radius.num_without_boundary
        (tensor([2., 2., 3.]), 3, 0)
    """

    mean: float
    standard_error: float
    per_sample: Tensor = field(repr=False)
    latent_dim: int
    invertible: bool

    @property
    def num_samples(self) -> int:
        """Returns N."""
        return self.per_sample.numel()

    @property
    def num_without_boundary(self) -> int:
        """Returns the number of samples for which no other class was found; their distance is inf."""
        return int(self.per_sample.isinf().sum())


@dataclass(frozen=True)
class SearchedRadius(ClassRadius):
    """Holds the result of `class_radius_search`: a `ClassRadius`, and the points that it was measured between.

    Attributes:
        latents: [N, d], the samples.
        labels: [N], their classes, int64.
        boundary: [N, d], for each sample the point of another class at the distance per_sample; NaN if none was found.

    Example:
        >>> import kdejsd, torch
        >>> radius = kdejsd.class_radius_search(None, lambda z: torch.stack([z[:, 0], -z[:, 0]], 1), latent_dim=8)
        >>> (radius.boundary[:, 0].abs() < 1e-3).all()  # the boundary is the plane z_0 = 0
        tensor(True)
    """

    latents: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    boundary: Tensor = field(repr=False)


def _summary(per_sample: Tensor) -> tuple[float, float]:
    """Returns the mean and its standard error, in float64."""
    wide = per_sample.double()
    return float(wide.mean()), float(wide.std() / math.sqrt(wide.numel()))


def class_radius(latents: Tensor, labels: Tensor) -> ClassRadius:
    """Estimates the mean class radius by the distance of each sample to the nearest sample of another class.

    The class radius is the mean distance of a latent sample to the boundary of its class. A smaller radius goes with
    more diversity. Use this estimator in up to 4 dimensions, and `class_radius_search` above.

    The estimate is biased upward, because the nearest sample lies behind the boundary and to the side. For half-spaces
    the bias is about 4.5 N^(-2/(d+1)): 0.015 at N = 5000, d = 2; 0.014 and 0.045 at N = 100 000, d = 3 and 4. For 25
    boxes it is twice that. From d = 5 on it falls too slowly for any practical N, and carries the estimate above the
    bound on the class radius. A `RadiusBiasWarning` then says so, and the result is not `invertible`.

    The standard error is s / sqrt(N), s the standard deviation of the distances, as for independent terms. Samples have
    neighbours in common, so the terms are not quite independent. In repeated trials (N from 500 to 5000, d from 2 to
    10) it is 0.83 to 0.98 of the spread of the mean. This difference is small beside the bias.

    Args:
        latents: [N, d], N at least 2, drawn from N(0, I); float32, float64 or a half type.
        labels: [N], int64, the class of what is generated from each.

    Returns:
        A `ClassRadius`. Its per_sample has no gradient (`nearest_other_class` has one).

    Raises:
        ValueError: if shapes do not match, or there are fewer than 2 samples.
        TypeError: if latents are not floating point, or labels are not int64.

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), Definition 2.5. It draws
    a latent within the classes, by their probabilities; where each latent has a class, that is N(0, I).

    Example:
        >>> import kdejsd, torch
        >>> latents = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
        >>> radius = kdejsd.class_radius(latents, (latents[:, 0] > 0).long())  # two half-planes: 0.798
        >>> print(f"{radius.mean:.2f} +- {radius.standard_error:.2f}")
        0.81 +- 0.01
    """
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a tensor, got {type(latents).__name__}")
    if latents.ndim != 2 or len(latents) < 2:
        raise ValueError(f"latents must have shape [N, d], N at least 2; got {list(latents.shape)}")
    with torch.no_grad():
        distance = nearest_other_class(latents, labels).distance
    count, dim = latents.shape
    if dim >= _BIASED_FROM:
        warnings.warn(
            f"in {dim} dimensions the nearest of {count} samples lies far behind the class boundary: this mean class "
            "radius is too large, and the bound may not be inverted at it. Use class_radius_search",
            RadiusBiasWarning,
            stacklevel=2,
        )
    invertible = dim < _BIASED_FROM and bool(distance.isfinite().all())
    return ClassRadius(*_summary(distance), distance, dim, invertible)


@torch.inference_mode(False)  # the search takes gradients, wherever it is called
def class_radius_search(
    generator: Callable[[Tensor], Tensor] | None,
    classifier: Callable[[Tensor], Tensor],
    latent_dim: int,
    num_samples: int = 1000,
    *,
    steps: int = 20,
    num_targets: int = 9,
    batch_size: int = 256,
    rng: torch.Generator | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SearchedRadius:
    """Estimates the mean class radius by searching, from each sample, for the nearest point of another class.

    The class radius is the mean distance of a latent sample z ~ N(0, I) to the boundary of its class. Use this search
    from 5 dimensions on; `class_radius` is quicker in fewer.

    Let f = classifier(generator(.)), and c the class at z. The search goes towards each of several other classes t.
    Each step goes to the point nearest to z on the linearisation of f_t - f_c = 0 at the current point. (This is the
    iteration of Hasofer, Lind, Rackwitz and Fiessler for the nearest point of a surface; without the pull back to z it
    is DeepFool.) One more start is the nearest sample of another class. Bisection then brings the best point found to
    the boundary. From there it moves along the boundary, as long as it stays in another class and comes nearer to z.
    Random points inside the remaining ball look for another class on another side.

    Every distance is to a point that the classifier did give another class, so it is an upper bound. For flat
    boundaries it is the distance itself. On curved ones the search can end at a local minimum. (For untrained networks
    in 2 to 5 dimensions, compared with 20 000 points around each sample, the mean is too large by 0 to 2 % with 20
    steps, and by a quarter of that with 60.)

    Models (`torch.nn.Module`) are in evaluation mode during the call and get their modes back; their parameters'
    gradients are left alone. The samples have the dtype of the models' parameters and are on their device.

    Args:
        generator: [B, d] -> what the classifier takes; None where the classifier acts on the latents.
        classifier: to logits or log-probabilities [B, K], K at least 2. Saturated probabilities have a gradient of 0,
            which leaves the search with bisection alone.
        latent_dim: d.
        num_samples: N, at least 2.
        steps: gradient steps of each of the two phases, towards the boundary (for each class) and along it.
        num_targets: the number of classes t that are tried for each sample: those of the highest logits.
        batch_size: points that the classifier is given at a time.
        rng: draws the samples, on any device; None for a CPU generator seeded with 0.
        progress: called with the number of samples done, and num_samples, after each batch.

    Returns:
        A `SearchedRadius`, `invertible` where every sample has a finite distance. A sample from which no other class
        was found has distance inf, and one whose logits are NaN has NaN; the mean is then inf or NaN too.

    Raises:
        ValueError: if a number is out of range, or logits have another shape or do not depend on the latents by
            differentiable operations.

    Source: Rackwitz, Fiessler, "Structural reliability under combined random load sequences" (1978); Moosavi-Dezfooli,
    Fawzi, Frossard, "DeepFool: a simple and accurate method to fool deep neural networks",
    https://arxiv.org/abs/1511.04599, algorithm 2.

    Example:
        >>> import kdejsd, torch
        >>> radius = kdejsd.class_radius_search(None, lambda z: torch.stack([z[:, 0], -z[:, 0]], 1), latent_dim=16)
        >>> print(f"{radius.mean:.2f} +- {radius.standard_error:.2f}")  # two half-spaces: 0.798
        0.79 +- 0.02
    """
    latent_dim = integer("latent_dim", latent_dim, 1)
    num_samples = integer("num_samples", num_samples, 2)
    steps = integer("steps", steps, 1)
    num_targets = integer("num_targets", num_targets, 1)
    batch_size = integer("batch_size", batch_size, 1)
    models = [m for m in (generator, classifier) if isinstance(m, torch.nn.Module)]
    like = next((p for m in models for p in m.parameters()), torch.empty(0))
    rng = torch.Generator().manual_seed(0) if rng is None else rng
    latents = torch.randn(num_samples, latent_dim, generator=rng, device=rng.device, dtype=like.dtype).to(like.device)

    def logits(z: Tensor) -> Tensor:
        found = classifier(z if generator is None else generator(z))
        if found.ndim != 2 or len(found) != len(z) or found.shape[1] < 2:
            raise ValueError(f"classifier must return logits [{len(z)}, K], K at least 2; got {list(found.shape)}")
        return found

    with evaluating(*models):
        probes = torch.randn(_Search.probes_per_step * steps, latent_dim, generator=rng, device=rng.device).to(latents)
        probes = torch.nn.functional.normalize(probes, dim=1)
        probes *= torch.rand(len(probes), 1, generator=rng, device=rng.device).to(latents) ** (1 / latent_dim)
        search = _Search(logits, steps, num_targets, probes)
        batches = latents.split(batch_size)
        with torch.no_grad():
            values = torch.cat([logits(z) for z in batches])
            labels, undefined = values.argmax(-1), values.isnan().any(-1)
            # A sample with NaN logits is of no class: in none of the others' way.
            start = latents.clone()
            known = (~undefined).nonzero().squeeze(-1)
            nearest = nearest_other_class(latents[known], labels[known]).index
            start[known] = torch.where((nearest < 0).unsqueeze(-1), latents[known], latents[known[nearest]])
        boundary = []
        for z, classes, other in zip(batches, labels.split(batch_size), start.split(batch_size), strict=True):
            boundary.append(search.run(z, classes, other))
            if progress is not None:
                progress(sum(map(len, boundary)), num_samples)
    points = torch.where(undefined.unsqueeze(1), math.nan, torch.cat(boundary))
    distance = torch.linalg.vector_norm(points - latents, dim=-1)
    per_sample = torch.where(undefined, math.nan, torch.where(distance.isnan(), math.inf, distance))
    invertible = bool(per_sample.isfinite().all())
    return SearchedRadius(*_summary(per_sample), per_sample, latent_dim, invertible, latents, labels, points)


@dataclass(frozen=True)
class _Search:
    logits: Callable[[Tensor], Tensor]
    steps: int
    num_targets: int
    probes: Tensor  # [steps * probes_per_step, d], points of the unit ball

    probes_per_step = 4
    overshoot = 1e-3  # in latent units, of a step that aims at the boundary and is to end behind it
    least_gain = 1e-5  # relative, of a step along the boundary
    bisections = 24

    def run(self, z: Tensor, classes: Tensor, other: Tensor) -> Tensor:
        """Returns, as [B, d], the nearest point of another class found for each z [B, d] of class [B]; NaN if none was.

        Args:
            other: [B, d], a point of another class each, or z itself.
        """
        best = _Nearest(self, z, classes)
        best.offer(other)
        best.bisect(self.bisections // 2)
        with torch.no_grad():
            others = self.logits(z).scatter(1, classes.unsqueeze(1), -math.inf)
        for target in others.topk(min(self.num_targets, others.shape[1] - 1)).indices.T:
            this = _Nearest(self, z, classes)
            point = z
            for _ in range(self.steps):
                gap, slope = self.linearisation(point, classes, target)
                norm = torch.linalg.vector_norm(slope, dim=-1, keepdim=True)
                move = (_dot(point - z, slope) - gap) / norm + self.overshoot
                point = torch.where((norm > 0) & move.isfinite(), z + move * slope / norm, point)
                this.offer(point)
            this.bisect(self.bisections // 2)
            best.offer(this.outside)
        self.slide(best)
        best.bisect(self.bisections)
        return best.outside

    def slide(self, best: _Nearest) -> None:
        """Moves along the boundary, by turns of the ray from z towards the foot on the tangent plane.

        If the boundary was not nearer in the new direction, the next turn goes half as far. Between the moves a few
        points in the ball up to the boundary are tried, so that another class on another side is not missed.
        """
        z, share = best.z, torch.ones_like(best.z[:, :1])
        furthest = 6 + math.sqrt(z.shape[1])  # from a sample with no other class in sight, some way out of N(0, I)
        for offsets in self.probes.split(self.probes_per_step):
            for offset in offsets:
                jumped = best.offer(z + best.distance.unsqueeze(1).clamp_max(furthest) * offset)
                share = torch.where(jumped.unsqueeze(1), 1.0, share)
            point = torch.where(best.distance.isinf().unsqueeze(1), z, best.outside)
            with torch.no_grad():
                target = self.logits(point).argmax(-1)
            gap, slope = self.linearisation(point, best.classes, target)
            offset = _dot(point - z, slope) - gap  # of the plane: slope . (x - z) = offset
            foot = z + offset * slope / _dot(slope, slope)
            ray = torch.nn.functional.normalize(point + share * (foot - point) - z, dim=-1)
            radius = best.distance.unsqueeze(1)
            gain = (radius - offset / _dot(ray, slope)) / 2
            improved = best.offer(z + ray * (radius - torch.maximum(gain, self.least_gain * radius)))
            share = torch.where(improved.unsqueeze(1), (1.5 * share).clamp_max(1.0), share / 2)

    def linearisation(self, point: Tensor, classes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how far the target's logit is over that of the class [B, 1], and the gradient of that [B, d]."""
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            values = self.logits(point)
            if not values.requires_grad:
                raise ValueError("classifier(generator(z)) must depend on z by differentiable operations")
            gap = values.gather(1, target.unsqueeze(1)) - values.gather(1, classes.unsqueeze(1))
            slope = torch.autograd.grad(gap.sum(), point)[0]
        return gap.detach(), slope


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


class _Nearest:
    """Keeps for each z the nearest known point of another class, and the furthest before it that is not of one."""

    def __init__(self, search: _Search, z: Tensor, classes: Tensor) -> None:
        self.search, self.z, self.classes = search, z, classes
        self.inside, self.outside = z, torch.full_like(z, math.nan)
        self.distance = torch.full_like(z[:, 0], math.inf)

    @torch.no_grad()
    def crosses(self, point: Tensor) -> Tensor:
        """Tells which points are of another class, [B, 1]; never where the point or its logits are NaN."""
        values = self.search.logits(point)
        known = ~(values.isnan().any(-1) | point.isnan().any(-1))
        return ((values.argmax(-1) != self.classes) & known).unsqueeze(1)

    def offer(self, point: Tensor) -> Tensor:
        """Takes the points that are of another class and nearer, and returns which these are, [B]."""
        distance = torch.linalg.vector_norm(point - self.z, dim=-1)
        better: Tensor = self.crosses(point).squeeze(1) & (distance < self.distance)
        self.outside = torch.where(better.unsqueeze(1), point, self.outside)
        self.inside = torch.where(better.unsqueeze(1), self.z, self.inside)
        self.distance = torch.where(better, distance, self.distance)
        return better

    def bisect(self, times: int) -> None:
        for _ in range(times):
            middle = (self.inside + self.outside) / 2
            crosses = self.crosses(middle)
            self.outside = torch.where(crosses, middle, self.outside)
            self.inside = torch.where(crosses, self.inside, middle)
        distance = torch.linalg.vector_norm(self.outside - self.z, dim=-1)
        self.distance = torch.where(distance.isnan(), math.inf, distance)
