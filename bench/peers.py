"""What kdejsd's jsd_loss is compared with. README.md says of each what it is and where its memory goes.

A provider is a function with jsd_loss's contract: (codes [n, l], lagged [m, l], bandwidth, reduction) -> loss, with the
gradient for the codes through autograd. Peers differ in how they get log p_e; what follows it is the same for all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

import kdejsd
from kdejsd import reference

LogProb = Callable[[Tensor, Tensor, float], Tensor]
Numbers = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Provider:
    name: str
    loss: Callable[[Tensor, Tensor, float, str], Tensor]
    held: Numbers = lambda n, m, dim: 0  # numbers that value + gradient hold at once, beside inputs and results
    compiles: bool = False  # the first call of a size builds something
    level: str | None = None  # instruction set of kdejsd's kernels
    for_centers: bool = True  # has their gradient too


def providers(device: str, levels: list[str]) -> dict[str, Provider | str]:
    """All of them by name, or why one is not there."""
    found: dict[str, Provider | str] = {}
    if device == "cuda":
        found["kdejsd"] = Provider("kdejsd", _ours)
        found["kdejsd TF32"] = Provider("kdejsd TF32", _ours_in_tf32)
    else:
        for level in levels:
            name = "kdejsd" if level == levels[0] else f"kdejsd {level}"
            found[name] = Provider(name, _ours, level=level)
    for name, log_prob, held, compiles in (
        ("gemm", gemm_log_prob, lambda n, m, dim: 4 * n * m, False),
        ("cdist", cdist_log_prob, lambda n, m, dim: 4 * n * m, False),
        ("gemm compiled", gemm_compiled_log_prob, lambda n, m, dim: 3 * n * m, True),
        ("stream compiled", stream_log_prob, lambda n, m, dim: 2**21, True),
        ("attention", attention_log_prob, lambda n, m, dim: 2 * m * (dim + 8), False),
    ):
        for_centers = log_prob not in (stream_log_prob, attention_log_prob)
        found[name] = Provider(name, _loss(log_prob), held, compiles, for_centers=for_centers)
    found["differences"] = Provider("differences", _differences, lambda n, m, dim: 3 * n * m * dim)
    for name, make, held, compiles in (
        ("pykeops", _pykeops, lambda n, m, dim: 0, True),
        ("torch-kde", _torch_kde, lambda n, m, dim: 3 * n * m * dim, False),
    ):
        try:
            found[name] = Provider(name, _loss(make()), held, compiles)
        except ImportError:
            found[name] = "not installed"
    return found


def _ours(codes: Tensor, lagged: Tensor, bandwidth: float, reduction: str) -> Tensor:
    return kdejsd.jsd_loss(codes, lagged, bandwidth, reduction=reduction)


def _ours_in_tf32(codes: Tensor, lagged: Tensor, bandwidth: float, reduction: str) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _ours(codes, lagged, bandwidth, reduction)
    finally:
        torch.set_float32_matmul_precision(before)


def _loss(log_prob: LogProb) -> Callable[[Tensor, Tensor, float, str], Tensor]:
    def loss(codes: Tensor, lagged: Tensor, bandwidth: float, reduction: str) -> Tensor:
        log_target = -0.5 * codes.square().sum(-1) - 0.5 * codes.shape[-1] * math.log(2 * math.pi)
        terms = math.log(2) - softplus(log_target - log_prob(codes, lagged, bandwidth))
        return terms.mean() if reduction == "mean" else terms

    return loss


def _constant(lagged: Tensor, bandwidth: float) -> float:
    m, dim = lagged.shape
    return -math.log(m) - dim * (math.log(bandwidth) + 0.5 * math.log(2 * math.pi))


# ----------------------------------------------------------------------------------------------------------------------
# Plain PyTorch: an n x m array, autograd does the rest


def _gemm_log_sum(codes: Tensor, lagged: Tensor, exponent: Tensor) -> Tensor:
    squared_distance = codes.square().sum(-1, keepdim=True) + lagged.square().sum(-1) - 2 * codes @ lagged.T
    return torch.logsumexp(squared_distance * exponent, -1)


def gemm_log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
    """Squared distances from |z'|^2 + |z_i|^2 - 2 z'.z_i: how one writes it first."""
    return _gemm_log_sum(codes, lagged, codes.new_tensor(-0.5 / bandwidth**2)) + _constant(lagged, bandwidth)


def gemm_compiled_log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
    log_sum = _compiled(_gemm_log_sum)(codes, lagged, codes.new_tensor(-0.5 / bandwidth**2))
    return log_sum + _constant(lagged, bandwidth)  # type: ignore[no-any-return]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def cdist_log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
    """Distances from differences, as torch.cdist takes them when told not to use a product."""
    distance = torch.cdist(codes, lagged, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.logsumexp(distance.square() * (-0.5 / bandwidth**2), -1) + _constant(lagged, bandwidth)


def _differences(codes: Tensor, lagged: Tensor, bandwidth: float, reduction: str) -> Tensor:
    """kdejsd's own reference: all n x m x l differences."""
    return reference.kde.jsd_loss(codes, lagged, bandwidth, reduction=reduction)


