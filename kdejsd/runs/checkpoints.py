"""Writes checkpoints that survive kills, full disks and diverging losses; runs continue from them bit for bit."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from .._extras import train_extra
from .folders import own_folder, write_whole

with train_extra():
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.trainer.states import TrainerFn

INTERVAL = 60.0  # seconds between two checkpoints
COST = 20  # but at least so many times as long as writing one takes
ASKED = 10  # steps after which several ranks ask each other whether one is due


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Returns the content of a checkpoint, which holds tensors and plain values only (`weights_only`).

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the file cannot be read.
        ValueError: if the file is damaged or of another kind.

    Example:
        >>> import os, tempfile, torch
        >>> from kdejsd.runs.checkpoints import load_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "last.ckpt")
        ...     torch.save({"global_step": 7}, path)
        ...     load_checkpoint(path)
        {'global_step': 7}
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"the checkpoint {path} does not exist") from None
    except (PermissionError, IsADirectoryError) as error:
        raise OSError(f"the checkpoint {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # of many kinds, by what is wrong with the file
        reason = " ".join(str(error).split("Please file an issue")[0].split())  # torch's are of many lines
        if not zipfile.is_zipfile(path):  # of these torch says only at which byte it gave up
            reason = "it is not a whole file of torch.save"
        raise ValueError(f"{path} is damaged or no checkpoint of plain values: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} must hold a checkpoint, a dict, got {type(checkpoint).__name__}")
    return checkpoint


_NOTHING, _SAVE, _STOP = range(3)  # what a rank wishes


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that at any moment its file is the old one or the new one, whole.

    It is written to the disk under the name FILE.part, and then renamed. A killed process leaves FILE.part, which the
    next checkpoint overwrites. (Lightning's own class writes into the system's folder of temporary files and moves the
    file from there. On another file system this is a copy, so a full disk or a kill meanwhile destroys the old
    checkpoint too.)

    Example:
        >>> import os, tempfile
        >>> from kdejsd.runs.checkpoints import WholeCheckpointIO
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "last.ckpt")
        ...     WholeCheckpointIO().save_checkpoint({"global_step": 7}, path)
        ...     os.listdir(folder), WholeCheckpointIO().load_checkpoint(path)
        (['last.ckpt'], {'global_step': 7})
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint to a path of this machine.

        Raises:
            OSError: if it cannot be written; the file that was there before stays untouched.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Returns the content of a checkpoint by `load_checkpoint`, whatever `weights_only` says."""
        return load_checkpoint(path, map_location)


