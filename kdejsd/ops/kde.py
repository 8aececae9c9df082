"""Computes the log-density of a Gaussian mixture at query points, and its gradients, without an n x m array."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _torch
from .._native import native
from .._normal_kde import Means
from ..reference import kde as reference
from . import _common
from ._kde_inputs import Inputs, all_tensors, checked_inputs, checked_own, is_per_center

# As csrc/kernels.h has them.
KdeValue: TypeAlias = Literal["kLogProb", "kJensenShannon", "kLogRatio"]
KdeProducts: TypeAlias = Literal["kNone", "kSplit", "kReduced"]


def kde_log_prob(
    query: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    *,
    log_weights: Tensor | None = None,
    exclude_self: bool | Tensor = False,
) -> Tensor:
    """Returns the log-density of a Gaussian kernel density estimate (KDE) at query points, in nats.

    Use it for any density made of normal kernels: the loss functions here call it, and it works as a log-likelihood by
    itself. At a query z', with centers z_1 ... z_m of weights w_i, the value is

        log p_e(z') = logsumexp_i [log w_i - l log h_i - |z' - z_i|^2 / (2 h_i^2)] - (l/2) log(2 pi)

    No n x m array is ever made, so millions of centers fit in memory. (The exceptions are second derivatives, function
    transforms and forward-mode AD, which run the plain reference.) One pass gives the value and the gradient for the
    queries and for a single bandwidth. Gradients for the centers, the weights and a bandwidth per center take a second,
    deterministic pass. Leading dimensions broadcast.

    Args:
        query: [..., n, l], the points z'. n may be 0.
        centers: [..., m, l], the points z_i, m at least 1.
        bandwidth: h, the kernel's standard deviation, positive: a number, a 0-dim tensor, or a tensor [..., m] (one per
            center) or [..., 1].
        log_weights: [..., m], log w_i, used as they are; None for equal weights that sum to 1.
        exclude_self: True leaves center i out of the density at query i (leave-one-out, for queries that are the
            centers). An int64 tensor [..., n] holds for each query the index of the center to leave out, -1 for none.
            Equal weights are 1/(m - 1) for a query that leaves one out.

    All tensors share a device and a dtype. float32 and float64 are computed as such, float16 and bfloat16 in float32.
    Under autocast, float32 and half types may be mixed; everything is then computed in float32.

    On CUDA, float32 points of 1 to 256 dimensions use the tensor cores, unless a gradient takes the second pass. The
    error is like float32's. If `torch.set_float32_matmul_precision` is "high" or "medium", reduced precision is
    allowed: the error is then about 1e-3 of the largest value and of the largest gradient. That setting also lets a CPU
    with AMX multiply in bfloat16 parts from 32 dimensions on, with an error of about 1e-5.

    Returns:
        [..., n], float64 for float64 input and float32 otherwise. NaN in a query gives NaN at that query. The result is
        NaN everywhere if a center is NaN, an entry of a bandwidth tensor is not positive and finite, or a log-weight is
        NaN or infinity. With the environment variable KDEJSD_CHECK=1 such values raise errors instead (this waits for
        the device). Where every center's weight is too small for the dtype, the value is -inf and the gradient NaN.

        In float32 squared distances leave the range of the dtype: from about 1e19 h on the density is 0, and from 1e38
        h on it is NaN. With a bandwidth per center, h stands here for the geometric mean of the least and the greatest;
        if one is 1e30 times another, the result is NaN everywhere. Use float64 for such data.

    Raises:
        ValueError: if shapes do not match, m = 0, or a bandwidth number is not positive and finite in the dtype.
        TypeError: if an argument has another type, or dtypes are mixed or unsupported.
        RuntimeError: if devices are mixed, CUDA is needed but cannot be used, or there is no compiled module.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, equation
    1, with the kernel normalised.

    Example:
        >>> import kdejsd, torch
        >>> centers = torch.tensor([[-1.0], [1.0]])
        >>> query = torch.tensor([[0.5], [3.0]], requires_grad=True)
        >>> log_prob = kdejsd.kde_log_prob(query, centers, bandwidth=1.0)
        >>> log_prob
        tensor([-1.4238, -3.6096], grad_fn=<...>)
        >>> log_prob.sum().backward()
        >>> query.grad  # at 3 it points back to the centers
        tensor([[-0.0379],
                [-2.0049]])
    """
    return named_log_prob(("query", "centers"), query, centers, bandwidth, log_weights, exclude_self)


def named_log_prob(
    names: tuple[str, str],
    query: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    log_weights: Tensor | None = None,
    exclude_self: bool | Tensor = False,
    own: Tensor | None = None,
) -> Tensor:
    """Computes `kde_log_prob` for callers whose arguments have other names, which the errors then use.

    `own` is as in `kdejsd.jsd_loss`.
    """
    inputs, shape = checked_inputs(names, query, centers, bandwidth, log_weights, exclude_self)
    if own is None:
        log_prob = _log_prob(inputs, inputs[0].dtype)
    else:
        log_prob = _log_prob_with_own(inputs, checked_own(own, names[0], query, inputs, shape))
    return _shaped(log_prob, shape)


def _log_prob_with_own(inputs: Inputs, own: Tensor) -> Tensor:
    """Returns [n] or [B, n], in the dtype of the query."""
    query, centers, bandwidth, _, exclude = inputs
    if _only_query_needs_grad(inputs, own):
        return _query_terms(inputs, own, query.shape[:-1], 1.0, None, "none", query.dtype)
    log_prob = _log_prob(inputs, torch.float64)
    count = reference.center_count(log_prob, centers.shape[-2], False if exclude is None else exclude)
    return _narrowed(reference.with_own_center(log_prob, count, query, own, bandwidth), query.dtype)


def _log_prob(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Returns [n] or [B, n]: from the kernels in `dtype`, the query's or float64; from the reference in the query's."""
    road = _common.road(inputs)
    if road == "reference":
        return _reference(inputs)
    if road == "operator":
        return _narrowed(_operator(*all_tensors(inputs))[0], dtype)
    if _common.needs_grad(inputs):
        return _EagerKde.apply(*inputs, dtype)  # type: ignore[no-untyped-call, no-any-return]
    return _narrowed(_forward(*inputs)[0], dtype)


