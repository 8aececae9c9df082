"""Scores how novel an example is by the density that a trained autoencoder gives to data."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._modes import Map, evaluating
from ._numbers import integer, positive
from .targets import StandardNormal

# An angle of this many roundings between the Jacobian's columns counts as 0: sums over a layer's inputs have some tens.
_ROUNDINGS = 100


class Density(Protocol):
    """Describes an object with a log-density: a target, a torch Distribution over vectors, a LaggedKDE."""

    def log_prob(self, z: Tensor, /) -> Tensor: ...


class NoveltyScore(NamedTuple):
    """Holds the novelty of n examples and its parts: score = -(latent - log_det + residual).

    Attributes:
        score: [n], negative log-density in data space, in nats; higher is more novel.
        latent: [n], log-density of the code z' under the distribution of the codes, in nats.
        log_det: [n], log sqrt det(J^T J) of the decoder's Jacobian J at z', in nats: the logarithm of the factor by
            which the decoder stretches volumes there. -inf where J has not full rank.
        residual: [n], log-density of the part of the example that the reconstruction misses, in nats.
        reconstruction_error: [n], mean squared error per value (pixel).

    Example:
        >>> import kdejsd, torch
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> found = kdejsd.novelty_score(lambda x: x[:, :1], lambda z: torch.cat([z, 0 * z], 1), x, variance=1.0)
        >>> found.reconstruction_error  # the second example lies off the line that the decoder reaches
        tensor([0., 2.])
    """

    score: Tensor
    latent: Tensor
    log_det: Tensor
    residual: Tensor
    reconstruction_error: Tensor


@torch.no_grad()
def novelty_score(
    encoder: Map, decoder: Map, x: Tensor, *, variance: float, target: Density | None = None, chunk: int = 1000
) -> NoveltyScore:
    """Scores the novelty of examples: the negative log-density that an autoencoder gives them in data space, in nats.

    Use it to find examples unlike those that the autoencoder was trained on. Higher scores are more novel. With the
    code z' = encoder(x) and the reconstruction x' = decoder(z'), the score is minus

        log p(x) = log p(z') - log|det A| + log p(x|x')

    The decoder maps the latent space onto an l-dimensional surface in the D-dimensional space of the data. The second
    term accounts for how the decoder stretches volumes: A is its Jacobian J [D, l] at z', as a map onto the tangent
    space of the surface. log|det A| = 1/2 log det(J^T J) comes from a QR decomposition in float64. The third term is
    about the rest, x - x'. It lies across the surface, in D - l dimensions, and is taken to be normal there:

        log p(x|x') = -(D - l)/2 log(2 pi variance) - |x - x'|^2 / (2 variance)

    The number of dimensions D - l is ours; the same division is in Generative Probabilistic Novelty Detection.

    The score is exact for a linear decoder and an encoder that projects onto its images, with x = decoder(z) + noise
    across the surface. Otherwise it is an approximation. It leaves out the curvature of the surface, and that x - x' of
    a trained encoder is not quite perpendicular to it.

    Some decoders squeeze the surroundings of z' into fewer than l dimensions (saturated or dead units). log_det and the
    score are then -inf: the density has no finite value, and the example cannot be compared with others. This counts as
    the case where a column of J lies within 100 roundings of the span of those before it. NaN in an example gives NaN
    for that example.

    Modules, and those whose methods are given, are in evaluation mode during the call. No gradient is kept. Everything
    but decompositions and sums is computed in the dtype of x.

    Args:
        encoder: examples [n, ...] -> codes [n, l]. For a GEN pass the method `encode`; its attribute `encoder` leaves
            out the codes' normalisation.
        decoder: codes [n, l] -> examples [n, ...], of more than l values. It must treat each code by itself and consist
            of operations that `torch.func.vmap` and `torch.func.jvp` take.
        x: [n, ...], floating, on the models' device.
        variance: the residual's variance in each of the D - l dimensions: `residual_variance` of training examples.
        target: the distribution of the codes: anything with log_prob, from codes [n, l] to nats [n]. None is the
            standard normal. A LaggedKDE counts an example's own lagged copy if it is among its codes.
        chunk: the number of decodings at a time, which bounds the memory. An example takes l + 1 of them, and l D
            values in float64.

    Returns:
        The score, its three parts and the reconstruction error, each [n] in the dtype of x.

    Raises:
        ValueError: if codes or reconstructions have another shape, l is not below D, the variance is not positive and
            finite, or the chunk is below 1.
        TypeError: if x is no floating-point tensor, or the target has no log_prob.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, section
    5.5, equations 10 and 11; Pidhorskyi, Almohsen, Doretto, "Generative Probabilistic Novelty Detection with
    Adversarial Autoencoders", https://arxiv.org/abs/1807.02588, section 3.

    Example:
        >>> import kdejsd, torch
        >>> encoder = lambda x: x[:, :2]
        >>> decoder = lambda z: torch.nn.functional.pad(z, (0, 1))  # reaches the plane x_3 = 0
        >>> x = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        >>> kdejsd.novelty_score(encoder, decoder, x, variance=0.1).score
        tensor([ 1.6055,  6.1055, 46.6055])
    """
    chunk = _checked_chunk(x, chunk)
    variance = positive("variance", variance)
    if target is not None and not hasattr(target, "log_prob"):
        raise TypeError(f"target must have log_prob(codes), got {type(target).__name__}")
    if not len(x):
        return NoveltyScore(*x.new_zeros(5, 0))
    parts = []
    with evaluating(encoder, decoder):
        dim = _codes(encoder, x[:1]).shape[1]
        law = StandardNormal(dim) if target is None else target
        for part in x.split(max(1, chunk // dim)):
            z = _codes(encoder, part)
            squared, count = _squared_residual(decoder, z, part)
            latent = law.log_prob(z).double()
            log_det = _log_det(_jacobian(decoder, z, chunk))
            residual = -0.5 * (count - dim) * math.log(2 * math.pi * variance) - squared / (2 * variance)
            score = -(latent - log_det + residual)
            parts.append(torch.stack([score, latent, log_det, residual, squared / count]).to(x.dtype))
    return NoveltyScore(*torch.cat(parts, 1))


@torch.no_grad()
def residual_variance(encoder: Map, decoder: Map, x: Tensor, *, chunk: int = 1000) -> float:
    """Estimates the variance that `novelty_score` needs: the mean of |x - x'|^2 / (D - l) over training examples.

    It is the maximum-likelihood estimate for that function's residual.

    Args:
        encoder, decoder: as in `novelty_score`.
        x: [n, ...], n at least 1, examples that the models were trained on.
        chunk: the number of examples at a time.

    Returns:
        The variance per dimension across the decoder's surface, a float.

    Raises:
        ValueError, TypeError: as in `novelty_score`, and if there are no examples.

    Example:
        >>> import kdejsd, torch
        >>> x = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 0.5])
        >>> variance = kdejsd.residual_variance(lambda x: x[:, :2], lambda z: torch.nn.functional.pad(z, (0, 1)), x)
        >>> round(variance, 2)
        0.25
    """
    chunk = _checked_chunk(x, chunk)
    if not len(x):
        raise ValueError("x must have at least one example, got none")
    total = 0.0
    with evaluating(encoder, decoder):
        for part in x.split(chunk):
            z = _codes(encoder, part)
            squared, count = _squared_residual(decoder, z, part)
            total += float(squared.sum()) / (count - z.shape[1])
    return total / len(x)


def _codes(encoder: Map, x: Tensor) -> Tensor:
    z = encoder(x)
    if z.ndim != 2 or len(z) != len(x):
        raise ValueError(f"encoder must return codes [{len(x)}, l], got {list(z.shape)}")
    count = x[0].numel()
    if not 1 <= z.shape[1] < count:
        raise ValueError(
            f"encoder must return codes of at least 1 dimension and less than an example's {count} values, "
            f"got {z.shape[1]}"
        )
    return z


def _squared_residual(decoder: Map, z: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Returns |x - x'|^2 as [n] in float64, and D."""
    reconstruction = decoder(z)
    if reconstruction.shape != x.shape:
        raise ValueError(f"decoder must return the shape of x, {list(x.shape)}, got {list(reconstruction.shape)}")
    residual = (x - reconstruction).flatten(1)
    return residual.double().square().sum(1), residual.shape[1]


