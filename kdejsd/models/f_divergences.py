"""Defines the f-divergences that adversarial networks minimise, with everything their variational bounds need.

An f-divergence measures how far the distribution Q of the model is from P, that of the data. For a convex f it is
bounded from below by means over samples:

    D_f(P || Q) = int q f(p / q)  >=  E_P[T] - E_Q[f*(T)],    f*(t) = sup_u (u t - f(u)),

with equality at T = f'(p / q). A network with output v gives T = g_f(v). g_f maps the real line into the domain of f*,
and increases, so that a large v speaks for data with every f. T above the threshold f'(1) says p > q.

    name                f(u)                                D_f(P || Q)
    kl                  u log u                             KL(P || Q)
    reverse-kl          -log u                              KL(Q || P)
    pearson             (u - 1)^2                           int (p - q)^2 / q
    squared-hellinger   (sqrt u - 1)^2                      int (sqrt p - sqrt q)^2
    jensen-shannon      u log u - (u + 1) log((u + 1) / 2)  2 JSD(P, Q)
    gan                 u log u - (u + 1) log(u + 1)        2 JSD(P, Q) - log 4

    name                f*(t)               finite for      g_f(v)                      f'(1)
    kl                  exp(t - 1)          all t           v                           1
    reverse-kl          -1 - log(-t)        t < 0           -exp(-v)                    -1
    pearson             t^2 / 4 + t         all t           v                           0
    squared-hellinger   t / (1 - t)         t < 1           1 - exp(-v)                 0
    jensen-shannon      -log(2 - exp t)     t < log 2       log 2 - log(1 + exp(-v))    0
    gan                 -log(1 - exp t)     t < 0           -log(1 + exp(-v))           -log 2

Divergences with a logarithm are in nats. JSD is the divergence that `kdejsd.jsd` estimates, 0 to log 2;
"jensen-shannon" is twice that. "gan" is the objective of the first GANs. Its f(1), and so its least value, is -log 4
instead of 0; its gradients are those of "jensen-shannon". The conjugate of "pearson" is the supremum over all real u,
as in the paper. Over u >= 0 alone it would be -1 below t = -2. Either gives a bound that is tight at the same T.

Source: Nowozin, Cseke, Tomioka, "f-GAN: Training Generative Neural Samplers using Variational Divergence Minimization",
https://arxiv.org/abs/1606.00709, section 2 and its tables.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._tensors import check_tensor

__all__ = ["NAMES", "FDivergence", "by_name"]

_LOG2 = math.log(2)


class FDivergence(ABC):
    """Describes an f-divergence: f, its conjugate and the bound, one row of the table above; `by_name` returns it.

    It has no state, and any two of the same name are equal. All methods but `bound` work elementwise on tensors of any
    shape, in their dtype, and are differentiable; NaN in gives NaN out.

    Attributes:
        name: the name by which `by_name` finds it.
        domain: the open interval on which f* is finite.
        threshold: f'(1), the value of T where p = q.

    Example:
        >>> import torch
        >>> from kdejsd.models.f_divergences import by_name
        >>> kl = by_name("kl")  # of P = (1/2, 1/2) from Q = (1/4, 3/4), whose optimal outputs are f'(p / q)
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> v = kl.derivative(p / q)
        >>> (q * kl.f(p / q)).sum(), (p * kl.output(v) - q * kl.fake_term(v)).sum()  # the bound is tight
        (tensor(0.1438), tensor(0.1438))
    """

    name: ClassVar[str]
    domain: ClassVar[tuple[float, float]]
    threshold: ClassVar[float]

    @abstractmethod
    def f(self, u: Tensor) -> Tensor:
        """Returns f(u) at u >= 0; below it is NaN, but for Pearson's parabola."""

    @abstractmethod
    def derivative(self, u: Tensor) -> Tensor:
        """Returns f'(u) at u >= 0: the T at which the bound is tight, for u = p / q."""

    def conjugate(self, t: Tensor) -> Tensor:
        """Returns f*(t), which is infinite outside the domain."""
        return self._conjugate(t).masked_fill(t >= self.domain[1], math.inf)

    @abstractmethod
    def _conjugate(self, t: Tensor) -> Tensor:
        """Returns f*(t) within the domain."""

    @abstractmethod
    def output(self, v: Tensor) -> Tensor:
        """Returns T = g_f(v), in the domain (on its edge where rounding leaves no room)."""

    @abstractmethod
    def fake_term(self, v: Tensor) -> Tensor:
        """Returns f*(g_f(v)) in closed form, exact even where g_f(v) overflows or is rounded to the domain's edge."""

    def bound(self, real_outputs: Tensor, fake_outputs: Tensor) -> Tensor:
        """Returns the lower bound of D_f(P || Q): mean g_f(v) over the data - mean f*(g_f(v)) over the model.

        The discriminator raises it, the generator lowers it. On samples that the network was trained on it can exceed
        the divergence.

        Args:
            real_outputs: v of samples of the data P, any shape but empty.
            fake_outputs: v of samples of the model Q, any shape but empty; their number may differ.

        Returns:
            0-dim.

        Raises:
            TypeError: if an argument is no floating-point tensor.
            ValueError: if a tensor is empty.
        """
        for argument, v in (("real_outputs", real_outputs), ("fake_outputs", fake_outputs)):
            if not check_tensor(argument, v).is_floating_point():
                raise TypeError(f"{argument} must be a floating-point tensor, got {v.dtype}")
            if v.numel() == 0:
                raise ValueError(f"{argument} must hold at least one output, got shape {list(v.shape)}")
        return self.output(real_outputs).mean() - self.fake_term(fake_outputs).mean()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"kdejsd.models.f_divergences.by_name({self.name!r})"