class Divergence(NamedTuple):
    """Describes a divergence whose terms at the codes follow from the gap log p_t - log p_e; `kdejsd.jsd` has them."""

    terms: Callable[[Tensor], Tensor]  # of the gap, in nats
    value: KdeValue  # what the kernels give where the target is a normal
    target_share: Callable[[Tensor], Tensor]  # of the terms: p_t / (p_e + p_t)
    mean: Callable[[Means], float]  # of the terms, from those of the log-ratios


def normal_divergence_terms(
    names: tuple[str, str],
    codes: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    log_weights: Tensor | None,
    exclude_self: bool | Tensor,
    variance: float,
    divergence: Divergence,
    reduction: str,
    own: Tensor | None = None,
    narrow: bool = False,
) -> Tensor | None:
    """Returns terms of the divergence from N(0, variance I), with value and gradient from the one pass of the kde.

    Args:
        reduction: "none" for the terms, "mean" or "sum" of them.
        own: as in `kdejsd.jsd_loss`.
        narrow: whether to convert the result to the dtype of `kde_log_prob`; the rest as there.

    Returns:
        [..., n] or a 0-dim tensor, in float64 unless narrow. None where the pass cannot be fused: when something but
        the codes needs a gradient, and wherever the kde itself does not take the eager path. The caller then composes
        the terms from `kde_log_prob`.
    """
    inputs, shape = checked_inputs(names, codes, centers, bandwidth, log_weights, exclude_self)
    if own is not None:
        own = checked_own(own, names[0], codes, inputs, shape)
    if not _only_query_needs_grad(inputs, own):
        return None
    dtype = inputs[0].dtype if narrow else torch.float64
    return _query_terms(inputs, own, shape, variance, divergence, reduction, dtype)


def _only_query_needs_grad(inputs: Inputs, own: Tensor | None) -> bool:
    """Tells whether the call takes the eager path and nothing but the query needs a gradient."""
    everything = (*inputs, own)
    return _common.road(everything) == "kernel" and not _common.needs_grad(everything[1:])


