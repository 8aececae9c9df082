"""Provides images to train on, as LightningDataModules that hold the whole set in memory.

A batch is (images [n, C, H, W] float32 in [0, 1], labels [n] int64, indices [n] int64). Labels are -1 where there are
none, and an index is the example's place in its set, training or held-out. The points of `Grid2D` are images of one
pixel, whose values may lie outside [0, 1].
"""

from .base import Batch, BatchLoader, BatchOrder, ImageData, ImageSet
from .digits import Digits
from .grid import Grid2D
from .idx import MNIST, FashionMNIST
from .pictures import CelebA, ImageFolder
from .svhn import SVHN

__all__ = [
    "MNIST",
    "SVHN",
    "Batch",
    "BatchLoader",
    "BatchOrder",
    "CelebA",
    "Digits",
    "FashionMNIST",
    "Grid2D",
    "ImageData",
    "ImageFolder",
    "ImageSet",
]
