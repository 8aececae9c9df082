"""Defines a GEN with a random encoder, which fills with noise the latent dimensions that examples do not need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..bandwidth import optimal_bandwidth
from ..targets import Target
from .autoencoder import CodeNorm
from .base import noise_like
from .gen import GEN, NUM_LAGGED
from .vae import VAE

BANDWIDTH_FACTOR = 1.5


class StochasticGEN(GEN):
    """Trains a GEN with a random encoder, for latent spaces of more dimensions than the examples have.

    Examples that vary in a few ways cannot fill many dimensions if each has one code. The codes of a `GEN` then lie on
    a surface. A kernel density can hide this, but a classifier finds it. Here the encoder gives two numbers for each
    dimension: a signal u, normalised over the training examples to mean 0 and variance 1, and a share s between 0 and 1
    of noise in the variance:

        code = target's mean + target's standard deviation * (sqrt(1 - s) u + sqrt(s) noise),    noise standard normal

    So every dimension has the target's mean and variance whatever the shares are, if they do not depend on the signal.
    The latent term is that of a GEN at such codes, and its lagged codes are such codes too. The reconstruction error
    lowers the shares where the decoder has use for the signal. As for a VAE, `encode` gives the means of the codes.
    Samples of the codes' distributions are to follow the target (`posterior_samples`), and `val/jsd` is the divergence
    of these samples.

    The kernel density is compared with the smoothed target at the codes as they are (no kernel noise).
    `optimal_bandwidth(..., smoothed=True)` explains how large the bandwidth must be there, and bench/results/papers
    shows the effect of larger ones.

    Args:
        encoder: examples [n, ...] -> [n, 2 l], the signals and the logits of the shares.
        decoder: codes [n, l] -> examples [n, ...].
        latent_dim: l, the dimension of the codes.
        num_lagged: m, the number of lagged codes; None is as in `GEN`.
        bandwidth: h, the kernel's standard deviation; None is 1.5 times `optimal_bandwidth(l, m, target,
            smoothed=True)`.
        target: a StandardNormal or GaussianMixture; None is the standard normal. The noise does not know a mixture's
            modes: it has the mixture's whole variance.
        kwargs: as in `GEN`.

    Raises:
        ValueError: in the cases of `GEN` and `optimal_bandwidth`.

    Example:
        >>> import torch
        >>> from kdejsd.models import FC, StochasticGEN
        >>> encoder, decoder = FC((1, 8, 8), latent_dim=8).encoder, FC((1, 8, 8), latent_dim=4).decoder
        >>> model = StochasticGEN(encoder, decoder, latent_dim=4, num_lagged=100)
        >>> mean, scale = model.posterior(torch.rand(5, 1, 8, 8))
        >>> mean.shape, bool((scale < 1).all())
        (torch.Size([5, 4]), True)
    """

    norm: CodeNorm

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        num_lagged: int | None = None,
        bandwidth: float | None = None,
        target: Target | None = None,
        **kwargs: Any,
    ) -> None:
        if num_lagged is None:
            num_lagged = NUM_LAGGED
        if bandwidth is None:
            try:
                least = optimal_bandwidth(latent_dim, num_lagged, target=target, smoothed=True)
            except ValueError as error:
                raise ValueError(f"bandwidth must be given, got None: {error}") from error
            bandwidth = BANDWIDTH_FACTOR * least.value
        super().__init__(
            encoder,
            decoder,
            latent_dim,
            num_lagged,
            target=target,
            bandwidth=bandwidth,
            smoothed=True,
            kernel_noise=False,
            normalize_codes=True,
            **kwargs,
        )
        for name in ("smoothed", "kernel_noise", "normalize_codes"):
            self.hparams.pop(name, None)  # a checkpoint hands them to this constructor, which has no such arguments

    build_networks = staticmethod(VAE.build_networks)  # an encoder to twice the latent dimension

    def posterior(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the means and standard deviations, [n, l] each, of the normal codes of examples [n, ...].

        Raises:
            ValueError: if the encoder's output has another shape.
        """
        return self._law(self._outputs(examples))

    def _outputs(self, examples: Tensor) -> Tensor:
        return self._encoded(examples, 2 * self.latent_dim)

    def _placed(self, outputs: Tensor) -> Tensor:
        return self._law(outputs)[0]

    def _law(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        signal, logits = encoded.chunk(2, 1)
        # Not by sqrt(sigmoid), whose slope is infinite where a share is rounded to 0 or 1.
        kept, added = ((logsigmoid(x) / 2).exp() for x in (-logits, logits))
        shift = self.norm.shift
        return shift + kept * (self.norm(signal) - shift), self.norm.scale * added

    def encode(self, examples: Tensor) -> Tensor:
        """Returns the means [n, l] of the codes of examples [n, ...]."""
        return self.posterior(examples)[0]

    def posterior_samples(self, examples: Tensor, rng: torch.Generator) -> Tensor:
        return _drawn(self.posterior(examples), rng)

    def training_codes(self, examples: Tensor) -> Tensor:
        return _drawn(self.posterior(examples), self.rng())

    def _lagged_codes(self) -> Iterator[Tensor]:
        encoded = [self._outputs(examples) for examples in self._lagged_batches(0, len(self.lagged.codes))]
        self.norm.calibrate(part[:, : self.latent_dim] for part in encoded)
        return self._lagged_from(encoded)

    def _lagged_from(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        rng = self.rng()
        for outputs in parts:
            yield _drawn(self._law(outputs), rng)


def _drawn(law: tuple[Tensor, Tensor], rng: torch.Generator | None) -> Tensor:
    """Draws one code from each normal distribution, whose means and standard deviations are [n, l] each."""
    mean, scale = law
    return mean + scale * noise_like(mean, rng)
