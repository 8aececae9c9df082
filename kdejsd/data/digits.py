"""The digits that come with scikit-learn."""

from __future__ import annotations

import torch

from .._extras import train_extra
from .base import ImageData, ImageSet

with train_extra():
    from sklearn.datasets import load_digits


class Digits(ImageData):
    """scikit-learn's 1797 handwritten digits, 8x8; one in five is held out, drawn by the seed.

    Args and errors: as in `ImageData`.
    """

    image_shape = (1, 8, 8)

    def load(self) -> tuple[ImageSet, ImageSet]:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        return self._split(ImageSet(images, torch.from_numpy(digits.target).long()), held_out=0.2)
