"""Chooses bandwidths: one at which a KDE matches its target, and one of greatest leave-one-out likelihood."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._normal_kde import log_ratio_means
from ._numbers import integer
from ._version import __version__
from .ops.kde import kde_log_prob
from .targets import (
    Law,
    SmoothableLaw,
    Target,
    checked_smoothable,
    checked_target,
    finite_moments,
    isotropic_variance,
    law_log_prob,
)

_log = logging.getLogger("kdejsd")

_WORTH_KEEPING = 1.0  # seconds of search from which on its result is kept on disk
_TRIALS = 10  # where none are given
_MANY = 10**7  # centers, from which on the normal's bandwidths are extrapolated
_SETTLED = 1.01  # times the target's scale: as far as codes may settle from it
_STEP = 1e-3  # of that scale, for the loss's slope
_WIDEST = 10.0  # of the bandwidths with which codes may settle, in units of the spread; beyond, the slope is all noise


@dataclass(frozen=True)
class OptimalBandwidth:
    """Holds the result of `optimal_bandwidth`: the bandwidth, and the trials that it comes from, if there were any.

    Attributes:
        value: the bandwidth to use, a float. With trials it is their mean.
        std: the standard deviation of the trials' bandwidths (n - 1 in the denominator); NaN for a single trial, 0
            without trials.
        trials: the bandwidth of every trial, in order; empty where no samples were needed.

    Example:
        >>> from kdejsd.bandwidth import OptimalBandwidth
        >>> found = OptimalBandwidth(value=0.75, std=0.04, trials=(0.71, 0.75, 0.79, 0.75))
        >>> found.standard_error
        0.02
    """

    value: float
    std: float
    trials: tuple[float, ...]

    @property
    def standard_error(self) -> float:
        """Returns the standard error of `value`, which is std / sqrt(number of trials), and 0 without trials."""
        return self.std / math.sqrt(max(1, len(self.trials)))


def optimal_bandwidth(
    latent_dim: int,
    num_centers: int,
    *,
    target: Target | None = None,
    smoothed: bool = False,
    method: Literal["root", "fixed-point"] = "root",
    trials: int | None = None,
    seed: int = 0,
) -> OptimalBandwidth:
    """Finds the bandwidth at which a KDE of m samples of the target resembles the target most.

    Use it for `jsd_loss` and `jsd`. It depends on the target, l and m only, not on your codes. (`LaggedKDE` calls it by
    itself.)

    For isotropic normals no samples are needed: it takes about a second, whatever m is. The result maximises the mean
    of J (below) over all sets of samples, which is an integral over three numbers. Beyond ten million centers it is
    extrapolated. For other targets, and with thousands of dimensions, the bandwidth is searched by trials; `trials`
    asks for this in any case.

    Each trial draws three independent sets of m samples of the target: the centers of the KDE p_e, and queries z' and
    z''. Its bandwidth maximises

        J(h) = mean over z' of log r + mean over z'' of log(1 - r),    r = p_e / (p_e + p_t),

    which is at most -2 log 2, its value where p_e = p_t. The maximum is the root of

        h dJ/dh = E'[(1 - r') (S' - l)] - E''[r'' (S'' - l)],    S = sum_i pi_i |z' - z_i|^2 / h^2,

    with pi_i the share of center i in p_e. The root is found in log h, inside a bracket that starts at a rule of thumb
    and widens until it holds the root.

    `smoothed=True` answers another question. If the loss compares the KDE with the target smoothed by the same kernel,
    every bandwidth has p_e = p_t as its optimum, but only in the limit of many centers. Few centers leave gaps between
    them, and the loss pushes codes outward into these gaps. It does so more strongly for smaller bandwidths and more
    dimensions. The result is then the smallest bandwidth, not below the one without `smoothed`, that keeps codes within
    1 % of the target's scale. To find it, take codes z = mu + sigma (x - mu) among m lagged codes of the same kind,
    where x are samples of the target and mu is their mean. The result is the bandwidth at which the derivative of
    `jsd_loss` for sigma is 0 at sigma = 1.01, averaged over the trials (or over all sets of samples of an isotropic
    normal). This rule is ours. The paper compares with the target itself; from about 64 dimensions on, codes then
    collapse at any bandwidth.

    A trial evaluates h dJ/dh 6 to 8 times, and about 10 times more with `smoothed`. An evaluation is one pass of
    `kde_log_prob` over 2 m queries (m with `smoothed`) and m centers. A trial takes about 3 s on two cores for m = 20
    000 and l = 40, and milliseconds for m = 1000. In memory are the 3 m samples of a trial, with `smoothed` those of
    all trials. The logger "kdejsd" reports the progress, at most once a second.

    Results are kept for the life of the process. Results that took more than a second are also kept on disk, in
    `kdejsd/bandwidths` of $XDG_CACHE_HOME or ~/.cache. They are found again by a digest of the samples and of their
    densities, so a target whose parameters have changed is computed anew.

    Args:
        latent_dim: l, the number of dimensions of the codes.
        num_centers: m, the number of centers of the KDE.
        target: a `StandardNormal`, `GaussianMixture`, any `torch.distributions.Distribution` over vectors of length l
            with its parameters on the CPU, or an object with the methods of `kdejsd.targets.Law`; None for the standard
            normal.
        smoothed: whether the loss compares the KDE with `target.smoothed(h)`, as `LaggedKDE` does when the codes get no
            kernel noise.
        method: "root" for a bracketed root, or "fixed-point" for the iteration of the supplement's equation 3, which
            has the same solution. The iteration converges from about l = 10 on. Where it cycles or leaves its bracket,
            the root is searched instead.
        trials: the number of independent trials. None needs no trial for an isotropic normal, and makes 10 for other
            targets and for "fixed-point".
        seed: any integer from 0 on. The samples of a trial depend on the seed and on the trial's number alone. The
            global random state is neither used nor changed.

    Returns:
        The bandwidth, in the units of the codes, with the trials' values and their spread.

    Raises:
        ValueError: if a number is out of range, the target has another dimension, or the method is unknown; if the
            target's density is not finite at its own samples, or these coincide so that no bandwidth is best; if
            `smoothed` comes with the method "fixed-point", with a target that has no `smoothed(h)`, or with so few
            centers that no bandwidth keeps codes at the target's scale.
        TypeError: if a number is no integer, or `target` is no target.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, equation 2
    and Table 1; supplement, equations 2 and 3.

    Example:
        >>> import kdejsd
        >>> print(f"{kdejsd.optimal_bandwidth(latent_dim=8, num_centers=10_000).value:.4f}")
        0.5347
        >>> found = kdejsd.optimal_bandwidth(latent_dim=8, num_centers=100, trials=20)
        >>> print(f"{found.value:.2f} +- {found.standard_error:.2f}")
        0.81 +- 0.01
    """
    latent_dim = integer("latent_dim", latent_dim, 1)
    num_centers = integer("num_centers", num_centers, 1)
    trials = None if trials is None else integer("trials", trials, 1)
    seed = integer("seed", seed, 0)
    if method not in ("root", "fixed-point"):
        raise ValueError(f'method must be "root" or "fixed-point", got {method!r}')
    law = checked_target(target, latent_dim)
    if smoothed and method != "root":
        raise ValueError(f'smoothed=True needs method="root", got {method!r}')
    smoothable = checked_smoothable(law) if smoothed else None
    variance = isotropic_variance(law)
    if trials is None and method == "root" and variance is not None:
        with contextlib.suppress(OverflowError):  # it would take longer than samples do
            return OptimalBandwidth(math.sqrt(variance) * _for_normal(latent_dim, num_centers, smoothed), 0.0, ())
    trials = _TRIALS if trials is None else trials

    # A caller's no_grad or inference_mode would take away the gradient for h.
    with torch.inference_mode(False), torch.enable_grad():
        draws: Iterable[_Trial] = (_draw(law, num_centers, seed, trial) for trial in range(trials))
        if smoothable is not None:
            draws = drawn = list(draws)
        values: tuple[float, ...] = ()
        told = -math.inf
        for number, trial in enumerate(draws, 1):
            if time.monotonic() - told > 1:
                told = time.monotonic()
                _log.info(
                    "bandwidth of %d centers in %d dimensions: trial %d of %d", num_centers, latent_dim, number, trials
                )
            values += _remembered(method, [trial], partial(_best, trial, method))
        if smoothable is not None:
            _log.info("bandwidth for the smoothed target: all %d trials together", trials)
            values = _remembered("smoothed", drawn, partial(_settled, drawn, smoothable, values))
    std = float(np.std(values, ddof=1)) if trials > 1 else math.nan
    return OptimalBandwidth(float(np.mean(values)), std, values)


def entropy_bandwidth(codes: Tensor) -> float:
    """Finds the bandwidth that maximises the leave-one-out log-likelihood of the codes.

    Use it to estimate the density of codes as they are, whatever their distribution. (`optimal_bandwidth` is for codes
    that follow a known target.) Each code is scored by the KDE of all other codes.

    The maximum is the root of E[S_i] - l, with S_i = sum_j pi_ij |z_i - z_j|^2 / h^2 over the other codes j and pi_ij
    the share of code j in the density at code i. It is also the fixed point of the paper's EM step. The search takes
    about 6 passes of `kde_log_prob` over n queries and n centers; EM takes up to hundreds.

    Args:
        codes: [n, l] floating point, n at least 2, on any device.

    Returns:
        The bandwidth, a float, in the units of the codes. It takes no part in autograd.

    Raises:
        TypeError: if the codes are not a floating-point tensor.
        ValueError: if the codes have another shape, are fewer than 2 or not finite; or if each has an exact duplicate:
            the likelihood then grows without bound as the bandwidth goes to 0.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283,
    supplement, equations 4 and 5.

    Example:
        >>> import kdejsd, torch
        >>> codes = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
        >>> round(kdejsd.entropy_bandwidth(codes), 2), round(kdejsd.entropy_bandwidth(10 * codes), 1)
        (0.65, 6.5)
    """
    check_codes(codes)
    return named_entropy_bandwidth("codes", codes)


def named_entropy_bandwidth(name: str, codes: Tensor, log_weights: Tensor | None = None) -> float:
    """Computes `entropy_bandwidth` for callers whose codes, already checked, have another name, and may have weights.

    With log-weights [n] it maximises the weighted mean of the log-likelihoods of each code among the weighted others.
    """
    with torch.inference_mode(False), torch.enable_grad():
        codes = codes.detach().clone()
        if codes.dtype in (torch.float16, torch.bfloat16):
            codes = codes.float()
        if bool((torch.unique(codes, dim=0, return_counts=True)[1] > 1).all()):
            raise ValueError(
                f"{name} must not all have an exact duplicate: the leave-one-out likelihood then grows without bound "
                f"as the bandwidth goes to 0; got {len(codes)}, each with a duplicate"
            )
        # In units of their spread neither tiny nor huge codes leave the range of their dtype.
        centered = codes.double() - codes.double().mean(0)
        largest = centered.abs().max()
        scale = float(largest * (centered / largest).square().mean().sqrt())
        codes = centered.div(scale).to(codes.dtype)
        shares = None if log_weights is None else log_weights.softmax(0)

        def slope(h: float) -> float:
            bandwidth = torch.tensor(h, dtype=codes.dtype, device=codes.device, requires_grad=True)
            log_likelihoods = kde_log_prob(codes, codes, bandwidth, log_weights=log_weights, exclude_self=True)
            log_likelihood = log_likelihoods.mean() if shares is None else shares @ log_likelihoods
            return h * float(torch.autograd.grad(log_likelihood, bandwidth)[0])

        return scale * _root(slope, _first_guess(*codes.shape))


def check_codes(codes: Tensor) -> None:
    """Refuses anything but at least two finite codes [n, l] in floating point."""
    check_codes_kind(codes)
    check_finite_codes(codes)


def check_codes_kind(codes: Tensor) -> None:
    """Makes those checks of `check_codes` that do not look at the values."""
    if not isinstance(codes, Tensor) or not codes.is_floating_point():
        kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"codes must be a floating-point tensor, got {kind}")
    if codes.ndim != 2 or codes.shape[0] < 2 or codes.shape[1] < 1:
        raise ValueError(f"codes must have shape [n, l] with n at least 2 and l at least 1, got {list(codes.shape)}")


def check_finite_codes(codes: Tensor) -> None:
    """Makes the check of `check_codes` that looks at the values."""
    if not bool(codes.isfinite().all()):
        raise ValueError("codes must be finite, got NaN or infinity among them")


@dataclass(frozen=True)
class _Trial:
    """Holds the samples of a trial: centers [m, l], and queries [2 m, l] with the target's log-density there [2 m]."""

    centers: Tensor
    query: Tensor
    log_target: Tensor

    @property
    def digest(self) -> bytes:
        digest = hashlib.sha256(str(tuple(self.centers.shape)).encode())
        for data in (self.centers, self.query, self.log_target):
            digest.update(data.contiguous().view(torch.uint8).numpy().data)
        return digest.digest()


def _draw(law: Law, num_centers: int, seed: int, trial: int) -> _Trial:
    state = np.random.SeedSequence((seed, trial)).generate_state(1, np.uint64)
    rng = torch.Generator("cpu").manual_seed(int(state[0]))
    centers, *queries = (law.sample(num_centers, rng) for _ in range(3))
    query = torch.cat(queries)
    log_target = law.log_prob(query).detach().double()
    if not bool(log_target.isfinite().all()):
        raise ValueError("target must have a finite log_prob at its own samples, got NaN or infinity")
    return _Trial(centers, query, log_target)


_found: dict[str, tuple[float, ...]] = {}


def _remembered(question: str, trials: list[_Trial], answer: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Returns an answer that depends on the trials' samples and the target's density there, computed only once."""
    key = hashlib.sha256(f"{__version__} {question}".encode())
    for trial in trials:
        key.update(trial.digest)
    name = key.hexdigest()
    if name not in _found:
        kept = _read(name, len(trials))
        if kept is None:
            began = time.monotonic()
            kept = answer()
            if time.monotonic() - began > _WORTH_KEEPING:
                _keep(name, kept)
        _found[name] = kept
    return _found[name]


def _file(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kdejsd" / "bandwidths" / f"{name}.json"


def _read(name: str, count: int) -> tuple[float, ...] | None:
    """Returns the bandwidths that were kept on disk, or None where there are not so many positive numbers."""
    try:
        values = json.loads(_file(name).read_text())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: there is no home
        return None
    usable = isinstance(values, list) and all(type(value) is float and 0 < value < math.inf for value in values)
    return tuple(values) if usable and len(values) == count else None


def _keep(name: str, values: tuple[float, ...]) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # what cannot be kept is computed again
        file = _file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(values))
        os.replace(part, file)


def _settled(trials: list[_Trial], law: SmoothableLaw, best: tuple[float, ...]) -> tuple[float, ...]:
    """Finds the smallest bandwidth, from the mean of `best` on, with which codes settle at the target's scale.

    It is the mean of the values returned, one for each trial.
    """
    mean, variance = finite_moments(law, "the bandwidth with which codes settle")
    scale = float(variance.mean().sqrt())
    shape = variance.sqrt() / scale

    def standardised(samples: Tensor) -> Tensor:
        # In units of the target's spread, and without the chance by which m samples are wider or narrower than the
        # target: at low m and l it is more than the 1 % in question.
        samples = samples.double()
        return (shape * (samples - samples.mean(0)) / samples.std(0)).float()

    sets = [(standardised(trial.centers), standardised(trial.query[: len(trial.centers)])) for trial in trials]

    def slopes(h: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Returns the derivatives for the scale, one for each trial, negative where the codes are pushed outwards."""
        found = []
        for centers, query in sets:
            codes = (_SETTLED * query).requires_grad_()
            log_density = kde_log_prob(codes, _SETTLED * centers, h).double()
            log_law = law_log_prob(law.smoothed(h * scale), mean + scale * codes.double())
            log_law = log_law + codes.shape[1] * math.log(scale)
            (gradient,) = torch.autograd.grad(-softplus(log_law - log_density).mean(), codes)
            found.append(float((gradient * query).sum()))
        return np.array(found)

    start = float(np.mean(best)) / scale
    if slopes(start).mean() >= 0:
        return best
    # The root of a single trial may lie far away, where its slope is all but level. Each trial's value is therefore its
    # root if its slope ran parallel to the mean of all, in log h; scaled to have the root of the mean as their mean.
    try:
        root = _root(lambda h: -float(slopes(h).mean()), start, 1e-3, _WIDEST)
    except ValueError as error:
        count, dim = trials[0].centers.shape
        raise _too_few_centers(dim, count) from error
    rise = float((slopes(1.05 * root) - slopes(root / 1.05)).mean()) / (2 * math.log(1.05))
    values = np.exp(-slopes(root) / rise)
    return tuple((scale * root * values / values.mean()).tolist())


@cache
def _for_normal(dim: int, count: int, smoothed: bool) -> float:
    """Computes the bandwidth for the standard normal from averages over all sets of samples.

    Raises:
        OverflowError: in the cases of `log_ratio_means`.
        ValueError: if there are too few centers for a smoothed target.
    """
    if count > _MANY:  # the objective is too flat for more; its logarithm goes on as it went over the last decade
        last, before = (_for_normal(dim, many, smoothed) for many in (_MANY, _MANY // 10))
        return last * float((last / before) ** math.log10(count / _MANY))
    from scipy.optimize import minimize_scalar

    def minus_j(log_h: float) -> float:
        means = log_ratio_means(dim, count, math.exp(log_h))
        return means.log_x - 2 * means.log_r  # log r + log(1 - r) = 2 log r - log X

    guess = math.log(_first_guess(count, dim))
    found = minimize_scalar(minus_j, bounds=(guess - 0.5, guess + 0.5), method="bounded", options={"xatol": 1e-6})
    best = math.exp(float(found.x))
    if not smoothed:
        return best

    def slope(h: float) -> float:
        """Returns the derivative of the loss for the codes' scale, negative where they are pushed outwards."""
        below, above = (
            log_ratio_means(dim, count, h, variance=1 + h * h, query_scale=scale, center_scale=_SETTLED).log_r
            for scale in (_SETTLED - _STEP, _SETTLED + _STEP)
        )
        return (above - below) / (2 * _STEP)

    if slope(best) >= 0:
        return best
    try:
        return _root(lambda h: -slope(h), best, 1e-4, _WIDEST)
    except (ValueError, OverflowError) as error:  # the wider, the more points a grid has
        raise _too_few_centers(dim, count) from error


def _too_few_centers(dim: int, count: int) -> ValueError:
    return ValueError(
        f"there must be more centers for a smoothed target of {dim} dimensions, got {count}: with these no bandwidth "
        f"up to {_WIDEST:g} times the target's spread keeps codes at its scale"
    )


def _spread(samples: Tensor) -> float:
    """Returns the standard deviation of the samples over all dimensions, and refuses 0."""
    scale = float(samples.double().std(0).square().mean().sqrt())
    if scale == 0:
        raise ValueError("target must have samples that differ, got the same one each time")
    return scale


def _best(trial: _Trial, method: str) -> tuple[float]:
    """Finds the bandwidth that maximises J for the trial's centers; the trial's query is z' followed by z''."""
    count, dim = trial.centers.shape
    centers, query = trial.centers.double(), trial.query.double()
    scale = _spread(query)
    # In units of the samples' spread the search needs no more than float32: it moves the result by less than 1e-6.
    middle = query.mean(0)
    centers, query = ((samples - middle).div(scale).float() for samples in (centers, query))
    log_target = trial.log_target + dim * math.log(scale)

    @cache
    def evaluate(h: float) -> tuple[float, float]:
        """Returns h dJ/dh and l (E'[1 - r'] - E''[r''])."""
        bandwidth = torch.tensor(h, dtype=centers.dtype, device=centers.device, requires_grad=True)
        log_density = kde_log_prob(query, centers, bandwidth)
        log_ratio = log_density.detach().double() - log_target
        weight = torch.cat((torch.sigmoid(-log_ratio[:count]), -torch.sigmoid(log_ratio[count:]))) / count
        (gradient,) = torch.autograd.grad(log_density, bandwidth, weight.to(log_density.dtype))
        return h * float(gradient), dim * float(weight.sum())

    start = _first_guess(count, dim)
    found = _fixed_point(evaluate, start) if method == "fixed-point" else None
    return (scale * (found or _root(lambda h: evaluate(h)[0], start)),)


def _first_guess(count: int, dim: int) -> float:
    """Returns Silverman's bandwidth for normal samples of unit variance, times about what ours are of it."""
    return 1.25 * float((4 / ((dim + 2) * count)) ** (1 / (dim + 4)))


def _root(slope: Callable[[float], float], start: float, tolerance: float = 1e-6, most: float = 1e10) -> float:
    """Finds the h at which a slope changes from positive to negative, to this share of its value.

    Raises:
        ValueError: if there is none from 1 / most to most.
    """
    from scipy.optimize import brentq  # its import takes longer than that of kdejsd

    @cache
    def at(log_h: float) -> float:
        return slope(math.exp(log_h))

    near = math.log(start)
    below = at(near) > 0
    step = 0.1 if below else -0.1
    while (at(near + step) > 0) == below:
        near, step = near + step, 2 * step
        if abs(near) > math.log(most):
            raise ValueError(
                f"samples must have a best bandwidth, found none from {1 / most:g} to {most:g} times their spread"
            )
    return math.exp(brentq(at, near, near + step, xtol=tolerance))


def _fixed_point(evaluate: Callable[[float], tuple[float, float]], start: float) -> float | None:
    """Iterates h to the fixed point of the supplement's equation 3, and returns None where that fails.

    The step is h^2 <- (E'[(1 - r') D'] - E''[r'' D'']) / (l (E'[1 - r'] - E''[r''])) with D = h^2 S. The signs of the
    slope met so far bracket the root. A step out of the bracket, which a cycle takes, ends the attempt.
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
