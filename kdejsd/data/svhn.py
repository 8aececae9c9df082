"""Reads house numbers from the files of cropped digits."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.io import loadmat

from .base import ExampleData, ExampleSet
from .files import damaged, find, folder_of, how_to_get, unreadable


class SVHN(ExampleData):
    """Reads the digits of house numbers in colour, 32x32: 73 257 to train on, and the test set's 26 032 held out.

    Labels are the digits; the files' label 10 stands for 0. As bytes the images take 225 MB of memory for training and
    80 MB held out, and twice that while a file is read.

    Args:
        root: a folder with train_32x32.mat and test_32x32.mat, or with a folder svhn/ that has them. `~` and
            environment variables are expanded.
        kwargs: as in `ExampleData`.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged, and in the cases of `ExampleData`.

    Source: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning" (2011).

    Example:
        >>> from kdejsd.data import SVHN
        >>> data = SVHN("~/data")
        >>> len(data.training), len(data.held_out)  # doctest: +SKIP
        (73257, 26032)
    """

    example_shape = (3, 32, 32)
    source: ClassVar[str] = "http://ufldl.stanford.edu/housenumbers/"

    def __init__(self, root: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = folder_of(root)

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        return self._part("train_32x32.mat"), self._part("test_32x32.mat")

    def _part(self, name: str) -> ExampleSet:
        url = self.source + name
        path = find(self, self.root, ("", "svhn"), (name,), how_to_get(url))
        try:
            with path.open("rb") as file:
                content = loadmat(file, variable_names=("X", "y"))
            pixels, labels = content["X"], content["y"].reshape(-1)
        except FileNotFoundError as error:
            raise unreadable(self, path, error, url) from error
        except Exception as error:  # of many kinds: the reader trusts what it reads
            raise damaged(path, "a MATLAB file of version 5 with X and y", repr(error), url) from error
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
            expected = "bytes X of shape [32, 32, 3, N]"
            raise damaged(path, expected, f"{pixels.dtype} of shape {list(pixels.shape)}", url)
        if len(labels) != pixels.shape[3]:
            raise damaged(path, f"{pixels.shape[3]} labels y, one per image", f"{len(labels)}", url)
        if not np.isin(labels, np.arange(1, 11)).all():
            raise damaged(path, "labels y from 1 to 10", f"{labels.min()} to {labels.max()}", url)
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
        return ExampleSet(images, torch.from_numpy(labels.astype(np.int64) % 10))
