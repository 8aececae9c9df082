"""What the models share: encoder and decoder, codes that are to follow a target, validation, checkpoints."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from .._extras import train_extra
from .._modes import evaluating
from ..divergence import target_jsd
from ..targets import GaussianMixture, IsotropicNormal, Target, checked_target, sample_target
from .networks import AutoencoderNetworks

with train_extra():
    import lightning.pytorch as pl

CHUNK = 1000  # images encoded or decoded at a time where no gradient is wanted
JSD_SAMPLES = 10_000  # a measured divergence is of at most this many codes: its cost grows with their square

Batch = tuple[Tensor, Tensor, Tensor]
Network = Callable[[Sequence[int], int], AutoencoderNetworks]


class Autoencoder(pl.LightningModule, ABC):
    """The base of the models. A model adds its constructor, which sets the target, and its `training_step`.

    A batch is (images [n, C, H, W], labels [n], indices [n] int64 in the training set), as the data modules of
    `kdejsd.data` give it. The reconstruction error of every model is the mean squared error per pixel; what a model
    adds to it is logged as `latent`. Per epoch, on the validation set: `val_rec`, and `val_jsd`, the divergence of the
    codes from the target (`jsd`), or of samples of the posterior where the encoder has one.

    Args:
        encoder: images [n, C, H, W] -> codes [n, l].
        decoder: codes [n, l] -> images [n, C, H, W].
        latent_dim: l, the dimension of the codes.
        learning_rate: of Adam.
        decay: lower the learning rate to 0 along a half cosine over the run, if its end is given in steps or epochs.
            The noise of the last steps is otherwise a part of what separates the codes from the target.
        betas: of Adam.

    Attributes:
        target: the law that the codes are to follow; `sample` decodes its samples.
        norm: what follows the encoder: a `CodeNorm` or nothing.
    """

    target: Target

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        learning_rate: float = 1e-3,
        decay: bool = True,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attribute 'target' is an instance of `nn.Module`")
            self.save_hyperparameters(ignore=["encoder", "decoder"])
        for name in ("target", "network"):
            # A checkpoint holds plain values: the description that the command line gives, not an object.
            if not isinstance(self.hparams.get(name), dict):
                self.hparams.pop(name, None)
        self.encoder = encoder
        self.decoder = decoder
        self.norm: nn.Module = nn.Identity()
        self.latent_dim = latent_dim
        self.learning_rate = learning_rate
        self.decay = decay
        self.betas = betas
        self._rng_state: Tensor | None = None

    def _aim_at(self, target: Target | None, normalize_codes: bool) -> None:
        self.target = checked_target(target, self.latent_dim)
        if normalize_codes:
            self.norm = CodeNorm(self.target, self.latent_dim)

    @staticmethod
    def build_networks(network: Network, image_shape: Sequence[int], latent_dim: int) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder as the model takes them, for images of a shape (C, H, W)."""
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
    def generator(self) -> nn.Module:
        """What `decode` applies."""
        return self.decoder

    def decode(self, codes: Tensor) -> Tensor:
        """Images [n, C, H, W] of codes [n, l]."""
        images: Tensor = self.generator(codes)
        return images

    def reconstruct(self, images: Tensor) -> Tensor:
        """The images after encoding and decoding."""
        return self.decode(self.encode(images))

    def posterior_samples(self, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """Codes [n, l] drawn from the posterior of each image, where the encoder gives a law rather than a code; None
        where it gives a code."""
        return None

    def target_samples(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n samples [n, l] of the target on the model's device, drawn by the generator (default: from the global
        seed)."""
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return sample_target(self.target, n, generator).to(self.device)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Images [n, C, H, W] decoded from n samples of the target, drawn as in `target_samples`."""
        codes = self.target_samples(n, generator)
        with evaluating(self):
            return torch.cat([self.decode(chunk) for chunk in codes.split(CHUNK)])

    # Training

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The loss of a minibatch, after logging its parts."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=self.betas, fused=True)

    def on_train_start(self) -> None:
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not self.decay:
            return
        # Not a scheduler of Lightning's, made with the optimiser: the length of the run is known only from here on.
        progress = min(self.trainer.global_step / self.trainer.estimated_stepping_batches, 1)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 + math.cos(math.pi * progress)) / 2

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

    def settings(self) -> dict[str, Any]:
        """The model and its main settings, as plain values for a report."""
        return {"name": type(self).__name__, "latent_dim": self.latent_dim, "target": str(self.target)}

    def run_measures(self) -> dict[str, float]:
        """What the model measured of the run that trained it."""
        return {}

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

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = torch.get_rng_state()  # for what is drawn in training, and networks with dropout

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng_state = checkpoint["rng_state"]


class CodeNorm(nn.BatchNorm1d):
    """Batch normalisation of codes [n, l] to the target's mean and variance, with nothing to learn."""

    shift: Tensor
    scale: Tensor

    def __init__(self, target: Target, latent_dim: int) -> None:
        super().__init__(latent_dim, affine=False)
        mean, variance = target_moments(target)
        self.register_buffer("shift", mean.float(), persistent=False)
        self.register_buffer("scale", variance.sqrt().float(), persistent=False)

    def calibrate(self, codes: Tensor) -> None:
        """Makes the mean and variance of these codes [n, l] the running statistics."""
        assert self.running_mean is not None and self.running_var is not None
        self.running_mean.copy_(codes.mean(0))
        self.running_var.copy_(codes.var(0))

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


def target_moments(target: Target) -> tuple[Tensor, Tensor]:
    """Mean and variance of every dimension of the target, each [l]."""
    if isinstance(target, IsotropicNormal):
        return torch.zeros(target.dim), torch.full((target.dim,), target.variance)
    if isinstance(target, GaussianMixture):
        weights, means = target.log_weights.exp()[:, None], target.means
        mean = (weights * means).sum(0)
        second = (weights * (means.square() + target.scales.square()[:, None])).sum(0)
        return mean, second - mean.square()
    return target.mean, target.variance


def checked(batch: Any) -> Batch:
    """The batch, if it is one.

    Raises:
        TypeError: something else.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 3:
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"a batch must be (images, labels, indices in the training set), got {got}")
    images, labels, index = batch
    return images, labels, index


def check_weight(name: str, weight: float) -> None:
    """Refuses a weight of the loss that is negative."""
    if weight < 0:
        raise ValueError(f"{name} must not be negative, got {weight}")
