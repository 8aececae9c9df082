"""Opens a saved run again: its settings, model and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._extras import train_extra
from ..data import ImageData
from ..models import ImageModel
from .checkpoints import load_checkpoint

with train_extra():
    from jsonargparse import ArgumentParser


def open_checkpoint(parser: ArgumentParser, args: list[str]) -> tuple[Any, dict[str, Any], ImageModel, ImageData]:
    """Opens the checkpoint that the arguments name; returns the settings, the checkpoint, its model and the images.

    The parser gets the arguments CKPT and --data; by default these are the images of the checkpoint's run.
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
    model = loaded_model(config.checkpoint)
    data_module = parser.instantiate_classes(config).data
    if data_module.image_shape != tuple(model.hparams["image_shape"]):
        raise ValueError(
            f"--data must have images of shape {tuple(model.hparams['image_shape'])}, as the checkpoint's model, "
            f"got {data_module.image_shape}"
        )
    return config, checkpoint, model, data_module


def _load(path: str) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    for settings, what in (("datamodule_hyper_parameters", "on which images it"), ("hyper_parameters", "which model")):
        if "_class_path" not in checkpoint.get(settings, {}):
            raise ValueError(f"{path} was not written by kdejsd fit: it does not say {what} was trained")
    return checkpoint


def loaded_model(path: str | Path) -> ImageModel:
    """Returns the model of a checkpoint that `kdejsd fit` has written, in float32, on a GPU if there is one."""
    model: ImageModel = ImageModel.load_from_checkpoint(path, map_location="cpu")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
