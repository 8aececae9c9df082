"""Defines the variational autoencoder, with the standard normal or a flow as its prior."""

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
    """Trains a variational autoencoder with a diagonal normal posterior, and a normal or learned prior.

    The values of an example are taken to be normal around the decoder's output, with a variance s^2. The loss is the
    negative evidence lower bound of an example of D values, times 2 s^2 / D and without constants:

        mean squared error per value + (2 s^2 / D) KL(posterior | prior)

    The KL is a sum over the latent dimensions and a mean over the examples, in nats. With the standard normal prior it
    has a closed form. With a flow f (an invertible network) the prior is the distribution of f^-1(u), u standard
    normal. The KL is then the negative entropy of the posterior, in closed form, minus log p(z) = log N(f(z); 0, I) +
    log|det J_f(z)| of one sample of the posterior.

    The codes of examples are f(posterior mean), and a code u is decoded as decoder(f^-1(u)). So codes are always to
    follow the standard normal, and measures, pictures and samples are made from them as for other models. (f does not
    change the Jensen-Shannon divergence of two distributions.) In a good VAE the posterior's samples match the prior,
    not its means (`posterior_samples`). `val/jsd` is therefore that of samples.

    It logs per step `loss/reconstruction` (error per value, of a sample of the posterior) and `loss/latent` (the KL in
    nats), and per epoch the measures of `Autoencoder`; `val/reconstruction` is that of the means.

    Args:
        encoder: examples [n, ...] -> [n, 2 l], the posterior's means and the logarithms of its variances.
        decoder: z [n, l] -> examples [n, ...].
        latent_dim, learning_rate, decay, betas: as in `Autoencoder`.
        observation_variance: s^2, the variance of the values. The default, 1/2, gives the common loss: sum of squared
            errors + KL. The most likely value is the error per value itself. But a normal prior then has so little
            weight that the codes stay far from it for thousands of steps. With the flow, 0.1 or 0.03 suits images: the
            error is then near that of a plain autoencoder, and the flow brings the codes to the normal nevertheless.
        prior: "normal", or "flow" for a `RealNVP` that is learned along with the model.
        flow_layers: the number of layers of the flow.
        flow_hidden: the width of the flow's networks.

    Raises:
        ValueError: if observation_variance is not positive and finite, the prior is unknown, and in the cases of
            `RealNVP`.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", https://arxiv.org/abs/1312.6114.

    Example:
        >>> import torch
        >>> from kdejsd.models import FC, VAE
        >>> encoder, decoder = FC((1, 8, 8), latent_dim=4).encoder, FC((1, 8, 8), latent_dim=2).decoder
        >>> model = VAE(encoder, decoder, latent_dim=2)
        >>> mean, log_variance = model.posterior(torch.rand(5, 1, 8, 8))
        >>> mean.shape, log_variance.shape, model.sample(3).shape
        (torch.Size([5, 2]), torch.Size([5, 2]), torch.Size([3, 1, 8, 8]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        observation_variance: float = 0.5,
        prior: Literal["normal", "flow"] = "normal",
        flow_layers: int = 10,
        flow_hidden: int = 128,
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
        network: Network, example_shape: Sequence[int], latent_dim: int, settings: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        """Returns the encoder of a pair of twice the latent dimension, and the decoder of another pair."""
        return network(example_shape, 2 * latent_dim).encoder, network(example_shape, latent_dim).decoder

    def posterior(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Returns means and log-variances, each [n, l], of the posterior of z for examples [n, ...].

        Raises:
            ValueError: if the encoder's output has another shape.
        """
        mean, log_variance = self._encoded(examples, 2 * self.latent_dim).chunk(2, 1)
        return mean, log_variance

    def _code(self, z: Tensor) -> Tensor:
        if self.flow is None:
            return z
        codes: Tensor = self.flow(z)[0]
        return codes

    def encode(self, examples: Tensor) -> Tensor:
        """Returns codes [n, l] of examples [n, ...]: the posterior's means, after the flow where there is one."""
        return self._code(self.posterior(examples)[0])

    def posterior_samples(self, examples: Tensor, rng: torch.Generator) -> Tensor:
        mean, log_variance = self.posterior(examples)
        return self._code(mean + (log_variance / 2).exp() * noise_like(mean, rng))

    @property
    def generator(self) -> nn.Module:  # type: ignore[override]
        """Returns the decoder, after the flow's inverse where there is a flow."""
        return self.decoder if self.flow is None else nn.Sequential(Inverse(self.flow), self.decoder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        examples = checked(batch)[0]
        mean, log_variance = self.posterior(examples)
        z = mean + (log_variance / 2).exp() * noise_like(mean, self.rng())
        error = reconstruction_error(self.decoder(z), examples)
        if self.flow is None:
            latent = kl_to_normal(mean, log_variance).mean()
        else:
            latent = -(normal_entropy(log_variance) + self.flow.log_prob(z)).mean()
        self.log_terms({"loss/reconstruction": error, "loss/latent": latent})
        latent = latent + self.penalty(examples, mean)
        return error + 2 * self.observation_variance / examples[0].numel() * latent

    def penalty(self, examples: Tensor, mean: Tensor) -> Tensor | float:
        """Returns an addition to the KL, in nats; 0 unless a subclass has one.

        `mean` [n, l] is that of the posterior of the examples.
        """
        return 0.0

    def settings(self) -> dict[str, object]:
        prior = "normal" if self.flow is None else "flow"
        return super().settings() | {"observation_variance": self.observation_variance, "prior": prior}


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns the KL divergence of normals from the standard normal in nats, summed over the dimensions, [n].

    Their means and log-variances are [n, l] each.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def normal_entropy(log_variance: Tensor) -> Tensor:
    """Returns the entropy of normals with log-variances [n, l] in nats, summed over the dimensions, [n]."""
    return 0.5 * (log_variance + 1 + math.log(2 * math.pi)).sum(1)
