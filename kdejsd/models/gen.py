"""Generative Encoding Networks: an autoencoder whose codes are matched to a known law by a lagged kernel density."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, Subset

from .._extras import train_extra
from .._modes import evaluating
from ..lagged import LaggedKDE
from ..targets import GaussianMixture, IsotropicNormal, Target, sample_target
from .networks import FC, AutoencoderNetworks
from .stopwatch import Stopwatch

with train_extra():
    import lightning.pytorch as pl

_CHUNK = 1000  # images encoded at a time where no gradient is wanted
JSD_SAMPLES = 10_000  # a measured divergence is of at most this many codes: its cost grows with their square

Batch = tuple[Tensor, Tensor, Tensor]


class GEN(pl.LightningModule):
    """Algorithm 1 of GENs (Saha, Elhabian, Whitaker, arXiv 2010.15283).

    The loss is the mean squared error per pixel + weight * `LaggedKDE.loss` (eq. 3). The m lagged examples are drawn
    once from the training set; every k_b minibatches the encoder as it then is encodes them anew, in evaluation mode
    and without gradient. They are kept on the module's device: m images. Two other ways to keep the lagged codes young
    are a choice (`refresh`): a part of them is encoded anew in every minibatch, or the codes of the minibatches
    themselves take the place of the oldest, for which nothing is encoded twice.

    A batch is (images [n, C, H, W], labels [n], indices [n] int64 in the training set); the index lets a code leave out
    its own lagged copy. The data modules of `kdejsd.data` give such batches.

    Logged per step: `rec` (error per pixel), `latent` (the latent term, nats), `1-r` (mean of p_t / (p_e + p_t), the
    weight of the JSD's gradient: 0.5 at p_e = p_t; near 0 the codes are in the dead zone, where nothing pulls them).
    Per epoch, on the validation set: `val_rec` and `val_jsd` (`LaggedKDE.jsd`), and `time` (share of the step that the
    latent term takes: refresh, value and gradient).

    Args:
        encoder: images [n, C, H, W] -> codes [n, l].
        decoder: codes [n, l] -> images [n, C, H, W].
        latent_dim: l, the dimension of the codes.
        num_lagged: m, the number of lagged codes, at most the size of the training set.
        refresh: how the lagged codes follow the encoder. "full": all of them in every k_b-th minibatch, counted from
            each epoch's first (Algorithm 1). "rolling": m / k_b of them in every minibatch, so that none is older than
            k_b steps. "queue": the codes of the last m training examples, each as it was in its minibatch.
        refresh_every: k_b; "queue" has no use for it.
        weight: lambda, the weight of the latent term beside the error per pixel.
        target: law of the codes; None is the standard normal.
        bandwidth: h, of the kernel; None is the optimal one for (l, m, target).
        smoothed: compare the kernel density with the target smoothed by the same kernel; False is the paper's loss.
        divergence: "js" (the paper's) or "kl", for 64 dimensions and more, where the gradient of "js" fades.
        kernel_noise: compare the codes with the kernel's noise, which are samples of p_e (`LaggedKDE.loss`). Without it
            (False, as in the paper) the codes of a small training set are pushed apart without bound, and those of
            held-out images do not follow.
        normalize_codes: batch normalisation without learned scale after the encoder, to the target's mean and variance.
            Without it the codes soon leave the region where the loss has a gradient. At evaluation its running
            statistics are used.
        learning_rate: of Adam.
        betas: of Adam.

    Raises:
        ValueError: sizes below 1, a negative weight, and what `LaggedKDE` refuses.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        num_lagged: int = 1000,
        refresh: Literal["full", "rolling", "queue"] = "full",
        refresh_every: int = 10,
        weight: float = 0.1,
        target: Target | None = None,
        bandwidth: float | None = None,
        smoothed: bool = True,
        divergence: Literal["js", "kl"] = "js",
        kernel_noise: bool = True,
        normalize_codes: bool = True,
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        super().__init__()
        if refresh not in ("full", "rolling", "queue"):
            raise ValueError(f'refresh must be "full", "rolling" or "queue", got {refresh!r}')
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {refresh_every}")
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attribute 'target' is an instance of `nn.Module`")
            self.save_hyperparameters(ignore=["encoder", "decoder"])
        for name in ("target", "network"):
            # A checkpoint holds plain values: the description that the command line gives, not an object.
            if not isinstance(self.hparams.get(name), dict):
                self.hparams.pop(name, None)
        self.encoder = encoder
        self.decoder = decoder
        self.lagged = LaggedKDE(num_lagged, latent_dim, bandwidth, target, smoothed=smoothed, divergence=divergence)
        self.norm = CodeNorm(self.lagged.target, latent_dim) if normalize_codes else nn.Identity()
        self.latent_dim = latent_dim
        self.refresh_policy = refresh
        self.refresh_every = refresh_every
        self.weight = weight
        self.kernel_noise = kernel_noise
        self.learning_rate = learning_rate
        self.betas = betas
        self.stopwatch: Stopwatch | None = None
        self._lagged_images: Tensor | None = None
        self._rng_state: Tensor | None = None

    # Use

    def encode(self, images: Tensor) -> Tensor:
        """Codes [n, l] of images [n, C, H, W].

        Raises:
            ValueError: an encoder whose output has another shape.
        """
        codes: Tensor = self.norm(self._raw_codes(images))
        return codes

    forward = encode

    def _raw_codes(self, images: Tensor) -> Tensor:
        codes: Tensor = self.encoder(images)
        if codes.shape != (len(images), self.latent_dim):
            raise ValueError(
                f"encoder must return [{len(images)}, latent_dim = {self.latent_dim}], got {list(codes.shape)}"
            )
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Images [n, C, H, W] of codes [n, l]."""
        images: Tensor = self.decoder(codes)
        return images

    def reconstruct(self, images: Tensor) -> Tensor:
        """The images after encoding and decoding."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Images [n, C, H, W] decoded from n samples of the target, drawn by the generator (default: from the global
        seed)."""
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        codes = sample_target(self.lagged.target, n, generator).to(self.device)
        with evaluating(self):
            return torch.cat([self.decode(chunk) for chunk in codes.split(_CHUNK)])

    # Training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=self.betas)

    def on_train_start(self) -> None:
        loader = self.trainer.train_dataloader
        assert loader is not None
        dataset: Dataset[Batch] = loader.dataset
        count = len(dataset)  # type: ignore[arg-type]
        num_lagged = len(self.lagged.indices)
        if num_lagged > count:
            raise ValueError(f"num_lagged must be at most {count}, the size of the training set, got {num_lagged}")
        resumed = self.lagged.refreshed
        if resumed:
            indices = self.lagged.indices.cpu()  # the examples drawn at the start of the run, or the last ones
            if int(indices.max()) >= count:
                raise ValueError(
                    f"the checkpoint's lagged codes come from a training set of at least {int(indices.max()) + 1} "
                    f"examples, this one has {count}"
                )
        else:
            indices = torch.randperm(count)[:num_lagged].sort().values
            self.lagged.indices.copy_(indices)
        self.lagged.reserve(count)
        if not (resumed and self.refresh_policy == "queue"):
            chosen = DataLoader(Subset(dataset, indices.tolist()), batch_size=_CHUNK, generator=torch.Generator())
            self._lagged_images = torch.cat([_checked(batch)[0] for batch in chosen]).to(self.device)
        if not resumed and self.refresh_policy != "full":
            self.refresh()
        if self.refresh_policy == "queue":
            self._lagged_images = None  # the minibatches bring the codes from here on
        self.stopwatch = Stopwatch(self.device)
        if self._rng_state is not None:
            torch.set_rng_state(self._rng_state)

    @torch.no_grad()
    def refresh(self) -> None:
        """Encodes the lagged examples by the encoder as it is, in evaluation mode. Their mean and variance become the
        running statistics of the normalisation, which otherwise trail behind an encoder that changes quickly."""
        assert self._lagged_images is not None
        with evaluating(self.encoder, self.norm):
            codes = torch.cat([self._raw_codes(chunk) for chunk in self._lagged_images.split(_CHUNK)])
            if isinstance(self.norm, CodeNorm):
                self.norm.calibrate(codes)
            self.lagged.refresh(self.norm(codes), self.lagged.indices.clone())

    @torch.no_grad()
    def _refresh_part(self, part: int) -> None:
        """The same for one of k_b parts, with the running statistics as they are."""
        assert self._lagged_images is not None
        m = len(self._lagged_images)
        start, end = m * part // self.refresh_every, m * (part + 1) // self.refresh_every
        with evaluating(self.encoder, self.norm):
            for chunk in self._lagged_images[start:end].split(_CHUNK):
                self.lagged.update(self.encode(chunk), start)
                start += len(chunk)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.stopwatch is not None
        self.stopwatch.start("step")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.stopwatch is not None
        images, _, index = _checked(batch)
        self.stopwatch.start("latent")
        if self.refresh_policy == "full" and batch_idx % self.refresh_every == 0:
            self.refresh()
        elif self.refresh_policy == "rolling":
            self._refresh_part(self.trainer.global_step % self.refresh_every)
        self.stopwatch.stop("latent")

        codes = self.encode(images)
        error = reconstruction_error(self.decode(codes), images)

        # The forward of the latent term gives its gradient too; the backward is a scaling and is not counted.
        self.stopwatch.start("latent")
        terms = self.latent_terms(codes, index)
        self.stopwatch.stop("latent")
        self._batch_codes = codes.detach(), index
        latent = terms.mean()
        self.log_dict({"rec": error, "latent": latent, "1-r": self.gradient_weight(terms)}, prog_bar=True)
        return error + self.weight * latent

    def on_after_backward(self) -> None:
        assert self.stopwatch is not None
        if self.refresh_policy == "queue":  # not before: the backward pass needs the codes as they were
            self.stopwatch.start("latent")
            self.lagged.push(*self._batch_codes)
            self.stopwatch.stop("latent")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.stopwatch is not None
        self.stopwatch.stop("step")

    def on_train_epoch_end(self) -> None:
        assert self.stopwatch is not None
        self.log("time", self.stopwatch.share("latent", "step"), prog_bar=True)

    def latent_terms(self, codes: Tensor, index: Tensor | None) -> Tensor:
        """The latent term of each code [n, l] in nats, as [n]; `index` [n] of the training examples, None for
        others."""
        noise = torch.randn_like(codes) if self.kernel_noise else None
        return self.lagged.loss(codes, index, noise=noise, reduction="none")

    def gradient_weight(self, terms: Tensor) -> Tensor:
        """Mean of 1 - r = p_t / (p_e + p_t) from the terms [n] of `LaggedKDE.loss`, 0-dim."""
        terms = terms.detach()
        if self.lagged.divergence == "kl":  # a term is log p_e - log p_t
            return torch.sigmoid(-terms).mean()
        return -torch.expm1(terms - torch.log(terms.new_tensor(2.0))).mean()  # a term is log 2 + log r

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self._codes: list[Tensor] = []
        if self._lagged_images is not None:
            self.refresh()  # measured and saved with the lagged codes and the statistics of this very encoder

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = _checked(batch)[0]
        codes = self.encode(images)
        error = reconstruction_error(self.decode(codes), images)
        self.log("val_rec", error, prog_bar=True, batch_size=len(images))
        self._codes.append(codes)

    def on_validation_epoch_end(self) -> None:
        codes = torch.cat(self._codes)[:JSD_SAMPLES]
        generator = torch.Generator(self.device).manual_seed(0)  # the same samples every time
        self.log("val_jsd", self.lagged.jsd(codes, generator), prog_bar=True)
        self._codes.clear()

    # Checkpoints: lagged codes, their examples and the bandwidth are in the state_dict of `lagged`

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = torch.get_rng_state()  # for networks with dropout

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng_state = checkpoint["rng_state"]


class ImageGEN(GEN):
    """A GEN whose networks are built for images of a given shape; what the command `kdejsd fit` trains.

    Args:
        image_shape: (C, H, W).
        latent_dim: l, the dimension of the codes.
        network: builds encoder and decoder from (image_shape, latent_dim): `FC`, `Conv` or another class.
        kwargs: as in `GEN`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_dim: int = 2,
        network: Callable[[Sequence[int], int], AutoencoderNetworks] = FC,
        **kwargs: Any,
    ) -> None:
        networks = network(image_shape, latent_dim)
        super().__init__(networks.encoder, networks.decoder, latent_dim, **kwargs)


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


def _checked(batch: Any) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 3:
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"a batch must be (images, labels, indices in the training set), got {got}")
    images, labels, index = batch
    return images, labels, index
