"""Defines what every model shares: decoding of latents that follow a target, learning rates, checkpoints."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .._extras import train_extra
from .._modes import evaluating
from .._numbers import integer, not_negative
from .._plain import plain
from .._ranks import rank_and_size
from .._version import __version__
from ..data import Batch, ExampleData
from ..targets import Law, as_law, is_target
from .descriptions import description
from .networks import Network
from .schedule import HalfCosine

with train_extra():
    import lightning.pytorch as pl

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK = 1000  # examples encoded or decoded at a time where no gradient is wanted
_FORMAT = 1  # of checkpoints, as they are written and read here
LOSSES_KEPT = {"cpu": 1, "cuda": 50}  # before they are looked at: a GPU would have to be waited for


class GenerativeModel(pl.LightningModule, ABC):
    """Decodes examples from latents that follow a target: the base class of all models.

    To define a model of your own, set `target` and `generator`, and add a `training_step`. A batch is (examples [n,
    ...], labels [n], indices [n] int64 in the training set), as the data modules of `kdejsd.data` give it.

    What the models log per step is logged in every `log_every_n_steps`-th step of the trainer (`log_terms`).

    Args:
        latent_dim: l, the dimension of the latents.
        learning_rate: the learning rate of Adam.
        decay: lower the learning rate to 0 along a half cosine over the run, if its end is given in steps or epochs.
        betas: Adam's decay rates of the mean gradient and of the mean squared gradient.

    Raises:
        ValueError: if latent_dim is below 1, or learning_rate is negative.
        TypeError: if a number is of another kind, or a checkpoint cannot hold an argument of the model. It can hold
            numbers, text, lists and the like. Networks, classes and targets are left out of checkpoints, and may be
            given.

    Attributes:
        target: the distribution of the latents; `sample` decodes its samples.
        generator: the module latents [n, l] -> examples [n, ...].

    Example:
        >>> import torch
        >>> from kdejsd.models import AE, FC, GenerativeModel
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
        >>> isinstance(model, GenerativeModel)
        True
        >>> model.sample(10, torch.Generator().manual_seed(0)).shape
        torch.Size([10, 1, 8, 8])
    """

    target: Law
    generator: nn.Module

    def __init__(self, latent_dim: int, learning_rate: float, decay: bool, betas: tuple[float, float]) -> None:
        super().__init__()
        latent_dim = integer("latent_dim", latent_dim, 1)
        learning_rate = not_negative("learning_rate", learning_rate)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attribute 'target' is an instance of `nn.Module`")
            self.save_hyperparameters(ignore=["encoder", "decoder", "generator", "discriminator"])
        # A checkpoint holds plain values: of a network or a target the description that the command line gives, not it.
        objects = {name: value for name, value in self.hparams.items() if callable(value) or is_target(value)}
        for name in objects:
            del self.hparams[name]
        self.descriptions = {name: description(value) for name, value in objects.items()}  # for `save_pretrained`
        self.hparams.update({name: plain(value, name) for name, value in self.hparams.items()})
        self.latent_dim = latent_dim
        self.learning_rate = learning_rate
        self.decay = decay
        self.betas: tuple[float, float] = plain(betas, "betas")
        self._rng_state: dict[str, Tensor] = {}
        self._planned_steps: float | None = None
        self._terms: dict[str, Tensor] = {}
        self._unlogged: dict[str, Tensor | Callable[[], Tensor]] = {}
        self._begun = False  # whether this run has had a step
        self._logs_step = True
        self._losses: list[_Loss] = []
        self._place = _Place(0, 0, 0, None)

    @staticmethod
    @abstractmethod
    def build_networks(
        network: Network, example_shape: Sequence[int], latent_dim: int, settings: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        """Returns the two networks that the model's constructor takes, for examples of a shape, without their number.

        `settings` are those of the constructor's other arguments that are given.
        """

    @classmethod
    def settings_for(cls, settings: Mapping[str, Any], data: ExampleData) -> dict[str, Any]:
        """Returns the settings that depend on the data, by their names, where they are not given.

        It is called before a model is built, since building may take long.

        Raises:
            ValueError: if no model of these settings can be trained on the data.
        """
        return {}

    # Use

    def decode(self, codes: Tensor) -> Tensor:
        """Returns examples [n, ...] decoded from codes [n, l]."""
        examples: Tensor = self.generator(codes)
        return examples

    @torch.compiler.disable
    def target_samples(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Draws n samples [n, l] of the target, in the model's dtype and on its device.

        Args:
            n: the number of samples.
            rng: the random number generator. None is one seeded from the global generator, with other samples on each
                rank.
        """
        if rng is None:
            rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())) + rank_and_size()[0])
        return as_law(self.target).sample(n, rng).to(self.device, self.dtype)  # type: ignore[arg-type]

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Returns examples [n, ...] decoded from n samples of the target, drawn as in `target_samples`."""
        codes = self.target_samples(n, rng)
        with evaluating(self):
            return torch.cat([self.decode(chunk) for chunk in codes.split(CHUNK)])

    # Training

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.world_size > 1 and not self.automatic_optimization:
            raise ValueError(
                f"{type(self).__name__} trains on one device, got {self.trainer.world_size}: its networks take turns, "
                "and the gradients of one would not be averaged before its step"
            )

    def rng(self) -> torch.Generator | None:
        """Returns the random number generator of the noise in training, on the model's device.

        On one process it is None, which stands for the global generator. On several processes the global generators are
        alike, so each rank has one of its own; every rank must ask equally often.
        """
        rank, size = rank_and_size()
        if size == 1:
            return None
        return torch.Generator(self.device).manual_seed(int(torch.randint(2**62, ())) + rank)

    def adam(self, *parts: Iterable[nn.Parameter]) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        """Returns an Adam for each part of the weights, and the schedulers of their learning rates.

        They have the form that `configure_optimizers` returns.
        """
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(part, lr=self.learning_rate, betas=self.betas, fused=True) for part in parts
        ]
        if not self.decay:
            return optimizers, []
        schedulers = [
            HalfCosine(optimizer, lambda: self.trainer.estimated_stepping_batches) for optimizer in optimizers
        ]
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in schedulers]

    def step_schedulers(self) -> None:
        """Moves the learning rates to their next step.

        A model that steps its optimisers itself calls this at the end of its training step.
        """
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()  # type: ignore[call-arg]

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Returns the loss of a minibatch after logging its parts; None if the model steps its optimisers itself."""

    def on_train_start(self) -> None:
        planned = self.trainer.estimated_stepping_batches
        if self.decay and self._planned_steps not in (None, planned):
            warnings.warn(
                f"the learning rate was to come to 0 after {self._planned_steps} steps, and is now to after {planned}: "
                "the run does not go on as it would have without a stop",
                stacklevel=1,
            )
        self._planned_steps = planned
        self._unlogged, self._begun = {}, False
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, HalfCosine):
                config.scheduler.go_to(self.trainer.global_step)
        self._losses.clear()
        if self._rng_state:
            torch.set_rng_state(self._rng_state["cpu"])
            if "cuda" in self._rng_state and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng_state["cuda"], self.device)
            self._rng_state = {}

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy or a pickle, without functions that compute terms of the last steps."""
        return super().__getstate__() | {"_unlogged": {}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._terms = {}
        last, written = self.trainer.is_last_batch, self.trainer._logger_connector.should_update_logs
        self._logs_step, self._begun = last or written or not self._begun, True
        known = isinstance(batch, (tuple, list)) and len(batch) == 3
        self._place = _Place(
            self.trainer.global_step, self.trainer.current_epoch, batch_idx, batch[2] if known else None
        )

    @torch.compiler.disable
    def log_terms(self, terms: Mapping[str, Tensor | Callable[[], Tensor]]) -> None:
        """Logs the terms of a training step's loss in those steps that the trainer's loggers write.

        These are every `log_every_n_steps`-th step of the trainer, the first and the last of the run, and the last of
        each epoch. `trainer.callback_metrics` and the progress bar keep the values until then. Lightning takes nearly a
        millisecond to log a value, so a small network may need less time for a step than for logging its terms.

        Args:
            terms: the terms by their names, each a 0-dim tensor, or a function that returns one. The function is
                called in those steps alone.
        """
        for name, value in terms.items():
            if isinstance(value, Tensor):
                self._terms[name] = self._unlogged[name] = value.detach()
            else:
                self._unlogged[name] = value
        if self._logs_step:
            self._log_unlogged()

    def _log_unlogged(self, sync_dist: bool = False) -> None:
        for name, value in self._unlogged.items():  # not by the method below, for some are of steps before this one
            super().log(name, value if isinstance(value, Tensor) else value(), prog_bar=True, sync_dist=sync_dist)
        self._unlogged = {}

    def on_train_epoch_end(self) -> None:
        self._log_unlogged(sync_dist=True)  # of an epoch that was cut short

    # A loss that is no number

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Logs a value as Lightning does. If a loss is not finite, the error names the values logged before it."""
        if isinstance(value, (Tensor, float)):
            self._terms[name] = torch.as_tensor(value).detach()
        super().log(name, value, *args, **kwargs)

    def on_before_backward(self, loss: Tensor) -> None:
        """Remembers every loss, and stops the training at one that is not finite.

        On the CPU it stops at once, before the loss has a part in a gradient. On a GPU it stops at the latest after 50
        losses or before the next checkpoint: the weights may be spoiled then, but the last checkpoint is not.

        Raises:
            FloatingPointError: if a loss is not finite. The error names the batch, the terms, and examples or weights
                that are not finite.
        """
        self._losses.append(_Loss(loss.detach(), dict(self._terms), self._place))
        if len(self._losses) >= LOSSES_KEPT.get(loss.device.type, 1):
            self._check_losses()

    @contextmanager
    def explaining(self, what: str, examples: Tensor | None) -> Iterator[None]:
        """Replaces a ValueError about values that are not finite by an error that says where they come from.

        Args:
            what: the name of the values.
            examples: [n], the training examples that the values come from; None if they come from all weights.

        Raises:
            FloatingPointError: in place of the ValueError, if examples or weights are the cause. It names them.
        """
        try:
            yield
        except ValueError as error:
            self._check_losses()  # one of those not yet looked at may have been the first
            cause = self._cause(examples)
            if cause is None:
                raise
            raise FloatingPointError(f"{what} are not finite in {self._named(self._place)}: {cause}") from error

    def _check_losses(self) -> None:
        losses, self._losses = self._losses, []
        if not losses or bool(torch.stack([item.value.float() for item in losses]).isfinite().all()):
            return
        first = next(item for item in losses if not bool(item.value.isfinite()))
        terms = ", ".join(f"{name} is {float(value):.4g}" for name, value in first.terms.items())
        cause = self._cause(first.place.examples) or "its examples and the weights are finite"
        raise FloatingPointError(f"the loss is {float(first.value)} in {self._named(first.place)}: {terms}; {cause}")

    def _named(self, place: _Place) -> str:
        return (
            f"epoch {place.epoch + 1}, batch {place.batch + 1} of {self.trainer.num_training_batches} "
            f"(after {place.step} steps)"
        )

    def _cause(self, examples: Tensor | None) -> str | None:
        """Names the training examples among those given [n] that are not finite, or else weights that are not.

        It returns None if all are finite.
        """
        loader = self.trainer.train_dataloader
        bad: list[str] = []
        if examples is not None and loader is not None:
            bad = [str(i) for i in examples.tolist() if not bool(loader.dataset[i][0].isfinite().all())]
        if bad:
            return f"examples that are not finite in the training set: {', '.join(bad)}"
        weights = self.strange_weights()
        return f"weights that are not finite: {', '.join(weights)}" if weights else None

    def strange_weights(self) -> list[str]:
        """Returns the names of weights with NaN or infinity and of buffers with NaN."""
        return [
            *(name for name, value in self.named_parameters() if not bool(value.isfinite().all())),
            *(name for name, value in self.named_buffers() if bool(value.isnan().any())),
        ]

    # Reports

    def settings(self) -> dict[str, Any]:
        """Returns the model's name and main settings, as plain values for a report."""
        return {"name": type(self).__name__, "latent_dim": self.latent_dim, "target": str(self.target)}

    def run_measures(self) -> dict[str, float]:
        """Returns measures of the run that trained the model, such as times."""
        return {}

    # Handing on

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model into a folder, for `from_pretrained` and for the Hugging Face hub.

        The folder is made if it is not there. It then holds three files. model.safetensors has the weights and the rest
        of the state, such as a GEN's lagged codes, each in its own dtype. config.json has the arguments of the model.
        README.md says how to load it; one that is already there stays as it is. `kdejsd export` adds the measures of a
        run, and the names and the scale of its columns.

        Args:
            folder: the path of the folder.

        Raises:
            FloatingPointError: if weights are not finite.
            ModuleNotFoundError: if a package of the extra `hub` is missing.

        Example:
            >>> import os, tempfile, torch
            >>> from kdejsd.models import VAE, built
            >>> model = built.VAE((1, 8, 8), latent_dim=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     print(sorted(os.listdir(folder)))
            ...     again = VAE.from_pretrained(folder)
            ['README.md', 'config.json', 'model.safetensors']
            >>> codes = torch.zeros(1, 2)
            >>> bool((again.decode(codes) == model.decode(codes)).all())
            True
        """
        from .pretrained import save

        save(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> Self:
        """Loads a model that `save_pretrained` or `kdejsd export` has written, on the CPU and in evaluation mode.

        If the model has built its networks itself, they are built again. For this, the modules that config.json names
        are imported: load no folder that you do not trust.

        Args:
            name: a folder, or the name of a repository on the Hugging Face hub, such as "user/digits".
            revision, token, cache_dir, local_files_only: as in `huggingface_hub.hf_hub_download`; a folder has no use
                for them.
            arguments: arguments of the model that no file can hold, such as `encoder` and `decoder` of your own or a
                distribution as `target`; and others that are to replace the saved ones.

        Returns:
            The model, of its own class: `GenerativeModel.from_pretrained` loads all of them.

        Raises:
            FileNotFoundError: if there is no such folder or repository, or it holds no model of kdejsd.
            ValueError: if an argument must be given, or the weights do not fit the networks.
            TypeError: if the model is of another class.
            ModuleNotFoundError: if a package of the extra `hub` is missing.

        Example:
            >>> import tempfile, torch
            >>> from kdejsd.models import AE, FC
            >>> networks = FC((1, 8, 8), latent_dim=2)  # in place of your own
            >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     new = FC((1, 8, 8), latent_dim=2)
            ...     again = AE.from_pretrained(folder, encoder=new.encoder, decoder=new.decoder)
            >>> codes = torch.zeros(1, 2)
            >>> bool((again.decode(codes) == model.decode(codes)).all())
            True
        """
        from .pretrained import load

        return load(
            cls,
            name,
            arguments,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **commit: Any
    ) -> str:
        """Uploads the files of `save_pretrained` to the Hugging Face hub, and returns the address of the commit.

        `kdejsd export RUN --push NAME` uploads the model of a run with the run's measures.

        Args:
            repo_id: the name of the repository, such as "user/digits"; it is made if it is not there.
            private: whether a new repository is private; None is the account's default.
            token: of the account; None is the one that `hf auth login` has stored.
            commit: `commit_message`, `revision`, `create_pr` and the other arguments of
                `huggingface_hub.HfApi.upload_folder`.

        Raises:
            ModuleNotFoundError: if a package of the extra `hub` is missing.

        Example:
            >>> from kdejsd.models import built
            >>> built.VAE((1, 8, 8)).push_to_hub("user/digits")  # doctest: +SKIP
        """
        from .pretrained import push

        return push(self, repo_id, private=private, token=token, **commit)

    # Checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Loads a model as Lightning does; networks are built anew if the checkpoint says how they were built.

        `kdejsd.load` does this too, and also takes the folder of a run.

        Raises:
            TypeError: if the checkpoint is of another class.
        """
        from .built import BuiltModel, with_built_networks

        settings: Mapping[str, Any] = {}
        networks = {"encoder", "decoder", "generator", "discriminator"} & kwargs.keys()
        if not (networks or issubclass(cls, BuiltModel)):
            settings = torch.load(checkpoint_path, map_location="cpu", weights_only=True).get("hyper_parameters", {})
            if not isinstance(checkpoint_path, (str, os.PathLike)):
                checkpoint_path.seek(0)  # of an open file
        if "example_shape" not in settings:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        form = BuiltModel if "_class_path" in settings else with_built_networks(cls)
        model = form.load_from_checkpoint(checkpoint_path, *args, **kwargs)
        if not isinstance(model, cls):
            raise TypeError(f"{checkpoint_path} must be of a {cls.__name__}, got one of a {type(model).__name__}")
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the random state and the length of the run that `decay` follows.

        Raises:
            FloatingPointError: if a loss or a weight is not finite.
        """
        self._check_losses()
        strange = self.strange_weights()
        if strange:
            raise FloatingPointError(
                f"the weights {', '.join(strange)} are not finite after {checkpoint['global_step']} steps, though "
                "every loss was: a gradient was not finite, or a step too large"
            )
        rng_state = {"cpu": torch.get_rng_state()}  # for what is drawn in training, and networks with dropout
        if self.device.type == "cuda":
            rng_state["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["kdejsd_format"], checkpoint["kdejsd_version"] = _FORMAT, __version__
        checkpoint["rng_state"] = rng_state
        checkpoint["planned_steps"] = self._planned_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the random state and the length of the run.

        Raises:
            ValueError: if the checkpoint has another format.
        """
        if checkpoint.get("kdejsd_format") != _FORMAT:
            writer = checkpoint.get("kdejsd_version", "before 0.2.0")
            raise ValueError(
                f"kdejsd {__version__} cannot read this checkpoint, which a version of another format ({writer}) has "
                "written: train again, or use that version"
            )
        self._rng_state = checkpoint["rng_state"]
        self._planned_steps = checkpoint["planned_steps"]
        then = checkpoint.get("hyper_parameters", {})
        self.descriptions |= {name: then.get(name) for name, value in self.descriptions.items() if value is None}
        self._keep_settings(checkpoint)

    def _keep_settings(self, checkpoint: dict[str, Any]) -> None:
        """Makes the checkpoint's optimisers continue with this model's settings, where the run had others."""
        optimizers = checkpoint.get("optimizer_states", [])
        first = checkpoint.get("hyper_parameters", {}).get("learning_rate", self.learning_rate)
        scale = self.learning_rate / first if first else 1.0
        for state in optimizers:
            for group in state["param_groups"]:
                group["lr"] *= scale
                if "betas" in group:
                    group["betas"] = self.betas
        for state in checkpoint.get("lr_schedulers", []):
            for name in {"base_lrs", "_last_lr"} & state.keys():
                state[name] = [rate * scale for rate in state[name]]


class _Place(NamedTuple):
    """Locates a training step: steps and epochs before it, its number in the epoch, the examples [n] of its batch."""

    step: int
    epoch: int
    batch: int
    examples: Tensor | None


class _Loss(NamedTuple):
    """Holds a loss and the terms logged before it, each 0-dim, and its place in the run."""

    value: Tensor
    terms: dict[str, Tensor]
    place: _Place


def noise_like(t: Tensor, rng: torch.Generator | None) -> Tensor:
    """Returns samples of the standard normal in the shape, dtype and device of t."""
    return torch.randn(t.shape, generator=rng, dtype=t.dtype, device=t.device)


def checked(batch: Any) -> Batch:
    """Returns the batch if it has three parts.

    Raises:
        TypeError: if it is anything else.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 3:
        got = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"a batch must be (examples, labels, indices in the training set), got {got}")
    examples, labels, index = batch
    return examples, labels, index


def inputs(batch: Any) -> Tensor:
    """Returns the tensor that a model predicts from: the batch itself, or the first of its parts.

    Raises:
        TypeError: if there is no tensor.
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(f"a batch to predict from must be a tensor or begin with one, got {type(first).__name__}")
    return first
