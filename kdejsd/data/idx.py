"""Reads MNIST and other sets in its file format, idx."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import ExampleData, ExampleSet
from .files import damaged, find, folder_of, how_to_get, unreadable


class MNIST(ExampleData):
    """Reads the handwritten digits of MNIST, 28x28: 60 000 to train on, and the test set's 10 000 held out.

    Args:
        root: a folder with the four idx files, or with a folder mnist/ or MNIST/raw/ that has them. The files may be
            gzipped, and their names may have a dot or a hyphen before "idx3" (train-images-idx3-ubyte or
            train-images.idx3-ubyte and so on). `~` and environment variables are expanded.
        kwargs: as in `ExampleData`.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged, and in the cases of `ExampleData`.

    Example:
        >>> from kdejsd.data import MNIST
        >>> data = MNIST("~/data", train_size=5000)
        >>> len(data.training), len(data.held_out)  # doctest: +SKIP
        (5000, 10000)
    """

    example_shape = (1, 28, 28)
    folders: ClassVar[tuple[str, ...]] = ("", "mnist", "MNIST/raw", "raw")  # torchvision's are the last two
    source: ClassVar[str] = "https://storage.googleapis.com/cvdf-datasets/mnist/"

    def __init__(self, root: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = folder_of(root)

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        return self._part("train"), self._part("t10k")

    def _part(self, part: str) -> ExampleSet:
        images_path, labels_path = (self._find(f"{part}-{name}-ubyte") for name in ("images-idx3", "labels-idx1"))
        images, labels = self._read(images_path, dimensions=3), self._read(labels_path, dimensions=1)
        if images.shape[1:] != self.example_shape[1:]:
            raise self._damaged(images_path, "images of 28 x 28 pixels", f"{images.shape[1]} x {images.shape[2]}")
        if len(images) != len(labels):
            raise self._damaged(
                labels_path, f"{len(images)} labels, one per image of {images_path.name}", f"{len(labels)}"
            )
        return ExampleSet(images[:, None], labels.long())

    def _find(self, name: str) -> Path:
        dotted = name.replace("-idx", ".idx")  # as it is unpacked by some programs
        names = (f"{name}.gz", name, f"{dotted}.gz", dotted)
        return find(self, self.root, self.folders, names, how_to_get(self._url(name)))

    def _read(self, path: Path, dimensions: int) -> Tensor:
        """Reads one idx file: a big-endian magic number 2048 + dimensions, the sizes, then a byte per value."""
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise self._damaged(path, "a whole gzip file", str(error)) from error
        except OSError as error:
            raise unreadable(self, path, error, self._url(path.name)) from error
        header = 4 + 4 * dimensions
        if len(content) < header:
            raise self._damaged(path, f"at least the {header} bytes of an idx header", f"{len(content)} bytes")
        magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
        if magic != 2048 + dimensions:
            raise self._damaged(path, f"the magic number {2048 + dimensions}", f"{magic}")
        expected = header + int(np.prod(shape, dtype=np.int64))
        if len(content) != expected:
            raise self._damaged(path, f"{expected} bytes for sizes {shape}", f"{len(content)} bytes")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)

    def _damaged(self, path: Path, expected: str, found: str) -> ValueError:
        return damaged(path, expected, found, self._url(path.name))

    def _url(self, name: str) -> str:
        return f"{self.source}{name.removesuffix('.gz').replace('.idx', '-idx')}.gz"


class FashionMNIST(MNIST):
    """Reads pictures of clothing in ten classes, 28x28: 60 000 to train on, and the test set's 10 000 held out.

    Args:
        root: as in `MNIST`, but the folders are fashion-mnist/ and FashionMNIST/raw/.
        kwargs: as in `ExampleData`.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged, and in the cases of `ExampleData`.

    Example:
        >>> from kdejsd.data import FashionMNIST
        >>> data = FashionMNIST("~/data")
        >>> len(data.training), len(data.held_out)  # doctest: +SKIP
        (60000, 10000)
    """

    folders = ("", "fashion-mnist", "FashionMNIST/raw", "raw")
    source = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    class_names = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
