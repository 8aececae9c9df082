"""Defines the targets, the known distributions that codes are to follow: normals, mixtures, torch's, and your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    constraints,
)
from torch.distributions.transforms import ComposeTransform

from . import _torch
from ._numbers import integer, positive, reals
from .ops import _common
from .ops.kde import kde_log_prob
from .reference.kde import normal_log_prob


class IsotropicNormal(nn.Module):
    """Represents the normal distribution N(0, variance I) in `dim` dimensions, as a target.

    Args:
        dim: l, the number of dimensions, at least 1.
        variance: the variance of every dimension, positive.

    Raises:
        ValueError: if `dim` is below 1, or the variance is not positive and finite.
        TypeError: if `dim` is no integer.

    Example:
        >>> import torch
        >>> from kdejsd.targets import IsotropicNormal
        >>> IsotropicNormal(2, variance=4.0).log_prob(torch.zeros(2))
        tensor(-3.2242)
    """

    def __init__(self, dim: int, variance: float = 1.0) -> None:
        super().__init__()
        self.dim = integer("dim", dim, 1)
        self.variance = positive("variance", variance)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns the log-density in nats at z [..., dim], as [...] in the dtype of z."""
        _check_dim(z, self.dim)
        return normal_log_prob(z, self.variance)

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Draws n samples, [n, dim] float32, on the device of rng (the CPU if there is none)."""
        n = integer("n", n, 0)
        device = None if rng is None else rng.device
        return torch.randn(n, self.dim, generator=rng, device=device) * math.sqrt(self.variance)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the variance of every dimension, each [dim]."""
        device = _device()
        return torch.zeros(self.dim, device=device), torch.full((self.dim,), self.variance, device=device)

    def outline(self) -> list[tuple[Tensor, float]]:
        """Returns the spheres of one, two and three standard deviations, which pictures show, as centers and radii."""
        return [(torch.zeros(self.dim, dtype=torch.float64), k * math.sqrt(self.variance)) for k in (1, 2, 3)]

    def smoothed(self, bandwidth: float) -> IsotropicNormal:
        """Returns this normal convolved with the kernel N(0, bandwidth^2 I): the limit of a KDE of its samples."""
        return IsotropicNormal(self.dim, self.variance + positive("bandwidth", bandwidth) ** 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, variance={self.variance:g}"


class StandardNormal(IsotropicNormal):
    """Represents the standard normal distribution N(0, I) in `dim` dimensions: the usual target of codes.

    Example:
        >>> import kdejsd
        >>> kdejsd.StandardNormal(8).smoothed(0.5).variance
        1.25
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)


class GaussianMixture(nn.Module):
    """Represents a mixture of isotropic normals, as a target: for codes that are to form clusters.

    Its density is computed by the same kernel as `kde_log_prob`.

    Args:
        means: [K, dim], the components' means.
        scales: the components' standard deviations: one number, or [K].
        weights: [K], positive, scaled here to sum to 1; None for equal ones.

    Raises:
        ValueError: if shapes do not match, or scales or weights are not positive and finite.
        TypeError: if an argument holds anything but real numbers; bools do not count as such.

    Example:
        >>> import kdejsd, torch
        >>> mixture = kdejsd.GaussianMixture(means=[[-2.0], [2.0]], scales=0.5, weights=[1, 3])
        >>> mixture.log_prob(torch.tensor([[-2.0], [2.0]])).exp()
        tensor([0.1995, 0.5984])
    """

    means: Tensor
    scales: Tensor
    log_weights: Tensor

    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        scales: Tensor | Sequence[float] | float = 1.0,
        weights: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        means = _float64("means", means)
        if means.ndim != 2 or means.numel() == 0:
            raise ValueError(f"means must have shape [K, dim] with K and dim at least 1, got {list(means.shape)}")
        count = means.shape[0]
        scales = _float64("scales", scales)
        weights = _float64("weights", [1.0] * count if weights is None else weights)
        if scales.ndim == 0:
            scales = scales.expand(count)
        for name, value in (("scales", scales), ("weights", weights)):
            if value.shape != (count,):
                raise ValueError(f"{name} must have shape [{count}], one per mean, got {list(value.shape)}")
        self.dim = means.shape[1]
        numbers = means.detach(), scales.detach(), weights.detach()
        checked = _operator if _common.road(numbers) == "operator" else _mixture
        for name, value in zip(("means", "scales", "log_weights"), checked(*numbers), strict=True):
            self.register_buffer(name, value)

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns the log-density in nats at z [..., dim], as [...] in the dtype of z (float32 for half types)."""
        _check_dim(z, self.dim)
        flat = z.reshape(-1, self.dim)
        means, scales, log_weights = (b.to(z.device, z.dtype) for b in (self.means, self.scales, self.log_weights))
        return kde_log_prob(flat, means, scales, log_weights=log_weights).reshape(z.shape[:-1])

    def component_log_prob(self, z: Tensor) -> Tensor:
        """Returns log w_k + log N(z; mu_k, sigma_k^2 I) in nats at z [..., dim], as [..., K].

        Its logsumexp over the components is `log_prob`; its softmax gives the components' probabilities at z.
        """
        _check_dim(z, self.dim)
        means, scales, log_weights = (b.to(z.device, z.dtype) for b in (self.means, self.scales, self.log_weights))
        standard = (z[..., None, :] - means) / scales[:, None]
        return log_weights - self.dim * scales.log() + normal_log_prob(standard, 1.0)

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Draws n samples, [n, dim] float32, on the device of rng (the CPU if there is none)."""
        return self.sample_with_component(n, rng)[0]

    def sample_with_component(self, n: int, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws n samples, [n, dim] float32, and returns with them the component [n] that each came from."""
        n = integer("n", n, 0)
        device = torch.device("cpu") if rng is None else rng.device
        weights = self.log_weights.exp().to(device)
        if n == 0:  # which multinomial refuses
            component = torch.zeros(0, dtype=torch.int64, device=device)
        else:
            component = torch.multinomial(weights, n, replacement=True, generator=rng)
        noise = torch.randn(n, self.dim, generator=rng, device=device)
        means, scales = self.means.float().to(device), self.scales.float().to(device)
        return means[component] + scales[component, None] * noise, component

    def moments(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the variance of every dimension, each [dim]."""
        weights = self.log_weights.exp()[:, None]
        mean = (weights * self.means).sum(0)
        second = (weights * (self.means.square() + self.scales.square()[:, None])).sum(0)
        return mean, second - mean.square()

    def outline(self) -> list[tuple[Tensor, float]]:
        """Returns a sphere of two standard deviations for each component, which pictures show, as centers and radii."""
        return [(mean, 2 * float(scale)) for mean, scale in zip(self.means.cpu(), self.scales.cpu(), strict=True)]

    def smoothed(self, bandwidth: float) -> GaussianMixture:
        """Returns this mixture convolved with the kernel N(0, bandwidth^2 I): every variance grows by bandwidth^2."""
        scales = (self.scales.square() + positive("bandwidth", bandwidth) ** 2).sqrt()
        return GaussianMixture(self.means, scales, self.log_weights.exp())

    def extra_repr(self) -> str:
        return f"components={self.means.shape[0]}, dim={self.dim}"


def _mixture(means: Tensor, scales: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the means, scales and log-weights that a mixture keeps; their values are looked at here."""
    for name, value in (("scales", scales), ("weights", weights)):
        if not bool(((value > 0) & value.isfinite()).all()):
            raise ValueError(f"{name} must be positive and finite, got {value.tolist()}")
    if not bool(means.isfinite().all()):
        raise ValueError("means must be finite, got NaN or infinity among them")
    return means.clone(), scales.clone(), (weights / weights.sum()).log()


def _fake(means: Tensor, scales: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(means), scales.new_empty(scales.shape), torch.empty_like(weights)


# A compiled graph has what looks at values as one operator.
_operator = _common.operator("mixture", _mixture, _fake, looks_at_values=True)


class Law(Protocol):
    """Describes the methods that a target needs: give a class of your own these, and pass its objects as `target`.

    The built-in targets have them. Three more methods are optional:

    * `smoothed(bandwidth)` returns the distribution convolved with the kernel N(0, bandwidth^2 I). `LaggedKDE` needs it
      unless smoothed=False.
    * `moments()` returns the mean and the variance of every dimension, each [dim]. Without it they are estimated from
      samples.
    * `outline()` returns a list of spheres, as pairs of a center [dim] and a radius. Pictures of codes then show them.

    Example:
        >>> import kdejsd, torch
        >>> class Square:
        ...     dim = 2
        ...     def log_prob(self, z):
        ...         return torch.where((z.abs() <= 1).all(-1), torch.tensor(0.25).log(), -torch.inf)
        ...     def sample(self, n, rng=None):
        ...         return 2 * torch.rand(n, self.dim, generator=rng) - 1
        >>> found = kdejsd.optimal_bandwidth(latent_dim=2, num_centers=100, target=Square(), trials=3)
        >>> round(found.value, 2)
        0.25
    """

    @property
    def dim(self) -> int:
        """Returns l, the number of dimensions."""

    def log_prob(self, z: Tensor, /) -> Tensor:
        """Returns the log-density in nats at z [..., dim], as [...]."""

    def sample(self, n: int, rng: torch.Generator | None = None, /) -> Tensor:
        """Draws n samples [n, dim]. If rng is given, they come from it alone and are on its device."""


class SmoothableLaw(Law, Protocol):
    """Describes a target that can be convolved with the kernel."""

    def smoothed(self, bandwidth: float, /) -> Law:
        """Returns this distribution convolved with the kernel N(0, bandwidth^2 I)."""


Target: TypeAlias = IsotropicNormal | GaussianMixture | Distribution | Law


class DistributionLaw(nn.Module):
    """Gives a torch Distribution over vectors the methods of `Law`; its parameters stay where they are.

    Raises:
        ValueError: if the distribution's event is not one vector (wrap it in `torch.distributions.Independent`).
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        if len(distribution.event_shape) != 1 or len(distribution.batch_shape) != 0:
            raise ValueError(
                "target must be one distribution over vectors, with event_shape [l] and batch_shape []; "
                f"got event_shape {list(distribution.event_shape)} and batch_shape {list(distribution.batch_shape)} "
                "(torch.distributions.Independent(target, 1) turns a batch of scalars into a vector)"
            )
        self.given = distribution
        self.dim = distribution.event_shape[0]

    @property
    def distribution(self) -> Distribution:
        return self.given

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns the log-density in nats at z [..., dim], as [...]: -inf outside the support and NaN where z is NaN.

        This holds whether or not the distribution validates its arguments. (Many that do not would return a plausible
        number there. Under torch.compile and function transforms the value is the distribution's own.) The dtype is
        that which torch makes of the distribution's and z's; `MultivariateNormal` and `LowRankMultivariateNormal`
        compute in their own.
        """
        _check_dim(z, self.dim)
        if z.numel() == 0:  # which some supports cannot check
            return z.sum(-1)
        return _log_density(self.distribution, z)

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Draws n samples [n, dim], on the device of rng.

        A Distribution draws from the global random state, which is seeded from rng for the draw and put back.
        """
        shape, distribution = torch.Size((integer("n", n, 0),)), self.distribution
        if rng is None:
            return distribution.sample(shape)
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return distribution.sample(shape).to(rng.device)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the variance of every dimension, each [dim], estimated from samples if need be."""
        distribution = self.distribution
        try:
            return distribution.mean, distribution.variance
        except NotImplementedError:
            return _estimated_moments(self)

    def __repr__(self) -> str:
        return repr(self.distribution)


class SmoothableDistribution(DistributionLaw):
    """Represents a normal Distribution, or a mixture of normals, convolved with N(0, variance I).

    Where the parameters of its spread need gradients, the convolution is computed anew at every call; it then has a
    graph of its own and follows an optimiser's steps. Otherwise they are read once.
    """

    def __init__(self, distribution: Distribution, variance: float = 0.0) -> None:
        super().__init__(distribution)
        self.variance = variance
        self.convolved: Distribution | None = None
        if variance == 0:
            self.convolved = distribution
        elif not _spread_needs_grad(_innermost(distribution)):
            self.convolved = _with_kernel(distribution, variance)

    @property
    def distribution(self) -> Distribution:
        return _with_kernel(self.given, self.variance) if self.convolved is None else self.convolved

    def smoothed(self, bandwidth: float) -> SmoothableDistribution:
        return SmoothableDistribution(self.given, self.variance + positive("bandwidth", bandwidth) ** 2)


def _innermost(distribution: Distribution) -> Distribution:
    """Returns the distribution of a part of independent parts, or of a component of a mixture."""
    if type(distribution) is Independent:
        return _innermost(distribution.base_dist)
    if type(distribution) is MixtureSameFamily:
        return _innermost(distribution.component_distribution)
    return distribution


def _spread_needs_grad(normal: Distribution) -> bool:
    """Tells whether the scale or the covariance that the distribution was made with needs a gradient."""
    made_of = (vars(normal).get(name) for name in normal.arg_constraints if name != "loc")
    return any(parameter is not None and parameter.requires_grad for parameter in made_of)


def _log_density(distribution: Any, z: Tensor) -> Tensor:
    """Computes `DistributionLaw.log_prob` for a distribution that may have a batch."""
    kind = type(distribution)
    # A mixture's own support is where all of its components have theirs; its density is not 0 where one of them has.
    if kind is MixtureSameFamily:
        components = _log_density(distribution.component_distribution, z.unsqueeze(-1 - len(distribution.event_shape)))
        weighted: Tensor = components + distribution.mixture_distribution.logits.log_softmax(-1)
        return weighted.logsumexp(-1)
    if kind is Independent and type(distribution.base_dist) in (*_OWN_DENSITY, Independent):
        density = _sum_last(_log_density(distribution.base_dist, z), distribution.reinterpreted_batch_ndims)
        return density.masked_fill(density.isneginf(), -math.inf)  # of which no part has a gradient
    # And a transformed law's is all that the last transform can give, whatever the support of its base.
    if kind is TransformedDistribution:
        steps = _single_steps(distribution.transforms)
        return _transformed_log_density(distribution.base_dist, steps, z, len(distribution.event_shape))
    if kind in (MultivariateNormal, LowRankMultivariateNormal):  # whose products are of one dtype
        z = z.to(distribution.loc.dtype)
    try:
        support = distribution.support
    except NotImplementedError:
        support = None
    batch = len(distribution.batch_shape) > 0
    return _supported(support, z, distribution.log_prob, distribution.sample if batch else None)


_OWN_DENSITY = (MixtureSameFamily, TransformedDistribution)  # what they say of their support is not where they have one


def _transformed_log_density(base: Any, steps: list[Any], z: Tensor, event_dim: int) -> Tensor:
    """Returns the log-density at z by the change of variables, after asking every step for its range."""
    if not steps:
        return _sum_last(_log_density(base, z), event_dim - len(base.event_shape))
    *inner, last = steps

    def log_density(z: Tensor) -> Tensor:
        x = last.inv(z)
        dims = event_dim + last.domain.event_dim - last.codomain.event_dim
        density = _transformed_log_density(base, inner, x, dims)
        change = _sum_last(last.log_abs_det_jacobian(x, z), dims - last.domain.event_dim)
        return (density - change).masked_fill(density.isneginf(), -math.inf)

    def sample() -> Tensor:
        x: Tensor = base.sample()
        for step in steps:
            x = step(x)
        return x

    support = constraints.independent(last.codomain, event_dim - last.codomain.event_dim)
    return _supported(support, z, log_density, sample if len(base.batch_shape) > 0 else None)


def _single_steps(transforms: list[Any]) -> list[Any]:
    return [
        step
        for transform in transforms
        for step in (_single_steps(transform.parts) if isinstance(transform, ComposeTransform) else [transform])
    ]


def _sum_last(values: Tensor, dims: int) -> Tensor:
    return values.flatten(-dims).sum(-1) if dims > 0 else values


def _supported(
    support: Any, z: Tensor, log_density: Callable[[Tensor], Tensor], sample: Callable[[], Tensor] | None
) -> Tensor:
    """Returns the log-density at z, asked for only at points of the support: -inf elsewhere, NaN where z is NaN.

    Args:
        support: a torch constraint; None where it is not known.
        sample: draws a point of the support of each law in the batch; None where there is one support for all z.
    """
    if support is None or torch.compiler.is_compiling() or _torch.transforms_active():
        return log_density(z)  # what lies outside cannot be asked there
    inside = support.check(z)
    if bool(inside.all()):
        return log_density(z)
    vectors = support.event_dim > 0
    nan = z.isnan().any(-1) if vectors else z.isnan()
    outside = torch.where(nan, math.nan, -math.inf).to(z.dtype)
    if not bool(inside.any()):
        return outside
    # A point of the support stands in for the others, so that none of their gradients is NaN.
    if sample is None:
        stand_in = z[inside][0].detach()
    else:
        with torch.random.fork_rng():
            stand_in = sample().to(z)
    kept = torch.where(inside[..., None] if vectors else inside, z, stand_in)
    return torch.where(inside, log_density(kept), outside)


def _with_kernel(distribution: Any, variance: float) -> Distribution:
    """Returns the distribution of x + e, x being normal or from a mixture of normals, and e from N(0, variance I)."""
    if type(distribution) is Independent:
        part = _with_kernel(distribution.base_dist, variance)
        return Independent(part, distribution.reinterpreted_batch_ndims)
    if type(distribution) is MixtureSameFamily:
        components = _with_kernel(distribution.component_distribution, variance)
        return MixtureSameFamily(distribution.mixture_distribution, components)
    if type(distribution) is Normal:
        return Normal(distribution.loc, (distribution.scale.square() + variance).sqrt())
    if type(distribution) is LowRankMultivariateNormal:
        return LowRankMultivariateNormal(distribution.loc, distribution.cov_factor, distribution.cov_diag + variance)
    covariance = _covariance(distribution)
    unit = torch.eye(len(covariance[-1]), dtype=covariance.dtype, device=covariance.device)
    return MultivariateNormal(distribution.loc, covariance + variance * unit)


def _covariance(normal: MultivariateNormal) -> Tensor:
    """Returns the covariance from the matrix that the distribution was made with.

    That matrix is the first of the three that it has. The others, once asked for, are kept with the graph they then
    had.
    """
    name = next(name for name in vars(normal) if name in ("covariance_matrix", "scale_tril", "precision_matrix"))
    matrix: Tensor = getattr(normal, name)
    if name == "scale_tril":
        return matrix @ matrix.mT
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix)) if name == "precision_matrix" else matrix


def as_law(target: Target) -> Law:
    """Returns the target with the methods of `Law`: itself, or a torch Distribution in a `DistributionLaw`.

    Raises:
        ValueError: if it is a Distribution whose event is not one vector.
        TypeError: if it is no target.
    """
    if isinstance(target, Distribution):
        is_normal = type(_innermost(target)) in (Normal, MultivariateNormal, LowRankMultivariateNormal)
        return SmoothableDistribution(target) if is_normal else DistributionLaw(target)
    missing = _missing(target)
    if missing or isinstance(target, type):
        described = f"{type(target).__name__}, which has no {' and no '.join(missing)}"
        if isinstance(target, type):
            described = f"the class {target.__name__}, not an instance of it"
        raise TypeError(
            "target must be None, StandardNormal, GaussianMixture, a torch.distributions.Distribution, or an object "
            f"with dim, log_prob(z) and sample(n, rng); got {described}"
        )
    return target


def _missing(target: object) -> list[str]:
    return [name for name in ("dim", "log_prob", "sample") if not hasattr(target, name)]


def is_target(value: object) -> bool:
    """Tells whether `as_law` takes a value, apart from its shape."""
    return isinstance(value, Distribution) or not (_missing(value) or isinstance(value, type))


def checked_target(target: Target | None, dim: int, like: str = "latent_dim") -> Law:
    """Returns the target as a law; None stands for the standard normal.

    Raises:
        ValueError: if the target has not `dim` dimensions, which `like` has, and as in `as_law`.
        TypeError: as in `as_law`.
    """
    law = StandardNormal(dim) if target is None else as_law(target)
    if law.dim != dim:
        raise ValueError(f"target must have {dim} dimensions, as {like} has, got {law.dim}")
    return law


def checked_smoothable(law: Law) -> SmoothableLaw:
    """Returns the law if it has a `smoothed`.

    Raises:
        ValueError: if it has none.
    """
    if not hasattr(law, "smoothed"):
        raise ValueError(
            "smoothed=True needs a target that can be convolved with the kernel: StandardNormal, GaussianMixture, "
            "torch's Normal in Independent, MultivariateNormal, a mixture of them, or an object with "
            f"smoothed(bandwidth); got {law}"
        )
    return cast(SmoothableLaw, law)


def smoothed_where_possible(law: Law, bandwidth: float) -> Law:
    return checked_smoothable(law).smoothed(bandwidth) if hasattr(law, "smoothed") else law


def isotropic_variance(target: Target | None) -> float | None:
    """Returns v for a target that is N(0, v I), and None for others; a target of None is the standard normal."""
    if target is None:
        return 1.0
    return target.variance if isinstance(target, IsotropicNormal) else None


def law_outline(law: Law) -> list[tuple[Tensor, float]]:
    """Returns the spheres of the law that pictures show, as centers [l] and radii; none where it has no outline."""
    spheres = law.outline() if hasattr(law, "outline") else []
    return [(torch.as_tensor(center), float(radius)) for center, radius in spheres]


def law_moments(law: Law) -> tuple[Tensor, Tensor]:
    """Returns the mean and the variance of every dimension of the law, each [l]."""
    if hasattr(law, "moments"):
        mean, variance = law.moments()
        return mean, variance
    return _estimated_moments(law)


def finite_moments(law: Law, purpose: str) -> tuple[Tensor, Tensor]:
    """Returns `law_moments`, which must be finite for this purpose.

    Raises:
        ValueError: if one is not finite.
    """
    mean, variance = law_moments(law)
    if not bool((mean + variance).isfinite().all()):
        raise ValueError(
            f"target must have a finite mean and variance for {purpose}, got mean {mean.tolist()} and variance "
            f"{variance.tolist()}"
        )
    return mean, variance


def _estimated_moments(law: Law) -> tuple[Tensor, Tensor]:
    n = max(1000, min(100_000, 10_000_000 // law.dim))  # the mean to 0.3 % of the deviation up to 100 dimensions
    samples = law.sample(n, torch.Generator().manual_seed(0)).double()
    return samples.mean(0), samples.var(0)


def law_log_prob(law: Law, z: Tensor) -> Tensor:
    """Returns the log-density at z [..., dim], in float64.

    The isotropic laws take z in float64. Others, whose parameters may be in float32, take it as it is, or in float32
    for half types.
    """
    if isinstance(law, (IsotropicNormal, GaussianMixture)):
        return law.log_prob(wide(z))
    return wide(law.log_prob(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z))


def wide(x: Tensor) -> Tensor:
    """Converts to float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def _float64(name: str, numbers: Any) -> Tensor:
    """Returns the real numbers of an argument as a float64 tensor."""
    found = reals(name, numbers)
    if isinstance(numbers, Tensor):
        return numbers.double()
    try:
        return torch.as_tensor(found, dtype=torch.float64, device=_device())
    except ValueError:
        raise ValueError(f"{name} must be rows of one length, got rows of several") from None


def _device() -> torch.device | None:
    """Returns the device for numbers that came without one: torch's default device, which None stands for as well.

    Under the meta device, where models are built to be loaded, it is the CPU, because these numbers are looked at.
    """
    if torch.compiler.is_compiling():  # which cannot be asked for the default device
        return None
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def _check_dim(z: Tensor, dim: int) -> None:
    if z.ndim == 0 or z.shape[-1] != dim:
        raise ValueError(f"z must have shape [..., {dim}], got {list(z.shape)}")
