"""Provides the digits that come with scikit-learn."""

from __future__ import annotations

import torch

from .._extras import train_extra
from .base import ExampleData, ExampleSet

with train_extra():
    from sklearn.datasets import load_digits


class Digits(ExampleData):
    """Loads scikit-learn's 1797 handwritten digits, 8x8; one in five is held out, drawn by the seed.

    They come with scikit-learn, so nothing is downloaded. Args and errors: as in `ExampleData`.

    Example:
        >>> from kdejsd.data import Digits
        >>> data = Digits(batch_size=100, train_size=1000)
        >>> data.example_shape, len(data.training), len(data.held_out)
        ((1, 8, 8), 1000, 359)
    """

    example_shape = (1, 8, 8)

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        return self._split(ExampleSet(images, torch.from_numpy(digits.target).long()), held_out=0.2)
