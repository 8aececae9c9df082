"""Implements the radius op in plain PyTorch, in float64; the kernels are tested against it.

With z = Phi^-1(p) the class radius bound of one class is F(p) = p z + phi(z). In that form it loses every digit as p
goes to 0. For p <= 1/2 we write F = p G, with G = phi/Q - x, x = -z: the hazard rate of the normal distribution minus
x. G is a function of log p without cancellation. For p > 1/2, F(p) = z + F(1 - p).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEWTON_STEPS = 4
_FRACTION_FROM = 2.5  # where the continued fraction takes over from the scaled complementary error function
_FRACTION_TERMS = 60


def class_radius_bound(
    p: Tensor | None = None, *, log_p: Tensor | None = None, log: bool = False, check: bool = False
) -> Tensor:
    """Computes `kdejsd.class_radius_bound` in float64 for every dtype, under the same contract except for the checks.

    Derivatives up to the third are right.

    Example:
        >>> import kdejsd, torch
        >>> kdejsd.reference.class_radius_bound(torch.tensor([0.5, 0.5], dtype=torch.float64))  # sqrt(2 / pi)
        tensor(0.7979, dtype=torch.float64)
    """
    masses = log_p if p is None else p
    assert masses is not None
    wide = masses.double()
    # At a mass of 0 the value and its gradient are 0, and log p has neither.
    empty = wide == (0 if log_p is None else -math.inf)
    inside = wide.masked_fill(empty, 0.5 if log_p is None else -1.0)
    log_mass = inside.log() if log_p is None else inside
    over_mass = _over_mass(log_mass)
    if log:
        total = (log_mass + over_mass.log()).masked_fill(empty, -math.inf).logsumexp(-1)
    else:
        mass = inside if log_p is None else inside.exp()
        total = (mass * over_mass).masked_fill(empty, 0).sum(-1)
    return total if masses.dtype == torch.float64 else total.float()


def _over_mass(log_p: Tensor) -> Tensor:
    """Returns F(p) / p; it is infinite at log p = 0 and NaN above."""
    end, lower = log_p == 0, log_p <= -math.log(2)
    upper = log_p.masked_fill(end | lower, -0.5)  # where the other half of the masses stays finite
    p, rest = upper.exp(), -upper.expm1()
    x = _quantile(-torch.where(lower, log_p, rest.log()))
    over = excess(x)
    over_mass = torch.where(lower, over, (x + rest * over) / p)
    at_end = -(1 - log_p.masked_fill(~end, -1.0).exp()).log()  # inf there, and so is its derivative
    return torch.where(end, at_end, over_mass)


def _quantile(surprise: Tensor) -> Tensor:
    """Returns the x >= 0 at which the upper tail Q(x) is exp(-surprise), at most 1/2.

    log Q is concave and Q(x) <= exp(-x^2/2)/2, so Newton's method comes down on the root from the start below. Each
    step doubles the number of right derivatives, as it doubles that of right digits: two are left to autograd.
    """
    constant = surprise.detach()
    x = (2 * (constant - math.log(2))).clamp_min(0).sqrt()
    for step in range(_NEWTON_STEPS + 2):
        target = constant if step < _NEWTON_STEPS else surprise
        hazard = _hazard(x)  # log Q = log phi - log hazard
        x = x + (target - 0.5 * x.square() - 0.5 * math.log(2 * math.pi) - hazard.log()) / hazard
    return x


def excess(x: Tensor) -> Tensor:
    """Returns phi/Q - x = 1/(x + 2/(x + 3/(x + ...))) for x >= 0, where Q is the normal distribution's upper tail."""
    is_near = x < _FRACTION_FROM  # not by clamp, whose gradient on its bound is not the same in all versions of torch
    near, far = x.masked_fill(~is_near, _FRACTION_FROM), x.masked_fill(is_near, _FRACTION_FROM)
    fraction = 0.5 * ((far.square() + 4 * _FRACTION_TERMS).sqrt() - far)  # where numerators that stay the same lead
    for k in range(_FRACTION_TERMS, 0, -1):
        fraction = k / (far + fraction)
    return torch.where(is_near, _hazard(near) - near, fraction)


def _hazard(x: Tensor) -> Tensor:
    hazard: Tensor = math.sqrt(2 / math.pi) / torch.special.erfcx(x / math.sqrt(2))
    return hazard
