"""Bandwidths from data: the one that matches a KDE to its target, and the one of greatest leave-one-out likelihood."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .ops.kde import kde_log_prob
from .targets import checked_target, sample_target


@dataclass(frozen=True)
class OptimalBandwidth:
    """What `optimal_bandwidth` found, one bandwidth per trial.

    Attributes:
        value: mean of the trials' bandwidths; the one to use.
        std: their standard deviation (n - 1 in the denominator); NaN for a single trial.
        trials: every trial's bandwidth, in order.
    """

    value: float
    std: float
    trials: tuple[float, ...]

    @property
    def standard_error(self) -> float:
        """Standard error of `value`: std / sqrt(number of trials)."""
        return self.std / math.sqrt(len(self.trials))


def optimal_bandwidth(
    latent_dim: int,
    num_centers: int,
    *,
    target: Any = None,
    method: Literal["root", "fixed-point"] = "root",
    trials: int = 10,
    seed: int = 0,
) -> OptimalBandwidth:
    """The bandwidth with which m samples of the target, as the centers of a KDE, look most like the target.

    Each trial draws three independent sets of m samples from the target: centers z, and z', z'' at which
    J(h) = E' log r + E'' log(1 - r), r = p_e / (p_e + p_t), is evaluated. J is at most -2 log 2, where p_e = p_t, and
    the trial's bandwidth maximises it: it is the root of

        h dJ/dh = E'[(1 - r') (S' - l)] - E''[r'' (S'' - l)],    S = sum_i pi_i |z' - z_i|^2 / h^2,

    found in log h inside a bracket that starts at a rule of thumb and widens until it holds the root.
    Source: "GENs: Generative Encoding Networks" (Saha, Elhabian, Whitaker), equation 2 and Table 1;
    supplement, equations 2 and 3.

    Cost: 6 to 8 evaluations of h dJ/dh per trial, each one pass of `kde_log_prob` over 2 m queries and m centers with
    its gradient for h: about 3 s per trial on two cores for m = 20 000 and l = 40, milliseconds for m = 1000. Beyond
    that pass only the 3 m samples are held. Results are kept in memory for the life of the process, under a digest of
    the samples and of their densities: asking again costs no more than drawing the samples, and a target whose
    parameters have changed is computed anew.

    Args:
        latent_dim: l, the number of dimensions of the codes.
        num_centers: m, the number of centers of the KDE.
        target: None for the standard normal, a `StandardNormal`, `GaussianMixture` or any
            `torch.distributions.Distribution` over vectors of length l, with its parameters on the CPU.
        method: "root" for a bracketed root; "fixed-point" for the iteration of the supplement's equation 3, which has
            the same solution: it converges for l of about 10 and more, and where it cycles or leaves its bracket
            the root is searched instead.
        trials: number of independent trials. The draws of one trial depend on the seed and on its number alone.
        seed: any integer from 0 on. The global random state is neither used nor changed.

    Returns:
        Mean, spread and values of the trials, in the units of the codes.

    Raises:
        ValueError: a number out of range, a target of another dimension, an unknown method, a target whose density is
            not finite at its own samples, or whose samples coincide so that no bandwidth is best.
        TypeError: a number that is no integer, or something that is no target.
    """
    for name, number, least in (
        ("latent_dim", latent_dim, 1),
        ("num_centers", num_centers, 1),
        ("trials", trials, 1),
        ("seed", seed, 0),
    ):
        try:
            too_small = operator.index(number) < least
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {number!r}") from None
        if too_small:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if method not in ("root", "fixed-point"):
        raise ValueError(f'method must be "root" or "fixed-point", got {method!r}')
    target = checked_target(target, latent_dim)

    # A caller's no_grad or inference_mode would take away the gradient for h.
    with torch.inference_mode(False), torch.enable_grad():
        values = tuple(_trial(target, num_centers, method, seed, trial) for trial in range(trials))
    std = float(np.std(values, ddof=1)) if trials > 1 else math.nan
    return OptimalBandwidth(float(np.mean(values)), std, values)


def entropy_bandwidth(codes: Tensor) -> float:
    """The bandwidth that maximises the leave-one-out log-likelihood of the codes.

    It is the root of E[S_i] - l with S_i = sum_j pi_ij |z_i - z_j|^2 / h^2 over the other codes j != i: the fixed point
    of the EM step in "GENs: Generative Encoding Networks", supplement, equations 4 and 5, found in about 6 passes
    of `kde_log_prob` over n queries and n centers instead of up to hundreds.

    Args:
        codes: [n, l] floating point, n at least 2, on any device.

    Returns:
        The bandwidth, in the units of the codes. It takes no part in autograd.

    Raises:
        TypeError: codes that are not a floating-point tensor.
        ValueError: codes of another shape, fewer than 2, not finite, or each with an exact duplicate: the likelihood
            then grows without bound as the bandwidth goes to 0.
    """
    check_codes(codes)
    with torch.inference_mode(False), torch.enable_grad():
        codes = codes.detach().clone()
        if codes.dtype in (torch.float16, torch.bfloat16):
            codes = codes.float()
        if bool((torch.unique(codes, dim=0, return_counts=True)[1] > 1).all()):
            raise ValueError(
                "codes must not all have an exact duplicate: the leave-one-out likelihood then grows without bound as "
                f"the bandwidth goes to 0 ({len(codes)} codes, each with a duplicate)"
            )
        # In units of their spread neither tiny nor huge codes leave the range of their dtype.
        centered = codes.double() - codes.double().mean(0)
        scale = float(centered.square().mean().sqrt())
        codes = centered.div(scale).to(codes.dtype)

        def slope(h: float) -> float:
            bandwidth = torch.tensor(h, dtype=codes.dtype, device=codes.device, requires_grad=True)
            log_likelihood = kde_log_prob(codes, codes, bandwidth, exclude_self=True).mean()
            return h * float(torch.autograd.grad(log_likelihood, bandwidth)[0])

        return scale * _root(slope, _first_guess(*codes.shape))


def check_codes(codes: Tensor) -> None:
    """Refuse what is not at least two finite codes [n, l] in floating point."""
    if not isinstance(codes, Tensor) or not codes.is_floating_point():
        kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"codes must be a floating-point tensor, got {kind}")
    if codes.ndim != 2 or codes.shape[0] < 2 or codes.shape[1] < 1:
        raise ValueError(f"codes must have shape [n, l] with n at least 2 and l at least 1, got {list(codes.shape)}")
    if not bool(codes.isfinite().all()):
        raise ValueError("codes must be finite, got NaN or infinity among them")


_found: dict[tuple[str, bytes], float] = {}


def _trial(target: Any, num_centers: int, method: str, seed: int, trial: int) -> float:
    """The bandwidth of one trial: a pure function of its samples and of the target's density there."""
    state = np.random.SeedSequence((seed, trial)).generate_state(1, np.uint64)
    generator = torch.Generator("cpu").manual_seed(int(state[0]))
    centers, *queries = (sample_target(target, num_centers, generator) for _ in range(3))
    query = torch.cat(queries)
    log_target = target.log_prob(query).detach().double()
    if not bool(log_target.isfinite().all()):
        raise ValueError("target must have a finite log_prob at its own samples, got NaN or infinity")

    digest = hashlib.sha256(str(tuple(centers.shape)).encode())
    for data in (centers, query, log_target):
        digest.update(data.contiguous().view(torch.uint8).numpy().data)
    key = (method, digest.digest())
    if key not in _found:
        _found[key] = _best(centers, query, log_target, method)
    return _found[key]


def _best(centers: Tensor, query: Tensor, log_target: Tensor, method: str) -> float:
    """The bandwidth that maximises J for these centers; query is z' followed by z''."""
    count, dim = centers.shape
    centers, query = centers.double(), query.double()
    scale = float(query.std(0).square().mean().sqrt())
    if scale == 0:
        raise ValueError("target must have samples that differ, got the same one each time")
    # In units of the samples' spread the search needs no more than float32: it moves the result by less than 1e-6.
    middle = query.mean(0)
    centers, query = ((samples - middle).div(scale).float() for samples in (centers, query))
    log_target = log_target + dim * math.log(scale)

    @cache
    def evaluate(h: float) -> tuple[float, float]:
        """h dJ/dh and l (E'[1 - r'] - E''[r''])."""
        bandwidth = torch.tensor(h, dtype=centers.dtype, device=centers.device, requires_grad=True)
        log_density = kde_log_prob(query, centers, bandwidth)
        log_ratio = log_density.detach().double() - log_target
        weight = torch.cat((torch.sigmoid(-log_ratio[:count]), -torch.sigmoid(log_ratio[count:]))) / count
        (gradient,) = torch.autograd.grad(log_density, bandwidth, weight.to(log_density.dtype))
        return h * float(gradient), dim * float(weight.sum())

    start = _first_guess(count, dim)
    found = _fixed_point(evaluate, start) if method == "fixed-point" else None
    return scale * (found or _root(lambda h: evaluate(h)[0], start))


def _first_guess(count: int, dim: int) -> float:
    """Silverman's bandwidth for normal samples of unit variance, times what both bandwidths here are of it, about."""
    return 1.25 * float((4 / ((dim + 2) * count)) ** (1 / (dim + 4)))


def _root(slope: Callable[[float], float], start: float) -> float:
    """The h > 0, to 1e-6 of its value, at which a slope that is positive below and negative above is zero."""
    from scipy.optimize import brentq  # its import takes longer than that of kdejsd

    @cache
    def at(log_h: float) -> float:
        return slope(math.exp(log_h))

    near = math.log(start)
    below = at(near) > 0
    step = 0.1 if below else -0.1
    while (at(near + step) > 0) == below:
        near, step = near + step, 2 * step
        if abs(near) > 25:
            raise ValueError("samples must have a best bandwidth, found none from 1e-10 to 1e10 times their spread")
    return math.exp(brentq(at, near, near + step, xtol=1e-6))


def _fixed_point(evaluate: Callable[[float], tuple[float, float]], start: float) -> float | None:
    """The fixed point of h^2 <- (E'[(1 - r') D'] - E''[r'' D'']) / (l (E'[1 - r'] - E''[r''])), D = h^2 S, or None.

    The signs of the slope met so far bracket the root; a step out of the bracket, as cycling needs, ends the attempt.
    """
    h, lower, upper = start, 0.01, 3.0
    for _ in range(50):
        slope, normaliser = evaluate(h)
        square = 1 + slope / normaliser if normaliser > 0 else 0.0
        following = h * math.sqrt(max(square, 0.0))
        if abs(following - h) < 1e-6 * h:
            return following
        lower, upper = (h, upper) if slope > 0 else (lower, h)
        if not lower < following < upper:
            return None
        h = following
    return None
