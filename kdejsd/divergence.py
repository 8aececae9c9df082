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
_MOST_CENTERS = 10**9  # with more, the integral has no digits left, and samples do not fit in memory
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
    """Returns the latent loss of a GEN: how far the distribution of the codes is from the target, in nats.

    Add it to the reconstruction error of an autoencoder to train the codes to follow the target p_t. The loss compares
    p_t with p_e, the kernel density estimate (KDE) of the lagged codes. These are codes of m training examples that
    were stored a few steps ago. (`LaggedKDE` stores them and calls this function; `jsd` measures the divergence
    instead.) "js" is

        log 2 + mean over codes of log p_e / (p_e + p_t)

    which is 0 where p_e = p_t, and at most log 2. "kl" is the mean of log p_e - log p_t.

    A KDE of m codes never equals the target exactly. The loss of codes that do follow the target is therefore mostly
    below 0: -0.19 for l = 8 and m = 2000 at the optimal bandwidth. `matched_loss` computes this value.

    Two properties of "js" matter in training:

    * Its gradient carries the factor 1 - r = p_t / (p_e + p_t). Codes that crowd together where p_e is much larger than
      p_t hardly move. (For l = 8, the gradient for a crowd of standard deviation 0.1 at distance 10 is 7e-23.)
      Normalise the codes, or use "kl", whose gradient has no such factor.
    * With a bandwidth below the target's scale, the loss has no lower bound. It pushes a code outward that is far from
      every lagged code, more strongly the fewer lagged codes there are.

    If the loss compares with the standard normal itself, codes settle at the variance 1 - h^2 (section 4 of the paper).
    If it compares with `target.smoothed(bandwidth)`, codes that follow the target are a fixed point for every
    bandwidth. Codes that also get the kernel's noise (see `own`) are samples of p_e, as the mean in equation 3 assumes;
    the loss is then at least 0 on average. `LaggedKDE.loss` can do both.

    Args:
        codes: [..., n, l], the codes z', which get the gradient; n at least 1 for reduction="mean".
        lagged: [..., m, l], the lagged codes. Detach them, or they get a gradient too.
        bandwidth: h, the kernel's standard deviation, as in `kde_log_prob`.
        target: StandardNormal, GaussianMixture, a torch Distribution over vectors, or an object with the methods of
            `kdejsd.targets.Law`; None for the standard normal. Where its density is 0, "js" is log 2 and "kl" infinity.
        target_samples: [k, l], samples of the target, for both terms of the divergence; None for the term at the codes
            alone. With samples, log 2 + mean of log p_t / (p_e + p_t) over them is added, so the sum is twice the
            Jensen-Shannon divergence (equation 2). Only for "js" with reduction="mean".
        log_weights: [..., m], as in `kde_log_prob`.
        exclude_self: leaves a code's own lagged copy out of its density, as in `kde_log_prob`.
        own: [..., n, l] in the codes' dtype, one extra center for each code; None for no such centers. It counts in the
            density of that code alone, as one more lagged code: each center then has weight 1/(m + 1), or 1/m for a
            code that leaves one out. For codes z + h noise, pass own=z.detach(): they are then samples of their p_e.
            Without the detach, `own` gets a gradient too. It cannot be combined with target_samples, log_weights or a
            bandwidth per center. NaN gives NaN at that code.
        divergence: "js" or "kl".
        reduction: "mean", "sum", or "none" for the terms [..., n].

    Returns:
        float64 for float64 codes, float32 otherwise; 0-dim unless reduction="none". Everything after log p_e is
        computed in float64.

    Raises:
        ValueError: if the divergence or the reduction is unknown, shapes do not match, `own` comes with an argument
            that excludes it, and as in `kde_log_prob`.
        TypeError, RuntimeError: as in `kde_log_prob`.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, equation 3
    ("js", with its constant).

    Example:
        >>> import kdejsd, torch
        >>> codes, lagged = torch.randn(2, 1000, 8, generator=torch.Generator().manual_seed(0)) / 2  # too narrow
        >>> loss = kdejsd.jsd_loss(codes.requires_grad_(), lagged, bandwidth=0.7)
        >>> loss.backward()
        >>> round(loss.item(), 2), (codes * codes.grad).sum() < 0  # a step along -grad widens the codes
        (0.33, tensor(True))
    """
    if divergence not in _NAMES:  # asked here too: a function call would slow down a small loss
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
    """Computes the mean of `jsd_loss` for codes that follow the target: the value that a good loss comes near.

    Subtract it from a loss to see how far the codes are from the target. The difference is near 0 where the codes
    follow the target, and positive where they crowd together.

    The value itself is not 0, because the density of m lagged codes differs from the distribution that they come from:

    * The kernel makes the density wider. (A smoothed target is wider by as much.)
    * The density has gaps between the lagged codes. A code in a gap meets a density that is far too low, and its term
      is far below 0, without bound.
    * With the kernel's noise, each code has a center of its own, near which the density is too high.

    For isotropic normals the mean over all sets of samples is an integral over three numbers. For other targets, and
    for bandwidths far from the target's scale, it is estimated from ten sets of lagged codes with 2000 codes each, by a
    fixed seed.

    Args:
        latent_dim: l, the dimension of the codes.
        num_centers: m, the number of lagged codes. None of them belong to the codes' own examples.
        bandwidth: h, the kernel's standard deviation.
        target: the distribution that both codes and lagged codes follow, as in `jsd_loss`.
        smoothed: whether the loss compares with `target.smoothed(h)`, as `LaggedKDE` does by default.
        kernel_noise: whether the codes get the kernel's noise and a center of their own, as in `LaggedKDE.loss`.
        divergence: "js" or "kl".

    Returns:
        The mean, in nats.

    Raises:
        ValueError: if a number is out of range, the target has another dimension or cannot be smoothed, or the
            divergence is unknown.
        TypeError: if an argument is not a number where one is needed, or `target` is no target.

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
        with contextlib.suppress(OverflowError):  # the integral would take longer than samples
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
    """Estimates the Jensen-Shannon divergence between a kernel density estimate and the target, in nats.

    Use it to measure how well codes follow a target; `jsd_loss` is the loss to train with. With p_e the KDE of
    `centers` and p_t the target, the estimate is

        log 2 + (mean over samples of log p_e/(p_e + p_t) + mean over target_samples of log p_t/(p_e + p_t)) / 2

    If the samples follow p_e, the divergence lies between 0 and log 2. An estimate from samples can fall a little below
    0. Its square root is a metric. Divide by log 2 for bits. Leading dimensions broadcast.

    Args:
        samples: [..., n, l], samples of the distribution that the KDE estimates, none of them among the centers.
        centers: [..., m, l], the KDE's centers.
        bandwidth: h, the kernel's standard deviation, as in `kde_log_prob`.
        target_samples: [..., k, l], samples of the target.
        target: p_t, as in `jsd_loss`; None for the standard normal.

    Returns:
        [...], 0-dim where no argument has leading dimensions; differentiable in all tensor arguments. It is float64 for
        float64 samples, float32 otherwise.

    Raises:
        ValueError, TypeError, RuntimeError: as in `jsd_loss`.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, equation
    2.

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
    """Measures how well codes follow a distribution: the Jensen-Shannon divergence of their KDE from it, in nats.

    The codes plus the kernel's noise are samples of the KDE. The value therefore lies between 0 and log 2, apart from
    the noise of n samples. Codes that do follow the distribution give a small value, not 0, because n is finite.
    Compare it with the value for n samples of the distribution before it was smoothed.

    Args:
        codes: [n, l].
        bandwidth: h, the kernel's standard deviation.
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

    If the bandwidth is None, it is the optimal one for n samples of the target (`optimal_bandwidth`), n being the
    number of codes. The codes are compared with the target smoothed by the kernel, or with the target itself where it
    has no `smoothed`.
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
