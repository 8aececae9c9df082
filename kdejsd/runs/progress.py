"""Shows the progress of a run: by a bar on a terminal, by a line now and then in a file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._extras import train_extra
from ..data import ImageSet

with train_extra():
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_CHUNK = 1000  # images at a time
_LINE_INTERVAL = 30.0  # seconds between two lines of progress, where it is written to a file


class RunProgressBar(TQDMProgressBar):
    """Shows one bar for the whole run, since an epoch of a small set ends before a bar of its own could be read."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_start(trainer)
        bar = self.train_progress_bar
        total = trainer.estimated_stepping_batches
        bar.total = None if math.isinf(total) else int(total)
        bar.initial = bar.n = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}", refresh=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if self._should_update(step, bar.total or 0):
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(step - bar.n)

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)


class RunProgressLines(ProgressBar):
    """Prints a line of progress every half minute, and one at the end of the run.

    It is for a file, in which a bar that is drawn again and again would leave a line of thousands of pieces.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._due = 0.0
        self._epoch = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._due = time.monotonic() + _LINE_INTERVAL
        self._epoch = trainer.current_epoch + 1  # of a run that goes on within an epoch, which does not start

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._epoch = trainer.current_epoch + 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if time.monotonic() >= self._due:
            self._tell(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer, pl_module)

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = time.monotonic() + _LINE_INTERVAL
        total = trainer.estimated_stepping_batches
        steps = str(trainer.global_step) if math.isinf(total) else f"{trainer.global_step}/{int(total)}"
        measures = [
            f", {name}={value:.3g}" if isinstance(value, float) else f", {name}={value}"
            for name, value in self.get_metrics(trainer, pl_module).items()
        ]
        if self._enabled and trainer.is_global_zero:
            print(f"epoch {self._epoch}: step {steps}{''.join(measures)}", flush=True)


def batches(images: ImageSet, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images and labels in order, with a progress bar."""
    interval = 0.1 if sys.stderr.isatty() else _LINE_INTERVAL
    for index in Tqdm(torch.arange(len(images)).split(_CHUNK), desc=name, unit="batch", mininterval=interval):
        yield images[index][:2]
