"""What `kdejsd fit`, `evaluate` and `score` do: training by LightningCLI, reports, the scores of images."""

from __future__ import annotations

import argparse
import csv
import inspect
import itertools
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ._extras import train_extra
from .checkpoints import RunCheckpoint, WholeCheckpointIO, load_checkpoint
from .classifier import load_classifier
from .data import ImageData, ImageSet
from .models import Autoencoder, ImageGEN, ImageModel
from .novelty import NoveltyScore, novelty_score, residual_variance
from .report import write_report

with train_extra():
    import lightning.pytorch as pl
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveFloat
    from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities import rank_zero_only

_DEFAULT_STEPS = 5000  # when neither steps, epochs nor a time are given
_CHUNK = 1000  # images at a time
_LINE_INTERVAL = 30.0  # seconds between two lines of progress, where it is written to a file


def fit(args: list[str]) -> int:
    """Trains a model as the arguments say, writes its report and prints where it is; the exit code."""
    _quiet()
    cli = FitCLI(_with_config_of_checkpoint(args))
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
    model = _loaded(ImageModel, checkpoint.path) if checkpoint.path.exists() else cli.model.float()
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


def evaluate(args: list[str]) -> int:
    """Writes the report of a checkpoint anew and prints where it is; the exit code."""
    _quiet()
    parser = ArgumentParser(
        prog="kdejsd evaluate", description="Writes the report of a checkpoint anew.", exit_on_error=False
    )
    parser.add_argument("--out", type=str, help="The report's folder; default: a fresh one beside the checkpoint's.")
    parser.add_argument(
        "--classifier",
        type=str,
        metavar="FILE",
        help="A classifier of the images, saved by torch.export.save with a batch of any size: adds the diversity of "
        "what the model makes. Loading a file can run code that is in it; use none that you do not trust.",
    )
    config, checkpoint, model, data_module = open_checkpoint(parser, args)
    classifier = None if config.classifier is None else load_classifier(config.classifier, data_module.image_shape)
    folder = _fresh_folder(config.out, _run_folder(config.checkpoint) / "evaluation")
    begun = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["started"]  # "epoch" may be the one before
    run = {"checkpoint": config.checkpoint, "epochs": begun, "steps": checkpoint["global_step"]}
    print(write_report(folder, model, data_module, run, classifier))
    (folder / "config.yaml").write_text(parser.dump(config))
    print(f"report: {folder}")
    return 0


def score(args: list[str]) -> int:
    """Writes the novelty of each image of a set, prints which are most and least likely; the exit code."""
    _quiet()
    parser = ArgumentParser(
        prog="kdejsd score",
        description="Writes how novel each image is to a checkpoint's model: a CSV of kdejsd.novelty_score (nats, "
        "higher is more novel), its three parts and the reconstruction error; and pictures of the 100 most and least "
        "likely.",
        exit_on_error=False,
    )
    parser.add_argument("--split", type=Literal["held_out", "training"], default="held_out", help="Which images.")
    parser.add_argument(
        "--variance",
        type=PositiveFloat | None,
        help="Of the residual in each dimension; default: measured on the training images, those of --data if it is "
        "the run's kind of data and else the run's own.",
    )
    parser.add_argument("--out", type=str, metavar="FILE.csv", help="Default: scores.csv in a fresh folder of the run.")
    config, _, model, data_module = open_checkpoint(parser, args)
    if not isinstance(model, Autoencoder):
        raise ValueError(
            f"CKPT must be of a model with an encoder, which the density of an image needs, and {config.checkpoint} is "
            f"of a {type(model).__name__}"
        )
    images = data_module.held_out if config.split == "held_out" else data_module.training
    variance = config.variance
    if variance is None:
        own = parser.get_defaults()
        others = own.data.class_path != config.data.class_path
        variance = _training_variance(model, parser.instantiate_classes(own).data if others else data_module)
    if config.out is None:
        path = _fresh_folder(None, _run_folder(config.checkpoint) / "score") / "scores.csv"
    else:
        path = Path(config.out)
        if path.exists():
            raise ValueError(f"out must be a new file, and {path} exists")
        path.parent.mkdir(parents=True, exist_ok=True)
    scores = _write_scores(path, model, images, variance)
    print(f"{len(scores)} images, mean score {scores.mean():.5g} nats; the residual's variance is {variance:.4g}")
    known = scores.isfinite().nonzero().flatten()
    if len(known) < len(scores):
        print(f"{len(scores) - len(known)} images have no finite score, and are not among the following")
    order = known[scores[known].argsort()]
    for name, chosen in (("most", order[:100]), ("least", order.flip(0)[:100])):
        print(f"{name} likely: {', '.join(map(str, chosen[:10].tolist()))}")
        if len(chosen):
            data_module.draw(images[chosen][0]).savefig(path.with_name(f"{path.stem}_{name}_likely.png"))
    print(f"scores: {path}")
    return 0


