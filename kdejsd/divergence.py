"""Computes the Jensen-Shannon divergence of a KDE of codes from a known target, and the training loss made of it."""

from __future__ import annotations

import contextlib
import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._normal_kde import log_ratio_means
from ._numbers import integer, positive
from ._tensors import broadcast_batch
from .bandwidth import optimal_bandwidth
from .ops.kde import Divergence, named_log_prob, normal_divergence_terms, reduced
from .reference.kde import normal_log_prob
from .targets import (
    Law,
    Target,
    as_law,
    checked_smoothable,
    checked_target,
    isotropic_variance,
    law_log_prob,
    smoothed_where_possible,
    wide,
)

_LOG2 = math.log(2)
_MOST_CENTERS = 10**9  # of which no digits of the integral are left, nor memory for samples
_SETS, _CODES = 10, 2000  # of lagged codes, and codes for each of them, where samples are needed


def _js_terms(gap: Tensor) -> Tensor:
    """Returns log 2 + log p_e / (p_e + p_t)."""
    return _LOG2 + logsigmoid(-gap)


def _js_target_share(terms: Tensor) -> Tensor:
    return -torch.expm1(terms - torch.log(terms.new_tensor(2.0)))  # 1 - r, where a term is log 2 + log r


# The divergences that the training loss can be, by name: whoever takes a name looks it up here.
DIVERGENCES = {
    "js": Divergence(_js_terms, "kJensenShannon", _js_target_share, lambda means: _LOG2 + means.log_r),
    "kl": Divergence(torch.neg, "kLogRatio", lambda terms: torch.sigmoid(-terms), lambda means: means.log_x),
}
_NAMES = tuple(DIVERGENCES)


def check_divergence(name: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"divergence must be {' or '.join(map(repr, _NAMES))}, got {name!r}")


