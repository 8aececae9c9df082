"""What the autoencoders share: encoder and decoder, codes that are to follow a target, validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..divergence import target_jsd
from ..targets import Target, checked_target, target_moments
from .base import Batch, GenerativeModel, checked
from .networks import Network

JSD_SAMPLES = 10_000  # a measured divergence is of at most this many codes: its cost grows with their square


class Autoencoder(GenerativeModel):
    """The base of the autoencoders. One adds its constructor, which sets the target, and its `training_step`.

    The reconstruction error of every model is the mean squared error per pixel; what a model adds to it is logged as
    `latent`. Per epoch, on the validation set: `val_rec`, and `val_jsd`, the divergence of the codes from the target
    (`jsd`), or of samples of the posterior where the encoder has one.

    Args:
        encoder: images [n, C, H, W] -> codes [n, l].
        decoder: codes [n, l] -> images [n, C, H, W].
        latent_dim: l, the dimension of the codes.
        learning_rate, decay, betas: as in `GenerativeModel`. The noise of the last steps, which the decay takes away,
            is otherwise a part of what separates the codes from the target.

    Attributes:
        target: the law that the codes are to follow; `sample` decodes its samples.
        norm: what follows the encoder: a `CodeNorm` or nothing.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        learning_rate: float = 1e-3,
        decay: bool = True,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        super().__init__(latent_dim, learning_rate, decay, betas)
        self.encoder = encoder
        self.decoder = decoder
        self.norm: nn.Module = nn.Identity()

    def _aim_at(self, target: Target | None, normalize_codes: bool) -> None:
        self.target = checked_target(target, self.latent_dim)
        if normalize_codes:
            self.norm = CodeNorm(self.target, self.latent_dim)

    @staticmethod
    def build_networks(
        network: Network, image_shape: Sequence[int], latent_dim: int, settings: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        networks = network(image_shape, latent_dim)
        return networks.encoder, networks.decoder

    # Use

    def encode(self, images: Tensor) -> Tensor:
        """Codes [n, l] of images [n, C, H, W].

        Raises:
            ValueError: an encoder whose output has another shape.
        """
        codes: Tensor = self.norm(self._encoded(images, self.latent_dim))
        return codes

    def forward(self, images: Tensor) -> Tensor:
        """`encode`."""
        return self.encode(images)

    def _encoded(self, images: Tensor, width: int) -> Tensor:
        output: Tensor = self.encoder(images)
        if output.shape != (len(images), width):
            times = "" if width == self.latent_dim else f"{width // self.latent_dim} x "
            raise ValueError(
                f"encoder must return [{len(images)}, {times}latent_dim = {width}], got {list(output.shape)}"
            )
        return output

    @property
    def generator(self) -> nn.Module:  # type: ignore[override]
        """The decoder, after what stands before it."""
        return self.decoder

    def reconstruct(self, images: Tensor) -> Tensor:
        """The images after encoding and decoding."""
        return self.decode(self.encode(images))

    def posterior_samples(self, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """Codes [n, l] drawn from the posterior of each image, where the encoder gives a law rather than a code; None
        where it gives a code."""
        return None

    # Training

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=self.betas, fused=True)

    # Evaluation

    def jsd(self, codes: Tensor, generator: torch.Generator) -> Tensor:
        """How far codes [n, l] are from the target, in nats, 0-dim; the generator is on their device."""
        return target_jsd(codes, self.target, generator)

    def latent_measures(self, codes: Tensor, index: Tensor | None) -> dict[str, float]:
        """What else the model measures of codes [n, l]; `index` [n] of the training examples, None for others."""
        return {}

    @property
    def expected_variance(self) -> Tensor:
        """Variance of every dimension of the codes that the loss aims at, [l]."""
        return target_moments(self.target)[1]

    def on_validation_epoch_start(self) -> None:
        self._codes: list[Tensor] = []
        self._generator = torch.Generator(self.device).manual_seed(0)  # the same samples every time

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = checked(batch)[0]
        codes = self.encode(images)
        error = reconstruction_error(self.decode(codes), images)
        self.log("val_rec", error, prog_bar=True, batch_size=len(images))
        samples = self.posterior_samples(images, self._generator)
        self._codes.append(codes if samples is None else samples)

    def on_validation_epoch_end(self) -> None:
        codes = torch.cat(self._codes)[:JSD_SAMPLES]
        self.log("val_jsd", self.jsd(codes, self._generator), prog_bar=True)
        self._codes.clear()


class CodeNorm(nn.BatchNorm1d):
    """Batch normalisation of codes [n, l] to the target's mean and variance, with nothing to learn."""

    shift: Tensor
    scale: Tensor

    def __init__(self, target: Target, latent_dim: int) -> None:
        super().__init__(latent_dim, affine=False)
        mean, variance = target_moments(target)
        self.register_buffer("shift", mean.float(), persistent=False)
        self.register_buffer("scale", variance.sqrt().float(), persistent=False)

    def calibrate(self, parts: Iterable[Tensor]) -> None:
        """Makes the mean and variance of the codes in all parts [k, l] together the running statistics."""
        assert self.running_mean is not None and self.running_var is not None
        moments = [(len(part), part.mean(0), part.var(0, correction=min(1, len(part) - 1))) for part in parts]
        counts, means, variances = (
            torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*moments, strict=True)
        )
        counts = counts.to(means).unsqueeze(-1)
        count = counts.sum()
        mean = (counts / count * means).sum(0)
        spread = (counts - 1) / (count - 1) * variances + counts / (count - 1) * (means - mean).square()
        self.running_mean.copy_(mean)
        self.running_var.copy_(spread.sum(0))

    def forward(self, codes: Tensor) -> Tensor:
        return self.shift + self.scale * super().forward(codes)


def reconstruction_error(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean squared error per pixel, 0-dim.

    Raises:
        ValueError: a decoder whose output has another shape than the images.
    """
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"decoder must return the shape of the images, {list(images.shape)}, got {list(reconstruction.shape)}"
        )
    return mse_loss(reconstruction, images)
