"""Reads the settings of `kdejsd fit`, those of trainer, model and data, by LightningCLI."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._extras import train_extra
from ..data import ExampleData
from ..models import BuiltModel
from .boards import RunPictures
from .checkpoints import RunCheckpoint, WholeCheckpointIO, load_checkpoint
from .classes import class_at, class_named, subclasses
from .errors import setting_error
from .folders import checkpoint_of, discard, fresh_folder, logs, missing_folders, own_folder, write_whole
from .progress import RunProgressBar, RunProgressLines

with train_extra():
    import lightning.pytorch as pl
    import yaml  # type: ignore[import-untyped]
    from jsonargparse import ArgumentParser, Namespace
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities import rank_zero_only

_BASES: dict[str, type] = {"model": BuiltModel, "data": ExampleData}
_DEFAULT_CLASSES = {"data": "kdejsd.data.Digits", "model": "kdejsd.models.built.GEN"}
_USAGE = (
    "kdejsd fit [--config FILE] [--data NAME] [--data.SETTING ...] [--model NAME] [--model.SETTING ...] "
    "[--trainer.SETTING ...] [--out DIR] [--compile] [--debug]"
)
_DESCRIPTION = (
    "Trains a model on examples and writes a report. Without settings it trains a Generative Encoding Network on "
    "scikit-learn's digits, in about a minute."
)
_TRAINER_DEFAULTS = {
    "trainer.devices": 1,
    "trainer.log_every_n_steps": 10,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_model_summary": False,
}
_DEFAULT_STEPS = 5000  # when neither steps, epochs nor a time are given
_MAIN_TRAINER_SETTINGS = {
    *("max_steps", "max_epochs", "max_time", "accelerator", "devices", "precision", "gradient_clip_val"),
}


class FitCLI(LightningCLI):
    """Reads every setting of trainer, model and data for `kdejsd fit`, and makes a fresh folder for the run.

    A run that continues from its own newest checkpoint keeps its folder.

    Attributes:
        folder: the run's folder.
        ckpt_path: the checkpoint that the run continues from, if there is one.
        begun: the number of steps in that checkpoint.
    """

    config: Any
    model: BuiltModel
    datamodule: ExampleData

    def __init__(self, args: list[str]) -> None:
        self.ckpt_path: Path | None = None
        self.begun = 0
        super().__init__(
            BuiltModel,
            ExampleData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,  # RunConfig does it
            run=False,
            args=args,
            parser_kwargs={"exit_on_error": False, "prog": "kdejsd fit", "usage": _USAGE, "allow_abbrev": False},
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ExampleData, "data", subclass_mode=True)
        parser.add_lightning_class_args(BuiltModel, "model", subclass_mode=True)
        parser.add_lightning_class_args(pl.Trainer, "trainer")
        parser.link_arguments("data.example_shape", "model.init_args.example_shape", apply_on="instantiate")
        parser.set_defaults(
            {
                **{part: {"class_path": path} for part, path in _DEFAULT_CLASSES.items()},
                **_TRAINER_DEFAULTS,
            }
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        _add_run_settings(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        given = _first_look(args)
        for option in ("ckpt_path", "out"):
            if getattr(given, option) == "":
                raise ValueError(f"--{option} must be a path, got an empty text")
        if given.ckpt_path is not None:
            self.ckpt_path = checkpoint_of(given.ckpt_path)
            config = self.ckpt_path.parent.parent / "config.yaml"
            if not given.config and config.is_file():
                given.config = [str(config)]
                args = [f"--config={config}", *args]
            elif not given.config:
                print(f"there is no {config}: the settings are those of this command and the defaults", file=sys.stderr)
        in_files = [(file, _read_config(file)) for file in given.config]
        chosen = {}
        for part, base in _BASES.items():
            named = [_section(content, part).get("class_path") for _, content in in_files]
            name = next(filter(None, (getattr(given, part), *reversed(named))), _DEFAULT_CLASSES[part])
            chosen[part] = class_named(part, name, base)
        if given.help or given.help_all:
            _print_help(chosen["model"], chosen["data"], everything=given.help_all)
            parser.exit()
        try:
            self.config = parser.parse_args(args)
            classes = {part: self.config[part].class_path for part in _DEFAULT_CLASSES}
            if classes != _DEFAULT_CLASSES:
                # Values of a default class stay where another class is chosen and knows a setting of the name (a GEN's
                # learning rate would be any model's), so the chosen ones are made the default.
                parser.set_defaults({part: {"class_path": path} for part, path in classes.items()})
                self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            owners = {part: cls.__name__ for part, cls in chosen.items()}
            raise argparse.ArgumentError(None, setting_error(str(error), _names(chosen), owners)) from error
        for file, content in in_files:
            for part, cls in chosen.items():
                _tell_replaced(file, part, _section(content, part), cls, self.config[part].init_args)
        _check_limits(self.config.trainer)

    def instantiate_classes(self) -> None:
        # To build a model may take long (a GEN looks for its bandwidth), and all that is given is checked before.
        checkpoint = {} if self.ckpt_path is None else load_checkpoint(self.ckpt_path)
        self.begun = checkpoint.get("global_step", 0)
        then = checkpoint.get("hyper_parameters", {})
        for setting, was, now in (
            ("", then.get("_class_path"), self.config.model.class_path),
            (".latent_dim", then.get("latent_dim"), self.config.model.init_args.get("latent_dim")),
        ):
            if was is not None and was != now:
                raise ValueError(
                    f"--model{setting} must be that of {self.ckpt_path} to go on from it, "
                    f"{str(was).rpartition('.')[2]}, got {str(now).rpartition('.')[2]}"
                )
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.state_dict", {})
        # TensorBoard is to forget what was logged after the checkpoint, which counts its last batch afterwards.
        self._first_logged = loop["_batches_that_stepped"] + 1 if "_batches_that_stepped" in loop else None
        most = self.config.trainer.max_epochs
        if most is not None and 0 < most < checkpoint.get("epoch", 0):
            raise ValueError(
                f"--trainer.max_epochs must be at least {checkpoint['epoch']}, as {self.ckpt_path} has so many epochs "
                f"behind it, got {most}"
            )
        data = self.parser.instantiate_classes(Namespace(data=self.config.data)).data  # type: ignore[no-untyped-call]
        data.setup()
        model = class_at(self.config.model.class_path)
        if issubclass(model, BuiltModel):
            settings = self.config.model.init_args
            settings.update(Namespace(model.settings_for(settings, data)))  # type: ignore[no-untyped-call]
            del self.config_dump  # which a checkpoint takes the settings from: they have changed since
        super().instantiate_classes()
        self.datamodule = data  # which has read its examples

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config
        given = self.config_init.trainer
        if given.max_epochs is None and given.max_time is None and given.max_steps == -1:
            config.trainer.max_steps = kwargs["max_steps"] = _DEFAULT_STEPS
        self._choose_folder(config.out, Path("runs", config.data.class_path.rpartition(".")[2].lower()))
        # The saved configuration is for the next run, which has its own folder and starting point.
        config.out = config.ckpt_path = None
        if given.logger in (None, True):
            kwargs["logger"] = RunLogger(
                self.folder, name="", version="", purge_step=self._first_logged, default_hp_metric=False
            )
        self.checkpoint = RunCheckpoint(self.folder / "checkpoints" / "last.ckpt")
        plugins = given.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpointIO()]
        callbacks: list[pl.Callback] = [
            RunConfig(self.folder / "config.yaml", self.parser.dump(config, skip_none=False)),
            RunPictures(),
        ]
        if given.enable_checkpointing is not False:
            callbacks.append(self.checkpoint)
        if given.enable_progress_bar is not False:
            callbacks.append(RunProgressBar() if sys.stderr.isatty() else RunProgressLines())
        self.trainer_defaults["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception:
            self.discard_folder()
            raise

    def _choose_folder(self, out: str | None, stem: Path) -> None:
        self._made: list[Path] = []
        own = None if self.ckpt_path is None or out is not None else own_folder(self.ckpt_path)
        if own is not None:
            self.folder = own
        elif rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # of several ranks the first one writes
            missing = missing_folders(stem.parent if out is None else Path(out))
            self.folder = fresh_folder(out, stem)
            self._made = [self.folder, *missing] if out is None else missing
        else:
            self.folder = Path(out or stem)
        self._logged_before = logs(self.folder)

    def discard_folder(self) -> None:
        """Removes what a run that has trained nothing has left, with its folder if it has made it."""
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            discard(self.folder, self._made, self._logged_before)


class RunConfig(pl.Callback):
    """Writes config.yaml into the run's folder after the first step.

    If a run that continues in its own folder cannot begin, the file that is there stays.
    """

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text: str | None = text

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._text is not None and trainer.is_global_zero:
            write_whole(self._path, self._text.encode())
            self._text = None


class RunLogger(TensorBoardLogger):
    """Logs for TensorBoard, with a hparams.yaml that is plain YAML: it has lists in place of Python's tuples."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(_with_lists(params), *args, **kwargs)