class RunCheckpoint(Checkpoint):
    """Keeps a run's newest state in one file, and saves it before a signal stops the run.

    It saves after the run's first step, then every minute, and at the end of the run. Where writing takes more than 3
    seconds it saves less often, so that writing takes a twentieth of the time. On Ctrl-C or SIGTERM it lets the step
    end, saves and stops the run; a second Ctrl-C stops it at once. Several ranks agree on all this after every tenth
    step.

    A run that continues from the file equals one that was never stopped. For this, checkpoints are made only where
    Lightning's loops can continue: at the end of a batch without a validation after it, or at the end of a validation.
    None is made at the end of an epoch, from where a run with `max_steps` would continue in another order.

    The first checkpoint of a resumed run is the one that it began with. If that is the run's own file, it stays as it
    is until the first new checkpoint takes its place.

    Args:
        path: the path of the file.

    Example:
        >>> from pathlib import Path
        >>> import lightning.pytorch as pl
        >>> from kdejsd.data import Digits
        >>> from kdejsd.models.built import AE
        >>> from kdejsd.runs.checkpoints import RunCheckpoint, WholeCheckpointIO
        >>> checkpoint = RunCheckpoint(Path("run", "last.ckpt"))
        >>> trainer = pl.Trainer(callbacks=[checkpoint], plugins=[WholeCheckpointIO()])  # doctest: +SKIP
        >>> trainer.fit(AE((1, 8, 8)), Digits())  # doctest: +SKIP
        >>> checkpoint.how_to_go_on()  # doctest: +SKIP
        'the last checkpoint is of step 14000; to go on: kdejsd fit --ckpt_path run/last.ckpt'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step: int | None = None  # of the checkpoint in the file
        self.begun: int | None = None  # of the checkpoint that the run goes on from
        self.interrupted = False
        self._due = 0.0
        self._previous: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.step = self.begun = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Tuners save and load one of their own before the run begins: a resumed run has loaded its own before that.
        if trainer.state.fn != TrainerFn.FITTING or self.begun is not None or checkpoint["global_step"] == 0:
            return
        self.begun = checkpoint["global_step"]
        if trainer.is_global_zero:
            self._keep(Path(trainer.ckpt_path))  # type: ignore[arg-type]
        parts = (("model", "hyper_parameters", pl_module), ("data", "datamodule_hyper_parameters", trainer.datamodule))  # type: ignore[attr-defined]
        changed = [
            f"--{part}.{name} was {then!r} and is {now[name]!r}"
            for part, key, holder in parts
            for now in [{} if holder is None else holder.hparams]
            for name, then in checkpoint.get(key, {}).items()
            if name != "root" and name in now and now[name] != then  # the same files may lie elsewhere
        ]
        if changed:
            warnings.warn(
                "the run goes on with other settings than it began with, so not as it would have without a stop: "
                + "; ".join(changed),
                stacklevel=1,
            )

    def _keep(self, checkpoint: Path) -> None:
        if self.path.exists() and self.path.samefile(checkpoint):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.link(checkpoint, self.path)  # a checkpoint's file is replaced and never changed
        except OSError:  # another file system, or one without links
            write_whole(self.path, checkpoint.read_bytes())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = self.begun
        if threading.current_thread() is threading.main_thread():  # no other thread is told of signals
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not _is_validated_next(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and _is_validated_next(trainer):
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        batches = trainer.fit_loop.batch_idx + 1
        if batches % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # gradients that wait for more are in no checkpoint
        ends = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step or _is_last_epoch_over(trainer)
        due = time.monotonic() >= self._due or trainer.received_sigterm
        wish = self._agreed(trainer, _STOP if self.interrupted else _SAVE if due else _NOTHING)
        if ends or wish != _NOTHING:
            self._save(trainer)
        if wish == _STOP:
            raise KeyboardInterrupt

    @staticmethod
    def _agreed(trainer: pl.Trainer, wish: int) -> int:
        """Returns the strongest wish of all ranks."""
        if trainer.world_size == 1:
            return wish
        if trainer.global_step % ASKED:
            return _NOTHING
        wishes = torch.tensor(wish, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(wishes, reduce_op="max"))

    def _save(self, trainer: pl.Trainer) -> None:
        began = time.monotonic()
        trainer.save_checkpoint(self.path)
        self.step = trainer.global_step
        now = time.monotonic()
        self._due = now + max(INTERVAL, COST * (now - began))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Stopped by a callback at the end of an epoch, or with weights that one has averaged at the end of the run.
        if self.step != trainer.global_step or self._is_old(trainer, pl_module):
            self._save(trainer)

    def _is_old(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Tells whether the file has other weights than the model."""
        old = False
        if trainer.is_global_zero:
            saved = load_checkpoint(self.path)["state_dict"]
            old = any(not torch.equal(saved[name], value.cpu()) for name, value in pl_module.named_parameters())
        return trainer.strategy.broadcast(old)

    def how_to_go_on(self) -> str:
        """Returns the advice for a user whose run has stopped after a checkpoint."""
        named = own_folder(self.path) or self.path
        return f"the last checkpoint is of step {self.step}; to go on: kdejsd fit --ckpt_path {named}"

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


def _is_validated_next(trainer: pl.Trainer) -> bool:
    """Tells whether the plan has a validation after the batch that has just ended.

    A validation that comes only because the run stops is not in the plan.
    """
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    done = 1 + (trainer.fit_loop.total_batch_idx if every is None else trainer.fit_loop.batch_idx)
    between = trainer.val_check_batch
    if between is None:  # by the clock: there is no plan
        return False
    return trainer.is_last_batch if between == float("inf") else done % between == 0


def _is_last_epoch_over(trainer: pl.Trainer) -> bool:
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
