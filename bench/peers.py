"""The functions that kdejsd's jsd_loss is compared with. README.md says of each what it is and where its memory goes.

A provider is a function with jsd_loss's contract: (codes [n, l], lagged [m, l], bandwidth, reduction) -> loss, with the
gradient for the codes through autograd. Peers differ in how they get log p_e; what follows it is the same for all.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from harness import error_line
from torch import Tensor
from torch.nn.functional import softplus

import kdejsd
from kdejsd import reference

LogProb = Callable[[Tensor, Tensor, float], Tensor]
Numbers = Callable[[int, int, int], float]


class Tolerance(NamedTuple):
    """Errors beyond which a provider is wrong."""

    value: float  # of a term, in nats; relative to the largest term where that is above 1
    gradient: float  # |g - truth| / |truth|


FLOAT32 = Tolerance(1e-3, 1e-2)
# Products in float16, and in TF32, keep 11 bits of a number. Rounding moves a coordinate by up to 2^-11 of itself,
# hence an exponent by some 2^-11 |z'| |z' - z_i| / h^2, and the value and the weights by as much. Emulated at sizes
# like the benchmark's, this comes to 5e-3 of the largest term and 4e-3 of the gradient from l = 4 on: more than what
# float32 is allowed for a value. Where h is small it is more, 9e-3 and 5e-2 at l = 2 and a gradient's 2e-1 at l = 1: so
# few bits are wrong there, and the row is to say so. A product that leaves out one coordinate is still found, as it
# costs the gradient about l^(-1/2) of itself, 6e-2 at l = 256.
ELEVEN_BITS = Tolerance(1e-2, 5e-2)


@dataclass(frozen=True)
class Provider:
    name: str
    loss: Callable[[Tensor, Tensor, float, str], Tensor]
    held: Numbers = lambda n, m, dim: 0  # numbers that value + gradient hold at once, beside inputs and results
    compiles: bool = False  # the first call of a size builds something
    level: str | None = None  # instruction set of kdejsd's kernels
    for_centers: bool = True  # has their gradient too
    tolerance: Tolerance = FLOAT32
    tuning: Mapping[str, int] = field(default_factory=dict)  # of kdejsd's CUDA kernels, beside the usual one
    unfit: Callable[[int, int, int], str] = lambda n, m, dim: ""  # why it cannot take a size


def providers(device: str, levels: list[str], tunings: Iterable[tuple[str, int]] = ()) -> dict[str, Provider | str]:
    """All of them by name, or why one is not there; on CUDA with one for each tuning of kdejsd's kernels."""
    found: dict[str, Provider | str] = {}
    if device == "cuda":
        found["kdejsd"] = Provider("kdejsd", _ours)
        found["kdejsd float16"] = Provider("kdejsd float16", _ours_in_reduced_precision, tolerance=ELEVEN_BITS)
        for key, value in tunings:
            name = f"kdejsd {key}={value}"
            found[name] = Provider(name, _ours, tuning={key: value})
    else:
        for level in levels:
            name = "kdejsd" if level == levels[0] else f"kdejsd {level}"
            found[name] = Provider(name, _ours, level=level)
            if level == "amx":
                found["kdejsd bf16x2"] = Provider("kdejsd bf16x2", _ours_in_reduced_precision, level=level)
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
    for name, module, make, needs_cuda, options in (
        ("pykeops", "pykeops", _pykeops, False, {"compiles": True}),
        ("torch-kde", "torchkde", _torch_kde, False, {"held": lambda n, m, dim: 3 * n * m * dim}),
        ("flash-sinkhorn", "flash_sinkhorn", _flash_sinkhorn, True, {"held": lambda n, m, dim: 5 * m}),
        ("flash-sd-kde", "flash_sd_kde", _flash_sd_kde, True, {"held": _held_by_sd_kde, "unfit": _unfit_for_sd_kde}),
    ):
        if find_spec(module) is None:
            found[name] = "not installed"
            continue
        if needs_cuda:
            if device != "cuda":
                found[name] = "needs a CUDA device"
                continue
            # Triton builds its kernels at the first call. They take products in TF32.
            options = {**options, "compiles": True, "for_centers": False, "tolerance": ELEVEN_BITS}
        try:
            found[name] = Provider(name, _loss(make()), **options)
        except Exception as error:  # another version, or a package that cannot be loaded here
            found[name] = error_line(error)
    return found


def _ours(codes: Tensor, lagged: Tensor, bandwidth: float, reduction: str) -> Tensor:
    return kdejsd.jsd_loss(codes, lagged, bandwidth, reduction=reduction)


def _ours_in_reduced_precision(codes: Tensor, lagged: Tensor, bandwidth: float, reduction: str) -> Tensor:
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
    return _gemm_log_sum(codes, lagged, codes.new_full((), -0.5 / bandwidth**2)) + _constant(lagged, bandwidth)


def gemm_compiled_log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
    log_sum = _compiled(_gemm_log_sum)(codes, lagged, codes.new_full((), -0.5 / bandwidth**2))
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