def jsd_loss(
    codes: Tensor,
    lagged: Tensor,
    bandwidth: float | Tensor,
    *,
    target: Target | None = None,
    target_samples: Tensor | None = None,
    log_weights: Tensor | None = None,
    exclude_self: bool | Tensor = False,
    own: Tensor | None = None,
    divergence: str = "js",
    reduction: str = "mean",
) -> Tensor:
    """Measures how far the law of the codes is from the target, in nats: the latent loss of a GEN.

    With p_e the KDE of the lagged codes and p_t the target, "js" is

        log 2 + mean over codes of log p_e / (p_e + p_t)   (GENs eq. 3, with its constant)

    which is 0 where p_e = p_t and at most log 2. The p_e of m lagged codes is never quite p_t, and the loss of codes
    that do follow the target is mostly below 0: -0.19 for l = 8 and m = 2000 at the optimal bandwidth. `matched_loss`
    computes it. With target_samples the loss is the sum of both such terms, log 2 + log 2 + both means: twice the
    Jensen-Shannon divergence (eq. 2). "kl" is the mean of log p_e - log p_t, whose gradient has no
    factor that dampens it.

    Two properties of "js" matter in training. First, its gradient carries the factor 1 - r = p_t / (p_e + p_t), so
    codes bunched where p_e >> p_t do not move (the dead zone: a bunch of deviation 0.1 at distance 10, l = 8, is pulled
    with 7e-23). Normalise the codes, or use "kl". Second, with a bandwidth below the target's scale the loss has no
    lower bound: a code far from every lagged code is pushed outward, more so the fewer lagged codes there are.

    Against the target itself, codes settle at the variance 1 - h^2 (GENs, section 4). Against
    `target.smoothed(bandwidth)`, p_e = p_t is the fixed point for every bandwidth. Adding the kernel's noise to the
    codes as well makes them samples of p_e, the law that eq. 3 averages over, and the loss is then bounded by what it
    measures. `LaggedKDE.loss` does both.

    Args:
        codes: [..., n, l], the codes z', which get the gradient; n at least 1 for reduction="mean".
        lagged: [..., m, l], the lagged codes. Detach them, or they get a gradient too.
        bandwidth: as in `kde_log_prob`.
        target: StandardNormal, GaussianMixture, a torch Distribution over vectors, or an object with the methods of
            `kdejsd.targets.Law`; None for the standard normal. Where its density is 0, "js" is log 2 and "kl" infinity.
        target_samples: [k, l], samples of the target; only for "js" with reduction="mean".
        log_weights: [..., m], as in `kde_log_prob`.
        exclude_self: as in `kde_log_prob`; leaves a code's own lagged copy out.
        own: [..., n, l] in the codes' dtype, a center of its own for each code; None for no such centers. It counts in
            that code's density alone, as one more lagged code: each then has weight 1/(m + 1), or 1/m for a code that
            leaves one out. For codes z + h noise, own=z.detach() makes them samples of their p_e, the law of eq. 3's
            mean. Without the detach it gets a gradient too. It cannot be combined with target_samples, which have no
            own center, nor with log_weights or a bandwidth per center. NaN gives NaN at that code.
        divergence: "js" or "kl".
        reduction: "mean", "sum", or "none" for the terms [..., n].

    Returns:
        float64 for float64 codes, float32 otherwise. The gap log p_t - log p_e and all that follows is in float64.

    Raises:
        ValueError: if the divergence or the reduction is unknown, shapes do not match, `own` comes with an argument
            that excludes it, and as in `kde_log_prob`.
        TypeError, RuntimeError: as in `kde_log_prob`.

    Example:
        >>> import kdejsd, torch
        >>> codes, lagged = torch.randn(2, 1000, 8, generator=torch.Generator().manual_seed(0)) / 2  # too narrow
        >>> loss = kdejsd.jsd_loss(codes.requires_grad_(), lagged, bandwidth=0.7)
        >>> loss.backward()
        >>> round(loss.item(), 2), (codes * codes.grad).sum() < 0  # a step along -grad widens the codes
        (0.33, tensor(True))
    """
    if divergence not in _NAMES:  # asked here too, as each call of a function is felt in a small loss
        check_divergence(divergence)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if target_samples is not None and (divergence, reduction) != ("js", "mean"):
        raise ValueError(
            "target_samples needs divergence='js' and reduction='mean', "
            f"got divergence={divergence!r} and reduction={reduction!r}"
        )
    if target_samples is not None and own is not None:
        raise ValueError("target_samples must be None where own is given, got both")
    kde = (lagged, bandwidth, log_weights, exclude_self)
    narrow = target_samples is None
    loss = _at_codes(("codes", "lagged"), codes, *kde, target, divergence, reduction, own, narrow)
    if target_samples is not None:
        loss = loss + _at_target("lagged", target_samples, lagged, bandwidth, log_weights, target).mean()
    return loss.float() if loss.dtype == torch.float64 and codes.dtype != torch.float64 else loss


