"""Known laws that codes are matched to: isotropic normals and mixtures of them, and each smoothed by the kernel."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .ops.kde import kde_log_prob
from .reference.kde import normal_log_prob


class IsotropicNormal(nn.Module):
    """N(0, variance I) in `dim` dimensions.

    Raises:
        ValueError: `dim` below 1, or a variance that is not positive and finite.
        TypeError: `dim` that is no integer.
    """

    def __init__(self, dim: int, variance: float = 1.0) -> None:
        super().__init__()
        dim = operator.index(dim)
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not 0 < variance < math.inf:
            raise ValueError(f"variance must be positive and finite, got {variance}")
        self.dim = dim
        self.variance = float(variance)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats at z [..., dim], as [...] in the dtype of z."""
        _check_dim(z, self.dim)
        return normal_log_prob(z, self.variance)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n samples as [n, dim] float32, on the generator's device (default: the CPU)."""
        device = None if generator is None else generator.device
        return torch.randn(n, self.dim, generator=generator, device=device) * math.sqrt(self.variance)

    def smoothed(self, bandwidth: float) -> IsotropicNormal:
        """This law convolved with the kernel N(0, bandwidth^2 I): what a KDE of its own samples tends to."""
        return IsotropicNormal(self.dim, self.variance + _positive(bandwidth) ** 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, variance={self.variance:g}"


class StandardNormal(IsotropicNormal):
    """N(0, I) in `dim` dimensions."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)


class GaussianMixture(nn.Module):
    """A mixture of isotropic normals, evaluated by the same kernel as a KDE.

    Args:
        means: [K, dim], the components' means.
        scales: the components' standard deviations: one number, or [K].
        weights: [K], positive, scaled here to sum to 1; None for equal ones.

    Raises:
        ValueError: shapes that do not match, or scales and weights that are not positive and finite.
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
        if not isinstance(means, Tensor):
            means = torch.as_tensor(means, dtype=torch.float64, device=_device())
        means = means.to(torch.float64)
        if means.ndim != 2 or means.numel() == 0:
            raise ValueError(f"means must have shape [K, dim] with K and dim at least 1, got {list(means.shape)}")
        count = means.shape[0]
        if not isinstance(scales, Tensor):
            scales = torch.as_tensor(scales, dtype=torch.float64, device=_device())
        weights = [1.0] * count if weights is None else weights
        if not isinstance(weights, Tensor):
            weights = torch.as_tensor(weights, dtype=torch.float64, device=_device())
        scales, weights = scales.to(torch.float64), weights.to(torch.float64)
        if scales.ndim == 0:
            scales = scales.expand(count)
        for name, value in (("scales", scales), ("weights", weights)):
            if value.shape != (count,):
                raise ValueError(f"{name} must have shape [{count}], one per mean, got {list(value.shape)}")
            if not bool(((value > 0) & value.isfinite()).all()):
                raise ValueError(f"{name} must be positive and finite, got {value.tolist()}")
        if not bool(means.isfinite().all()):
            raise ValueError("means must be finite, got NaN or infinity among them")
        self.dim = means.shape[1]
        self.register_buffer("means", means.detach().clone())
        self.register_buffer("scales", scales.detach().clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log().detach())

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats at z [..., dim], as [...] in the dtype of z (float32 for half types)."""
        _check_dim(z, self.dim)
        flat = z.reshape(-1, self.dim)
        means, scales, log_weights = (b.to(z.device, z.dtype) for b in (self.means, self.scales, self.log_weights))
        return kde_log_prob(flat, means, scales, log_weights=log_weights).reshape(z.shape[:-1])

    def component_log_prob(self, z: Tensor) -> Tensor:
        """log w_k + log N(z; mu_k, sigma_k^2 I) in nats at z [..., dim], as [..., K]: `log_prob` is its logsumexp over
        the components, and its softmax gives their probabilities at z."""
        _check_dim(z, self.dim)
        means, scales, log_weights = (b.to(z.device, z.dtype) for b in (self.means, self.scales, self.log_weights))
        standard = (z[..., None, :] - means) / scales[:, None]
        return log_weights - self.dim * scales.log() + normal_log_prob(standard, 1.0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n samples as [n, dim] float32, on the generator's device (default: the CPU)."""
        return self.sample_with_component(n, generator)[0]

    def sample_with_component(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n samples as [n, dim] float32 and the component [n] each was drawn from."""
        device = torch.device("cpu") if generator is None else generator.device
        weights = self.log_weights.exp().to(device)
        if n == 0:  # which multinomial refuses
            component = torch.zeros(0, dtype=torch.int64, device=device)
        else:
            component = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, generator=generator, device=device)
        means, scales = self.means.float().to(device), self.scales.float().to(device)
        return means[component] + scales[component, None] * noise, component

    def smoothed(self, bandwidth: float) -> GaussianMixture:
        """This law convolved with the kernel N(0, bandwidth^2 I): every component's variance grows by bandwidth^2."""
        scales = (self.scales.square() + _positive(bandwidth) ** 2).sqrt()
        return GaussianMixture(self.means, scales, self.log_weights.exp())

    def extra_repr(self) -> str:
        return f"components={self.means.shape[0]}, dim={self.dim}"


Target: TypeAlias = IsotropicNormal | GaussianMixture | Distribution


def target_dim(target: Target) -> int:
    """The number of dimensions of the target's samples.

    Raises:
        ValueError: a Distribution whose event is not one vector (wrap it in `torch.distributions.Independent`).
        TypeError: something that is no target.
    """
    if isinstance(target, (IsotropicNormal, GaussianMixture)):
        return target.dim
    if isinstance(target, Distribution):
        if len(target.event_shape) != 1 or len(target.batch_shape) != 0:
            raise ValueError(
                "target must be one distribution over vectors, with event_shape [l] and batch_shape []; "
                f"got event_shape {list(target.event_shape)} and batch_shape {list(target.batch_shape)} "
                "(torch.distributions.Independent(target, 1) turns a batch of scalars into a vector)"
            )
        return target.event_shape[0]
    raise TypeError(
        "target must be None, StandardNormal, GaussianMixture or a torch.distributions.Distribution, "
        f"got {type(target).__name__}"
    )


def target_moments(target: Target) -> tuple[Tensor, Tensor]:
    """Mean and variance of every dimension of the target, each [l]."""
    if isinstance(target, IsotropicNormal):
        device = _device()
        return torch.zeros(target.dim, device=device), torch.full((target.dim,), target.variance, device=device)
    if isinstance(target, GaussianMixture):
        weights, means = target.log_weights.exp()[:, None], target.means
        mean = (weights * means).sum(0)
        second = (weights * (means.square() + target.scales.square()[:, None])).sum(0)
        return mean, second - mean.square()
    return target.mean, target.variance


def checked_target(target: Target | None, latent_dim: int) -> Target:
    """The target, None being the standard normal.

    Raises:
        ValueError: a target that has not latent_dim dimensions, and as in `target_dim`.
        TypeError: as in `target_dim`.
    """
    target = StandardNormal(latent_dim) if target is None else target
    if target_dim(target) != latent_dim:
        raise ValueError(f"target must have latent_dim = {latent_dim} dimensions, got {target_dim(target)}")
    return target


def checked_smoothable(target: Target) -> IsotropicNormal | GaussianMixture:
    """The target, if it has a `smoothed`.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(target, (IsotropicNormal, GaussianMixture)):
        raise ValueError(
            "smoothed=True needs a target that can be convolved with the kernel (StandardNormal or GaussianMixture), "
            f"got {type(target).__name__}"
        )
    return target


def sample_target(target: Target, n: int, generator: torch.Generator) -> Tensor:
    """n samples [n, dim] from any target, on the generator's device, by the generator alone.

    A torch Distribution draws from the global random state; it is seeded from the generator for the draw and put back.
    """
    if not isinstance(target, Distribution):
        return target.sample(n, generator)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return target.sample(torch.Size((n,))).to(generator.device)


def _device() -> torch.device:
    """Where numbers are put that no tensor's device says a place for: torch's default device; under the meta device,
    where models are built to be loaded, the CPU, since these numbers are looked at."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def _check_dim(z: Tensor, dim: int) -> None:
    if z.ndim == 0 or z.shape[-1] != dim:
        raise ValueError(f"z must have shape [..., {dim}], got {list(z.shape)}")


def _positive(bandwidth: float) -> float:
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
    return float(bandwidth)