def _with_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, (tuple, list)) else value


def _first_look(args: list[str]) -> argparse.Namespace:
    """Finds the arguments that decide how the others are read: model, data, config, ckpt_path and help.

    Those that are not given are None, config is a list, and the two kinds of help are False.
    """
    parser = argparse.ArgumentParser(
        prog="kdejsd fit", usage=_USAGE, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    for option in ("--model", "--data", "--ckpt_path", "--out"):
        parser.add_argument(option)
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--help-all", action="store_true")
    return parser.parse_known_args(args)[0]


def _read_config(file: str) -> dict[str, Any]:
    """Returns what is in a file of settings.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it does not hold settings by name, as YAML.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"the file {file} of --config cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        reason = getattr(error, "problem", None) or "it is no text in UTF-8"
        raise ValueError(f"the file {file} of --config is not valid YAML: {reason}{where}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"the file {file} of --config must hold settings by name (data: ..., model: ..., trainer: ...), got "
            f"{'nothing' if content is None else type(content).__name__}"
        )
    return content


def _section(content: dict[str, Any], part: str) -> dict[str, Any]:
    section = content.get(part)
    return section if isinstance(section, dict) else {"class_path": section} if isinstance(section, str) else {}


def _tell_replaced(file: str, part: str, section: dict[str, Any], cls: type, final: Mapping[str, Any]) -> None:
    """Tells what has become of a file's settings for another class than the chosen one."""
    in_file = str(section.get("class_path", cls.__name__)).rpartition(".")[2]
    settings = section.get("init_args")
    if in_file == cls.__name__ or not isinstance(settings, dict) or not settings:
        return
    kept = [f"{name}={getattr(final[name], 'class_path', final[name])}" for name in settings if name in final]
    left = [name for name in settings if name not in final]
    print(
        f"{file} has settings for {in_file}, and the {part} is {cls.__name__}, which takes over "
        f"{', '.join(kept) or 'none'}" + (f" and leaves out {', '.join(left)}" if left else ""),
        file=sys.stderr,
    )


def _settings_of(chosen: Mapping[str, type], trainer_skips: set[str]) -> ArgumentParser:
    """Returns a parser of the settings of the chosen classes, in the order in which help shows them."""
    parser = ArgumentParser(prog="kdejsd fit", usage=_USAGE, description=_DESCRIPTION, add_help=False)
    run = parser.add_argument_group("the run")
    for part, base in _BASES.items():
        names = ", ".join(cls.__name__ for cls in subclasses(base))
        run.add_argument(f"--{part}", help=f"{names} or the import path of a class; with --help, its settings.")
    run.add_argument("--config", help="A YAML file of settings; arguments after it override its settings.")
    _add_run_settings(run)
    run.add_argument("--seed_everything", default=0, help="The seed of all random numbers.")
    run.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    for part, cls in (*chosen.items(), ("trainer", pl.Trainer)):
        group = parser.add_argument_group(f"{part}: {cls.__name__}")
        group.add_class_arguments(
            cls, part, as_group=False, skip=trainer_skips if part == "trainer" else {"example_shape"}
        )
    parser.set_defaults({name: value for name, value in _TRAINER_DEFAULTS.items() if name[8:] not in trainer_skips})
    return parser


def _add_run_settings(parser: Any) -> None:
    parser.add_argument("--out", help="The run's folder; default: runs/DATA-N, N the first free number.")
    parser.add_argument(
        "--ckpt_path",
        help="Continue from this checkpoint, or from the newest one in the folder of a run. The settings are those of "
        "its config.yaml unless --config is given.",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="Train the model as torch.compile(model), which needs a C++ compiler on a CPU.",
    )


def _names(chosen: Mapping[str, type]) -> list[str]:
    """Returns the names of all settings."""
    return [f"--{name}" for name in (*_settings_of(chosen, set()).get_defaults().keys(), "help", "help-all")]


def _print_help(model: type, data: type, everything: bool) -> None:
    """Prints the settings of the chosen classes; of the trainer's the main ones, unless everything is asked for."""
    skips = set() if everything else set(inspect.signature(pl.Trainer).parameters) - _MAIN_TRAINER_SETTINGS
    _settings_of({"model": model, "data": data}, skips).print_help()
    if not everything:
        print("\nkdejsd fit --help-all shows the other settings of Lightning's Trainer.")


def _check_limits(trainer: Any) -> None:
    for name in ("max_steps", "max_epochs"):
        most = trainer[name]
        if most is not None and most != -1 and most < 1:
            raise ValueError(f"--trainer.{name} must be at least 1, or -1 for no limit, got {most}")
