"""Shows the progress of a run on stderr: by a bar on a terminal, by a line now and then in a file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._extras import train_extra
from ..data import ExampleSet

with train_extra():
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_CHUNK = 1000  # examples at a time
_LINE_INTERVAL = 10.0  # seconds between two lines of progress, where it is written to a file

_SHORT = {
    "loss/reconstruction": "rec",
    "val/reconstruction": "val_rec",
    "train/latent_excess": "excess",
    "train/gradient_weight": "1-r",
}


def _short(name: str) -> str:
    """Returns the name of a logged value as it is shown while a run goes on."""
    return _SHORT.get(name) or name.removeprefix("loss/").replace("val/", "val_")


def _figures(trainer: pl.Trainer) -> tuple[str, str]:
    """Returns the newest figures of the training and of the validation, each as a text."""
    shown: tuple[list[str], list[str]] = [], []
    figures = trainer.progress_bar_metrics
    for name, value in figures.items():
        if name == "loss/latent" and "train/latent_excess" in figures:
            continue  # which says the same, with a zero that means a match
        name = _short(name)
        shown[name.startswith("val_")].append(f"{name}={value:.3g}")
    return ", ".join(shown[0]), ", ".join(shown[1])


class RunProgressBar(TQDMProgressBar):
    """Shows one bar for the whole run, since an epoch of a small set ends before a bar of its own could be read.

    Below it are a line with the figures of the training and, from the first validation on, a line with those of the
    validation.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[Tqdm] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        total = trainer.estimated_stepping_batches
        self.train_progress_bar = Tqdm(
            desc=f"epoch {trainer.current_epoch + 1}",
            initial=trainer.global_step,
            total=None if math.isinf(total) else int(total),
            unit=" steps",
            dynamic_ncols=True,
            disable=self.is_disabled,
        )
        self._lines = []

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1}", refresh=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        bar = self.train_progress_bar
        if bar.update(trainer.global_step - bar.n):  # it has been drawn anew, which is ten times in a second at most
            self._show_figures(trainer)

    def _show_figures(self, trainer: pl.Trainer) -> None:
        room = self.train_progress_bar.format_dict["ncols"] or math.inf
        for place, text in enumerate(filter(None, _figures(trainer))):
            if place == len(self._lines):
                self._lines.append(Tqdm(bar_format="{desc}", position=place + 1, disable=self.is_disabled))
            while len(text) > room and ", " in text:  # a line that is wrapped would be left behind by the next one
                text = text.rpartition(", ")[0]
            self._lines[place].set_description_str(text)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.train_progress_bar.disable:
            self._show_figures(trainer)
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        """Leaves the lines on the screen, and the cursor below them."""
        if self._train_progress_bar is not None:
            for line in (self.train_progress_bar, *self._lines):
                line.leave = True
                line.close()
        self._lines = []

    # The validation's own bar, of a second or so, is not shown.

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reset_dataloader_idx_tracker()


class RunProgressLines(ProgressBar):
    """Prints a line of progress every ten seconds, and one at the end of the run.

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
            self._tell(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        self._due = time.monotonic() + _LINE_INTERVAL
        if self._enabled and trainer.is_global_zero:
            total = trainer.estimated_stepping_batches
            steps = str(trainer.global_step) if math.isinf(total) else f"{trainer.global_step}/{int(total)}"
            figures = filter(None, (f"epoch {self._epoch}: step {steps}", *_figures(trainer)))
            print(", ".join(figures), file=sys.stderr, flush=True)


def batches(examples: ExampleSet, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields examples and labels in order, and shows how far they are."""
    chunks = torch.arange(len(examples)).split(_CHUNK)
    if sys.stderr.isatty():
        chunks = Tqdm(chunks, desc=name, unit=" batches", dynamic_ncols=True)
    due = time.monotonic() + _LINE_INTERVAL
    for index in chunks:
        yield examples[index][:2]
        done = int(index[-1]) + 1
        if not sys.stderr.isatty() and (time.monotonic() >= due or done == len(examples)):
            due = time.monotonic() + _LINE_INTERVAL
            print(f"{name}: {done} of {len(examples)} examples", file=sys.stderr, flush=True)