# ----------------------------------------------------------------------------------------------------------------------
# One pass over the centers that gives value and score, as kdejsd does it, from PyTorch's own parts


class _WithScore(torch.autograd.Function):
    """log p_e by a function that returns the score d log p_e / dz' with it."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, lagged: Tensor, bandwidth: float, both: Any) -> Tensor:
        log_prob, score = both(codes, lagged, bandwidth)
        ctx.save_for_backward(score)
        return log_prob  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad.unsqueeze(-1) * ctx.saved_tensors[0], None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T. On the CPU by oneDNN, which has AVX-512 kernels for every maker's processors (MKL has not)."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def _add_chunk(products: Tensor, offset: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The elementwise part of a step: weights of a chunk, the new maximum and sum, and by what the old ones shrink."""
    exponents = products + offset
    new_top = torch.maximum(top, exponents.amax(-1, keepdim=True))
    weights = torch.exp(exponents - new_top)
    shrink = torch.exp(top - new_top)
    return weights, new_top, total * shrink + weights.sum(-1, keepdim=True), shrink


def _stream(codes: Tensor, lagged: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Online log-sum-exp over chunks of centers: two matrix products and one fused elementwise step for each."""
    n, m = codes.shape[0], lagged.shape[0]
    size = max(256, (2**20 if codes.device.type == "cpu" else 2**24) // n)
    precision = bandwidth**-2
    scaled = codes * precision
    offset = lagged.square().sum(-1) * (-0.5 * precision)
    top = codes.new_full((n, 1), -torch.finfo(codes.dtype).max)
    total, mean = codes.new_zeros(n, 1), torch.zeros_like(codes)
    for first in range(0, m, size):
        chunk = lagged[first : first + size]
        products = _product(scaled, chunk)
        weights, top, total, shrink = _compiled(_add_chunk)(products, offset[first : first + size], top, total)
        mean = mean * shrink + _product(weights, chunk.T.contiguous())
    log_prob = (top + total.log()).squeeze(-1) - codes.square().sum(-1) * (0.5 * precision)
    return log_prob + _constant(lagged, bandwidth), (mean / total - codes) * precision


def stream_log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
    return _WithScore.apply(codes, lagged, bandwidth, _stream)  # type: ignore[no-untyped-call, no-any-return]


def _attention(codes: Tensor, lagged: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Attention whose logits are log-densities up to a term per query: z'.z_i / h^2 - |z_i|^2 / (2 h^2).

    The second summand is one more feature of the key, beside a 1 in the query. With the centers as values the output is
    their weighted mean, hence the score. The value of log p_e is the log-sum-exp of the logits, which
    scaled_dot_product_attention computes and does not return: its operators are called by their own names.
    """
    n, dim = codes.shape
    m = lagged.shape[0]
    precision = bandwidth**-2
    width = 8 * math.ceil((dim + 1) / 8)  # the CUDA kernels ask for multiples of 8
    # Few queries leave most of a GPU idle: shares of the centers go side by side as heads, and are merged below.
    heads = 16 if codes.is_cuda and m % 16 == 0 else 1
    query, key = codes.new_zeros(n, width), lagged.new_zeros(m, width)
    query[:, :dim], query[:, dim] = codes * precision, 1
    key[:, :dim], key[:, dim] = lagged, lagged.square().sum(-1) * (-0.5 * precision)
    query, key = query.expand(1, heads, n, width), key.reshape(1, heads, m // heads, width)
    if codes.is_cuda:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, key, None, True, scale=1.0)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, scale=1.0)
    means, log_sums = found[0][0, :, :, :dim], found[1][0, :, :n]
    log_sum = torch.logsumexp(log_sums, 0)
    mean = ((log_sums - log_sum).exp().unsqueeze(-1) * means).sum(0)
    log_prob = log_sum - codes.square().sum(-1) * (0.5 * precision) + _constant(lagged, bandwidth)
    return log_prob, (mean - codes) * precision


def attention_log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
    return _WithScore.apply(codes, lagged, bandwidth, _attention)  # type: ignore[no-untyped-call, no-any-return]


# ----------------------------------------------------------------------------------------------------------------------
# Other packages


def _pykeops() -> LogProb:
    # Its own flags leave the processor's vector units unused. These are -ffast-math's, but for the one that switches
    # denormals off in the whole process, and so for the other providers.
    os.environ.setdefault(
        "CXXFLAGS",
        "-O3 -march=native -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -freciprocal-math",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it says there that it found no CUDA
        import pykeops
        from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)

    def log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
        squared_distance = ((LazyTensor(codes[:, None]) - LazyTensor(lagged[None])) ** 2).sum(-1)
        exponents = squared_distance * (-0.5 / bandwidth**2)
        return exponents.logsumexp(dim=1).squeeze(-1) + _constant(lagged, bandwidth)  # type: ignore[no-any-return]

    return log_prob


def _torch_kde() -> LogProb:
    from torchkde import KernelDensity

    def log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
        return KernelDensity(bandwidth=bandwidth, kernel="gaussian").fit(lagged).score_samples(codes)  # type: ignore[no-any-return]

    return log_prob