def _query_terms(
    inputs: Inputs,
    own: Tensor | None,
    shape: tuple[int, ...],
    variance: float,
    divergence: Divergence | None,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:
    """Returns terms of the divergence, or log p_e if it is None, in `dtype`, where `_only_query_needs_grad` holds."""
    query, *others = inputs
    if _common.needs_grad((query,)):
        settings = shape, variance, divergence, reduction, dtype
        return _QueryTerms.apply(query, (*others, own), settings)  # type: ignore[no-untyped-call, no-any-return]
    kind: KdeValue = "kLogProb" if divergence is None else divergence.value
    terms = _forward(*inputs, value_kind=kind, variance=variance, own=own)[0]
    return _narrowed(reduced(_shaped(terms, shape), reduction), dtype)


def raw_pass(inputs: Inputs, want_dquery: bool) -> tuple[Tensor, Tensor]:
    """Returns log p_e in float64 and its gradient for the queries, empty if not wanted; the caller makes the graph."""
    if _common.road(inputs) == "kernel":
        value, dquery, _ = _launch_forward(*inputs, want_dquery)
    else:
        value, dquery, _ = _operator(*all_tensors(inputs), want_dquery)  # which refuses what it cannot do
    return value, dquery


def _shaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    return t if t.shape == shape else t.reshape(shape)


def reduced(terms: Tensor, reduction: str) -> Tensor:
    return terms.mean() if reduction == "mean" else terms.sum() if reduction == "sum" else terms


def _narrowed(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a float64 result in float64 or float32; `to` does so too, in half as much time again."""
    return t if dtype == torch.float64 else t.float()


def _reference(inputs: Inputs, own: Tensor | None = None) -> Tensor:
    query, centers, bandwidth, log_weights, exclude = inputs
    return reference.log_prob_with_own(
        query, centers, bandwidth, own, log_weights=log_weights, exclude_self=False if exclude is None else exclude
    )


# ----------------------------------------------------------------------------------------------------------------------
# The raw calls


def _mixture(
    query: Tensor, centers: Tensor, bandwidth: Tensor | float, log_weights: Tensor | None, exclude: Tensor | None
) -> tuple[Any, list[Tensor | None]]:
    """Returns the kernels' arguments, and the contiguous tensors they point into, which must outlive the call."""
    _common.check_cuda("query", query)
    h, number = (bandwidth, 0.0) if isinstance(bandwidth, Tensor) else (None, bandwidth)
    query, centers = query.contiguous(), centers.contiguous()
    h = None if h is None else h.contiguous()
    log_weights = None if log_weights is None else log_weights.contiguous()
    exclude = None if exclude is None else exclude.contiguous()
    m = centers.shape[-2]
    batched = query.ndim == 3
    mixture = native().KdeMixture(
        dtype=_common.KERNEL_DTYPE[query.dtype],
        batch=query.shape[0] if batched else 1,
        n=query.shape[-2],
        m=m,
        l=query.shape[-1],
        query=query.data_ptr(),
        centers=centers.data_ptr(),
        bandwidth=0 if h is None else h.data_ptr(),
        log_weights=0 if log_weights is None else log_weights.data_ptr(),
        exclude=0 if exclude is None else exclude.data_ptr(),
        per_center=h is not None and is_per_center(h),
        query_stride=_stride(query) if batched else 0,
        centers_stride=_stride(centers) if batched else 0,
        bandwidth_stride=_stride(h) if batched else 0,
        log_weights_stride=_stride(log_weights) if batched else 0,
        exclude_stride=_stride(exclude) if batched else 0,
        bandwidth_number=number,
    )
    return mixture, [query, centers, h, log_weights, exclude]


def _stride(t: Tensor | None) -> int:
    """Returns the stride from one batch item to the next, 0 where all share the tensor."""
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)


def _forward(
    query: Tensor,
    centers: Tensor,
    bandwidth: Tensor | float,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    want_dquery: bool = False,
    want_dbandwidth: bool = False,
    for_backward: bool = False,
    value_kind: KdeValue = "kLogProb",
    variance: float = 1.0,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns value [B, n] and dbandwidth [B, n] in float64, and dquery [B, n, l]; the last two are None if not wanted.

    With for_backward the values are for `_launch_backward`, whose weights sum to 1 if the exponents are rounded alike.
    """
    mixture, _keep = _mixture(query, centers, bandwidth, log_weights, exclude)
    value = query.new_empty(*query.shape[:-1], dtype=torch.float64)  # numbers are read faster than a torch.Size
    dquery = torch.empty_like(query, memory_format=torch.contiguous_format) if want_dquery else None
    dbandwidth = torch.empty_like(value) if want_dbandwidth else None
    if value.numel() == 0:
        return value, dquery, dbandwidth
    device = query.device
    products: KdeProducts = "kSplit"
    if for_backward:
        products = "kNone"
    elif query.dtype == torch.float32 and _torch.reduced_precision_allowed(device.type):
        products = "kReduced"
    own = None if own is None else own.contiguous()
    args = native().KdeForward(
        mixture=mixture,
        value_kind=value_kind,
        target_variance=variance,
        products=products,
        own=0 if own is None else own.data_ptr(),
        value=value.data_ptr(),
        dquery=0 if dquery is None else dquery.data_ptr(),
        dbandwidth=0 if dbandwidth is None else dbandwidth.data_ptr(),
    )
    _common.launch(native(), "kde_forward", device, args)
    return value, dquery, dbandwidth


def _launch_forward(
    query: Tensor,
    centers: Tensor,
    bandwidth: Tensor | float,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    want_dquery: bool = False,
    want_dbandwidth: bool = False,
    for_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls `_forward` as the operator's schema has it: a result that is not wanted is an empty tensor."""
    wanted = want_dquery, want_dbandwidth, for_backward
    value, dquery, dbandwidth = _forward(query, centers, bandwidth, log_weights, exclude, *wanted)
    dquery = query.new_empty(0) if dquery is None else dquery
    dbandwidth = query.new_empty(0, dtype=torch.float64) if dbandwidth is None else dbandwidth
    return value, dquery, dbandwidth


def _launch_backward(
    grad: Tensor,
    query: Tensor,
    centers: Tensor,
    bandwidth: Tensor | float,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    log_prob: Tensor,
    want_dcenters: bool,
    want_dlog_weights: bool,
    want_dbandwidth: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dcenters [B, m, l], dlog_weights [B, m] and dbandwidth [B, m] for all B items, empty if not wanted."""
    mixture, _keep = _mixture(query, centers, bandwidth, log_weights, exclude)
    per_center = (*query.shape[:-2], centers.shape[-2])
    grad, log_prob = grad.to(query.dtype).contiguous(), log_prob.contiguous()
    dcenters = query.new_empty((*per_center, query.shape[-1]) if want_dcenters else 0)
    dlog_weights = query.new_empty(per_center if want_dlog_weights else 0)
    dbandwidth = query.new_empty(per_center if want_dbandwidth else 0)
    args = native().KdeBackward(
        mixture=mixture,
        grad=grad.data_ptr(),
        log_prob=log_prob.data_ptr(),
        dcenters=dcenters.data_ptr(),
        dlog_weights=dlog_weights.data_ptr(),
        dbandwidth=dbandwidth.data_ptr(),
    )
    _common.launch(native(), "kde_backward", query.device, args)
    return dcenters, dlog_weights, dbandwidth


def _backward(
    grad: Tensor, query: Tensor, centers: Tensor, bandwidth: Tensor | float, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls `_launch_backward` with a gradient that may come from a mode that the forward pass was not called in."""
    log_weights, exclude, log_prob = others[:3]
    inputs: Inputs = (query, centers, bandwidth, log_weights, exclude)
    if _common.road((grad, *inputs, log_prob)) == "kernel":
        return _launch_backward(grad, query, centers, bandwidth, *others)
    return _backward_operator(grad, *all_tensors(inputs), *others[2:])  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------------------------
# Autograd, once for the raw calls and once for the operators


def _save(ctx: Any, inputs: Inputs, *results: Tensor | None) -> None:
    """Keeps these for `_saved`. A number cannot be kept as the tensors are."""
    query, centers, bandwidth, log_weights, exclude = inputs
    h, ctx.number = (bandwidth, None) if isinstance(bandwidth, Tensor) else (None, bandwidth)
    ctx.save_for_backward(query, centers, h, log_weights, exclude, *results)


def _saved(ctx: Any) -> tuple[Inputs, list[Tensor]]:
    query, centers, h, log_weights, exclude, *results = ctx.saved_tensors
    return (query, centers, ctx.number if h is None else h, log_weights, exclude), results


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients for the five inputs from what the forward pass saved."""
    inputs, (log_prob, dquery, dbandwidth) = _saved(ctx)
    if torch.is_grad_enabled():  # create_graph: a derivative that can be differentiated again
        return _plain_gradients(grad, inputs, ctx.needs_input_grad)
    query, centers, bandwidth, log_weights, _ = inputs
    need_query, need_centers, need_bandwidth, need_weights = ctx.needs_input_grad[:4]
    per_center = is_per_center(bandwidth)

    def shared(t: Tensor, like: Any) -> Tensor:
        return t.sum(0, keepdim=True) if like.shape[0] < t.shape[0] else t

    gradients: list[Tensor | None] = [None] * 5
    if need_query:
        gradients[0] = _narrowed(grad, query.dtype).unsqueeze(-1) * dquery
    if need_bandwidth and not per_center:
        gradients[2] = shared((grad * dbandwidth).sum(-1, keepdim=True), bandwidth).to(query.dtype)
    if need_centers or need_weights or (need_bandwidth and per_center):
        dcenters, dlog_weights, dbandwidths = _backward(
            grad, *inputs, log_prob, need_centers, need_weights, need_bandwidth and per_center
        )
        if need_centers:
            gradients[1] = shared(dcenters, centers)
        if need_bandwidth and per_center:
            gradients[2] = shared(dbandwidths, bandwidth)
        if need_weights:
            gradients[3] = shared(dlog_weights, log_weights)
    return tuple(gradients)


def _wanted(ctx: Any, bandwidth: Tensor | float) -> tuple[bool, bool, bool]:
    """Returns want_dquery, want_dbandwidth and for_backward."""
    need_query, need_centers, need_bandwidth, need_weights = ctx.needs_input_grad[:4]
    per_center = is_per_center(bandwidth)
    second_pass = need_centers or need_weights or (need_bandwidth and per_center)
    return need_query, need_bandwidth and not per_center, second_pass


class _EagerKde(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, dtype = arguments[:5], arguments[5]
        log_prob, dquery, dbandwidth = _forward(*inputs, *_wanted(ctx, inputs[2]))  # type: ignore[call-arg]
        _save(ctx, inputs, log_prob, dquery, dbandwidth)
        # In here the conversion is no node of the graph.
        return _narrowed(log_prob, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad), None)


class _QueryTerms(torch.autograd.Function):
    """Computes `_query_terms`, with the reduction and the conversion in the same node.

    As nodes of the graph of their own these would cost more than a small kernel. Only the query has a gradient. The
    other inputs and `own` come as one argument and the settings as another, since torch looks at each argument by
    itself.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, others: Any, settings: Any) -> Tensor:
        shape, variance, divergence, reduction, dtype = settings
        inputs: Inputs = (query, *others[:-1])
        own = others[-1]
        kind: KdeValue = "kLogProb" if divergence is None else divergence.value
        terms, dquery, _ = _forward(*inputs, want_dquery=True, value_kind=kind, variance=variance, own=own)
        _save(ctx, inputs, own, dquery)
        ctx.settings = settings
        return _narrowed(reduced(_shaped(terms, shape), reduction), dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (own, dquery) = _saved(ctx)
        shape, variance, divergence, reduction, _ = ctx.settings
        if not torch.is_grad_enabled():
            if reduction == "none":
                factor = grad.reshape(dquery.shape[:-1]).unsqueeze(-1).to(dquery.dtype)
            else:
                # In float64, as CUDA multiplies by a rounded 1 / n; 0-dim, so that it widens no product.
                factor = grad.double() / float(math.prod(shape)) if reduction == "mean" else grad
            return factor * dquery, None, None
        query = inputs[0]
        terms = _reference(inputs, own)
        if divergence is not None:
            terms = divergence.terms(reference.normal_log_prob(query.double(), variance) - terms.double())
        value = reduced(_shaped(terms, shape), reduction)
        return (*torch.autograd.grad(value, query, grad.to(value.dtype), create_graph=True), None, None)


def _plain_gradients(grad: Tensor, inputs: Inputs, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Returns the gradients for the five inputs by the reference, with a graph of their own (n m l memory)."""
    log_prob = _reference(inputs)
    wanted = [t for t, need in zip(inputs[:4], needed, strict=False) if need]
    found = iter(torch.autograd.grad(log_prob, wanted, grad.to(log_prob.dtype), create_graph=True))  # type: ignore[arg-type]
    return (*(next(found) if need else None for need in needed[:4]), None)


def _fake_forward(
    query: Tensor,
    centers: Tensor,
    bandwidth: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    want_dquery: bool = False,
    want_dbandwidth: bool = False,
    for_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape[:-1], dtype=torch.float64),
        query.new_empty(query.shape if want_dquery else 0),
        query.new_empty(query.shape[:-1] if want_dbandwidth else 0, dtype=torch.float64),
    )


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    centers: Tensor,
    bandwidth: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    log_prob: Tensor,
    want_dcenters: bool,
    want_dlog_weights: bool,
    want_dbandwidth: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    per_center = (*query.shape[:-2], centers.shape[-2])
    return (
        query.new_empty((*per_center, query.shape[-1]) if want_dcenters else 0),
        query.new_empty(per_center if want_dlog_weights else 0),
        query.new_empty(per_center if want_dbandwidth else 0),
    )


class _TracedKde(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = arguments[:5]
        with _torch.below_autograd():
            log_prob, dquery, dbandwidth = _operator(*inputs, *_wanted(ctx, inputs[2]))
        _save(ctx, inputs, log_prob, dquery, dbandwidth)
        ctx.mark_non_differentiable(dquery, dbandwidth)
        return log_prob, dquery, dbandwidth

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_gradients(ctx, grad), None, None, None)


_operator = _common.operator("kde", _launch_forward, _fake_forward, _TracedKde, of="kde_log_prob")
_backward_operator = _common.operator("kde_backward", _launch_backward, _fake_backward, of="kde_log_prob")
