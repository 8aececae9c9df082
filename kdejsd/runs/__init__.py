"""Does the work of the command on a model: settings, folder, checkpoints, report and scores."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..models import GenerativeModel


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> GenerativeModel:
    """Loads the model of a run of `kdejsd fit`, ready to encode, decode and sample.

    Args:
        path: the folder of the run, or the file of a checkpoint.
        device: the device to put the model on; None takes a GPU if there is one, and else the CPU.

    Returns:
        The model, of its own class (`kdejsd.models.GEN`, say), in float32 and in evaluation mode. Its examples have the
        shape `hparams["example_shape"]`; images have values in [0, 1].

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the file is damaged, of another kind, or of another version's format.
        ModuleNotFoundError: if a package of the extra `train` is missing.

    Example:
        >>> import kdejsd, torch
        >>> model = kdejsd.load("runs/digits-1")  # doctest: +SKIP
        >>> with torch.no_grad():  # doctest: +SKIP
        ...     codes = model.encode(examples)
        ...     again = model.decode(codes)
        >>> new = model.sample(100)  # doctest: +SKIP
    """
    from . import saved  # needs the extra `train`

    return saved.load(path, device)
