"""Measures by which factor an encoder stretches the distances between the samples of a batch: the omega op."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _tensors, _torch
from .._native import native
from ..reference.omega import OmegaMax, pair_ratios
from ..reference.omega import omega as reference
from . import _common

_PAIRS = ("halves", "all")
_REDUCTIONS = ("sum", "mean", "max", "none")


@overload
def omega(
    inputs: Tensor,
    codes: Tensor,
    *,
    pairs: Literal["halves", "all"] = ...,
    reduction: Literal["sum", "mean", "none"] = ...,
) -> Tensor: ...
@overload
def omega(
    inputs: Tensor, codes: Tensor, *, pairs: Literal["halves", "all"] = ..., reduction: Literal["max"]
) -> OmegaMax: ...
def omega(
    inputs: Tensor,
    codes: Tensor,
    *,
    pairs: Literal["halves", "all"] = "halves",
    reduction: Literal["sum", "mean", "max", "none"] = "sum",
) -> Tensor | OmegaMax:
    """Returns how much an encoder f stretches distances between pairs of samples: the regulariser of LC-VAE.

    Add it to a loss as a penalty on the encoder's Lipschitz constant (`kdejsd.models.LCVAE` says what this achieves),
    or take its maximum to measure an encoder. For each pair of samples it is the squared ratio of distances

        omega(I1, I2) = |f(I1) - f(I2)|^2 / |I1 - I2|^2

    Every ratio is a lower bound of the squared Lipschitz constant of f. The largest one (reduction "max") is the best
    of these bounds. A pair of equal inputs counts as 0 and has no gradient, whatever its codes. (Equal means that the
    squared distance is 0 in the dtype of the computation.)

    One pass over the pairs takes each distance once, and gives sums and gradients. It needs no more memory than the
    arguments do. Distances and gradients are computed from differences, not from |a|^2 + |b|^2 - 2 a.b, so samples far
    from the origin and close to each other keep their digits. Squares are taken in the dtype: in float32, distances
    under 1e-18 lose digits and end as 0, and those over 1e19 become infinite. Scale such inputs and codes. Second
    derivatives, function transforms and forward-mode AD run the plain reference, which holds the differences of all
    pairs in memory.

    Args:
        inputs: [b, ...], the samples I; all dimensions but the first are one vector, of at least one number.
        codes: [b, l], f(I), l at least 1.
        pairs: "halves" takes the b/2 pairs (i, i + b/2), "all" the b (b - 1)/2 pairs i < j.
        reduction: "sum"; "mean" over the pairs; "max", whose gradient flows through one pair, the first of equal ones;
            "none".

    Both tensors share a device and a dtype. float32 and float64 are computed as such, float16 and bfloat16 in float32.
    Under autocast, float32 and half types may be mixed; everything is then computed in float32.

    Returns:
        [] for "sum" and "mean"; sums are taken in float64. With no pairs the sum is 0 and the mean NaN.
        For "max" a named tuple (value [], indices [2] in int64, the pair).
        For "none" [b/2] with "halves"; with "all" a symmetric [b, b] with a diagonal of 0.
        float64 for float64 arguments and float32 otherwise. NaN in an argument gives NaN, and for "max" a pair that has
        it. With the environment variable KDEJSD_CHECK=1 values that are not finite raise errors instead (this waits for
        the device).

    Raises:
        ValueError: if shapes do not match, b is odd with "halves", there is no pair for "max", or pairs or reduction is
            unknown.
        TypeError: if an argument has another type, or dtypes are mixed or unsupported.
        RuntimeError: if devices are mixed, CUDA is needed but cannot be used, or there is no compiled module.

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), section 4.1.

    Example:
        >>> import kdejsd, torch
        >>> inputs = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
        >>> codes = inputs.square()  # an encoder that stretches more the farther it is from 0
        >>> largest = kdejsd.omega(inputs, codes, pairs="all", reduction="max")
        >>> largest.value, largest.indices
        (tensor(36.), tensor([2, 3]))
    """
    inputs, codes = _checked(inputs, codes, pairs, reduction)
    b = inputs.shape[0]
    road = _common.road((inputs, codes))
    if road == "reference" or b < 2:  # with no pair there is nothing to compute
        return reference(inputs, codes, pairs=pairs, reduction=reduction)
    eager = road == "kernel"
    if reduction == "max":
        return _max(inputs, codes, pairs, eager)
    if reduction == "none":
        return _all_ratios(inputs, codes, eager) if pairs == "all" else _half_ratios(inputs, codes)
    total = _sum(inputs, codes, pairs == "all", eager)
    if reduction == "mean":
        total = total / (b // 2 if pairs == "halves" else b * (b - 1) // 2)
    return total.to(inputs.dtype)


def _checked(inputs: Tensor, codes: Tensor, pairs: str, reduction: str) -> tuple[Tensor, Tensor]:
    """Returns [b, d] and [b, l] in the dtype of the computation."""
    if _tensors.check_tensor("inputs", inputs).ndim < 2:
        raise ValueError(f"inputs must have shape [b, ...] with at least 2 dimensions, got {list(inputs.shape)}")
    if _tensors.check_tensor("codes", codes).ndim != 2:
        raise ValueError(f"codes must have shape [b, l], one vector per sample; got {list(codes.shape)}")
    if pairs not in _PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(_PAIRS)}; got {pairs!r}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}")
    dtype = _tensors.compute_dtype("inputs", inputs)
    _tensors.check_companion("codes", codes, "inputs", inputs, (inputs.dtype,))
    b = inputs.shape[0]
    if codes.shape[0] != b:
        raise ValueError(f"inputs and codes must hold as many samples, got {b} and {codes.shape[0]}")
    inputs = inputs.flatten(1)
    if inputs.shape[1] == 0 or codes.shape[1] == 0:
        raise ValueError(
            f"inputs and codes must have at least one number per sample, got {inputs.shape[1]} and {codes.shape[1]}"
        )
    if pairs == "halves" and b % 2:
        raise ValueError(f'pairs="halves" needs an even number of samples, got {b}')
    if reduction == "max" and b < 2:
        raise ValueError(f'reduction="max" needs at least one pair, got {b} samples')
    inputs, codes = inputs.to(dtype), codes.to(dtype)
    if _tensors.checks_values():
        _tensors.check_finite("inputs", inputs)
        _tensors.check_finite("codes", codes)
    return inputs, codes


def _sum(inputs: Tensor, codes: Tensor, all_pairs: bool, eager: bool) -> Tensor:
    """Returns the sum [], in float64 from the kernels."""
    if not eager:
        return _operator(inputs, codes, all_pairs)[0]  # type: ignore[no-any-return]
    if _common.needs_grad((inputs, codes)):
        return _EagerSum.apply(inputs, codes, all_pairs)  # type: ignore[no-untyped-call, no-any-return]
    return _launch_sum(inputs, codes, all_pairs)[0]


def _all_ratios(inputs: Tensor, codes: Tensor, eager: bool) -> Tensor:
    if not eager:
        return _ratios_operator(inputs, codes)  # type: ignore[no-any-return]
    if _common.needs_grad((inputs, codes)):
        return _EagerRatios.apply(inputs, codes)  # type: ignore[no-untyped-call, no-any-return]
    return _launch_ratios(inputs, codes)


def _half_ratios(inputs: Tensor, codes: Tensor) -> Tensor:
    """Returns [b/2] by torch's own operators, which here need no more memory than the arguments do."""
    (x, other_x), (z, other_z) = inputs.chunk(2), codes.chunk(2)
    return pair_ratios(x - other_x, z - other_z)