def _jacobian(decoder: Map, z: Tensor, chunk: int) -> Tensor:
    """Returns the decoder's Jacobian at each of the codes z [n, l], as [n, D, l]."""

    def derivative(direction: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(decoder, (z,), (direction.expand_as(z),))[1]
        return tangent.flatten(1)

    directions = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    columns: Tensor = torch.func.vmap(derivative, out_dims=2, chunk_size=max(1, chunk // len(z)))(directions)
    return columns


def _log_det(jacobian: Tensor) -> Tensor:
    """Returns log sqrt det(J^T J) of J [n, D, l] as [n] in float64; -inf where a column depends on those before it."""
    triangle = torch.linalg.qr(jacobian.double(), mode="r").R
    height = triangle.diagonal(dim1=1, dim2=2).abs()  # of each column above the span of those before it
    length = torch.linalg.vector_norm(triangle, dim=1)
    dependent = height <= _ROUNDINGS * torch.finfo(jacobian.dtype).eps * length
    log_det: Tensor = height.masked_fill(dependent, 0).log().sum(1)
    return log_det


def _checked_chunk(x: Tensor, chunk: int) -> int:
    """Returns the chunk, if it and x are valid."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
    if x.ndim < 2:
        raise ValueError(f"x must have shape [n, ...], got {list(x.shape)}")
    return integer("chunk", chunk, 1)
