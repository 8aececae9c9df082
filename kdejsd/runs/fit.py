"""Defines `kdejsd fit`, which trains a model by LightningCLI and writes its report."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

import torch

from .report import write_report
from .saved import loaded_model
from .settings import FitCLI


def fit(args: list[str]) -> int:
    """Trains a model as the arguments say, writes its report and prints where it is; returns the exit code."""
    cli = FitCLI(args)
    started = time.perf_counter()
    try:
        _train(cli)
    except SystemExit:  # how Lightning ends after Ctrl-C or SIGTERM
        if cli.trainer.is_global_zero:
            print(f"stopped; {_how_to_go_on(cli)}", file=sys.stderr)
        return 128 + (signal.SIGTERM if cli.trainer.received_sigterm else signal.SIGINT)
    if not cli.trainer.is_global_zero:
        return 0
    if cli.begun == cli.trainer.global_step:
        print(
            f"nothing was left to train after step {cli.begun} of {cli.ckpt_path}, and its report is written anew; to "
            "go on, move the run's end by --trainer.max_epochs, --trainer.max_steps or --trainer.max_time",
            file=sys.stderr,
        )
    # The report is of what the checkpoint holds, as evaluate and score read it: in float32, whatever the precision was,
    # and without the validation that Lightning adds where a limit of time stops a run, which renews a GEN's codes.
    checkpoint = cli.checkpoint.path
    model = loaded_model(checkpoint) if checkpoint.exists() else cli.model.float()
    run = {
        "epochs": cli.trainer.current_epoch,
        "steps": cli.trainer.global_step,
        "seed": cli.config.seed_everything,
        "wall_time_s": time.perf_counter() - started,
        **cli.model.run_measures(),
    }
    try:
        print(write_report(cli.folder, model, cli.datamodule, run))
    except OSError as error:
        again = f"; once it can: kdejsd evaluate {checkpoint}" if checkpoint.exists() else ""
        raise OSError(f"the report cannot be written to {cli.folder}: {error}{again}") from error
    print(f"report: {cli.folder / 'report.html'}")
    return 0


def _train(cli: FitCLI) -> None:
    trainer = cli.trainer
    try:
        model: Any = torch.compile(cli.model) if cli.config.compile else cli.model
        trainer.fit(model, datamodule=cli.datamodule, ckpt_path=cli.ckpt_path)
        if trainer.global_step == 0:
            limits = ("max_epochs", "max_steps", "max_time", "limit_train_batches")
            given = ", ".join(f"{name}={getattr(cli.config_init.trainer, name)}" for name in limits)
            raise ValueError(
                f"nothing was left to train: the trainer's limits must leave one step at least, got {given}"
            )
    except BaseException as error:
        if trainer.global_step in (0, cli.begun):
            cli.discard_folder()
        elif cli.checkpoint.step is not None and trainer.is_global_zero and isinstance(error, Exception):
            print(f"stopped by an error; {cli.checkpoint.how_to_go_on()}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno is not None:  # not one of ours: the logger's, of a full disk
            raise OSError(f"the run cannot write to {cli.folder}: {error.strerror}") from error
        raise


def _how_to_go_on(cli: FitCLI) -> str:
    if cli.trainer.global_step in (0, cli.begun):
        return "nothing was trained"
    if cli.checkpoint.step is None:
        return f"step {cli.trainer.global_step} is in no checkpoint"
    return cli.checkpoint.how_to_go_on()
