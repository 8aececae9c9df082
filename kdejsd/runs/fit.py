"""Defines `kdejsd fit`, which trains a model by LightningCLI and writes its report."""

from __future__ import annotations

import signal
import sys
import time

from .report import write_report
from .saved import load
from .settings import FitCLI


def fit(args: list[str]) -> int:
    """Trains a model as the arguments say, writes its report and prints where it is; returns the exit code."""
    cli = FitCLI(args)
    cli.datamodule.setup()
    checkpoint = cli.checkpoint
    started = time.perf_counter()
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.ckpt_path)
    except SystemExit:  # how Lightning ends after Ctrl-C or SIGTERM
        if checkpoint.step is None or not cli.trainer.is_global_zero:
            raise
        print(f"\nstopped; {checkpoint.how_to_go_on()}")
        return 128 + (signal.SIGTERM if cli.trainer.received_sigterm else signal.SIGINT)
    except Exception as error:
        if checkpoint.step is not None and cli.trainer.is_global_zero:
            print(f"\nstopped by an error; {checkpoint.how_to_go_on()}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno is not None:  # not one of ours: the logger's, of a full disk
            raise OSError(f"the run cannot write to {cli.folder}: {error.strerror}") from error
        raise
    if cli.trainer.global_step == 0:
        limits = ("max_epochs", "max_steps", "max_time", "limit_train_batches")
        given = ", ".join(f"{name}={getattr(cli.config_init.trainer, name)}" for name in limits)
        raise ValueError(f"nothing was left to train: the trainer's limits must leave one step at least, got {given}")
    if not cli.trainer.is_global_zero:
        return 0
    # The report is of what the checkpoint holds, as evaluate and score read it: in float32, whatever the precision was,
    # and without the validation that Lightning adds where a limit of time stops a run, which renews a GEN's codes.
    model = load(checkpoint.path) if checkpoint.path.exists() else cli.model.float()
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
        again = f"; once it can: kdejsd evaluate {checkpoint.path}" if checkpoint.path.exists() else ""
        raise OSError(f"the report cannot be written to {cli.folder}: {error}{again}") from error
    print(f"report: {cli.folder}")
    if checkpoint.begun == cli.trainer.global_step:
        print(
            f"nothing was left to train after step {checkpoint.begun} of {cli.ckpt_path}; to go on, move the run's end "
            "by --trainer.max_epochs, --trainer.max_steps or --trainer.max_time"
        )
    return 0