class _KL(FDivergence):
    name = "kl"
    domain = (-math.inf, math.inf)
    threshold = 1.0

    def f(self, u: Tensor) -> Tensor:
        return torch.xlogy(u, u)

    def derivative(self, u: Tensor) -> Tensor:
        return 1 + u.log()

    def _conjugate(self, t: Tensor) -> Tensor:
        return (t - 1).exp()

    def output(self, v: Tensor) -> Tensor:
        return v

    def fake_term(self, v: Tensor) -> Tensor:
        return (v - 1).exp()


class _ReverseKL(FDivergence):
    name = "reverse-kl"
    domain = (-math.inf, 0.0)
    threshold = -1.0

    def f(self, u: Tensor) -> Tensor:
        return -u.log()

    def derivative(self, u: Tensor) -> Tensor:
        return -u.reciprocal()

    def _conjugate(self, t: Tensor) -> Tensor:
        return -1 - (-t).log()

    def output(self, v: Tensor) -> Tensor:
        return -(-v).exp()

    def fake_term(self, v: Tensor) -> Tensor:
        return v - 1


class _Pearson(FDivergence):
    name = "pearson"
    domain = (-math.inf, math.inf)
    threshold = 0.0

    def f(self, u: Tensor) -> Tensor:
        return (u - 1).square()

    def derivative(self, u: Tensor) -> Tensor:
        return 2 * (u - 1)

    def _conjugate(self, t: Tensor) -> Tensor:
        return t * (t / 4 + 1)

    def output(self, v: Tensor) -> Tensor:
        return v

    def fake_term(self, v: Tensor) -> Tensor:
        return v * (v / 4 + 1)


class _SquaredHellinger(FDivergence):
    name = "squared-hellinger"
    domain = (-math.inf, 1.0)
    threshold = 0.0

    def f(self, u: Tensor) -> Tensor:
        return (u.sqrt() - 1).square()

    def derivative(self, u: Tensor) -> Tensor:
        return 1 - u.rsqrt()

    def _conjugate(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    def output(self, v: Tensor) -> Tensor:
        return -torch.expm1(-v)

    def fake_term(self, v: Tensor) -> Tensor:
        return torch.expm1(v)


class _JensenShannon(FDivergence):
    name = "jensen-shannon"
    domain = (-math.inf, _LOG2)
    threshold = 0.0

    def f(self, u: Tensor) -> Tensor:
        return _perspective(lambda w: torch.xlogy(w, w) - (1 + w) * ((w - 1) / 2).log1p(), u)

    def derivative(self, u: Tensor) -> Tensor:
        return self.output(u.log())

    def _conjugate(self, t: Tensor) -> Tensor:
        return -(-torch.expm1(t)).log1p()

    def output(self, v: Tensor) -> Tensor:
        return _LOG2 + logsigmoid(v)

    def fake_term(self, v: Tensor) -> Tensor:
        return -logsigmoid(-v) - _LOG2


class _GAN(FDivergence):
    name = "gan"
    domain = (-math.inf, 0.0)
    threshold = -_LOG2

    def f(self, u: Tensor) -> Tensor:
        return _perspective(lambda w: torch.xlogy(w, w) - (1 + w) * w.log1p(), u)

    def derivative(self, u: Tensor) -> Tensor:
        return self.output(u.log())

    def _conjugate(self, t: Tensor) -> Tensor:
        # Near 0 by expm1, further down by log1p; each sees only its own side, for the gradient's sake.
        # (The gradient of clamp on its bound is not the same in all versions of torch.)
        is_near = t > -_LOG2
        near = -(-torch.expm1(t.masked_fill(~is_near, -_LOG2))).log()
        return torch.where(is_near, near, -(-t.masked_fill(is_near, -_LOG2).exp()).log1p())

    def output(self, v: Tensor) -> Tensor:
        return logsigmoid(v)  # softplus, as torch has it, leaves out what is below 2e-9

    def fake_term(self, v: Tensor) -> Tensor:
        return -logsigmoid(-v)


def _perspective(f: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Evaluates an f with f(u) = u f(1/u) at 0 to 1 alone: above, terms of the size of u log u would cancel."""
    small = u < 1
    scale = u.masked_fill(small, 1.0)
    return scale * f(torch.where(small, u, scale.reciprocal()))


_DIVERGENCES: dict[str, FDivergence] = {
    divergence.name: divergence
    for divergence in (_KL(), _ReverseKL(), _Pearson(), _SquaredHellinger(), _JensenShannon(), _GAN())
}
NAMES = tuple(_DIVERGENCES)  # what `by_name` knows


def by_name(name: str) -> FDivergence:
    """Returns the f-divergence of that name, one of `NAMES`.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> import torch
        >>> from kdejsd.models.f_divergences import by_name
        >>> by_name("jensen-shannon").bound(real_outputs=torch.zeros(100), fake_outputs=torch.zeros(100))
        tensor(0.)
    """
    if name not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return _DIVERGENCES[name]
