"""Bounds the mean class radius by the collision probability of the classes, and the other way round.

Let p_i be the probabilities of the classes under z ~ N(0, I), and r(z) the distance of z to the nearest point of
another class. Then E r <= sum_i F(p_i) (`class_radius_bound`). With psi(p) = F(p)/p, the sum is sum_i p_i psi(p_i): a
mean of psi, and the mean of psi's arguments is the collision probability v = |p|^2. This gives bounds in terms of v, or
of the collision entropy log 1/v.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._numbers import RealNumber, positive, real
from .._tensors import check_tensor, compute_dtype
from ..ops.radius import class_radius_bound
from ..reference.radius import excess
from .class_entropy import collision_probability

# psi is concave up to 0.2731, and the masses are at most sqrt(v). Up to here psi lies under its tangent at v on all of
# [0, sqrt(v)], and psi(v) is the bound; a little further, psi(v) alone is no bound (0.3816 and 3 times 0.2061).
_CONCAVE_TO = 0.19885433806054141
_PSI_THERE = 0.55729318316533512
_MOST = 0.2  # of a class's probability, as Theorem 3.1 assumes; the collision probability is then at most this too
_ROUNDING = 1e-6  # relative, above a limit
_LEAST_PRINTED = 1e-150  # the printed bound at an entropy of 2e305
_NEWTON_STEPS = 12
_BISECTIONS = 60


def collision_radius_bound(p: Tensor, *, form: str = "sharp", lipschitz: float | Tensor = 1.0) -> Tensor:
    """Returns an upper bound of the mean class radius that needs only the collision probability v = sum_i p_i^2.

    Use `class_radius_bound` if you know the probability of every class; it is at least as tight. This bound relates two
    single numbers, and `max_collision_entropy` is its inverse.

    Args:
        p: [..., K], the probabilities of the classes under N(0, I); v = 1 (one class) gives inf.
        form: "sharp" holds for every p. For v <= 0.1989 it is psi(v) = F(v)/v, with F as in `class_radius_bound`, and
            classes of equal probability reach it. For larger v, where that would not hold, it is the least concave
            function over psi on [0, sqrt(v)], at v. "printed" is Theorem 3.1 of the paper, log(4 pi H) / sqrt(2 H) with
            H = log 1/v. It is an error where a class has more than 1/5, because the theorem assumes that none has. (A
            distribution then has five classes at least.) Classes of probability 0 do not count. The printed bound is 3
            times as large as the sharp one for five equal classes, and 5.45 times for a billion. It waits for the
            device, to look at p.
        lipschitz: a Lipschitz constant L of the map from the latent space to the data. L times the bound then bounds
            the radius of the classes in data space.

    Returns:
        [...], differentiable, float64 for float64 input and float32 otherwise.

    Raises:
        TypeError, ValueError: as in `collision_probability`; if the form is unknown, or lipschitz is no number or not
            positive and finite; if the form is "printed" and a class has a probability above 1/5 (a row with NaN gives
            NaN).

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), Theorem 3.1, for the
    printed form; the sharp one is ours.

    Example:
        >>> import kdejsd, torch
        >>> p = torch.tensor([0.4, 0.3, 0.2, 0.1])
        >>> kdejsd.collision_radius_bound(p), kdejsd.class_radius_bound(p)  # the second knows every mass
        (tensor(0.6406), tensor(0.6344))
    """
    _check_form(form)
    v = collision_probability(p)
    wide = v.double()
    if form == "printed":
        _check_assumption(p)
        wide = wide - (wide.detach() - _MOST).clamp_min(0)  # what rounding adds
    bound = _sharp(wide) if form == "sharp" else _printed(wide)
    return (bound * _lipschitz(lipschitz)).to(v.dtype)


def uniform_radius_bound(num_classes: float | Tensor, *, lipschitz: float | Tensor = 1.0) -> Tensor:
    """Returns the largest mean class radius that K classes of equal probability can have, K F(1/K).

    F is as in `class_radius_bound`. Two half-spaces reach the bound. Classes of unequal probability can have a larger
    radius. (Theorem 3.2 of the paper prints log(4 pi log K) / sqrt(2 log K) instead, which needs K >= 5. That is
    `collision_radius_bound` of K equal classes in the printed form.)

    Args:
        num_classes: K >= 1, a number or a tensor of any shape; it need not be whole (it may be exp of an entropy).
        lipschitz: as in `collision_radius_bound`.

    Returns:
        In the shape of num_classes: float32 for a float32 or half tensor, float64 otherwise. K = 1 gives inf, a tensor
        entry below 1 NaN.

    Raises:
        ValueError: if a number is below 1, or lipschitz is not positive and finite.
        TypeError: if an argument is no number.

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), Lemmas B.1 and B.4, at
    p_i = 1/K.

    Example:
        >>> import kdejsd, torch
        >>> kdejsd.uniform_radius_bound(torch.tensor([2, 10, 100]))
        tensor([0.7979, 0.4734, 0.3389], dtype=torch.float64)
    """
    num_classes = _number_or_tensor("num_classes", num_classes)
    if not isinstance(num_classes, Tensor) and not num_classes >= 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    count, dtype = _as_double("num_classes", num_classes)
    return (_psi(1 / count) * _lipschitz(lipschitz)).to(dtype)


def max_collision_entropy(radius: float | Tensor, *, form: str = "sharp", lipschitz: float | Tensor = 1.0) -> Tensor:
    """Returns the largest collision entropy that classes with this mean radius can have, in nats.

    It is the inverse of `collision_radius_bound`. Use it to turn a measured class radius into a limit on the diversity:
    the exponential of the result is a number of equally probable classes.

    Args:
        radius: mean class radius, positive, a number or a tensor of any shape. In latent space with the sharp form,
            0.4037 gives log 25: no more than 25 classes of equal probability.
        form: as in `collision_radius_bound`. If no class has more than 1/5, the collision probability has not either.
            So the printed bound is inverted for H >= log 5, where it falls as H rises: for radii up to 1.67598. A
            larger radius shows that some class has more than 1/5. A smaller one does not show that none has, and the
            result holds only then. At the radius of 25 equal classes the printed form allows e^184 classes.
        lipschitz: L, if `radius` was measured in data space: the radius in latent space is then at least radius / L.

    The sharp form waits for the device: beyond a certain radius another inverse is needed, which takes longer.

    Returns:
        Nats, in the shape of radius: float32 for a float32 or half tensor, float64 otherwise. It is differentiable, for
        radii beyond 0.5573 only once. A radius of 0 gives inf. A tensor entry that is negative, NaN or above 1.67598 in
        the printed form gives NaN.

    Raises:
        ValueError: if the form is unknown, a number is negative or above 1.67598 in the printed form, or lipschitz is
            not positive and finite.
        TypeError: if a tensor is complex, or an argument is no number.

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), section 3, for the
    printed form; the sharp one is ours.

    Example:
        >>> import kdejsd, math
        >>> print(f"{math.exp(kdejsd.max_collision_entropy(0.4037)):.1f} equal classes at most")
        25.0 equal classes at most
    """
    _check_form(form)
    most = float(_printed(torch.tensor(_MOST, dtype=torch.float64)))
    radius, lipschitz = _number_or_tensor("radius", radius), _lipschitz(lipschitz)
    if not isinstance(radius, Tensor):
        if not radius >= 0:
            raise ValueError(f"radius must be at least 0, got {radius}")
        if form == "printed" and not isinstance(lipschitz, Tensor) and radius / lipschitz > most * (1 + _ROUNDING):
            raise ValueError(
                f"radius must be at most {most * lipschitz:.6g} with form='printed', the bound for five equal classes: "
                f"beyond it some class has more than the 1/5 that Theorem 3.1 assumes; got {radius}"
            )
    value, dtype = _as_double("radius", radius)
    latent = value / lipschitz
    if form == "printed":
        overflows = (latent.detach() >= 0) & (latent.detach() < _LEAST_PRINTED)
        inner = latent.masked_fill(overflows, 1.0).masked_fill(latent.detach() > most * (1 + _ROUNDING), math.nan)
        return _inverse_printed(inner).masked_fill(overflows, math.inf).to(dtype)
    near = latent.detach() <= _PSI_THERE
    entropy = _inverse_psi(latent.masked_fill(~near, 0.5 * _PSI_THERE))
    if not bool(near.all()):
        entropy = torch.where(near, entropy, _inverse_majorant(latent.masked_fill(near, 1.0)))
    return entropy.masked_fill(latent.detach() == 0, math.inf).to(dtype)


def _check_form(form: str) -> None:
    if form not in ("sharp", "printed"):
        raise ValueError(f"form must be 'sharp' or 'printed', got {form!r}")


def _check_assumption(p: Tensor) -> None:
    """Refuses probabilities that Theorem 3.1 says nothing of."""
    greatest = p.detach().amax(-1)
    above = greatest > _MOST * (1 + max(_ROUNDING, 4 * torch.finfo(p.dtype).eps))
    if bool(above.any()):
        row = above.nonzero()[0].tolist()
        raise ValueError(
            "p must be at most 1/5 for every class with form='printed', as Theorem 3.1 assumes, got "
            f"{float(greatest[tuple(row)]):.9g}{f' in row {row}' if row else ''}; form='sharp' holds for every p"
        )


def _number_or_tensor(name: str, value: RealNumber | Tensor) -> float | Tensor:
    return check_tensor(name, value) if isinstance(value, Tensor) else real(name, value)


def _lipschitz(value: RealNumber | Tensor) -> float | Tensor:
    return check_tensor("lipschitz", value) if isinstance(value, Tensor) else positive("lipschitz", value)


def _as_double(name: str, value: float | Tensor) -> tuple[Tensor, torch.dtype]:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64), torch.float64
    if not value.is_floating_point():
        return value.double(), torch.float64
    return value.double(), compute_dtype(name, value)


# ----------------------------------------------------------------------------------------------------------------------
# Sharp


def _psi(p: Tensor) -> Tensor:
    return class_radius_bound(p.unsqueeze(-1)) / p


def _sharp(v: Tensor) -> Tensor:
    concave, one = v.detach() <= _CONCAVE_TO, v.detach() == 1
    above = _majorant(-v.masked_fill(concave | one, 0.5).log()).masked_fill(one, math.inf)
    return torch.where(concave, _psi(v.masked_fill(~concave, 0.1)), above)


def _majorant(entropy: Tensor) -> Tensor:
    """Returns the least concave function over psi on [0, w], w = sqrt(v), at v = exp(-entropy) > _CONCAVE_TO.

    It is the chord from the point a at which psi's tangent passes through (w, psi(w)), to there. The chord's height at
    v is greatest for that a, so that a first derivative needs none of a; for the second one the last of Newton's steps
    is left to autograd.
    """
    w, v = (-0.5 * entropy).exp(), (-entropy).exp()
    top = class_radius_bound(log_p=-0.5 * entropy.unsqueeze(-1)) / w
    a, end, goal = torch.full_like(w, 0.1), w.detach(), top.detach()
    for step in range(_NEWTON_STEPS):
        if step == _NEWTON_STEPS - 1:
            end, goal = w, top
        height, slope, bend = _psi_and_derivatives(a)
        # In log a, which keeps a positive. The gap falls with a.
        gap = height + slope * (end - a) - goal
        a = (a * (-gap / (bend * (end - a) * a)).clamp(-1, 1).exp()).clamp_max(_CONCAVE_TO)
    height = _psi_and_derivatives(a)[0]
    return height + (top - height) * (v - a) / (w - a)


def _psi_and_derivatives(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns psi and two derivatives for p that are not small, from those of F: p/phi(z) and F/phi(z)^2."""
    z = torch.special.ndtri(p)
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    psi = z + density / p
    slope = (p / density - psi) / p
    return psi, slope, (psi / density.square() * p - 2 * slope) / p