class _ThenScore(torch.autograd.Function):
    """log p_e by one function, and the score d log p_e / dz' by another when it is asked for."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, lagged: Tensor, bandwidth: float, log_prob: LogProb, score: LogProb) -> Tensor:
        ctx.save_for_backward(codes, lagged)
        ctx.bandwidth, ctx.score = bandwidth, score
        return log_prob(codes, lagged, bandwidth)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad.unsqueeze(-1) * ctx.score(*ctx.saved_tensors, ctx.bandwidth), None, None, None, None


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


def _flash_sinkhorn() -> LogProb:
    """Optimal transport between the codes and the centers at temperature h^2 has the KDE's exponents in it.

    Its normal use is a loss, SamplesLoss, of many rounds; the kernels of one round are called here by their own names.
    """
    # The variant that divides the centers among blocks: the other one gives a block all of them, which leaves most of a
    # GPU idle where queries are few, and tries some 50 configurations for each size first.
    from flash_sinkhorn.kernels import sinkhorn_geomloss_online_grad_sqeuclid as displacements
    from flash_sinkhorn.kernels.sinkhorn_splitn_sqeuclid import flashsinkhorn_lse_splitn as negative_log_sums

    def log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
        variance = bandwidth**2
        # -h^2 logsumexp_i (z'.z_i / h^2 + bias_i). A block takes 128 queries and one slice of the centers, in tiles of
        # 128. The package makes 64 slices for its some thousand queries; here there are four blocks a multiprocessor.
        bias = lagged.square().sum(-1) * (-0.5 / variance)
        slots = 4 * torch.cuda.get_device_properties(codes.device).multi_processor_count
        slices = max(1, min(math.ceil(len(lagged) / 128), slots // math.ceil(len(codes) / 128)))
        found = negative_log_sums(codes, lagged, bias, variance, num_splits=slices, cost_scale=0.5)
        return (found + 0.5 * codes.square().sum(-1)) / -variance + _constant(lagged, bandwidth)

    def score(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
        # With weights of 1 and potentials of 0 it is a code minus the weighted mean of the centers. This kernel has no
        # variant that divides the centers among blocks.
        sides = (codes, lagged)
        weights, potentials = ([t.new_full((len(t),), number) for t in sides] for number in (1.0, 0.0))
        options = {"eps": bandwidth**2, "cost_scale": 0.5, "compute_grad_y": False}
        return displacements(*sides, *weights, *potentials, **options)[0] * -(bandwidth**-2)

    def both(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
        return _ThenScore.apply(codes, lagged, bandwidth, log_prob, score)  # type: ignore[no-untyped-call, no-any-return]

    return both


def _flash_sd_kde() -> LogProb:
    """Sums densities rather than their logarithms, as torch-kde does.

    Its normal use is an estimator on NumPy arrays, FlashSDKDE. Here is what that calls, kde_eval, which spares the way
    to the host and back; and where there is a gradient, what it moves samples by, which yields the density too.
    """
    from flash_sd_kde import kde_eval
    from kernels.flash_sd_kde import gaussian_kde_score_triton

    # In 16 dimensions the package offers these sums at the samples alone; the kernel takes other queries too, and is
    # started as the package starts it.
    from kernels.flash_sd_kde.empirical import _empirical_sd_kde_kernel_nd as add_sums

    def both(codes: Tensor, lagged: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        if codes.shape[1] == 1:
            sides = (lagged.squeeze(-1), codes.squeeze(-1))
            # By default it waits for the device, which nothing else here does.
            score, density, _ = gaussian_kde_score_triton(*sides, bandwidth, device=codes.device, synchronize=False)
            return density.log(), score.unsqueeze(-1)
        (n, dim), m = codes.shape, len(lagged)
        total, weighted = codes.new_zeros(n), codes.new_zeros(dim, n)
        add_sums[math.ceil(n / 64), math.ceil(m / 2048)](
            *(lagged, codes, total, weighted, m, n, lagged.stride(0), codes.stride(0), weighted.stride(0)),
            bandwidth**-2,
            **{"BLOCK_M": 64, "BLOCK_N": 2048, "BLOCK_K": dim, "num_warps": 2, "num_stages": 2},
        )
        return total.log() + _constant(lagged, bandwidth), ((weighted / total).T - codes) * bandwidth**-2

    def log_prob(codes: Tensor, lagged: Tensor, bandwidth: float) -> Tensor:
        if codes.dtype != torch.float32:
            raise TypeError("takes float32 alone")
        if torch.is_grad_enabled():
            return _WithScore.apply(codes, lagged, bandwidth, both)  # type: ignore[no-untyped-call, no-any-return]
        sides = (lagged, codes) if codes.shape[1] > 1 else (lagged.squeeze(-1), codes.squeeze(-1))
        return kde_eval(*sides, bandwidth, device=codes.device).log()  # type: ignore[no-any-return]

    return log_prob


def _unfit_for_sd_kde(n: int, m: int, dim: int) -> str:
    return "" if dim in (1, 16) else "takes l = 1 and l = 16 alone"


def _held_by_sd_kde(n: int, m: int, dim: int) -> float:
    return n * (math.ceil(m / 1024) + dim) + m
