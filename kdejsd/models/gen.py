"""Defines Generative Encoding Networks: autoencoders whose codes are matched to a target by a lagged kernel density."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.data import Dataset

from .._extras import train_extra
from .._modes import evaluating
from .._numbers import integer, not_negative, real
from .._ranks import gathered, of_first
from ..data import Batch, ExampleData
from ..divergence import DIVERGENCES
from ..lagged import LaggedKDE
from ..refresh import read
from ..targets import Target
from .autoencoder import Autoencoder, CodeNorm, reconstruction_error
from .base import CHUNK, checked, noise_like
from .stopwatch import Stopwatch

with train_extra():
    from lightning.pytorch import callbacks

NUM_LAGGED = 1000  # where neither the user nor a small training set says otherwise
REFRESHES = ("full", "rolling", "queue", "tracked")
QUEUES = ("queue", "tracked")  # whose codes come from the minibatches
PAIRS = 4  # "tracked" encodes PAIRS (l + 1) examples again; the map has l + 1 numbers for each dimension
FOLLOWED = 5  # steps that "tracked" makes up for together
FEWEST = 30  # codes whose mean and variance can stand for those of all


class GEN(Autoencoder):
    """Trains a Generative Encoding Network: an autoencoder whose codes follow a known distribution, the target.

    The loss is the mean squared error per value plus weight * the latent term. The latent term measures, at the codes
    of the minibatch, how far the kernel density of the lagged codes is from the target (`LaggedKDE.loss`). The lagged
    codes are those of m training examples that are drawn once. As in the paper's Algorithm 1, the encoder encodes them
    anew every k_b minibatches, in evaluation mode and without gradient. `refresh` chooses between this and three other
    ways. "rolling" encodes a part of them in every minibatch. "queue" takes the codes of the minibatches themselves, so
    nothing is encoded twice. "tracked" is a queue whose codes are moved along with the encoder. A code leaves out its
    own lagged copy, which it finds by the indices of the batch.

    For millions of lagged codes take `refresh="tracked"`, "queue" or "rolling"; set `keep_examples`, `lagged_dtype` and
    `lagged_device` by the memory that you have. All m codes are encoded by one encoder at the start and before each
    validation ("queue" and "tracked": at the start only). With bfloat16 they are encoded twice, the first time for
    their mean and variance.

    On several devices (Lightning's "ddp") each keeps and encodes its share of the lagged codes (`LaggedKDE.shard`). The
    codes are normalised over the minibatches of all devices, so the steps are those of one device with the whole
    minibatch.

    It logs per step (`log_terms`):

    * `loss/reconstruction`, the mean squared error per value, and `loss/latent`, the latent term in nats.
    * `train/latent_excess`, the latent term minus the mean for codes that follow the target (`matched_latent`). It is
      near 0 for a match.
    * `train/gradient_weight`, the mean of 1 - r = p_t / (p_e + p_t), with p_e the kernel density and p_t the target.
      The JSD's gradient is multiplied by it. It is 0.5 at p_e = p_t. Near 0 the codes are in the dead zone, where
      nothing pulls them to the target.

    It logs per epoch `val/reconstruction` and `val/jsd` (`LaggedKDE.jsd`) of the validation set, and
    `train/latent_time_share`: the share of the step that the latent term takes (refresh, value and gradient).

    Args:
        encoder, decoder, latent_dim, learning_rate, decay, betas: as in `Autoencoder`.
        num_lagged: m, the number of lagged codes, which form the kernel density; at most the size of the training set.
            None is 1000; the command then takes the whole training set where it is smaller.
        refresh: how the lagged codes follow the encoder. "full": all of them in every k_b-th minibatch, counted from
            each epoch's first (Algorithm 1). "rolling": m / k_b of them in every minibatch, so that none is older than
            k_b steps; a part is drawn from all of them, and normalised by its own mean and variance if it has 30 codes
            or more. "queue": the codes of the last m training examples, each as it was in its minibatch. "tracked":
            the same, but every five steps all of them are moved along by an affine map (`LaggedKDE.follow`), and
            normalised anew if `normalize_codes`. The map is found from 4 (l + 1) examples of a minibatch, or all if it
            has fewer, which are encoded before and after the steps. It needs float32. Dropout or batch normalisation in
            the encoder takes much of its effect, since the codes of minibatches then differ from those of evaluation.
            "full" and "rolling" keep to the m examples that are drawn once. Where these are fewer than the training
            set, "tracked" has matched better than "full" in all that we have tried.
        refresh_every: k_b, the number of minibatches between refreshes; "queue" and "tracked" have no use for it.
        weight: lambda, the weight of the latent term relative to the error per value.
        target: the distribution that the codes are to follow; None is the standard normal.
        bandwidth: h, the kernel's standard deviation; None is the optimal one for (l, m, target).
        smoothed: compare the kernel density with the target smoothed by the same kernel; False is the paper's loss.
        divergence: "js" (the paper's) or "kl", whose gradient does not fade where codes crowd together (in the dead
            zone).
        kernel_noise: add the kernel's noise to the codes, so that they are samples of the kernel density
            (`LaggedKDE.loss`). Without it (False, as in the paper) the codes of a small training set are pushed apart
            without bound, and those of held-out examples do not follow. From about 16 dimensions on the noise shrinks
            the codes instead. Use False there, with twice `optimal_bandwidth(l, m, smoothed=True)` as the bandwidth.
        normalize_codes: normalise the codes to the target's mean and variance, by batch normalisation without learned
            scale after the encoder. Without it the codes soon leave the region where the loss has a gradient. At
            evaluation its running statistics are used.
        lagged_dtype: "float32" or "bfloat16", in which the lagged codes are kept (`LaggedKDE`).
        lagged_device: "cpu" keeps the lagged codes on the host, None on the module's device.
        keep_examples: keep the m lagged examples on the module's device. False reads them from the training set
            whenever they are encoded; for sets that are in memory this adds a tenth to the time of encoding. "queue"
            and "tracked" never keep them.
        input_dropout: share of the examples' values that the encoder does not see in a training step, drawn anew each
            time. Use it for training sets of a few thousand examples or fewer. Without it the encoder can place their
            codes one by one, more evenly than samples of the target.

    Raises:
        ValueError: if a size is below 1, the weight is negative, input_dropout is outside [0, 1), the codes of
            "tracked" are to be in bfloat16, and in the cases of `LaggedKDE`.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, equation 3
    and Algorithm 1.

    Example:
        >>> import torch
        >>> from kdejsd.models import FC, GEN
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = GEN(networks.encoder, networks.decoder, latent_dim=2, num_lagged=200)
        >>> model.lagged.refresh(model.target_samples(200))
        >>> model.encode(torch.rand(5, 1, 8, 8)).shape, model.sample(5).shape
        (torch.Size([5, 2]), torch.Size([5, 1, 8, 8]))
        >>> far = model.latent_terms(model.target_samples(100) + 3, None).mean()
        >>> bool(far > model.latent_terms(model.target_samples(100), None).mean())  # far codes cost more
        True
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        num_lagged: int | None = None,
        refresh: Literal["full", "rolling", "queue", "tracked"] = "full",
        refresh_every: int = 10,
        weight: float = 1.0,
        target: Target | None = None,
        bandwidth: float | None = None,
        smoothed: bool = True,
        divergence: Literal["js", "kl"] = "js",
        kernel_noise: bool = True,
        normalize_codes: bool = True,
        input_dropout: float = 0.0,
        lagged_dtype: Literal["float32", "bfloat16"] = "float32",
        lagged_device: Literal["cpu"] | None = None,
        keep_examples: bool = True,
        learning_rate: float = 1e-3,
        decay: bool = True,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        if refresh not in REFRESHES:
            raise ValueError(f'refresh must be "full", "rolling", "queue" or "tracked", got {refresh!r}')
        refresh_every = integer("refresh_every", refresh_every, 1)
        weight = not_negative("weight", weight)
        input_dropout = real("input_dropout", input_dropout)
        if not 0 <= input_dropout < 1:
            raise ValueError(f"input_dropout must be at least 0 and below 1, got {input_dropout}")
        if lagged_dtype not in ("float32", "bfloat16"):
            raise ValueError(f'lagged_dtype must be "float32" or "bfloat16", got {lagged_dtype!r}')
        if refresh == "tracked" and lagged_dtype == "bfloat16":
            raise ValueError('lagged_dtype must be "float32" for refresh "tracked", got "bfloat16"')
        if lagged_device not in (None, "cpu"):
            raise ValueError(f'lagged_device must be "cpu" or None, got {lagged_device!r}')
        super().__init__(encoder, decoder, latent_dim, learning_rate, decay, betas)
        self.lagged = LaggedKDE(
            NUM_LAGGED if num_lagged is None else num_lagged,
            latent_dim,
            bandwidth,
            target,
            smoothed=smoothed,
            divergence=divergence,
            storage_dtype=getattr(torch, lagged_dtype),
            storage_device=lagged_device,
        )
        object.__setattr__(self, "target", self.lagged.target)  # whose parameters the state_dict has already
        if normalize_codes:
            self.norm = CodeNorm(self.target, latent_dim)
        self.refresh_policy = refresh
        self.refresh_every = refresh_every
        self.weight = weight
        self.kernel_noise = kernel_noise
        self.input_dropout = input_dropout
        self.keep_examples = keep_examples
        self.stopwatch: Stopwatch | None = None
        self._matched_latent = 0.0
        self._training_set: Dataset[Batch] | None = None
        self._lagged_examples: Tensor | None = None
        self._takes_index_tensors = False
        self._kept_examples: Tensor | None = None
        # Of "tracked": the examples by whose codes it sees what the steps do, and those that are the next ones.
        self._followed: _Followed | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None
        self._followed_before: dict[str, Any] | None = None  # the checkpoint, without the examples

    @classmethod
    def settings_for(cls, settings: Mapping[str, Any], data: ExampleData) -> dict[str, Any]:
        count, num_lagged = len(data.training), settings["num_lagged"]
        if num_lagged is None:
            return {"num_lagged": min(NUM_LAGGED, count)}
        _check_num_lagged(num_lagged, count)
        return {}

    # Training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.trainer.world_size > 1:
            averaging = getattr(callbacks, "WeightAveraging", ())  # Lightning 2.5 has none
            if any(isinstance(callback, averaging) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError(
                    f"{type(self).__name__} is averaged by WeightAveraging on one device only, got "
                    f"{self.trainer.world_size}: the average has no share of the lagged codes"
                )
            self.lagged.shard()

    def on_fit_end(self) -> None:
        super().on_fit_end()
        if self.trainer.world_size > 1:
            self.lagged.gather()

    def on_train_start(self) -> None:
        loader = self.trainer.train_dataloader
        assert loader is not None
        dataset: Dataset[Batch] = loader.dataset
        count = len(dataset)  # type: ignore[arg-type]
        _check_num_lagged(self.lagged.num_centers, count)
        resumed = self.lagged.refreshed
        if resumed:
            self._lagged_examples = self.lagged.indices  # those drawn at the start of the run, or the last ones
            if int(self._lagged_examples.max()) >= count:
                raise ValueError(
                    "the checkpoint's lagged codes come from a training set of at least "
                    f"{int(self._lagged_examples.max()) + 1} examples, this one has {count}"
                )
        else:
            self._lagged_examples = self._drawn_examples(count)
        self._followed = self._chosen = None  # of a run that an error has ended
        if self.refresh_policy == "tracked" and self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f'refresh "tracked" needs a model in float32 or float64, got {self.dtype}: take "queue"')
        self.lagged.reserve(count)
        self._training_set, self._takes_index_tensors = dataset, loader.batch_size is None
        if self.keep_examples and self.refresh_policy not in QUEUES:
            self._kept_examples = torch.cat(list(self._read_examples(self._lagged_examples)))
        self._follow_again(count)
        if not resumed and self.refresh_policy != "full":
            self.refresh()
        if self.refresh_policy in QUEUES:
            self._training_set = None  # the minibatches bring the codes from here on
        self.stopwatch = Stopwatch(self.device)
        self._matched_latent = self.matched_latent()
        super().on_train_start()

    def _drawn_examples(self, count: int) -> Tensor:
        """Draws the training examples [m] int64 of this rank's lagged codes from a training set of `count` examples.

        They are in the order of the training set, except for "rolling", whose parts are to be like each other.
        """
        drawn = of_first(torch.randperm(count)[: self.lagged.num_centers])
        if self.refresh_policy != "rolling":
            drawn = drawn.sort().values
        return self.lagged.share(drawn).to(self.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Encodes all lagged examples by the encoder as it is now, in evaluation mode.

        Their mean and variance become the running statistics of the normalisation, which otherwise lag behind an
        encoder that changes quickly.
        """
        self._followed = self._chosen = None  # from here on there is nothing to catch up with
        with evaluating(self.encoder, self.norm), self.explaining("lagged codes", self._lagged_examples):
            self.lagged.refresh(self._lagged_codes(), self._lagged_examples)

    def _lagged_codes(self) -> Iterator[Tensor]:
        """Yields the codes of all lagged examples, in parts.

        The normalisation waits for the mean of them all. Until then the codes stand in the place of the normalised
        ones; where they would be rounded there, they are encoded twice.
        """
        codes = self.lagged.codes
        rounds = codes.dtype == torch.bfloat16
        if not rounds:
            start = 0
            for part in self._encoded_parts():
                codes[start : start + len(part)] = part
                start += len(part)
        if isinstance(self.norm, CodeNorm):
            self.norm.calibrate(self._encoded_parts() if rounds else codes.split(CHUNK))
        for part in self._encoded_parts() if rounds else codes.split(CHUNK):
            yield self.norm(part.to(self.device, self.dtype))  # type: ignore[arg-type]

    def _encoded_parts(self) -> Iterator[Tensor]:
        """Yields the codes of all lagged examples before their normalisation, in parts."""
        for examples in self._lagged_batches(0, len(self.lagged.codes)):
            yield self._encoded(examples, self.latent_dim)

    @torch.no_grad()
    def _refresh_part(self, part: int) -> None:
        """Encodes one of k_b parts of the lagged examples.

        It is normalised by its own mean and variance, unless it is small. The running statistics are averages over the
        last minibatches, whose encoders were others, and would bring each part to another place.
        """
        m = len(self.lagged.codes)
        start, end = m * part // self.refresh_every, m * (part + 1) // self.refresh_every
        many = self.lagged.num_centers >= self.refresh_every * max(FEWEST, 2 * self.lagged.ranks)  # two on each rank
        with evaluating(self.encoder, self.norm), self.explaining("lagged codes", self._lagged_examples):
            outputs = [self._outputs(examples) for examples in self._lagged_batches(start, end)]
            signals = (encoded[:, : self.latent_dim] for encoded in outputs)
            own = self.norm.calibrated(signals) if many and isinstance(self.norm, CodeNorm) else nullcontext()
            with own:
                for codes in self._lagged_from(outputs):
                    self.lagged.update(codes, start)
                    start += len(codes)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step as Lightning does. Every few steps, "tracked" then moves the lagged codes along."""
        step = self.trainer.global_step  # before this one
        super().optimizer_step(*args, **kwargs)
        if self.refresh_policy == "tracked" and step % FOLLOWED == 0:
            assert self.stopwatch is not None
            self.stopwatch.start("latent")
            self._follow()
            self.stopwatch.stop("latent")

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the lagged codes as the last steps have moved the codes of a few examples, and chooses the next ones.

        The examples are encoded before and after the steps, in evaluation mode. Both outputs are normalised by the same
        statistics, so that these are no part of the difference.
        """
        with evaluating(self.encoder, self.norm), self.explaining("codes", None):
            if self._followed is not None:
                then, now = self._placed(self._followed.outputs), self._placed(self._outputs(self._followed.examples))
                self.lagged.follow(then, now, self._followed.pushed)
                if isinstance(self.norm, CodeNorm):  # otherwise the errors of many maps would add up to another scale
                    self.norm.renormalize(self.lagged.codes)
            self._followed = None
            if self._chosen is not None:
                (examples, indices), self._chosen = self._chosen, None
                self._followed = _Followed(examples, indices, self._outputs(examples), [])

    def _to_follow(self, examples: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses from a minibatch [n, ...] and its indices [n] those whose codes are to be followed, evenly spaced.

        Ranks choose together what one process does, if their number divides the minibatch and its choice.
        """
        count = min(len(examples), math.ceil(PAIRS * (self.latent_dim + 1) / self.lagged.ranks))
        chosen = torch.arange(count, device=examples.device) * len(examples) // max(1, count)
        return examples[chosen], index[chosen]

    def _outputs(self, examples: Tensor) -> Tensor:
        """Returns what the encoder makes of examples [n, ...], before the normalisation."""
        return self._encoded(examples, self.latent_dim)

    def _placed(self, outputs: Tensor) -> Tensor:
        """Returns the codes [n, l] of the encoder's outputs; the means of those that are drawn."""
        codes: Tensor = self.norm(outputs)
        return codes

    def _lagged_from(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yields the codes [n, l] that are lagged for each part of the encoder's outputs."""
        return map(self._placed, parts)

    def _lagged_batches(self, start: int, end: int) -> Iterator[Tensor]:
        """Yields the lagged examples from place `start` to before `end`, in parts, on the model's device."""
        if self._kept_examples is not None:
            yield from self._kept_examples[start:end].split(CHUNK)
        else:
            assert self._lagged_examples is not None
            yield from self._read_examples(self._lagged_examples[start:end])

    def _read_examples(self, index: Tensor) -> Iterator[Tensor]:
        """Yields the training examples of an index [n], in parts, on the model's device."""
        assert self._training_set is not None
        chosen = index.cpu()
        if self._takes_index_tensors:
            parts: Iterator[Tensor] = (self._training_set[part][0] for part in chosen.split(CHUNK))
        else:
            parts = read(self._training_set, chosen)
        for part in parts:
            yield part.to(self.device, self.dtype)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.stopwatch is not None
        self.stopwatch.start("step")
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.stopwatch is not None
        examples, labels, index = checked(batch)
        self._renew(examples, index, batch_idx)

        codes = self.training_codes(dropout(examples, self.input_dropout))
        error = reconstruction_error(self.decode(codes), examples)

        # The forward of the latent term gives its gradient too; the backward is a scaling and is not counted.
        self.stopwatch.start("latent")
        terms = self.latent_terms(codes, index)
        self.stopwatch.stop("latent")
        if self.refresh_policy in QUEUES:
            self._pushed = codes.detach(), index
        latent, found = terms.mean(), terms.detach()
        self.log_terms(
            {
                "loss/reconstruction": error,
                "loss/latent": latent,
                "train/latent_excess": lambda: found.mean() - self._matched_latent,
                "train/gradient_weight": lambda: self.gradient_weight(found),
            }
        )
        loss: Tensor = error + self.weight * latent + self.penalty(codes, labels)
        return loss

    @torch.compiler.disable  # or all would be compiled again for every number of the step
    def _renew(self, examples: Tensor, index: Tensor, batch_idx: int) -> None:
        """Renews the lagged codes before a step, if it is time, or chooses the examples that "tracked" follows next."""
        assert self.stopwatch is not None
        self.stopwatch.start("latent")
        if self.refresh_policy == "full" and batch_idx % self.refresh_every == 0:
            self.refresh()
        elif self.refresh_policy == "rolling":
            self._refresh_part(self.trainer.global_step % self.refresh_every)
        elif self.refresh_policy == "tracked" and self.trainer.global_step % FOLLOWED == 0:
            self._chosen = self._to_follow(examples, index)
        self.stopwatch.stop("latent")

    def penalty(self, codes: Tensor, labels: Tensor) -> Tensor | float:
        """Returns an addition to the loss for codes [n, l] with labels [n]; 0 unless a subclass adds one."""
        return 0.0

    def training_codes(self, examples: Tensor) -> Tensor:
        """Returns the codes [n, l] of examples [n, ...] that the latent term compares with the target."""
        return self.encode(examples)

    def on_after_backward(self) -> None:
        assert self.stopwatch is not None
        if self.refresh_policy in QUEUES:  # not before: the backward pass needs the codes as they were
            self.stopwatch.start("latent")
            self.lagged.push(*self._pushed)
            if self._followed is not None:
                self._followed.pushed.append(len(self._pushed[1]))
            del self._pushed
            self.stopwatch.stop("latent")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.stopwatch is not None
        self.stopwatch.stop("step")

    def on_train_end(self) -> None:
        if not self.lagged.refreshed:  # of a queue, whose examples come and go, callbacks that average leave no codes
            assert self.trainer.train_dataloader is not None
            self._training_set = self.trainer.train_dataloader.dataset
            self._lagged_examples = self._drawn_examples(len(self._training_set))  # type: ignore[arg-type]
            self.refresh()
        super().on_train_end()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        assert self.stopwatch is not None
        self.log("train/latent_time_share", self.stopwatch.share("latent", "step"), sync_dist=True)

    def latent_terms(self, codes: Tensor, index: Tensor | None) -> Tensor:
        """Returns the latent term of each code [n, l] in nats, as [n].

        `index` [n] holds the training examples of the codes; None is for other examples.
        """
        noise = noise_like(codes, self.rng()) if self.kernel_noise else None
        return self.lagged.loss(codes, index, noise=noise, reduction="none")

    def matched_latent(self) -> float:
        """Returns the mean latent term of codes that follow the target, in nats (`LaggedKDE.matched_loss`)."""
        return self.lagged.matched_loss(noise=self.kernel_noise)

    def gradient_weight(self, terms: Tensor) -> Tensor:
        """Returns the mean of 1 - r = p_t / (p_e + p_t) from the terms [n] of `LaggedKDE.loss`, 0-dim."""
        return DIVERGENCES[self.lagged.divergence].target_share(terms.detach()).mean()

    # Evaluation

    def jsd(self, codes: Tensor, rng: torch.Generator) -> Tensor:
        """Returns the Jensen-Shannon divergence of codes from the distribution that the loss compares with, in nats.

        It is `LaggedKDE.jsd`.
        """
        return self.lagged.jsd(codes, rng)

    def latent_measures(self, codes: Tensor, index: Tensor | None) -> dict[str, float]:
        """Returns the latent term of codes, its value for a match, and the gradient's weight 1 - r."""
        terms = self.latent_terms(codes, index)
        return {
            "latent_term": float(terms.mean()),
            "latent_term_of_target": self.matched_latent(),
            "gradient_weight": float(self.gradient_weight(terms)),
        }

    @property
    def expected_variance(self) -> Tensor:
        """Returns the variance that the loss aims at: the target's, or h^2 less if `smoothed` is False."""
        variance = super().expected_variance
        return variance if self.lagged.smoothed else variance - self.lagged.bandwidth**2

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "num_lagged": self.lagged.num_centers,
            "bandwidth": self.lagged.bandwidth,
            "smoothed": self.lagged.smoothed,
            "divergence": self.lagged.divergence,
            "kernel_noise": self.kernel_noise,
            "weight": self.weight,
            "lagged_dtype": str(self.lagged.codes.dtype).removeprefix("torch."),
            "lagged_device": self.lagged.storage_device or "module",
        }

    def run_measures(self) -> dict[str, float]:
        if self.stopwatch is None:  # resumed where there was nothing left to do
            return {}
        return {"latent_time_share": self.stopwatch.share("latent", "step")}

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self._training_set is not None:
            self.refresh()  # measured and saved with the lagged codes and the statistics of this very encoder

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `GenerativeModel` adds, and the lagged codes of all ranks, which call it together."""
        super().on_save_checkpoint(checkpoint)
        if self.lagged.ranks > 1 or self.refresh_policy in QUEUES:  # also in place of an average's, see on_train_end
            checkpoint["state_dict"] |= self.lagged.gathered_state("lagged.")
        if self._followed is not None:
            _, indices, outputs, pushed = self._followed
            found = {"indices": indices, "outputs": outputs, "prints": self._followed.prints()}
            if self.lagged.ranks > 1:
                found = {name: gathered(part, name) for name, part in found.items()}
            checkpoint["followed"] = {name: part.cpu() for name, part in found.items()}
            checkpoint["followed"]["pushed"] = [codes * self.lagged.ranks for codes in pushed]  # of all ranks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._followed_before = checkpoint.get("followed")

    def _follow_again(self, count: int) -> None:
        """Reads the examples anew that were followed when the checkpoint was written.

        If they are not the same now, nothing is followed until the next ones are chosen.
        """
        found, self._followed_before = self._followed_before, None
        rank, ranks = self.lagged.rank, self.lagged.ranks
        if found is None or len(found["indices"]) < ranks:
            return
        if not 0 <= int(found["indices"].min()) <= int(found["indices"].max()) < count:
            return
        size = len(found["indices"]) // ranks
        indices, outputs, prints = (
            found[name][size * rank : size * (rank + 1)].to(self.device) for name in ("indices", "outputs", "prints")
        )
        pushed = [codes // ranks for codes in found["pushed"]]
        followed = _Followed(torch.cat(list(self._read_examples(indices))), indices, outputs, pushed)
        if torch.equal(followed.prints(), prints):  # otherwise another training set, or random changes of its examples
            self._followed = followed


class _Followed(NamedTuple):
    """Holds the examples [p, ...] that "tracked" follows, their indices [p], and what the encoder made of them then.

    `pushed` has the number of codes in each push since then.
    """

    examples: Tensor
    indices: Tensor
    outputs: Tensor
    pushed: list[int]

    def prints(self) -> Tensor:
        """Returns a number [p] of each example by which it is known again."""
        return self.examples.double().flatten(1).mean(1)


def _check_num_lagged(num_lagged: int, count: int) -> None:
    if num_lagged > count:
        raise ValueError(f"num_lagged must be at most {count}, the size of the training set, got {num_lagged}")
