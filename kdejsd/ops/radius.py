"""Bounds the mean class radius by the classes' probabilities, with the gradient in the same pass: the radius op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _tensors, _torch
from .._native import native
from ..reference import radius as reference
from . import _common


def class_radius_bound(
    p: Tensor | None = None, *, log_p: Tensor | None = None, log: bool = False, check: bool = False
) -> Tensor:
    """Returns the largest mean class radius that classes with these probabilities can have.

    A classifier divides the latent space into classes. The class radius is the mean distance of a sample z ~ N(0, I) to
    the nearest point of another class. Compare an estimate (`class_radius`) with this bound: a smaller radius goes with
    more diversity. For classes of probabilities p_i under N(0, I), in any dimension, the bound is

        sum_i F(p_i),    F(p) = p Phi^-1(p) + phi(Phi^-1(p)),    dF/dp = p / phi(Phi^-1(p)).

    It follows from the Gaussian isoperimetric inequality: of all sets of a given probability, half-spaces have the
    greatest distance. Two half-spaces of probability 1/2 reach the bound, 0.797884560803. F is convex, with F(0) = 0
    and F(1) = inf.

    Args:
        p: [..., K], the probabilities, each in [0, 1], K at least 1. The last dimension is summed. They need not sum to
            1, so the shape [..., 1] gives single values of F.
        log_p: [..., K], their logarithms, instead of p: for probabilities too near 0 for any float, or as log_softmax
            gives them.
        log: return the logarithm of the sum, which exists where the sum itself underflows: F(e^-1000) = e^-1003.799....
            It is computed in plain PyTorch, in memory for a few copies of the input.
        check: raise an error where an entry is no probability or a row does not sum to 1. This waits for the device.
            Nothing is checked while torch.compile traces.

    float32 and float64 are computed as such, to 4 units in the last place; float16 and bfloat16 are computed in
    float32. Second derivatives, function transforms and forward-mode AD run the plain reference.

    Returns:
        [...], float64 for float64 input and float32 otherwise. A probability of 0 contributes 0 to the value and has
        gradient 0; a probability of 1 gives inf. An entry that is NaN or no probability gives NaN, or with the
        environment variable KDEJSD_CHECK=1 an error.

    Raises:
        ValueError: if both or neither of p and log_p are given, there is no class, or `check` finds a fault.
        TypeError: if an argument has another type, or the dtype is unsupported.
        RuntimeError: if CUDA is needed but cannot be used, or there is no compiled module.

    Source: Fawzi, Fawzi, Fawzi, "Adversarial vulnerability for any classifier", https://arxiv.org/abs/1802.08686; Naren
    Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), Lemmas B.1 and B.4.

    Example:
        >>> import kdejsd, torch
        >>> kdejsd.class_radius_bound(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
        tensor([0.7979, 1.3762])
        >>> kdejsd.class_radius_bound(torch.full((100,), 0.01))  # more classes are nearer to each other
        tensor(0.3389)
    """
    if (p is None) == (log_p is None):
        raise ValueError(f"either p or log_p must be given, got {'neither' if p is None else 'both'}")
    name = "p" if log_p is None else "log_p"
    masses = _tensors.check_tensor(name, p if log_p is None else log_p)
    dtype = _tensors.compute_dtype(name, masses)
    if masses.ndim == 0 or masses.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., classes] with at least one class, got {list(masses.shape)}")
    if _tensors.checks_values() or (check and not torch.compiler.is_compiling()):
        _check_values(name, masses.detach(), sums=check)
    masses = masses.to(dtype)
    is_log = log_p is not None
    road = _common.road((masses,))
    if log or road == "reference":
        return _reference(masses, is_log, log)
    if road == "operator":
        return _operator(masses, is_log)[0]  # type: ignore[no-any-return]
    if _common.needs_grad((masses,)):
        return _EagerRadius.apply(masses, is_log)  # type: ignore[no-untyped-call, no-any-return]
    return _launch(masses, is_log)[0]


def _reference(masses: Tensor, is_log: bool, log: bool = False) -> Tensor:
    if is_log:
        return reference.class_radius_bound(log_p=masses, log=log)
    return reference.class_radius_bound(masses, log=log)


def _check_values(name: str, masses: Tensor, sums: bool) -> None:
    """Raises an error for values that only the data can show to be wrong."""
    wide = masses.double()
    p = wide if name == "p" else wide.exp()
    bad = ~((p >= 0) & (p <= 1)) if name == "p" else ~(wide <= 0)
    if count := int(bad.sum()):
        limits = "in [0, 1]" if name == "p" else "at most 0"
        raise ValueError(f"{name} must be {limits}, got {count} values that are not, the first {float(wide[bad][0])}")
    if not sums:
        return
    tolerance = max(1e-6, 16 * torch.finfo(masses.dtype).eps)  # what rounding a softmax leaves, in the dtype it came in
    total = p.sum(-1).reshape(-1)
    off = (total - 1).abs() > tolerance
    if bool(off.any()):
        row = int(off.nonzero()[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(row), masses.shape[:-1])] if masses.ndim > 1 else []
        raise ValueError(f"{name} must sum to 1 over its last dimension, got {float(total[row]):.9g} in row {index}")


# ----------------------------------------------------------------------------------------------------------------------
# The raw call, and autograd


def _launch(masses: Tensor, is_log: bool, want_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the bounds [...], and their gradient [..., K], empty if not wanted."""
    _common.check_cuda("log_p" if is_log else "p", masses)
    masses = masses.contiguous()
    value = masses.new_empty(masses.shape[:-1])
    gradient = torch.empty_like(masses) if want_gradient else masses.new_empty(0)
    if value.numel() == 0:
        return value, gradient
    classes = masses.shape[-1]
    args = native().Radius(
        dtype=_common.KERNEL_DTYPE[masses.dtype],
        is_log=is_log,
        rows=masses.numel() // classes,
        classes=classes,
        masses=masses.data_ptr(),
        value=value.data_ptr(),
        dmasses=gradient.data_ptr(),
    )
    _common.launch(native(), "radius", masses.device, args)
    return value, gradient


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    masses: Tensor
    gradient: Tensor
    masses, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: a derivative that can be differentiated again, by the reference
        return torch.autograd.grad(_reference(masses, ctx.is_log), masses, grad, create_graph=True)[0]
    return grad.unsqueeze(-1) * gradient


class _EagerRadius(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, masses: Tensor, is_log: bool) -> Tensor:
        value, gradient = _launch(masses, is_log, True)
        ctx.save_for_backward(masses, gradient)
        ctx.is_log = is_log
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad), None


def _fake(masses: Tensor, is_log: bool, want_gradient: bool = False) -> tuple[Tensor, Tensor]:
    return masses.new_empty(masses.shape[:-1]), masses.new_empty(masses.shape if want_gradient else 0)


class _TracedRadius(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, masses: Tensor, is_log: bool, *_: bool) -> tuple[Tensor, Tensor]:
        with _torch.below_autograd():
            value, gradient = _operator(masses, is_log, True)
        ctx.save_for_backward(masses, gradient)
        ctx.is_log = is_log
        ctx.mark_non_differentiable(gradient)
        return value, gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad), None, None


_operator = _common.operator("radius", _launch, _fake, _TracedRadius, of="class_radius_bound")
