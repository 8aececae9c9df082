"""Defines the plain autoencoder, which lacks the latent term of the other models."""

from __future__ import annotations

from torch import Tensor, nn

from ..data import Batch
from ..targets import Target
from .autoencoder import Autoencoder, reconstruction_error
from .base import checked


class AE(Autoencoder):
    """Trains a plain autoencoder: its loss is the error per value, and nothing makes its codes follow the target.

    Use it to see which reconstruction error is possible without a latent term. It logs `loss/reconstruction` per step,
    and per epoch the measures of `Autoencoder`.

    Args:
        encoder, decoder, latent_dim, learning_rate, decay, betas: as in `Autoencoder`.
        target: the distribution that the codes are compared with and whose samples `sample` decodes; None is the
            standard normal.
        normalize_codes: normalise the codes to the target's mean and variance, by batch normalisation without learned
            scale after the encoder.

    Raises:
        ValueError: if the target has another dimension.

    Example:
        >>> import torch
        >>> from kdejsd.models import AE, FC
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
        >>> model.encode(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        target: Target | None = None,
        normalize_codes: bool = False,
        learning_rate: float = 1e-3,
        decay: bool = True,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        super().__init__(encoder, decoder, latent_dim, learning_rate, decay, betas)
        self._aim_at(target, normalize_codes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        examples = checked(batch)[0]
        error = reconstruction_error(self.reconstruct(examples), examples)
        self.log_terms({"loss/reconstruction": error})
        return error
