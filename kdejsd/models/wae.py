"""Defines WAE-MMD, an autoencoder that matches minibatches of codes to the target by maximum mean discrepancy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._numbers import not_negative
from ..data import Batch
from ..targets import Target, finite_moments
from .autoencoder import Autoencoder, reconstruction_error
from .base import checked

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the kernels, times the mean squared distance of target samples


class WAE(Autoencoder):
    """Trains a Wasserstein autoencoder, which matches codes to the target by the maximum mean discrepancy (MMD).

    The loss is the mean squared error per value + weight * `imq_mmd` between the minibatch's codes and as many samples
    of the target. (The authors' code takes the sum over values, times 0.05, and the weight 10. For 28 x 28 images this
    equals a weight of 0.26 with the mean. The default here is larger; with it the error is about that of an AAE or
    GEN.)

    It logs per step `loss/reconstruction` (error per value) and `loss/latent` (the MMD; for codes that follow the
    target it is 0 on average), and per epoch the measures of `Autoencoder`.

    Args:
        encoder, decoder, latent_dim, learning_rate, decay, betas: as in `Autoencoder`.
        weight: lambda, the weight of the MMD relative to the error per value.
        target: the distribution that the codes are to follow; None is the standard normal.
        normalize_codes: normalise the codes to the target's mean and variance, by batch normalisation without learned
            scale after the encoder.

    Raises:
        ValueError: if the weight is negative, or the target has another dimension.

    Source: Tolstikhin, Bousquet, Gelly, Schoelkopf, "Wasserstein Auto-Encoders", https://arxiv.org/abs/1711.01558,
    Algorithm 2.

    Example:
        >>> import torch
        >>> from kdejsd.models import FC, WAE
        >>> from kdejsd.models.wae import imq_mmd
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = WAE(networks.encoder, networks.decoder, latent_dim=2)
        >>> codes, samples = model.encode(torch.rand(100, 1, 8, 8)), model.target_samples(100)
        >>> bool(imq_mmd(codes, samples, model.mean_square) > 1)  # untrained, the codes are all at one place
        True
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        weight: float = 1.0,
        target: Target | None = None,
        normalize_codes: bool = False,
        learning_rate: float = 1e-3,
        decay: bool = True,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        weight = not_negative("weight", weight)
        super().__init__(encoder, decoder, latent_dim, learning_rate, decay, betas)
        self._aim_at(target, normalize_codes)
        self.weight = weight
        self.mean_square = 2 * float(finite_moments(self.target, "the scale of WAE's kernel")[1].sum())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        examples = checked(batch)[0]
        codes = self.encode(examples)
        error = reconstruction_error(self.decode(codes), examples)
        latent = imq_mmd(codes, self.target_samples(len(codes)), self.mean_square)
        self.log_terms({"loss/reconstruction": error, "loss/latent": latent})
        return error + self.weight * latent

    def settings(self) -> dict[str, object]:
        return super().settings() | {"weight": self.weight}


def imq_mmd(codes: Tensor, samples: Tensor, mean_square: float) -> Tensor:
    """Estimates the squared maximum mean discrepancy between two distributions without bias, from samples of them.

    The kernel is the sum of the inverse multiquadratic kernels C / (C + |x - y|^2), with C = mean_square times each of
    `SCALES`.

    Args:
        codes: [n, l], from the one distribution, n at least 2.
        samples: [k, l], from the other, k at least 2.
        mean_square: the mean squared distance between two samples of the target: 2 l for the standard normal.

    Returns:
        A 0-dim tensor, differentiable. For equal distributions it is 0 on average, so often negative.

    Raises:
        ValueError: if there are fewer than 2 codes or samples.
    """
    n, k = len(codes), len(samples)
    if min(n, k) < 2:
        raise ValueError(f"codes and samples must be at least 2 each, got {n} and {k}")
    own, others = _kernel(codes, codes, mean_square), _kernel(samples, samples, mean_square)
    within = (own.sum() - own.trace()) / (n * (n - 1)) + (others.sum() - others.trace()) / (k * (k - 1))
    return within - 2 * _kernel(codes, samples, mean_square).mean()


def _kernel(x: Tensor, y: Tensor, mean_square: float) -> Tensor:
    squared = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
    kernel = torch.zeros_like(squared)
    for scale in SCALES:
        kernel = kernel + scale * mean_square / (scale * mean_square + squared)
    return kernel