def matched_loss(
    latent_dim: int,
    num_centers: int,
    bandwidth: float,
    *,
    target: Target | None = None,
    smoothed: bool = False,
    kernel_noise: bool = False,
    divergence: Literal["js", "kl"] = "js",
) -> float:
    """Computes the mean of `jsd_loss` for codes that follow the target, which the loss of matched codes is near.

    It is not 0. The density of m lagged codes is not the law that they come from, for three reasons. It is wider by the
    kernel, which a smoothed target is too. Between the codes it has gaps, in which a code finds a density that is far
    too low and a term that is far below 0: the loss has no lower bound. And with the kernel's noise a code has a center
    of its own, near which the density is too high. Subtract this number from a loss to see how far the codes are from
    the target: the difference is near 0 where they follow it, and positive where they are bunched. The mean over all
    sets of samples is an integral over three numbers for isotropic normals. For other targets, and for bandwidths far
    from the target's scale, it is estimated with 20 000 codes and ten sets of lagged ones, by a fixed seed.

    Args:
        latent_dim: l.
        num_centers: m, the number of lagged codes. None of them are of the codes' own examples.
        bandwidth: h.
        target: the law that both codes and lagged codes follow, as in `jsd_loss`.
        smoothed: whether the loss compares with `target.smoothed(h)`, as `LaggedKDE` does by default.
        kernel_noise: whether the codes get the kernel's noise and a center of their own, as in `LaggedKDE.loss`.
        divergence: "js" or "kl".

    Returns:
        The mean, in nats.

    Raises:
        ValueError: if a number is out of range, the target has another dimension or cannot be smoothed, or the
            divergence is unknown.
        TypeError: if a number is none, or `target` is no target.

    Example:
        >>> import kdejsd, torch
        >>> expected = kdejsd.matched_loss(latent_dim=8, num_centers=1000, bandwidth=0.6)
        >>> codes, lagged = torch.randn(2, 1000, 8, generator=torch.Generator().manual_seed(0))
        >>> loss = kdejsd.jsd_loss(codes, lagged, bandwidth=0.6)
        >>> print(f"{loss:.2f} where {expected:.2f} is expected")
        -0.24 where -0.25 is expected
    """
    latent_dim, num_centers = integer("latent_dim", latent_dim, 1), integer("num_centers", num_centers, 1)
    if num_centers > _MOST_CENTERS:
        raise ValueError(f"num_centers must be at most {_MOST_CENTERS}, got {num_centers}")
    bandwidth = positive("bandwidth", bandwidth)
    check_divergence(divergence)
    law = checked_target(target, latent_dim)
    compared: Law = checked_smoothable(law).smoothed(bandwidth) if smoothed else law
    variance = isotropic_variance(law)
    if variance is not None:
        square = bandwidth**2 / variance  # in units of the target's scale
        with contextlib.suppress(OverflowError):  # it would take longer than samples do
            means = log_ratio_means(
                latent_dim,
                num_centers,
                math.sqrt(square),
                variance=1 + square if smoothed else 1.0,
                query_scale=math.sqrt(1 + square) if kernel_noise else 1.0,
                own=kernel_noise,
            )
            return DIVERGENCES[divergence].mean(means)
    rng = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(_SETS):
        lagged, codes = law.sample(num_centers, rng), law.sample(_CODES, rng)
        noise = bandwidth * torch.randn(codes.shape, generator=rng, dtype=codes.dtype) if kernel_noise else 0.0
        own = codes if kernel_noise else None
        terms = jsd_loss(codes + noise, lagged, bandwidth, target=compared, own=own, divergence=divergence)
        total += float(terms) / _SETS
    return total


def jsd(
    samples: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    target_samples: Tensor,
    *,
    target: Target | None = None,
) -> Tensor:
    """Estimates the Jensen-Shannon divergence of the KDE of `centers` from the target, in nats (GENs eq. 2).

        log 2 + (mean over samples of log p_e/(p_e + p_t) + mean over target_samples of log p_t/(p_e + p_t)) / 2

    It lies between 0 and log 2 when the samples follow p_e; an estimate from samples can fall a little below 0. Its
    square root is a metric. Divide by log 2 for bits.

    Args:
        samples: [..., n, l], from the law that the KDE estimates, none of them among the centers.
        centers: [..., m, l].
        bandwidth: as in `kde_log_prob`.
        target_samples: [..., k, l], samples of the target.
        target: as in `jsd_loss`.

    Leading dimensions broadcast.

    Returns:
        [...], 0-dim where no argument has leading dimensions; differentiable in all tensor arguments.

    Raises:
        ValueError, TypeError, RuntimeError: as in `jsd_loss`.

    Example:
        >>> import kdejsd, torch
        >>> codes, noise, target_samples = torch.randn(3, 1000, 2, generator=torch.Generator().manual_seed(0))
        >>> for shift in (0, 1, 3):
        ...     centers = codes + shift
        ...     print(f"{shift}: {kdejsd.jsd(centers + 0.3 * noise, centers, 0.3, target_samples):.2f}")
        0: 0.01
        1: 0.21
        3: 0.64
    """
    names = ("samples", "centers")
    at_samples = _at_codes(names, samples, centers, bandwidth, None, False, target, "js", "none")
    at_target = _at_target("centers", target_samples, centers, bandwidth, None, target)
    broadcast_batch({"samples": at_samples.shape[:-1], "target_samples": at_target.shape[:-1]})
    divergence = 0.5 * (at_samples.mean(-1) + at_target.mean(-1))
    return divergence if samples.dtype == torch.float64 else divergence.float()


