"""Reads the settings of `kdejsd fit`, those of trainer, model and data, by LightningCLI."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

from .._extras import train_extra
from ..data import ImageData
from ..models import ImageGEN, ImageModel
from .checkpoints import RunCheckpoint, WholeCheckpointIO
from .folders import fresh_folder
from .progress import RunProgressBar, RunProgressLines

with train_extra():
    import lightning.pytorch as pl
    from jsonargparse import ArgumentParser
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities import rank_zero_only

_DEFAULT_CLASSES = {"data": "kdejsd.data.Digits", "model": "kdejsd.models.images.GEN"}
_USAGE = (
    "kdejsd fit [--config FILE] [--data NAME] [--data.SETTING ...] [--model NAME] [--model.SETTING ...] "
    "[--trainer.SETTING ...] [--out DIR]"
)
_DEFAULT_STEPS = 5000  # when neither steps, epochs nor a time are given


class FitCLI(LightningCLI):
    """Reads every setting of trainer, model and data for `kdejsd fit`, and makes a fresh folder for the run."""

    config: Any
    model: ImageModel
    datamodule: ImageData

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            ImageModel,
            ImageData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            run=False,
            args=args,
            parser_kwargs={
                "exit_on_error": False,
                "prog": "kdejsd fit",
                "usage": _USAGE,
                "description": "Trains a model on images and writes a report; without settings, a Generative Encoding "
                "Network on scikit-learn's digits in about a minute.",
            },
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ImageData, "data", subclass_mode=True)
        parser.add_lightning_class_args(ImageModel, "model", subclass_mode=True)
        parser.add_lightning_class_args(pl.Trainer, "trainer")
        parser.link_arguments("data.image_shape", "model.init_args.image_shape", apply_on="instantiate")
        parser.set_defaults(
            {
                **{part: {"class_path": path} for part, path in _DEFAULT_CLASSES.items()},
                "trainer.devices": 1,
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": 0,
                "trainer.enable_model_summary": False,
            }
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", help="The run's folder; default: runs/DATA-N, N the first free number.")
        parser.add_argument(
            "--ckpt_path", help="Go on from this checkpoint, with the config.yaml of its run unless --config is given."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        given = _first_look(args)
        model = _class_named("model", given.model, ImageModel) or ImageGEN
        _class_named("data", given.data, ImageData)
        if given.help:
            parser.print_help()
            print(f"\nThe settings of {model.__name__} (--model NAME --help for another model's):\n")
            settings = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
            settings.add_class_arguments(model, "model", skip={"image_shape"})
            settings.print_help()
            parser.exit()
        if given.ckpt_path is not None and given.config is None:
            args = [*_config_of_run(given.ckpt_path), *args]
        self.config = parser.parse_args(args)
        classes = {part: self.config[part].class_path for part in _DEFAULT_CLASSES}
        if classes != _DEFAULT_CLASSES:
            # Values of a default class stay where another class is chosen and knows a setting of the name (a GEN's
            # learning rate would be any model's), so the chosen ones are made the default.
            parser.set_defaults({part: {"class_path": path} for part, path in classes.items()})
            self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config
        self.ckpt_path = config.ckpt_path
        name = config.data.class_path.rpartition(".")[2].lower()
        stem = Path("runs") / name
        # Of several ranks the first one writes.
        self.folder = fresh_folder(config.out, stem) if rank_zero_only.rank == 0 else Path(config.out or stem)  # type: ignore[attr-defined]
        given = self.config_init.trainer
        if given.max_epochs is None and given.max_time is None and given.max_steps == -1:
            config.trainer.max_steps = kwargs["max_steps"] = _DEFAULT_STEPS
        # The saved configuration is for the next run, which has a folder of its own and starts where it is told to.
        config.out = config.ckpt_path = None
        self.save_config_kwargs = {"folder": self.folder, "save_to_log_dir": False}
        if given.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(save_dir=self.folder, name="", version="")
        self.checkpoint = RunCheckpoint(self.folder / "checkpoints" / "last.ckpt")
        self.trainer_defaults["callbacks"] = [] if given.enable_checkpointing is False else [self.checkpoint]
        plugins = given.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpointIO()]
        if given.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(RunProgressBar() if sys.stdout.isatty() else RunProgressLines())
        return super().instantiate_trainer(**kwargs)


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, whatever folder the logger writes into."""

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = folder

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.parser.save(self.config, self.folder / self.config_filename, skip_none=False, multifile=False)


def _first_look(args: list[str]) -> argparse.Namespace:
    """Finds the arguments that decide how the others are read: model, data, config, ckpt_path and help.

    Those that are not given are None, and help is False.
    """
    parser = argparse.ArgumentParser(prog="kdejsd fit", usage=_USAGE, add_help=False, allow_abbrev=False)
    for option in ("--model", "--data", "--ckpt_path"):
        parser.add_argument(option)
    parser.add_argument("--config", "-c")
    parser.add_argument("--help", "-h", action="store_true")
    return parser.parse_known_args(args)[0]


def _class_named(option: str, name: str | None, base: type) -> type | None:
    """Returns the class with a short name; None if the name is missing or is the import path of a class.

    Raises:
        ValueError: if no class has the short name.
    """
    if name is None or not name.isidentifier():
        return None
    known = {cls.__name__: cls for cls in _subclasses(base)}
    if name not in known:
        raise ValueError(f"--{option} must be one of {', '.join(known)} or the import path of a class, got {name}")
    return known[name]


def _subclasses(base: type) -> list[type]:
    found: list[type] = []
    cls: type
    for cls in base.__subclasses__():
        found += [cls, *_subclasses(cls)]
    return [cls for cls in found if not inspect.isabstract(cls)]


def _config_of_run(checkpoint: str) -> list[str]:
    """Returns the argument that reads the configuration of a checkpoint's run, if that is there."""
    config = Path(checkpoint).parent.parent / "config.yaml"
    if config.is_file():
        return [f"--config={config}"]
    print(f"there is no {config}: the settings are those of this command and the defaults", file=sys.stderr)
    return []
