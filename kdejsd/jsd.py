"""The Jensen-Shannon divergence of a KDE of codes from a known target, and the training loss made of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .bandwidth import optimal_bandwidth
from .ops._common import broadcast_batch
from .ops.kde import Divergence, named_log_prob, normal_divergence_terms, reduced
from .reference.kde import normal_log_prob
from .targets import IsotropicNormal, Law, Target, as_law, law_log_prob, smoothed_where_possible, wide

_LOG2 = math.log(2)


def _js_terms(gap: Tensor) -> Tensor:
    """log 2 + log p_e / (p_e + p_t)."""
    return _LOG2 + logsigmoid(-gap)


# The divergences that the training loss can be, by name: whoever takes a name looks it up here.
DIVERGENCES = {"js": Divergence(_js_terms, "kJensenShannon"), "kl": Divergence(torch.neg, "kLogRatio")}
_NAMES = tuple(DIVERGENCES)


def check_divergence(name: str) -> None:
    """Refuse a name that no divergence has."""
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
    """The latent loss of a generative encoding network: how far the law of the codes is from the target, in nats.

    With p_e the KDE of the lagged codes and p_t the target, "js" is

        log 2 + mean over codes of log p_e / (p_e + p_t)   (GENs eq. 3, with its constant)

    which is 0 where p_e = p_t and at most log 2. With target_samples it is log 2 + log 2 + both means, twice the
    Jensen-Shannon divergence (eq. 2). "kl" is the mean of log p_e - log p_t, whose gradient no factor dampens.

    Two properties of "js" to know. Its gradient carries the factor 1 - r = p_t / (p_e + p_t), so codes bunched where
    p_e >> p_t are not moved (the dead zone: a bunch of deviation 0.1 at distance 10, l = 8, is pulled with 7e-23);
    normalise the codes, or use "kl". And with a bandwidth below the target's scale the loss has no lower bound: a code
    far from every lagged code is pushed outward, the more so the fewer there are. Comparing with
    `target.smoothed(bandwidth)` makes p_e = p_t the fixed point for every bandwidth, where with the target itself codes
    settle at the variance 1 - h^2 (GENs, section 4); adding the kernel's noise to the codes as well makes them samples
    of p_e, the law that eq. 3 averages over, and the loss bounded by what it measures (`LaggedKDE.loss` does both).

    Args:
        codes: [..., n, l], the codes z', that get the gradient; n at least 1 for reduction="mean".
        lagged: [..., m, l], the lagged codes; detach them, or they get their gradient too.
        bandwidth: as in `kde_log_prob`.
        target: StandardNormal, GaussianMixture, a torch Distribution over vectors, or an object with the methods of
            `kdejsd.targets.Law`; None for the standard normal. Where its density is 0, "js" is log 2 and "kl" infinity.
        target_samples: [k, l], samples of the target; only for "js" with reduction="mean".
        log_weights: [..., m], as in `kde_log_prob`.
        exclude_self: as in `kde_log_prob`: leaves a code's own lagged copy out.
        own: [..., n, l] in the codes' dtype, a center of its own for each code, which counts in that code's density
            alone, as one more of the lagged codes: they have weight 1/(m + 1) each, or 1/m for a code that leaves one
            out. For codes z + h noise, own=z.detach() makes them samples of their p_e, the law of eq. 3's mean. Without
            the detach it gets its gradient too. None: no code has one. It does not go with target_samples, which have
            no own center, nor with log_weights or a bandwidth per center. NaN gives NaN at that code.
        divergence: "js" or "kl".
        reduction: "mean", "sum", or "none" for the terms [..., n].

    Returns:
        float64 for float64 codes, float32 otherwise. The gap log p_t - log p_e and what follows is in float64.

    Raises:
        ValueError: an unknown divergence or reduction, shapes that do not match, own with what it does not go with,
            and as in `kde_log_prob`.
        TypeError, RuntimeError: as in `kde_log_prob`.
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


