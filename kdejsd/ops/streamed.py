"""Computes the kde op over centers of another dtype, in another memory or on other ranks, a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _torch
from .._ranks import gathered, rank_and_size
from ..reference import kde as reference
from . import _common
from ._kde_inputs import checked_inputs
from .kde import raw_pass

PART_BYTES = 2**23  # of a part in the queries' dtype; on a CPU a pass is as fast from 2 MiB to 32, slower below


def streamed_log_prob(
    query: Tensor, centers: Tensor, bandwidth: float | Tensor, exclude: Tensor | None = None, sharded: bool = False
) -> tuple[Tensor, Tensor]:
    """Computes `kdejsd.kde_log_prob` with constant centers of any floating dtype, on the query's device or the host.

    Parts of the centers are converted and moved one after the other, each into the memory of an earlier one. In
    addition to the centers there is memory for one part, or on CUDA for three parts of host centers. Host centers in
    pinned memory are copied while the previous part is computed. The pass gives the gradient for the queries too; the
    backward only scales it.

    If the centers are sharded over R ranks, each rank brings its own n queries and its own centers. The queries of all
    ranks are gathered, each rank passes its centers for all of them, and two sums over the ranks merge the results.
    These sums are of R n and R n (l + 2) numbers, whatever the number of centers.

    Function transforms and forward-mode AD run the plain reference, with all centers at once.

    Args:
        query: [n, l] float32 or float64, the dtype of the computation. Only it gets a gradient, and no second one.
        centers: [m, l].
        bandwidth: h, a number or a 0-dim tensor.
        exclude: [n] int64, the index of the center to leave out for each query, -1 for none; of sharded centers [R n],
            for the queries of all ranks in their order.
        sharded: whether the centers are sharded. Every rank of torch.distributed's default group then calls this, with
            the same number of queries.

    Returns:
        The log-densities [n] float64 in nats, of the centers as they are after conversion, and the number of centers in
        each, [n] float64.

    Raises:
        ValueError, TypeError: as `kde_log_prob`, and if ranks have different numbers of queries.
        RuntimeError: if centers are neither on the query's device nor on the host; for second derivatives; for function
            transforms and forward-mode AD of sharded centers; and as `kde_log_prob`.
    """
    if exclude is not None and len(centers) == 1 and not sharded:
        raise ValueError("exclude_self needs at least 2 centers, got 1")
    if centers.device not in (query.device, torch.device("cpu")):
        raise RuntimeError(f"centers must be on {query.device} as the query or on the host, got {centers.device}")
    road = _common.road((query, centers, bandwidth, exclude))
    if road == "reference":
        if sharded:
            raise RuntimeError("centers that are sharded over ranks have no function transforms and no forward-mode AD")
        centers, own = centers.to(query), False if exclude is None else exclude
        log_prob = reference.kde_log_prob(query, centers, bandwidth, exclude_self=own).double()
        return log_prob, reference.center_count(log_prob, len(centers), own).expand_as(log_prob)
    if road == "operator" and not isinstance(bandwidth, Tensor):
        bandwidth = query.new_full((), bandwidth)
    log_sum: Tensor
    count: Tensor
    inputs = query, centers, bandwidth, exclude, sharded
    if road == "operator":
        log_sum, count, _ = _operator(*inputs)
    elif _common.needs_grad((query,)):
        log_sum, count = _EagerStreamed.apply(*inputs, True)  # type: ignore[no-untyped-call]
    else:
        log_sum, count, _ = _whole_pass(*inputs)
    return log_sum - count.log(), count


def merged(log_sums: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Merges the results of parts of the centers into that of all centers.

    With L_p = log sum of exp(a_i) over the centers of part p, and g_p its gradient for the query,

        L = log sum_p exp(L_p),    dL / dquery = sum_p exp(L_p - L) g_p.

    Args:
        log_sums: [parts, n] float64, -inf where a part has no center for a query.
        gradients: [parts, n, l]; those of a part whose weight is 0 do not count, whatever they are.

    Returns:
        [n] and [n, l], in float64.
    """
    weights = log_sums.softmax(0).unsqueeze(-1)
    return log_sums.logsumexp(0), (weights * gradients).masked_fill(weights == 0, 0).sum(0)


