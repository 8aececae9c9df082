"""What the autoencoders share: encoder and decoder, codes that are to follow a target, validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, mse_loss

from .._ranks import gathered, summed
from ..data import Batch
from ..jsd import target_jsd
from ..targets import Law, Target, as_law, checked_target, finite_moments, law_moments
from .base import GenerativeModel, checked, inputs
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

    def posterior_samples(self, images: Tensor, rng: torch.Generator) -> Tensor | None:
        """Codes [n, l] drawn from the posterior of each image, where the encoder gives a law rather than a code; None
        where it gives a code."""
        return None

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The "codes" [n, l] and "reconstructions" [n, C, H, W] of images [n, C, H, W], which are the batch or stand
        first in it.

        Raises:
            TypeError: no tensor is there.
        """
        codes = self.encode(inputs(batch))
        return {"codes": codes, "reconstructions": self.decode(codes)}

    # Training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and isinstance(self.norm, CodeNorm):
            self.norm.synchronized = self.trainer.world_size > 1

    def on_fit_end(self) -> None:
        if isinstance(self.norm, CodeNorm):
            self.norm.synchronized = False

    def configure_optimizers(self) -> Any:
        return self.adam(self.parameters())

    # Evaluation

    def jsd(self, codes: Tensor, rng: torch.Generator) -> Tensor:
        """How far codes [n, l] are from the target, in nats, 0-dim; the random number generator is on their device."""
        return target_jsd(codes, self.target, rng)

    def latent_measures(self, codes: Tensor, index: Tensor | None) -> dict[str, float]:
        """What else the model measures of codes [n, l]; `index` [n] of the training examples, None for others."""
        return {}

    @property
    def expected_variance(self) -> Tensor:
        """Variance of every dimension of the codes that the loss aims at, [l]."""
        return law_moments(as_law(self.target))[1]

    def on_validation_epoch_start(self) -> None:
        self._codes: list[Tensor] = []
        self._rng = torch.Generator(self.device).manual_seed(0)  # the same samples every time

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = checked(batch)[0]
        codes = self.encode(images)
        error = reconstruction_error(self.decode(codes), images)
        self.log("val_rec", error, prog_bar=True, batch_size=len(images), sync_dist=True)
        samples = self.posterior_samples(images, self._rng)
        self._codes.append(codes if samples is None else samples)

    def on_validation_epoch_end(self) -> None:
        codes = torch.cat(self._codes)[:JSD_SAMPLES]
        self.log("val_jsd", self.jsd(codes, self._rng), prog_bar=True, sync_dist=True)
        self._codes.clear()


class CodeNorm(nn.Module):
    """Batch normalisation of codes [n, l] to the target's mean and variance, with nothing to learn.

    No nn.BatchNorm1d, for which nn.SyncBatchNorm.convert_sync_batchnorm would put a normalisation to mean 0 and
    variance 1: this one knows several ranks itself.

    Attributes:
        synchronized: the batch is that of all ranks of torch.distributed's default group, which call this together.
    """

    shift: Tensor
    scale: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: ClassVar[float] = 0.1
    eps: ClassVar[float] = 1e-5

    def __init__(self, target: Law, latent_dim: int) -> None:
        super().__init__()
        mean, variance = finite_moments(target, "codes to be normalised to")
        self.register_buffer("running_mean", torch.zeros(latent_dim))
        self.register_buffer("running_var", torch.ones(latent_dim))
        self.register_buffer("shift", mean.float())
        self.register_buffer("scale", variance.sqrt().float())
        self.synchronized = False

    def calibrate(self, parts: Iterable[Tensor]) -> None:
        """Makes the mean and variance of the codes in all parts [k, l] together the running statistics."""
        moments = [(len(part), part.mean(0), part.var(0, correction=min(1, len(part) - 1))) for part in parts]
        counts, means, variances = (
            torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*moments, strict=True)
        )
        merged = _merged_moments(counts.to(means).unsqueeze(-1), means, variances)
        if self.synchronized:
            merged = _merged_moments(*(gathered(moment.unsqueeze(0), "moments") for moment in merged))
        _, mean, variance = merged
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def forward(self, codes: Tensor) -> Tensor:
        if self.training and len(codes) < 2 and not self.synchronized:
            raise ValueError(f"codes must be at least 2 to be normalised in training, got a batch of {len(codes)}")
        if self.training and self.synchronized:
            normalized = self._over_ranks(codes)
        else:
            normalized = batch_norm(
                codes, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps
            )
        return self.shift + self.scale * normalized

    def _over_ranks(self, codes: Tensor) -> Tensor:
        """`batch_norm` in training with the statistics of all ranks' codes."""
        ones = torch.ones_like(codes[:, :1])
        sums = summed(torch.cat([codes, ones], 1).sum(0))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        squares = summed((codes - mean).square().sum(0))
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((squares / (count - 1)).to(self.running_var), self.momentum)
        return (codes - mean) * (squares / count + self.eps).rsqrt()


def _merged_moments(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number [1], mean and variance [l] of all codes from those of their parts, [k, 1] and [k, l] twice."""
    count = counts.sum(0)
    mean = (counts / count * means).sum(0)
    spread = (counts - 1) / (count - 1) * variances + counts / (count - 1) * (means - mean).square()
    return count, mean, spread.sum(0)


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