def _max(inputs: Tensor, codes: Tensor, pairs: str, eager: bool) -> OmegaMax:
    """Finds the pair of the largest ratio without a graph, and computes its value again, which then has gradients."""
    x, z = inputs.detach(), codes.detach()
    if pairs == "halves":
        largest = _half_ratios(x, z).argmax()
        indices = torch.stack([largest, largest + inputs.shape[0] // 2])
    else:
        indices = (_launch_largest if eager else _largest_operator)(x, z)
    x, z = inputs.index_select(0, indices), codes.index_select(0, indices)
    return OmegaMax(pair_ratios(x[0] - x[1], z[0] - z[1]), indices)


# ----------------------------------------------------------------------------------------------------------------------
# The raw calls


def _launch_all(
    inputs: Tensor,
    codes: Tensor,
    *,
    upstream: Tensor | None = None,
    total: Tensor | None = None,
    ratios: Tensor | None = None,
    largest: Tensor | None = None,
    dinputs: Tensor | None = None,
    dcodes: Tensor | None = None,
) -> None:
    """Calls the kernel of all pairs, which writes what is given."""
    _common.check_cuda("inputs", inputs)
    inputs, codes = inputs.contiguous(), codes.contiguous()
    args = native().OmegaAll(
        dtype=_common.KERNEL_DTYPE[inputs.dtype],
        b=inputs.shape[0],
        d=inputs.shape[1],
        l=codes.shape[1],
        inputs=inputs.data_ptr(),
        codes=codes.data_ptr(),
        upstream=0 if upstream is None else upstream.data_ptr(),
        sum=0 if total is None else total.data_ptr(),
        ratios=0 if ratios is None else ratios.data_ptr(),
        largest=0 if largest is None else largest.data_ptr(),
        dinputs=0 if dinputs is None else dinputs.data_ptr(),
        dcodes=0 if dcodes is None else dcodes.data_ptr(),
    )
    _common.launch(native(), "omega_all", inputs.device, args)


def _launch_halves(inputs: Tensor, codes: Tensor, *, total: Tensor, dinputs: Tensor, dcodes: Tensor) -> None:
    """Calls the kernel of the halves' pairs."""
    _common.check_cuda("inputs", inputs)
    inputs, codes = inputs.contiguous(), codes.contiguous()
    args = native().OmegaHalves(
        dtype=_common.KERNEL_DTYPE[inputs.dtype],
        pairs=inputs.shape[0] // 2,
        d=inputs.shape[1],
        l=codes.shape[1],
        inputs=inputs.data_ptr(),
        codes=codes.data_ptr(),
        sum=total.data_ptr(),
        dinputs=dinputs.data_ptr(),
        dcodes=dcodes.data_ptr(),
    )
    _common.launch(native(), "omega_halves", inputs.device, args)


def _gradients_like(inputs: Tensor, codes: Tensor, want_dinputs: bool, want_dcodes: bool) -> tuple[Tensor, Tensor]:
    """Makes the tensors that gradients are written to; one that is not wanted is empty, which is a null pointer."""
    return inputs.new_empty(inputs.shape if want_dinputs else 0), codes.new_empty(codes.shape if want_dcodes else 0)


def _launch_sum(
    inputs: Tensor, codes: Tensor, all_pairs: bool, want_dinputs: bool = False, want_dcodes: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum [] in float64, and its gradients [b, d] and [b, l], which are empty if not wanted."""
    total = inputs.new_empty((), dtype=torch.float64)
    dinputs, dcodes = _gradients_like(inputs, codes, want_dinputs, want_dcodes)
    if all_pairs:
        _launch_all(inputs, codes, total=total, dinputs=dinputs, dcodes=dcodes)
    else:
        _launch_halves(inputs, codes, total=total, dinputs=dinputs, dcodes=dcodes)
    return total, dinputs, dcodes


def _launch_ratios(inputs: Tensor, codes: Tensor) -> Tensor:
    """Returns the ratios [b, b]."""
    ratios = inputs.new_empty(inputs.shape[0], inputs.shape[0])
    _launch_all(inputs, codes, ratios=ratios)
    return ratios


def _launch_ratios_backward(
    grad: Tensor, inputs: Tensor, codes: Tensor, want_dinputs: bool, want_dcodes: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients [b, d] and [b, l] of sum(grad * ratios), empty if not wanted."""
    dinputs, dcodes = _gradients_like(inputs, codes, want_dinputs, want_dcodes)
    _launch_all(inputs, codes, upstream=grad.to(inputs.dtype).contiguous(), dinputs=dinputs, dcodes=dcodes)
    return dinputs, dcodes


def _launch_largest(inputs: Tensor, codes: Tensor) -> Tensor:
    """Returns the pair of the largest ratio, [2] int64."""
    indices = inputs.new_empty(2, dtype=torch.int64)
    _launch_all(inputs, codes, largest=indices)
    return indices


# ----------------------------------------------------------------------------------------------------------------------
# Autograd, once for the raw calls and once for the operators


def _plain_gradients(ctx: Any, grad: Tensor, inputs: Tensor, codes: Tensor, pairs: str, reduction: str) -> Any:
    """Returns gradients by the reference, with a graph of their own, so that they can be differentiated again."""
    needed = ctx.needs_input_grad[:2]
    with torch.enable_grad():
        result = reference(inputs, codes, pairs=pairs, reduction=reduction)
        wanted = [t for t, need in zip((inputs, codes), needed, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, grad.to(inputs.dtype), create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _sum_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, codes, dinputs, dcodes = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _plain_gradients(ctx, grad, inputs, codes, ctx.pairs, "sum")  # type: ignore[no-any-return]
    need_inputs, need_codes = ctx.needs_input_grad[:2]
    grad = grad.to(dinputs.dtype)
    return grad * dinputs if need_inputs else None, grad * dcodes if need_codes else None


def _ratios_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, codes = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _plain_gradients(ctx, grad, inputs, codes, "all", "none")  # type: ignore[no-any-return]
    needed = ctx.needs_input_grad[:2]
    # The gradient may come from a mode that the forward pass was not called in.
    eager = _common.road((grad, inputs, codes)) == "kernel"
    backward = _launch_ratios_backward if eager else _ratios_backward_operator
    gradients = backward(grad, inputs, codes, *needed)
    return tuple(g if need else None for g, need in zip(gradients, needed, strict=True))


class _EagerSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, all_pairs: bool) -> Tensor:
        total, dinputs, dcodes = _launch_sum(inputs, codes, all_pairs, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(inputs, codes, dinputs, dcodes)
        ctx.pairs = "all" if all_pairs else "halves"
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_sum_gradients(ctx, grad), None)


class _EagerRatios(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, codes)
        return _launch_ratios(inputs, codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ratios_gradients(ctx, grad)


def _fake_sum(
    inputs: Tensor, codes: Tensor, all_pairs: bool, want_dinputs: bool = False, want_dcodes: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        inputs.new_empty((), dtype=torch.float64),
        *_gradients_like(inputs, codes, want_dinputs, want_dcodes),
    )


def _fake_ratios(inputs: Tensor, codes: Tensor) -> Tensor:
    return inputs.new_empty(inputs.shape[0], inputs.shape[0])


def _fake_ratios_backward(
    grad: Tensor, inputs: Tensor, codes: Tensor, want_dinputs: bool, want_dcodes: bool
) -> tuple[Tensor, Tensor]:
    return _gradients_like(inputs, codes, want_dinputs, want_dcodes)


def _fake_largest(inputs: Tensor, codes: Tensor) -> Tensor:
    return inputs.new_empty(2, dtype=torch.int64)


class _TracedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, all_pairs: bool, *_: bool) -> tuple[Tensor, Tensor, Tensor]:
        with _torch.below_autograd():
            total, dinputs, dcodes = _operator(inputs, codes, all_pairs, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(inputs, codes, dinputs, dcodes)
        ctx.pairs = "all" if all_pairs else "halves"
        ctx.mark_non_differentiable(dinputs, dcodes)
        return total, dinputs, dcodes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_sum_gradients(ctx, grad), None, None, None)


class _TracedRatios(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, codes)
        with _torch.below_autograd():
            return _ratios_operator(inputs, codes)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ratios_gradients(ctx, grad)


_operator = _common.operator("omega", _launch_sum, _fake_sum, _TracedSum, of="omega")
_ratios_operator = _common.operator("omega_ratios", _launch_ratios, _fake_ratios, _TracedRatios, of="omega")
_ratios_backward_operator = _common.operator(
    "omega_ratios_backward", _launch_ratios_backward, _fake_ratios_backward, of="omega"
)
_largest_operator = _common.operator("omega_largest", _launch_largest, _fake_largest, of="omega")
