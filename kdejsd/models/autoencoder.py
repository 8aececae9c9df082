"""Defines what the autoencoders share: encoder and decoder, codes that are to follow a target, validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, mse_loss
from torch.utils._pytree import tree_leaves

from .._ranks import gathered, rank_and_size, summed
from .._tensors import cache_parts
from ..data import Batch, BatchOrder
from ..divergence import target_jsd
from ..metrics._rows import MOST, RowsMeasure
from ..targets import Law, Target, as_law, checked_target, finite_moments, law_moments
from .base import GenerativeModel, checked, inputs
from .networks import Network


class Autoencoder(GenerativeModel):
    """Encodes examples to codes that are to follow a target, and decodes them: the base class of the autoencoders.

    To define an autoencoder of your own, write a constructor that sets the target, and a `training_step`. Every model
    logs its mean squared error per value as `loss/reconstruction`, and the term that it adds to this error as
    `loss/latent`. Per epoch it logs for the validation set `val/reconstruction`, and `val/jsd`: the divergence of the
    codes from the target (`jsd`), of at most 10 000 codes of all devices together. If the encoder has a posterior,
    `val/jsd` is that of samples of the posterior. It is NaN, with a warning, for codes that have no divergence.

    Args:
        encoder: examples [n, ...] -> codes [n, l].
        decoder: codes [n, l] -> examples [n, ...].
        latent_dim: l, the dimension of the codes.
        learning_rate, decay, betas: as in `GenerativeModel`. Without the decay, the noise of the last steps adds to the
            distance between the codes and the target.

    Attributes:
        target: the distribution that the codes are to follow; `sample` decodes its samples.
        norm: the module after the encoder: a `CodeNorm`, or one that changes nothing.

    Example:
        >>> import torch
        >>> from kdejsd.models import AE, FC, Autoencoder
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
        >>> examples = torch.rand(5, 1, 8, 8)
        >>> isinstance(model, Autoencoder), model.encode(examples).shape, model.reconstruct(examples).shape
        (True, torch.Size([5, 2]), torch.Size([5, 1, 8, 8]))
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
        self._validated_apart = False
        self._codes_jsd = _ModelJSD(self.jsd, distributed_available_fn=self._measures_are_gathered)

    def _aim_at(self, target: Target | None, normalize_codes: bool) -> None:
        self.target = checked_target(target, self.latent_dim)
        if normalize_codes:
            self.norm = CodeNorm(self.target, self.latent_dim)

    @staticmethod
    def build_networks(
        network: Network, example_shape: Sequence[int], latent_dim: int, settings: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        networks = network(example_shape, latent_dim)
        return networks.encoder, networks.decoder

    # Use

    def encode(self, examples: Tensor) -> Tensor:
        """Returns codes [n, l] of examples [n, ...].

        Raises:
            ValueError: if the encoder's output has another shape.
        """
        codes: Tensor = self.norm(self._encoded(examples, self.latent_dim))
        return codes

    def forward(self, examples: Tensor) -> Tensor:
        """Returns codes [n, l] of examples [n, ...], by `encode`."""
        return self.encode(examples)

    def _encoded(self, examples: Tensor, width: int) -> Tensor:
        output: Tensor = self.encoder(examples)
        count = examples.shape[0]  # len would fix the size of the batch where the model is exported
        if output.shape != (count, width):
            times = "" if width == self.latent_dim else f"{width // self.latent_dim} x "
            raise ValueError(f"encoder must return [{count}, {times}latent_dim = {width}], got {list(output.shape)}")
        return output

    @property
    def generator(self) -> nn.Module:  # type: ignore[override]
        """Returns the decoder, after the modules that stand before it."""
        return self.decoder

    def reconstruct(self, examples: Tensor) -> Tensor:
        """Returns the examples after encoding and decoding."""
        return self.decode(self.encode(examples))

    def posterior_samples(self, examples: Tensor, rng: torch.Generator) -> Tensor | None:
        """Returns codes [n, l] drawn from each example's posterior; None if each example has a single code."""
        return None

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Returns the "codes" [n, l] and "reconstructions" [n, ...] of examples [n, ...].

        The examples are the batch itself, or the first of its parts.

        Raises:
            TypeError: if there is no tensor.
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
        """Returns the Jensen-Shannon divergence of codes [n, l] from the target, in nats, 0-dim.

        The random number generator must be on the device of the codes.
        """
        return target_jsd(codes, self.target, rng)

    def latent_measures(self, codes: Tensor, index: Tensor | None) -> dict[str, float]:
        """Returns further measures that the model takes of codes [n, l].

        `index` [n] are their training examples, None for other examples.
        """
        return {}

    @property
    def expected_variance(self) -> Tensor:
        """Returns the variance of every dimension of the codes that the loss aims at, [l]."""
        return law_moments(as_law(self.target))[1]

    def on_validation_epoch_start(self) -> None:
        loaders = tree_leaves(self.trainer.val_dataloaders)
        self._validated_apart = not all(_gives_all_to_every_rank(loader) for loader in loaders)
        self._codes_jsd.set_dtype(torch.promote_types(self.dtype, torch.float32))  # type: ignore[arg-type]
        # The same noise in every validation, but not that of `_ModelJSD`. Ranks with other examples draw other noise.
        self._rng = torch.Generator(self.device).manual_seed(1 + (self.global_rank if self._validated_apart else 0))

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Returns the "codes" [n, l] of the batch."""
        examples = checked(batch)[0]
        codes = self.encode(examples)
        error = reconstruction_error(self.decode(codes), examples)
        self.log("val/reconstruction", error, prog_bar=True, batch_size=len(examples), sync_dist=True)
        samples = self.posterior_samples(examples, self._rng)
        self._codes_jsd.update(codes if samples is None else samples)
        return {"codes": codes}

    def on_validation_epoch_end(self) -> None:
        self.log("val/jsd", self._codes_jsd, prog_bar=True)

    def _measures_are_gathered(self) -> bool:
        """Returns whether metrics of the validation set gather what they have from all ranks."""
        return self._validated_apart and rank_and_size()[1] > 1


class _ModelJSD(RowsMeasure):
    """Measures codes by a model's own `jsd`, which a subclass can define anew, as a metric of torchmetrics."""

    def __init__(self, jsd: Callable[[Tensor, torch.Generator], Tensor], **kwargs: Any) -> None:
        super().__init__(MOST, "codes", **kwargs)
        self.jsd = jsd

    def update(self, codes: Tensor) -> None:
        self._keep("codes", codes)

    def _measure(self, codes: Tensor) -> Tensor:
        return self.jsd(codes, torch.Generator(codes.device).manual_seed(0))


def _gives_all_to_every_rank(loader: Any) -> bool:
    """Returns whether a loader is known to give each rank all examples, as those of `kdejsd.data` do for validation.

    Any other is taken to divide them, by Lightning's sampler or by itself.
    """
    sampler = getattr(loader, "sampler", None)
    return isinstance(sampler, BatchOrder) and sampler.num_replicas == 1


class CodeNorm(nn.Module):
    """Normalises batches of codes [n, l] to the target's mean and variance, with nothing to learn.

    It is no nn.BatchNorm1d, since nn.SyncBatchNorm.convert_sync_batchnorm would put a normalisation to mean 0 and
    variance 1 in its place; this one handles several ranks itself.

    Attributes:
        synchronized: normalise over the batches of all ranks of torch.distributed's default group, which call it
            together.
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
        """Sets the running statistics to the mean and variance of the codes in all parts [k, l] together."""
        mean, variance = self._moments(parts)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    @contextmanager
    def calibrated(self, parts: Iterable[Tensor]) -> Iterator[None]:
        """Has the statistics that `calibrate` would set, and those of before again at the end."""
        before = self.running_mean.clone(), self.running_var.clone()
        self.calibrate(parts)
        try:
            yield
        finally:
            self.running_mean.copy_(before[0])
            self.running_var.copy_(before[1])

    def renormalize(self, codes: Tensor) -> None:
        """Gives codes [n, l] the mean and variance of normalised ones, in place.

        With `synchronized` these are the mean and variance of all ranks' codes together. A dimension of very small
        variance is normalised to less than the target's variance (`eps`), and so it is here.
        """
        parts = cache_parts(codes)
        mean, variance = self._moments(parts)
        wanted = self.scale.square() * self.running_var / (self.running_var + self.eps)
        scale = (wanted / variance).sqrt().where(variance > 0, 1)
        scale, offset = scale.to(codes), (self.shift - mean * scale).to(codes)
        for part in parts:
            part.copy_(torch.addcmul(offset, part, scale))

    def _moments(self, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns mean and variance [l] of the codes in all parts [k, l] together, and on all ranks if synchronized."""
        moments = []
        for part in parts:
            part = part.to(torch.promote_types(part.dtype, torch.float32))
            mean = part.mean(0)
            squares = (part - mean).square_().sum(0)  # several times as fast as torch.var down the columns
            moments.append((mean.new_full((1,), len(part)), mean, squares / max(1, len(part) - 1)))
        merged = _merged_moments(
            *(torch.stack(column).to(self.running_mean.device) for column in zip(*moments, strict=True))
        )
        if self.synchronized:
            merged = _merged_moments(*(gathered(moment.unsqueeze(0), "moments") for moment in merged))
        return merged[1], merged[2]

    def forward(self, codes: Tensor) -> Tensor:
        if self.training and len(codes) < 2 and not self.synchronized:
            raise ValueError(
                f"codes must be at least 2 to be normalised in training, got a batch of {len(codes)}: take a "
                "batch_size of at least 2"
            )
        if self.training and self.synchronized:
            normalized = self._over_ranks(codes)
        else:
            normalized = batch_norm(
                codes, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps
            )
        return self.shift + self.scale * normalized

    def _over_ranks(self, codes: Tensor) -> Tensor:
        """Applies `batch_norm` in training with the statistics of all ranks' codes."""
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
    """Returns number [1], mean and variance [l] of all codes from those of their parts, [k, 1] and [k, l] twice."""
    count = counts.sum(0)
    mean = (counts / count * means).sum(0)
    spread = (counts - 1) / (count - 1) * variances + counts / (count - 1) * (means - mean).square()
    return count, mean, spread.sum(0)


def reconstruction_error(reconstruction: Tensor, examples: Tensor) -> Tensor:
    """Returns the mean squared error per value, 0-dim.

    Raises:
        ValueError: if the decoder's output has another shape than the examples.
    """
    if reconstruction.shape != examples.shape:
        raise ValueError(
            f"decoder must return the shape of the examples, {list(examples.shape)}, got {list(reconstruction.shape)}"
        )
    return mse_loss(reconstruction, examples)