def _training_variance(model: Autoencoder, data: ImageData) -> float:
    try:
        images = data.training
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the images that the model was trained on are not there, and the residual's variance is measured on them "
            f"unless --variance gives it: {error}"
        ) from error
    total = 0.0
    for batch, _ in _batches(images, "residuals"):
        total += len(batch) * residual_variance(model.encode, model.decode, batch.to(model.device))
    return total / len(images)


def _write_scores(path: Path, model: Autoencoder, images: ImageSet, variance: float) -> Tensor:
    """One line for each image; the scores [n]."""
    scores: list[Tensor] = []
    count = itertools.count()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "label", *NoveltyScore._fields))
        for batch, labels in _batches(images, "scores"):
            batch = batch.to(model.device)
            found = novelty_score(model.encode, model.decode, batch, variance=variance, target=model.target)
            for label, row in zip(labels.tolist(), torch.stack(found, 1).tolist(), strict=True):
                writer.writerow((next(count), label, *(f"{number:.9g}" for number in row)))
            scores.append(found.score.cpu())
    return torch.cat(scores)


def _batches(images: ImageSet, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels in order, with a progress bar."""
    interval = 0.1 if sys.stderr.isatty() else _LINE_INTERVAL
    for index in Tqdm(torch.arange(len(images)).split(_CHUNK), desc=name, unit="batch", mininterval=interval):
        yield images[index][:2]


def open_checkpoint(parser: ArgumentParser, args: list[str]) -> tuple[Any, dict[str, Any], ImageModel, ImageData]:
    """What a command on a checkpoint begins with: the settings, the checkpoint, its model and the images.

    The parser gets the arguments CKPT and --data, whose default are the images of the checkpoint's run.
    """
    parser.add_argument("checkpoint", type=str, metavar="CKPT", help="A checkpoint that kdejsd fit has written.")
    parser.add_subclass_arguments(ImageData, "data", help="Other images than the run's own.", required=False)
    checkpoint: dict[str, Any] = {}
    if args and not args[0].startswith("-"):
        checkpoint = _load(args[0])
        data = dict(checkpoint["datamodule_hyper_parameters"])
        data.pop("_instantiator")
        parser.set_defaults({"data": {"class_path": data.pop("_class_path"), "init_args": data}})
    config = parser.parse_args(args)
    if not checkpoint:
        raise ValueError(f"CKPT must stand before the options, got {args[0]} there")
    # The first checkpoints do not name their model: there was none but GEN.
    named = "_class_path" in checkpoint["hyper_parameters"]
    model = _loaded(ImageModel if named else ImageGEN, config.checkpoint)
    data_module = parser.instantiate_classes(config).data
    if data_module.image_shape != tuple(model.hparams["image_shape"]):
        raise ValueError(
            f"--data must have images of shape {tuple(model.hparams['image_shape'])}, as the checkpoint's model, "
            f"got {data_module.image_shape}"
        )
    return config, checkpoint, model, data_module


def _loaded(kind: Any, path: str | Path) -> ImageModel:
    """The model of a checkpoint that `kdejsd fit` has written, in float32, on a GPU if there is one."""
    model: ImageModel = kind.load_from_checkpoint(path, map_location="cpu")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _run_folder(checkpoint: str) -> Path:
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == "checkpoints" else folder


class FitCLI(LightningCLI):
    """`kdejsd fit`: every setting of trainer, model and data, a fresh folder per run."""

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
                "usage": "kdejsd fit [--config FILE] [--data NAME] [--data.SETTING ...] [--model NAME] "
                "[--model.SETTING ...] [--trainer.SETTING ...] [--out DIR]",
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
                "data": {"class_path": "kdejsd.data.Digits"},
                "model": {"class_path": "kdejsd.models.images.GEN"},
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
        model = _named(args, "model", ImageModel) or ImageGEN
        _named(args, "data", ImageData)
        if {"-h", "--help"} & set(args):
            parser.print_help()
            print(f"\nThe settings of {model.__name__} (--model NAME --help for another model's):\n")
            settings = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
            settings.add_class_arguments(model, "model", skip={"image_shape"})
            settings.print_help()
            parser.exit()
        chosen = parser.parse_args(args)
        # Values of a default class stay where another class is chosen and knows a setting of the name (a GEN's learning
        # rate would be any model's), so the chosen ones are made the default.
        parser.set_defaults({part: {"class_path": chosen[part].class_path} for part in ("model", "data")})
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config
        self.ckpt_path = config.ckpt_path
        name = config.data.class_path.rpartition(".")[2].lower()
        stem = Path("runs") / name
        # Of several ranks the first one writes.
        self.folder = _fresh_folder(config.out, stem) if rank_zero_only.rank == 0 else Path(config.out or stem)  # type: ignore[attr-defined]
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
    """Writes config.yaml into the run's folder, wherever the logger writes."""

    def __init__(self, *args: Any, folder: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.folder = folder

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.parser.save(self.config, self.folder / self.config_filename, skip_none=False, multifile=False)


class RunProgressBar(TQDMProgressBar):
    """One bar for the whole run: an epoch of a small set is over before a bar of its own could be read."""

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
    """A line of progress now and then and one at the end of the run: for a file, in which a bar that is drawn again and
    again would leave a line of thousands of pieces."""

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


def _fresh_folder(out: str | None, stem: Path) -> Path:
    """The folder that was asked for, or the first of STEM-1, STEM-2, ... that is not there yet; made here."""
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"out must be a new or empty folder, and {folder} is not")
        _make(folder, exist_ok=True)
        return folder
    number = 1
    while True:
        folder = stem.with_name(f"{stem.name}-{number}")
        try:
            _make(folder, exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return folder


def _make(folder: Path, exist_ok: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be made: {error.strerror}; name another one with --out") from error


def _named(args: list[str], option: str, base: type) -> type | None:
    """The class that the option names in short, None where it is not given or not a short name.

    Raises:
        ValueError: a short name of no class.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{option}")
    name = parser.parse_known_args(args)[0].__dict__[option]
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


def _with_config_of_checkpoint(args: list[str]) -> list[str]:
    """The arguments, with the configuration of the run that --ckpt_path belongs to put before them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--config", "-c")
    known, _ = parser.parse_known_args(args)
    if known.ckpt_path is None or known.config is not None:
        return args
    config = Path(known.ckpt_path).parent.parent / "config.yaml"
    if config.is_file():
        return [f"--config={config}", *args]
    print(f"there is no {config}: the settings are those of this command and the defaults", file=sys.stderr)
    return args


def _load(path: str) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    if "_class_path" not in checkpoint.get("datamodule_hyper_parameters", {}):
        raise ValueError(f"{path} was not written by kdejsd fit: it does not say on which images it was trained")
    return checkpoint


def _quiet() -> None:
    """Silences what tells a user nothing: Lightning's tips and device list, advice on workers, its use of old torch
    names, torch.export's traceback."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it logs a traceback beside the error that it raises
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
