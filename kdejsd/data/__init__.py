"""Provides examples to train on, as LightningDataModules: known sets, and tables, tensors and pictures of your own.

A batch is (examples [n, ...] float32, labels [n] int64, indices [n] int64). Images are [n, C, H, W] with values in [0,
1]. Labels are -1 where there are none. An index is the example's place in its set, training or held-out.
"""

from .base import Batch, BatchLoader, BatchOrder, ExampleData, ExampleSet, StoredExamples
from .digits import Digits
from .grid import Grid2D
from .idx import MNIST, FashionMNIST
from .pictures import CelebA, ImageFolder
from .svhn import SVHN
from .table import Table
from .tensors import Tensors

__all__ = [
    "MNIST",
    "SVHN",
    "Batch",
    "BatchLoader",
    "BatchOrder",
    "CelebA",
    "Digits",
    "ExampleData",
    "ExampleSet",
    "FashionMNIST",
    "Grid2D",
    "ImageFolder",
    "StoredExamples",
    "Table",
    "Tensors",
]
