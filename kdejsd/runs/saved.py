"""Opens a saved run again: its settings, model and examples."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._extras import train_extra
from ..data import ExampleData
from ..models import BuiltModel, GenerativeModel
from .checkpoints import load_checkpoint
from .classes import class_at, class_named
from .folders import checkpoint_of

with train_extra():
    from jsonargparse import ArgumentParser


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> GenerativeModel:
    """Loads the model of a run, for `kdejsd.load`."""
    return loaded_model(opened(path)[0], device)


def open_checkpoint(
    parser: ArgumentParser, args: list[str]
) -> tuple[Any, dict[str, Any], GenerativeModel, ExampleData, Path]:
    """Opens the checkpoint that the arguments name.

    The parser gets the arguments RUN and --data; by default the examples are those of the checkpoint's run.

    Returns:
        The settings, the content of the checkpoint, its model, the examples, and the path of the checkpoint.
    """
    parser.add_argument(
        "run", type=str, metavar="RUN", help="The folder of a run of kdejsd fit, or the file of its checkpoint."
    )
    parser.add_subclass_arguments(ExampleData, "data", help="Examples to use instead of the run's own.", required=False)
    path, checkpoint = None, None
    if args and not args[0].startswith("-"):
        path, checkpoint = opened(args[0])
        data = dict(checkpoint["datamodule_hyper_parameters"])
        data.pop("_instantiator")
        parser.set_defaults({"data": {"class_path": data.pop("_class_path"), "init_args": data}})
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--data")
    data_named = first_look.parse_known_args(args)[0].data
    if data_named is not None:
        class_named("data", data_named, ExampleData)
    config = parser.parse_args(args)
    if path is None or checkpoint is None:
        raise ValueError(f"RUN must stand before the options, got {args[0]} there")
    model = loaded_model(path)
    data_module = data_as_trained(parser, config, checkpoint)
    if data_module.example_shape != tuple(model.hparams["example_shape"]):
        raise ValueError(
            f"--data must have examples of shape {tuple(model.hparams['example_shape'])}, as the run's model, "
            f"got {data_module.example_shape}"
        )
    return config, checkpoint, model, data_module, path


def data_as_trained(parser: ArgumentParser, config: Any, checkpoint: Mapping[str, Any]) -> ExampleData:
    """Returns the data of the settings, whose examples are read as those of the checkpoint's run were."""
    data: ExampleData = parser.instantiate_classes(config).data
    data.load_state_dict(checkpoint.get(type(data).__qualname__, {}))
    return data


def opened(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Returns the path and the content of the checkpoint of a run."""
    file = checkpoint_of(path)
    checkpoint = load_checkpoint(file)
    for settings, what in (
        ("datamodule_hyper_parameters", "on which examples it"),
        ("hyper_parameters", "which model"),
    ):
        if "_class_path" not in checkpoint.get(settings, {}):
            raise ValueError(f"{file} was not written by kdejsd fit: it does not say {what} was trained")
        class_at(checkpoint[settings]["_class_path"], f"{file} is of")  # imports the module of a user's class
    return file, checkpoint


def loaded_model(checkpoint: Path, device: str | torch.device | None = None) -> GenerativeModel:
    """Returns the model of a checkpoint that `kdejsd fit` has written, as `load` does, without a look at the file."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: GenerativeModel = BuiltModel.load_from_checkpoint(checkpoint, map_location="cpu")
    return model.to(device).eval()
