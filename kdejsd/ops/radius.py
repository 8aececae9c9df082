"""The radius op: bounds on the mean class radius from the classes' masses, with their gradients in the same pass."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..reference import radius as reference
from . import _common


def class_radius_bound(
    p: Tensor | None = None, *, log_p: Tensor | None = None, log: bool = False, check: bool = False
) -> Tensor:
    """The greatest mean class radius that classes of these Gaussian measures can have.

    For z ~ N(0, I) in any dimension and classes of masses p_i, the mean distance of z to the nearest point of another
    class is at most

        sum_i F(p_i),    F(p) = p Phi^-1(p) + phi(Phi^-1(p)),    dF/dp = p / phi(Phi^-1(p)),

    by the Gaussian isoperimetric inequality (half-spaces have the greatest distance at any mass; two of them with
    p = 1/2 reach the bound, 0.797884560803). F is convex, F(0) = 0 and F(1) = inf.

    Args:
        p: [..., K], the masses, each in [0, 1], K at least 1. The last dimension is summed; whether it sums to 1 is not
            asked for, so that single values of F can be had from shape [..., 1].
        log_p: [..., K], their logarithms, for masses near 0 that no float holds or as log_softmax gives them; instead
            of p.
        log: return the logarithm of the sum, which exists where the sum itself underflows: F(e^-1000) = e^-1003.799....
            In plain PyTorch, for a few copies of the input.
        check: raise where an entry is no probability or a row does not sum to 1 (this waits for the device; nothing is
            checked while torch.compile traces).

    The dtype is float32 or float64, computed as such to 4 units in the last place; float16 and bfloat16 are computed in
    float32. Second derivatives, function transforms and forward-mode AD run the plain reference.

    Returns:
        [...], float64 for float64 input and float32 otherwise. A mass of 0 contributes 0 to the value and has gradient
        0; a mass of 1 gives inf. An entry that is NaN or no probability gives NaN, or with the environment variable
        KDEJSD_CHECK=1 an error.

    Raises:
        ValueError: both or neither of p and log_p, no class, or what `check` finds.
        TypeError: an argument of another type, an unsupported dtype.
        RuntimeError: a CUDA tensor where CUDA cannot be used; no compiled module.
    """
    if (p is None) == (log_p is None):
        raise ValueError(f"either p or log_p must be given, got {'neither' if p is None else 'both'}")
    name = "p" if log_p is None else "log_p"
    masses = _common.check_tensor(name, p if log_p is None else log_p)
    dtype = _common.compute_dtype(name, masses)
    if masses.ndim == 0 or masses.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., classes] with at least one class, got {list(masses.shape)}")
    if (check or os.environ.get("KDEJSD_CHECK") == "1") and not torch.compiler.is_compiling():
        _check_values(name, masses.detach(), sums=check)
    masses = masses.to(dtype)
    return reference.class_radius_bound(**{name: masses}, log=log)


def _check_values(name: str, masses: Tensor, sums: bool) -> None:
    """What only the data can tell, as errors."""
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