def jsd(
    samples: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    target_samples: Tensor,
    *,
    target: Target | None = None,
) -> Tensor:
    """Jensen-Shannon divergence of the KDE of `centers` from the target, in nats (GENs eq. 2).

        log 2 + (mean over samples of log p_e/(p_e + p_t) + mean over target_samples of log p_t/(p_e + p_t)) / 2

    It lies in 0 to log 2 when the samples follow p_e; an estimate from samples can fall a little below 0. Its square
    root is a metric; divide by log 2 for bits.

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
    """
    names = ("samples", "centers")
    at_samples = _at_codes(names, samples, centers, bandwidth, None, False, target, "js", "none")
    at_target = _at_target("centers", target_samples, centers, bandwidth, None, target)
    broadcast_batch({"samples": at_samples.shape[:-1], "target_samples": at_target.shape[:-1]})
    divergence = 0.5 * (at_samples.mean(-1) + at_target.mean(-1))
    return divergence if samples.dtype == torch.float64 else divergence.float()


@torch.no_grad()
def codes_jsd(codes: Tensor, bandwidth: float, law: Target, generator: torch.Generator) -> Tensor:
    """The Jensen-Shannon divergence in nats (GENs eq. 2) of the kernel density of the codes from a law: a measure of
    how well they follow it.

    Samples of the kernel density are the codes with the kernel's noise, so the value lies between 0 and log 2 but for
    the noise of n samples. For codes that do follow the law it is small, not 0, as n is finite: compare it with the
    value for n samples of the law before it was smoothed.

    Args:
        codes: [n, l].
        bandwidth: h, of the kernel.
        law: the target, or the target smoothed by the kernel.
        generator: draws the samples; on the device of the codes.

    Returns:
        The estimate, 0-dim.
    """
    noise = torch.randn(codes.shape, generator=generator, device=codes.device, dtype=codes.dtype)
    law_samples = as_law(law).sample(len(codes), generator).to(codes)
    return jsd(codes + bandwidth * noise, codes, bandwidth, law_samples, target=law)


def target_jsd(codes: Tensor, target: Target, generator: torch.Generator) -> Tensor:
    """`codes_jsd` by the bandwidth that is optimal for as many samples of the target (`optimal_bandwidth`), from the
    target smoothed by the same kernel (from the target itself where that has no `smoothed`): a measure that depends on
    the codes and the target alone."""
    count, dim = codes.shape
    bandwidth = optimal_bandwidth(dim, count, target=target).value
    return codes_jsd(codes, bandwidth, smoothed_where_possible(as_law(target), bandwidth), generator)


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
    """log 2 + log p_e / (p_e + p_t), or log p_e - log p_t, of the codes; in float64.

    With `narrow`, for a caller that adds nothing to it, it may be in the dtype of `kde_log_prob` already.
    """
    kde = (names, codes, centers, bandwidth, log_weights, exclude_self)
    if target is None or isinstance(target, IsotropicNormal):
        variance = 1.0 if target is None else target.variance
        fused = normal_divergence_terms(*kde, variance, DIVERGENCES[divergence], reduction, own, narrow)
        if fused is not None:
            _checked_law(target, names[0], codes)
            return fused
    return divergence_terms(named_log_prob(*kde, own), codes, target, divergence, reduction, names[0])


def divergence_terms(
    log_prob: Tensor, codes: Tensor, target: Target | None, divergence: str, reduction: str, name: str = "codes"
) -> Tensor:
    """The terms of `jsd_loss` at codes [..., n, l] from log p_e there, [..., n]; in float64."""
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
    """log 2 + log p_t / (p_e + p_t) at samples of the target, [..., k]; in float64."""
    log_prob = named_log_prob(("target_samples", name), target_samples, centers, bandwidth, log_weights)
    return _js_terms(wide(log_prob) - _log_target(target, "target_samples", target_samples))


def _checked_law(target: Target | None, name: str, z: Tensor) -> Law | None:
    law = None if target is None else as_law(target)
    if law is not None and law.dim != z.shape[-1]:
        raise ValueError(f"target must have the {z.shape[-1]} dimensions of {name}, got {law.dim}")
    return law


def _log_target(target: Target | None, name: str, z: Tensor) -> Tensor:
    """log p_t in float64."""
    law = _checked_law(target, name, z)
    return normal_log_prob(wide(z), 1.0) if law is None else law_log_prob(law, z)
