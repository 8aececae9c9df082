"""Defines the adversarial autoencoder, whose encoder learns to make codes that look like samples of the target."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import softplus

from .._extras import train_extra
from .._numbers import integer, not_negative
from ..data import Batch
from ..targets import Target
from .autoencoder import Autoencoder, reconstruction_error
from .base import checked
from .networks import linear_stack

with train_extra():
    from lightning.pytorch.core.optimizer import LightningOptimizer


class AAE(Autoencoder):
    """Trains an adversarial autoencoder: a discriminator teaches the encoder to make codes like samples of the target.

    The discriminator D gives the probability that a code is a sample of the target. Every minibatch trains two parts in
    turn, each of which lowers its loss:

        the discriminator:        -mean log D(samples of the target) - mean log(1 - D(codes))
        encoder and decoder:      mean squared error per value + weight * -mean log D(codes)

    The encoder's adversarial loss is the one that does not saturate.

    It logs per step `loss/reconstruction` (error per value), `loss/latent` (-log D(codes) in nats) and
    `loss/discriminator` (its loss in nats). Where the discriminator cannot tell codes from samples, the last two are
    log 2 = 0.69 and 2 log 2 = 1.39. Per epoch it logs the measures of `Autoencoder`.

    Args:
        encoder, decoder, latent_dim: as in `Autoencoder`.
        weight: the weight of the encoder's adversarial loss relative to the error per value.
        target: the distribution that the codes are to follow; None is the standard normal.
        discriminator_hidden: widths of the discriminator's hidden layers.
        normalize_codes: normalise the codes to the target's mean and variance, by batch normalisation without learned
            scale after the encoder.
        learning_rate, decay, betas: as in `GenerativeModel`, for both Adams: one trains encoder and decoder, one the
            discriminator.

    Raises:
        ValueError: if the weight is negative, the target has another dimension, or a width is below 1.

    Source: Makhzani, Shlens, Jaitly, Goodfellow, Frey, "Adversarial Autoencoders", https://arxiv.org/abs/1511.05644.

    Example:
        >>> import torch
        >>> from kdejsd.models import AAE, FC
        >>> _ = torch.manual_seed(0)
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = AAE(networks.encoder, networks.decoder, latent_dim=2)
        >>> codes = model.encode(torch.rand(100, 1, 8, 8))
        >>> print(f"{model.adversarial_loss(codes):.1f}")  # log 2: the untrained discriminator cannot tell
        0.7
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        weight: float = 0.02,
        target: Target | None = None,
        discriminator_hidden: Sequence[int] = (256, 256, 256),
        normalize_codes: bool = False,
        learning_rate: float = 2e-4,
        decay: bool = True,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        weight = not_negative("weight", weight)
        discriminator_hidden = [integer("discriminator_hidden", width, 1) for width in discriminator_hidden]
        if not discriminator_hidden:
            raise ValueError("discriminator_hidden must have one width at least, got none")
        super().__init__(encoder, decoder, latent_dim, learning_rate, decay, betas)
        self._aim_at(target, normalize_codes)
        self.discriminator = nn.Sequential(*linear_stack([latent_dim, *discriminator_hidden, 1]), nn.Flatten(0))
        self.weight = weight
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return self.adam(chain(self.encoder.parameters(), self.decoder.parameters()), self.discriminator.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        examples = checked(batch)[0]
        autoencoder, discriminator = cast("list[LightningOptimizer]", self.optimizers())
        codes = self.encode(examples)

        told = self.discriminator_loss(codes.detach(), self.target_samples(len(codes)))
        self.log_terms({"loss/discriminator": told})
        discriminator.zero_grad()
        self.manual_backward(told)
        # Not discriminator.step(), which the trainer would count as a training step of its own.
        self.trainer.strategy.optimizer_step(discriminator.optimizer, lambda: None)

        error = reconstruction_error(self.decode(codes), examples)
        with autoencoder.toggle_model():  # the discriminator's weights get no gradient
            latent = self.adversarial_loss(codes)
            self.log_terms({"loss/reconstruction": error, "loss/latent": latent})
            autoencoder.zero_grad()
            self.manual_backward(error + self.weight * latent)
            autoencoder.step()
        self.step_schedulers()

    def discriminator_loss(self, codes: Tensor, samples: Tensor) -> Tensor:
        """Returns -mean log D(samples) - mean log(1 - D(codes)) in nats, 0-dim; the samples [n, l] are the target's."""
        return softplus(-self.discriminator(samples)).mean() + softplus(self.discriminator(codes)).mean()

    def adversarial_loss(self, codes: Tensor) -> Tensor:
        """Returns -mean log D(codes) in nats, 0-dim."""
        return softplus(-self.discriminator(codes)).mean()

    def settings(self) -> dict[str, object]:
        return super().settings() | {"weight": self.weight}