@torch.no_grad()
def codes_jsd(codes: Tensor, bandwidth: float, law: Target, rng: torch.Generator) -> Tensor:
    """Measures how well codes follow a law: the Jensen-Shannon divergence of their KDE from it, in nats (GENs eq. 2).

    The samples of the KDE are the codes with the kernel's noise, so the value lies between 0 and log 2 but for the
    noise of n samples. For codes that do follow the law it is small, not 0, because n is finite. Compare it with the
    value for n samples of the law before it was smoothed.

    Args:
        codes: [n, l].
        bandwidth: h, the kernel's bandwidth.
        law: the target, or the target smoothed by the kernel.
        rng: draws the samples; on the device of the codes.

    Returns:
        The estimate, 0-dim.
    """
    noise = torch.randn(codes.shape, generator=rng, device=codes.device, dtype=codes.dtype)
    law_samples = as_law(law).sample(len(codes), rng).to(codes)
    return jsd(codes + bandwidth * noise, codes, bandwidth, law_samples, target=law)


def target_jsd(codes: Tensor, target: Target, rng: torch.Generator, bandwidth: float | None = None) -> Tensor:
    """Measures by `codes_jsd` how well codes follow the target, with a kernel that depends on the target alone.

    A bandwidth of None is the optimal one for as many samples of the target (`optimal_bandwidth`). The codes are
    compared with the target smoothed by the kernel, or with the target itself where it has no `smoothed`.
    """
    if bandwidth is None:
        count, dim = codes.shape
        bandwidth = optimal_bandwidth(dim, count, target=target).value
    return codes_jsd(codes, bandwidth, smoothed_where_possible(as_law(target), bandwidth), rng)


def _at_codes(
    names: tuple[str, str],
    codes: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    log_weights: Tensor | None,
    exclude_self: bool | Tensor,
    target: Target | None,
    divergence: str,
    reduction: str,
    own: Tensor | None = None,
    narrow: bool = False,
) -> Tensor:
    """Returns log 2 + log p_e / (p_e + p_t), or log p_e - log p_t, of the codes, in float64.

    With `narrow`, for a caller that adds nothing to it, it may be in the dtype of `kde_log_prob` already.
    """
    kde = (names, codes, centers, bandwidth, log_weights, exclude_self)
    variance = isotropic_variance(target)
    if variance is not None:
        fused = normal_divergence_terms(*kde, variance, DIVERGENCES[divergence], reduction, own, narrow)
        if fused is not None:
            _checked_law(target, names[0], codes)
            return fused
    return divergence_terms(named_log_prob(*kde, own), codes, target, divergence, reduction, names[0])


def divergence_terms(
    log_prob: Tensor, codes: Tensor, target: Target | None, divergence: str, reduction: str, name: str = "codes"
) -> Tensor:
    """Returns the terms of `jsd_loss` at codes [..., n, l] from log p_e there, [..., n], in float64."""
    gap = _log_target(target, name, codes) - wide(log_prob)
    return reduced(DIVERGENCES[divergence].terms(gap), reduction)


def _at_target(
    name: str,
    target_samples: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    log_weights: Tensor | None,
    target: Target | None,
) -> Tensor:
    """Returns log 2 + log p_t / (p_e + p_t) at samples of the target, [..., k], in float64."""
    log_prob = named_log_prob(("target_samples", name), target_samples, centers, bandwidth, log_weights)
    return _js_terms(wide(log_prob) - _log_target(target, "target_samples", target_samples))


def _checked_law(target: Target | None, name: str, z: Tensor) -> Law | None:
    law = None if target is None else as_law(target)
    if law is not None and law.dim != z.shape[-1]:
        raise ValueError(f"target must have the {z.shape[-1]} dimensions of {name}, got {law.dim}")
    return law


def _log_target(target: Target | None, name: str, z: Tensor) -> Tensor:
    """Returns log p_t in float64."""
    law = _checked_law(target, name, z)
    return normal_log_prob(wide(z), 1.0) if law is None else law_log_prob(law, z)
