"""Reads examples of any shape from files of torch.save."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._numbers import between
from .base import ExampleData, ExampleSet, StoredExamples
from .files import note, path_of
from .standardization import Standardization

_PART = 10_000  # examples looked at at a time


class Tensors(ExampleData):
    """Reads examples of any shape, and their labels if there are any, from a file of torch.save.

    The file holds a tensor [n, ...], a pair (examples [n, ...], labels [n]), or a dict of both by the names "examples"
    and "labels". Examples are bytes (0 to 255) or floating-point numbers. Those of shape (C, H, W) are images, whose
    values must be from 0 to 1, as the networks for images end with a sigmoid. Labels are integers; -1 is for none.
    Nothing but tensors is unpickled.

    Args:
        path: the file. `~` and environment variables are expanded.
        held_out: the share of the examples held out, drawn by the seed, where there is no held_out_path.
        held_out_path: a file of examples of the same shape, which are held out.
        standardize: move and scale each value of an example to mean 0 and standard deviation 1 of the training
            examples, in float64; for anything but images. `restored` goes back.
        keep_in_memory: hold all examples in memory. False maps the file into memory, and reads the examples of a
            minibatch when it comes.
        kwargs: as in `ExampleData`.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file holds anything else, an image has values outside of 0 to 1, a value to be standardised
            never changes, and in the cases of `ExampleData`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from kdejsd.data import Tensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "spectra.pt")
        ...     torch.save({"examples": torch.randn(500, 40), "labels": torch.arange(500) % 3}, path)
        ...     data = Tensors(path, standardize=True)
        ...     data.example_shape, len(data.training), len(data.held_out)
        ((40,), 450, 50)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        held_out: float = 0.1,
        held_out_path: str | os.PathLike[str] | None = None,
        standardize: bool = False,
        keep_in_memory: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path_of(path)
        self.held_out_path = None if held_out_path is None else path_of(held_out_path, "held_out_path")
        self.held_out_share = between("held_out", held_out, 0, 1)
        self.standardize = standardize
        self.keep_in_memory = keep_in_memory

    @cached_property
    def example_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(_read(self.path)[0].shape[1:])

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        paths = [self.path] if self.held_out_path is None else [self.path, self.held_out_path]
        files = [_read(path) for path in paths]
        shape = files[0][0].shape[1:]
        least = 3 - len(files)
        for path, (examples, _) in zip(paths, files, strict=True):
            if examples.shape[1:] != shape:
                raise ValueError(
                    f"{path} must have examples of shape {list(shape)}, as {self.path}, got {list(examples.shape[1:])}"
                )
            if len(examples) < least:
                raise ValueError(f"{path} must have at least {least} examples, got {len(examples)}")
            if len(shape) == 3:
                _check_image_range(path, examples)
        count = len(files[0][0])
        parts = self._parts(count, self.held_out_share) if len(files) == 1 else None
        if self.standardize and self.standardization is None:
            self.standardization = self._measured(files[0][0], torch.arange(count) if parts is None else parts[0])
        sets = [ExampleSet(_Examples(examples, self.standardization), labels) for examples, labels in files]
        if parts is not None:
            sets = [sets[0].subset(part) for part in parts]
        said = f"{count} examples of shape {list(shape)} in {self.path}, "
        said += f"{len(sets[1])} of them held out" if parts is not None else f"{len(sets[1])} held out in {paths[1]}"
        known = torch.cat([labels for _, labels in files]).unique()
        classes = int((known >= 0).sum())
        note(self, f"{said}; {classes} classes" if classes else f"{said}; no labels")
        return sets[0], sets[1]

    def _measured(self, examples: Tensor, training: Tensor) -> Standardization:
        """Returns the standardisation by the training examples of a file."""
        if examples.ndim == 4:
            raise ValueError(
                f"standardize must be False for images, whose values are from 0 to 1, got True for examples of shape "
                f"{list(examples.shape[1:])}"
            )
        found = Standardization.of(examples[index].double() for index in training.split(_PART))
        constant = (found.scale == 0).nonzero().tolist()
        if constant:
            raise ValueError(
                f"{self.path} must have values that change to be standardised, and the same number stands in all "
                f"training examples at {len(constant)} places, the first of them {constant[0]}: leave these out"
            )
        return found


class _Examples(StoredExamples):
    """Reads examples of a tensor that is mapped into memory, and standardises them."""

    def __init__(self, examples: Tensor, standardization: Standardization | None) -> None:
        as_bytes = examples.dtype == torch.uint8 and standardization is None
        super().__init__(len(examples), torch.uint8 if as_bytes else torch.float32)
        self.examples = examples
        self.standardization = standardization

    def read(self, rows: Tensor) -> Tensor:
        found = self.examples[rows]
        return found.to(self.dtype) if self.standardization is None else self.standardization.done(found)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Returns the examples [n, ...] of a file, mapped into memory, and their labels [n], -1 where there are none."""
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file of torch.save, and there is no {path.absolute()}")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of many kinds: the file's, the pickle's, the system's
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds other objects than tensors, which are not unpickled, as they could run code"
        elif not zipfile.is_zipfile(path):
            reason = "it is something else, or was written by a torch before 1.6"
        raise ValueError(f"{path} cannot be read as a file of torch.save: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get("examples"), Tensor):
        content = (content["examples"], content.get("labels"))
    elif isinstance(content, Tensor):
        content = (content, None)
    if not isinstance(content, (tuple, list)) or len(content) != 2 or not isinstance(content[0], Tensor):
        kind = (
            f"a dict of {', '.join(map(str, content)) or 'nothing'}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise ValueError(
            f'{path} must hold a tensor [n, ...], a pair (examples, labels) or a dict of "examples" and "labels", got '
            f"{kind}"
        )
    examples, labels = content[0].detach(), content[1]
    if examples.layout != torch.strided:
        raise ValueError(f"{path} must hold a dense tensor, got one of layout {examples.layout}: save its to_dense()")
    if examples.ndim >= 2 and 0 in examples.shape[1:]:
        raise ValueError(f"{path} must hold examples of at least one value, got shape {list(examples.shape)}")
    if examples.ndim < 2 or (examples.dtype != torch.uint8 and not examples.is_floating_point()):
        raise ValueError(
            f"{path} must hold examples [n, ...] in bytes or floating-point numbers, got {examples.dtype} of shape "
            f"{list(examples.shape)}"
        )
    if labels is None:
        return examples, torch.full((len(examples),), -1)
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    if not whole or labels.shape != examples.shape[:1] or (len(labels) and int(labels.min()) < -1):
        got = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"{path} must hold labels as integers [{len(examples)}] of at least 0, or -1 for none, got {got}"
        )
    return examples, labels.long()


def _parts_of(examples: Tensor) -> Iterator[Tensor]:
    for index in torch.arange(len(examples)).split(_PART):
        yield examples[index]


def _check_image_range(path: Path, examples: Tensor) -> None:
    if examples.dtype != torch.uint8:
        found = [(float(part.min()), float(part.max())) for part in _parts_of(examples)]
        lowest, highest = min(low for low, _ in found), max(high for _, high in found)
        if lowest < 0 or highest > 1:
            raise ValueError(
                f"{path} must have values from 0 to 1, as examples of shape {list(examples.shape[1:])} are images, "
                f"and has values from {lowest:.4g} to {highest:.4g}: divide them by their range, or, if they are no "
                "images, save them with examples.flatten(1) as rows, which can have any values"
            )