def _whole_pass(
    query: Tensor,
    centers: Tensor,
    bandwidth: float | Tensor,
    exclude: Tensor | None,
    sharded: bool,
    want_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes `_pass` over the centers of all ranks, with the number of centers between its results; all in float64."""
    n = len(query)
    if sharded:
        query = gathered(query.detach(), "queries")
    count = query.new_full((len(query),), len(centers), dtype=torch.float64)
    if exclude is not None:
        count -= _among(exclude, len(centers)).to(count)
    log_sum, gradient = _pass(query, centers, bandwidth, exclude, want_gradient)
    if not sharded:
        return log_sum, count, gradient

    # The rule of `merged` as sums over the ranks.
    greatest = log_sum.clone()
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    weight = (log_sum - greatest).exp().unsqueeze(-1)
    columns = [weight, count.unsqueeze(-1)]
    if want_gradient:
        columns.append((weight * gradient).masked_fill(weight == 0, 0))
    sums = torch.cat(columns, 1).to(query.dtype)
    dist.all_reduce(sums)
    own = n * rank_and_size()[0]
    total, count, gradient = sums[own : own + n].double().tensor_split((1, 2), 1)
    return greatest[own : own + n] + total[:, 0].log(), count[:, 0], gradient / total


def _pass(
    query: Tensor, centers: Tensor, bandwidth: float | Tensor, exclude: Tensor | None, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Returns log sum_i N(query; z_i, h^2 I) [n] and its gradient [n, l], in float64; the latter 0 if not wanted."""
    n, dim = query.shape
    rows = max(1, PART_BYTES // (dim * query.element_size()))
    equal = query.new_zeros(min(rows, len(centers)))  # log-weights, of a sum that is not divided by its number of terms
    total = query.new_full((n,), -torch.inf, dtype=torch.float64)
    gradient = query.new_zeros(n, dim, dtype=torch.float64)
    start = 0
    for part in _converted(_brought(centers.split(rows), query.device), query):
        own: bool | Tensor = False
        if exclude is not None:
            own = exclude - start
            own = own.where(_among(own, len(part)), -1)
        inputs, _ = checked_inputs(("query", "centers"), query, part, bandwidth, equal[: len(part)], own)
        log_sum, slope = raw_pass(inputs, want_gradient)
        if want_gradient:
            total, gradient = merged(torch.stack((total, log_sum)), torch.stack((gradient, slope.double())))
        else:
            total = torch.stack((total, log_sum)).logsumexp(0)
        start += len(part)
    return total, gradient


def _among(index: Tensor, count: int) -> Tensor:
    return (index >= 0) & (index < count)


def _converted(parts: Iterator[Tensor], like: Tensor) -> Iterator[Tensor]:
    """Yields the parts in the dtype of another tensor, in the same memory one after the other."""
    room = like.new_empty(0)
    for part in parts:
        if part.dtype == like.dtype:
            yield part
            continue
        if len(room) == 0:  # the first part is the largest
            room = torch.empty_like(part, dtype=like.dtype)
        yield room[: len(part)].copy_(part)


def _brought(parts: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yields the parts on the device.

    From the host to CUDA two places take turns: a part is copied on a stream of its own while the one before is
    computed.
    """
    if device.type != "cuda" or parts[0].device == device:
        for part in parts:
            yield part.to(device)
        return
    places = [torch.empty_like(part, device=device) for part in parts[:2]]
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    copying.wait_stream(computing)  # whose earlier work may still use the memory of the places
    free: list[torch.cuda.Event | None] = [None, None]
    for number, part in enumerate(parts):
        turn = number % 2
        place = places[turn][: len(part)]
        if (event := free[turn]) is not None:
            copying.wait_event(event)
        with torch.cuda.stream(copying):
            place.copy_(part, non_blocking=True)
        copied = copying.record_event()
        computing.wait_event(copied)
        yield place
        free[turn] = computing.record_event()
    copied.synchronize()  # the host's codes may change as soon as this returns


# ----------------------------------------------------------------------------------------------------------------------
# Autograd, once for the raw calls and once for the operator


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # once_differentiable would let a gradient pass for a constant here
        raise RuntimeError(
            "a streamed kernel density has no second derivatives (create_graph=True); keep the codes in float32 on "
            "the device of the query, or call kdejsd.kde_log_prob"
        )
    gradient: Tensor = ctx.saved_tensors[0]
    return grad.to(gradient.dtype).unsqueeze(-1) * gradient


class _EagerStreamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        log_sum, count, gradient = _whole_pass(query, *others)
        ctx.save_for_backward(gradient.to(query.dtype))
        ctx.mark_non_differentiable(count)
        return log_sum, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad), None, None, None, None, None


def _fake(
    query: Tensor,
    centers: Tensor,
    bandwidth: Tensor,
    exclude: Tensor | None,
    sharded: bool,
    want_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    each = query.new_empty(query.shape[:1], dtype=torch.float64)
    return each, torch.empty_like(each), torch.empty_like(query, dtype=torch.float64)


class _TracedStreamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _torch.below_autograd():
            log_sum, count, gradient = _operator(query, *others[:4], True)
        ctx.save_for_backward(gradient.to(query.dtype))
        constant = (count, gradient) if ctx.needs_input_grad[0] else (log_sum, count, gradient)
        ctx.mark_non_differentiable(*constant)
        return log_sum, count, gradient

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad), None, None, None, None, None


_operator = _common.operator("kde_streamed", _whole_pass, _fake, _TracedStreamed, of="kde_log_prob")
