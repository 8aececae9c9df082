"""Variational autoencoder, with the standard normal or a flow as its prior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._numbers import positive
from ..data import Batch
from ..targets import StandardNormal
from .autoencoder import Autoencoder, reconstruction_error
from .base import checked, noise_like
from .flows import Inverse, RealNVP
from .networks import Network


class VAE(Autoencoder):
    """The variational autoencoder (Kingma, Welling, arXiv 1312.6114), with a diagonal normal posterior.

    With pixels that are normal around the decoder's with a variance s^2, the negative evidence lower bound of an image
    of D pixels, times 2 s^2 / D and but for constants, is

        mean squared error per pixel + (2 s^2 / D) KL(posterior | prior)

    and that is the loss; the KL is a sum over the latent dimensions and a mean over the images, in nats. With the
    standard normal prior it is in closed form. With a flow f the prior is the law of f^-1(u), u standard normal, and
    the KL is the negative entropy of the posterior, in closed form, less log p(z) = log N(f(z); 0, I) + log|det J_f(z)|
    of one sample of the posterior.

    The codes of images are f(posterior mean), and a code u is decoded as decoder(f^-1(u)): codes are always to follow
    the standard normal, and every measure, picture and sample is made from them as from other models' codes (the
    Jensen-Shannon divergence of two laws does not change under f). What matches the prior in a good VAE is not the law
    of the means but that of samples of the posterior (`posterior_samples`): `val_jsd` is theirs.

    Logged per step: `rec` (error per pixel, of a sample of the posterior) and `latent` (the KL, nats). Per epoch what
    `Autoencoder` logs; `val_rec` is of the means.

    Args:
        encoder: images [n, C, H, W] -> [n, 2 l], the posterior's means and the logarithms of its variances.
        decoder: z [n, l] -> images [n, C, H, W].
        latent_dim, learning_rate, decay, betas: as in `Autoencoder`.
        observation_variance: s^2. The default, 1/2, is the common loss sum of squared errors + KL. The images are most
            likely with what the error per pixel comes to, but so little weight of the prior leaves the codes far from
            it for thousands of steps.
        prior: "normal", or "flow" for a `RealNVP` that is learned along.
        flow_layers: of the flow.
        flow_hidden: width of the flow's networks.

    Raises:
        ValueError: an observation_variance that is not positive and finite, an unknown prior, and what `RealNVP`
            refuses.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        observation_variance: float = 0.5,
        prior: Literal["normal", "flow"] = "normal",
        flow_layers: int = 6,
        flow_hidden: int = 64,
        learning_rate: float = 1e-3,
        decay: bool = True,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        observation_variance = positive("observation_variance", observation_variance)
        if prior not in ("normal", "flow"):
            raise ValueError(f'prior must be "normal" or "flow", got {prior!r}')
        super().__init__(encoder, decoder, latent_dim, learning_rate, decay, betas)
        self.target = StandardNormal(latent_dim)
        self.observation_variance = observation_variance
        self.flow = RealNVP(latent_dim, flow_layers, flow_hidden) if prior == "flow" else None

    @staticmethod
    def build_networks(
        network: Network, image_shape: Sequence[int], latent_dim: int, settings: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder of two pairs: the encoder's is one of twice the latent dimension."""
        return network(image_shape, 2 * latent_dim).encoder, network(image_shape, latent_dim).decoder

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances, each [n, l], of the posterior of z for images [n, C, H, W].

        Raises:
            ValueError: an encoder whose output has another shape.
        """
        mean, log_variance = self._encoded(images, 2 * self.latent_dim).chunk(2, 1)
        return mean, log_variance

    def _code(self, z: Tensor) -> Tensor:
        if self.flow is None:
            return z
        codes: Tensor = self.flow(z)[0]
        return codes

    def encode(self, images: Tensor) -> Tensor:
        """Codes [n, l] of images [n, C, H, W]: the posterior's means, or what the flow makes of them."""
        return self._code(self.posterior(images)[0])

    def posterior_samples(self, images: Tensor, rng: torch.Generator) -> Tensor:
        mean, log_variance = self.posterior(images)
        return self._code(mean + (log_variance / 2).exp() * noise_like(mean, rng))

    @property
    def generator(self) -> nn.Module:  # type: ignore[override]
        """The decoder, after the flow's inverse where there is a flow."""
        return self.decoder if self.flow is None else nn.Sequential(Inverse(self.flow), self.decoder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = checked(batch)[0]
        mean, log_variance = self.posterior(images)
        z = mean + (log_variance / 2).exp() * noise_like(mean, self.rng())
        error = reconstruction_error(self.decoder(z), images)
        if self.flow is None:
            latent = kl_to_normal(mean, log_variance).mean()
        else:
            latent = -(normal_entropy(log_variance) + self.flow.log_prob(z)).mean()
        self.log_dict({"rec": error, "latent": latent}, prog_bar=True)
        latent = latent + self.penalty(images, mean)
        return error + 2 * self.observation_variance / images[0].numel() * latent

    def penalty(self, images: Tensor, mean: Tensor) -> Tensor | float:
        """What a kind of VAE adds to the KL, in nats: nothing here. `mean` [n, l] of the posterior of the images."""
        return 0.0

    def settings(self) -> dict[str, object]:
        prior = "normal" if self.flow is None else "flow"
        return super().settings() | {"observation_variance": self.observation_variance, "prior": prior}


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence in nats of the normals with these means and log-variances, each [n, l], from the standard normal;
    summed over the dimensions, [n]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def normal_entropy(log_variance: Tensor) -> Tensor:
    """Entropy in nats of the normals with these log-variances [n, l], summed over the dimensions, [n]."""
    return 0.5 * (log_variance + 1 + math.log(2 * math.pi)).sum(1)
