"""Shows in TensorBoard how a run goes: pictures over time, and settings beside results."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from .._extras import train_extra
from ..data import ExampleData
from ..models import Autoencoder, GenerativeModel
from .measuring import encode_set
from .pictures import pictures, sample_count

with train_extra():
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.trainer.states import TrainerFn
    from matplotlib.figure import Figure

_CODES = 1000  # held-out codes in a picture
_SHARE = 0.01  # of the run's time, for pictures
_FIRST = 0.3  # seconds that pictures are taken to need before any has been drawn
_SPACING = 1.25  # steps at a picture over those at the one before: a long run has dozens of pictures, not thousands
_RESOLUTION = 100  # dots per inch


class RunPictures(pl.Callback):
    """Logs pictures and results of a run to TensorBoard; other loggers get none.

    The pictures are those of a report: samples, and for an autoencoder codes and reconstructions of held-out examples.
    The latents of the samples and the held-out examples are the same every time, so that one sees what changes.
    Pictures are drawn after a validation and at the end of the run. All together take at most a hundredth of the run's
    time, and each set comes after at least a quarter more steps than the one before. A run of some minutes has a
    handful of them.

    If a picture cannot be drawn, there is a warning, and the run goes on without it. At the end the run's settings are
    logged with the last values of the validation, as `result/...`, for TensorBoard's table of hyperparameters.

    Example:
        >>> import lightning.pytorch as pl
        >>> from kdejsd.runs.boards import RunPictures
        >>> trainer = pl.Trainer(callbacks=[RunPictures()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._spent = 0.0
        self._count = 0
        self._step = 0
        self._possible = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started, self._spent, self._count, self._step = time.perf_counter(), 0.0, 0, 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or trainer.global_step < _SPACING * self._step:
            return
        expected = self._spent / self._count if self._count else _FIRST
        if self._spent + expected <= _SHARE * (time.perf_counter() - self._started):
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._step:
            self._draw(trainer, pl_module)
        settings = {name: value for name, value in pl_module.hparams.items() if not name.startswith("_")}
        data = getattr(trainer, "datamodule", None)
        if data is not None:
            settings |= {f"data/{name}": value for name, value in data.hparams.items() if not name.startswith("_")}
            settings["data/name"] = type(data).__name__
        settings["model"] = type(pl_module).__name__
        # Of names of their own: logged again as val/..., they would be one more point of the curve.
        results = {
            name.replace("val/", "result/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        for board in _boards(trainer):
            if results:
                board.log_hyperparams(settings, results)

    def _draw(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        boards, data = _boards(trainer), getattr(trainer, "datamodule", None)
        if not (boards and self._possible and isinstance(model, GenerativeModel) and isinstance(data, ExampleData)):
            return
        begun = time.perf_counter()
        try:
            figures = self._figures(model, data)
        except Exception as error:  # whatever it is, the run is worth more than its pictures
            self._possible = False
            warnings.warn(f"the run has no pictures on its board: {error}", stacklevel=1)
            return
        for name, figure in figures.items():
            figure.set_dpi(_RESOLUTION)
            for board in boards:
                board.experiment.add_figure(f"pictures/{name}", figure, trainer.global_step)
        self._spent += time.perf_counter() - begun
        self._count += 1
        self._step = trainer.global_step

    @staticmethod
    @torch.no_grad()
    def _figures(model: GenerativeModel, data: ExampleData) -> dict[str, Figure]:
        samples = model.sample(sample_count(data), torch.Generator().manual_seed(0))
        held_out = None
        if isinstance(model, Autoencoder):
            held_out = encode_set(model, data.held_out.subset(torch.arange(min(_CODES, len(data.held_out)))))
        return pictures(model, data, samples, held_out)


def _boards(trainer: pl.Trainer) -> list[Any]:
    """Returns the loggers that take pictures, on the rank that writes."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