def _inverse_psi(radius: Tensor) -> Tensor:
    """Returns the entropy at which psi(exp(-entropy)) is the radius, for radii from 0 to 0.6.

    With x = -Phi^-1(v) psi is the hazard rate's excess at x, and log v = log phi(x) - log hazard(x). Newton's method
    for 1/excess = 1/radius; two steps are left to autograd.
    """
    constant = radius.detach()
    x = (1 - 2 * constant.square()) / constant
    for step in range(_NEWTON_STEPS + 2):
        target = constant if step < _NEWTON_STEPS else radius
        over = excess(x)
        # The derivative of 1/excess is 1 - 2/x^2 + 18/x^4 - ..., and loses digits as it is written first.
        slope = torch.where(x < 1e3, (1 - (x + over) * over) / over.square(), 1 - 2 / x.square())
        x = x + (1 / target - 1 / over) / slope
    return 0.5 * x.square() + 0.5 * math.log(2 * math.pi) + (x + excess(x)).log()


def _inverse_majorant(radius: Tensor) -> Tensor:
    """Returns the entropy at which the majorant is the radius, for radii above psi's where the majorant begins."""
    with torch.no_grad():
        low, high = torch.full_like(radius, math.log(1e-300)), torch.full_like(radius, math.log(-math.log(_CONCAVE_TO)))
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            above = _majorant(middle.exp()) > radius
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        entropy = (0.5 * (low + high)).exp()
    if not radius.requires_grad:
        return entropy.masked_fill(radius.isnan(), math.nan)
    with torch.enable_grad():
        entropy.requires_grad_()
        bound = _majorant(entropy)
        (slope,) = torch.autograd.grad(bound.sum(), entropy)
    return entropy.detach() + (radius - bound.detach()) / slope


# ----------------------------------------------------------------------------------------------------------------------
# Theorem 3.1 as printed: log(4 pi H) / sqrt(2 H)


def _printed(v: Tensor) -> Tensor:
    entropy = -v.log()
    return (4 * math.pi * entropy).log() / (2 * entropy).sqrt()


def _inverse_printed(radius: Tensor) -> Tensor:
    """Solves sqrt(2 pi) y exp(-y/2) = radius for y = log(4 pi H), where it falls: for y >= 2.

    Newton's method in log radius, which is concave in y, comes down on the root from the right; two steps are left to
    autograd.
    """
    logarithm = (radius / math.sqrt(2 * math.pi)).log()
    constant = logarithm.detach()
    y = 2.0 + (-4 * (constant - math.log(2) + 1)).clamp_min(0) + 2 * (1 - math.log(2) + constant).abs().sqrt()
    for step in range(_NEWTON_STEPS + 2):
        target = constant if step < _NEWTON_STEPS else logarithm
        y = y - (y.log() - 0.5 * y - target) / (1 / y - 0.5)
    return y.exp() / (4 * math.pi)
