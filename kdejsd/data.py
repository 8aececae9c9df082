"""Images to train on, as LightningDataModules that hold the whole set in memory.

A batch is (images [n, C, H, W] float32 in [0, 1], labels [n] int64, indices [n] int64): labels are -1 where there are
none, and an index is the example's place in its set, training or held-out.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ._extras import train_extra

with train_extra():
    import lightning.pytorch as pl
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError
    from sklearn.datasets import load_digits

Batch = tuple[Tensor, Tensor, Tensor]


class ImageSet(Dataset[Batch]):
    """Images and labels in memory; a batch is one index operation.

    Args:
        images: [N, C, H, W], uint8 (0 to 255) or float32 (0 to 1).
        labels: [N] int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Tensor) -> Batch:
        """The example or, for a tensor of indices, the batch."""
        index = torch.as_tensor(index)
        images = self.images[index]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return images, self.labels[index], index

    def subset(self, indices: Tensor) -> ImageSet:
        """The set of the given examples, which are numbered anew."""
        return ImageSet(self.images[indices], self.labels[indices])


class BatchOrder(Sampler[Tensor]):
    """Batches of indices; shuffled anew every epoch, by the seed and the epoch's number alone.

    Lightning tells the epoch through `set_epoch`. `position` is the number of batches given out in this epoch, `start`
    the number that the next epoch skips: a run resumed within an epoch goes on with the batches that were left.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = self.position = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        # Training leaves out what does not fill a batch: batch statistics of a handful of codes would be poor.
        return self.count // self.batch_size if self.seed is not None else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(self.count)
        if self.seed is not None:
            # Not seed + epoch: the orders of neighbouring seeds would be shifted copies of each other.
            mixed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)[0]) >> 1
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mixed))
        batches = order.split(self.batch_size)[self.start : len(self)]
        self.position, self.start = self.start, 0
        for batch in batches:
            self.position += 1
            yield batch


class BatchLoader(DataLoader[Batch]):
    """Whole batches by index, in this process; its place in the epoch goes into checkpoints.

    There are no workers: an index operation takes less time than handing a batch over, and a fork after OpenMP has been
    used hangs the child.
    """

    def __init__(self, dataset: ImageSet, order: BatchOrder) -> None:
        # A generator of its own, so that making an iterator does not advance the global random state.
        super().__init__(dataset, sampler=order, batch_size=None, num_workers=0, generator=torch.Generator())
        self.order = order

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.order.position % len(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.start = state["position"]


class ImageData(pl.LightningDataModule):
    """Images to train on: a training set, a held-out set, and batches of them.

    Args:
        batch_size: images per training step.
        train_size: train on this many images, drawn by the seed; None takes all.
        seed: of the draw and of the order of the batches.

    Raises:
        ValueError: batch_size or train_size below 1 or larger than the training set.
    """

    image_shape: tuple[int, int, int]

    def __init__(self, batch_size: int = 100, train_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if train_size is not None and train_size < batch_size:
            raise ValueError(f"train_size must be at least batch_size = {batch_size}, got {train_size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.batch_size = batch_size
        self.train_size = train_size
        self.seed = seed
        self._sets: tuple[ImageSet, ImageSet] | None = None
        self.save_hyperparameters(logger=False)  # so that a checkpoint says what it was trained on

    def load(self) -> tuple[ImageSet, ImageSet]:
        """All training images and the held-out images."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Reads the images, once."""
        if self._sets is not None:
            return
        training, held_out = self.load()
        if self.train_size is not None:
            if self.train_size > len(training):
                raise ValueError(
                    f"train_size must be at most {len(training)}, the number of training images, got {self.train_size}"
                )
            training = training.subset(self._shuffled(len(training))[: self.train_size].sort().values)
        if self.batch_size > len(training):
            raise ValueError(
                f"batch_size must be at most {len(training)}, the number of training images, got {self.batch_size}"
            )
        self._sets = training, held_out

    @property
    def training(self) -> ImageSet:
        """The images trained on."""
        self.setup()
        assert self._sets is not None
        return self._sets[0]

    @property
    def held_out(self) -> ImageSet:
        """The images kept out of training."""
        self.setup()
        assert self._sets is not None
        return self._sets[1]

    def train_dataloader(self) -> BatchLoader:
        return BatchLoader(self.training, BatchOrder(len(self.training), self.batch_size, self.seed))

    def val_dataloader(self) -> BatchLoader:
        return BatchLoader(self.held_out, BatchOrder(len(self.held_out), max(self.batch_size, 1000), None))

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def _split(self, images: ImageSet, held_out: float) -> tuple[ImageSet, ImageSet]:
        """Two parts, drawn by the seed; the second one is a share of the images, one at least."""
        order = self._shuffled(len(images))
        count = max(1, round(held_out * len(images)))
        return images.subset(order[count:].sort().values), images.subset(order[:count].sort().values)


class Digits(ImageData):
    """scikit-learn's 1797 handwritten digits, 8x8; one in five is held out, drawn by the seed.

    Args:
        batch_size: images per training step.
        train_size: train on this many images, drawn by the seed; None takes all.
        seed: of the split, the draw and the order of the batches.
    """

    image_shape = (1, 8, 8)

    def __init__(self, batch_size: int = 100, train_size: int | None = None, seed: int = 0) -> None:
        super().__init__(batch_size, train_size, seed)

    def load(self) -> tuple[ImageSet, ImageSet]:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        return self._split(ImageSet(images, torch.from_numpy(digits.target).long()), held_out=0.2)


class MNIST(ImageData):
    """Handwritten digits, 28x28: 60 000 for training, the 10 000 of the test set held out.

    Args:
        root: folder that holds the four idx files, as they are or gzipped, or that holds a folder mnist/ with them.
        batch_size: images per training step.
        train_size: train on this many images, drawn by the seed; None takes all.
        seed: of the draw and the order of the batches.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a damaged file.
    """

    image_shape = (1, 28, 28)
    folder: ClassVar[str] = "mnist"
    source: ClassVar[str] = "https://storage.googleapis.com/cvdf-datasets/mnist/"

    def __init__(self, root: str, batch_size: int = 100, train_size: int | None = None, seed: int = 0) -> None:
        super().__init__(batch_size, train_size, seed)
        self.root = Path(root)

    def load(self) -> tuple[ImageSet, ImageSet]:
        return self._part("train"), self._part("t10k")

    def _part(self, part: str) -> ImageSet:
        images_path = self._find(f"{part}-images-idx3-ubyte")
        labels_path = self._find(f"{part}-labels-idx1-ubyte")
        images, labels = self._read(images_path, dimensions=3), self._read(labels_path, dimensions=1)
        if images.shape[1:] != self.image_shape[1:]:
            raise self._damaged(images_path, "images of 28 x 28 pixels", f"{images.shape[1]} x {images.shape[2]}")
        if len(images) != len(labels):
            raise self._damaged(
                labels_path, f"{len(images)} labels, one per image of {images_path.name}", f"{len(labels)}"
            )
        return ImageSet(images[:, None], labels.long())

    def _find(self, name: str) -> Path:
        folders = (self.root, self.root / self.folder)
        for folder in folders:
            for path in (folder / f"{name}.gz", folder / name):
                if path.is_file():
                    return path
        raise FileNotFoundError(
            f"{type(self).__name__} needs the file {name}.gz (or {name}), which is neither in {folders[0]} "
            f"nor in {folders[1]}. "
            f"Name its folder with --data.root; {self._how_to_get(name)}"
        )

    def _read(self, path: Path, dimensions: int) -> Tensor:
        """One idx file: big-endian magic number 2048 + dimensions, the sizes, then a byte per value."""
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise self._damaged(path, "a whole gzip file", str(error)) from error
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
        name = path.name.removesuffix(".gz")
        return ValueError(f"{path} is damaged: expected {expected}, found {found}; {self._how_to_get(name)}")

    def _how_to_get(self, name: str) -> str:
        return f"to get it: curl -O {self.source}{name}.gz"


class FashionMNIST(MNIST):
    """Pictures of clothing, 28x28, in ten classes: 60 000 for training, the 10 000 of the test set held out.

    Args:
        root: folder that holds the four idx files, as they are or gzipped, or that holds a folder fashion-mnist/ with
            them.
        batch_size: images per training step.
        train_size: train on this many images, drawn by the seed; None takes all.
        seed: of the draw and the order of the batches.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a damaged file.
    """

    folder = "fashion-mnist"
    source = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


class ImageFolder(ImageData):
    """A folder of pictures; those in subfolders too, and then the first subfolder is the class.

    Args:
        root: the folder.
        size: side in pixels; a picture is cut to a square around its centre and resized.
        channels: 3 for colour, 1 for grey.
        held_out: share of the pictures held out, drawn by the seed.
        batch_size: images per training step.
        train_size: train on this many images, drawn by the seed; None takes all.
        seed: of the split, the draw and the order of the batches.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
        ValueError: a picture that cannot be read, or a setting out of range.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

    def __init__(
        self,
        root: str,
        size: int = 32,
        channels: int = 3,
        held_out: float = 0.1,
        batch_size: int = 100,
        train_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, train_size, seed)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
        self.root = Path(root)
        self.held_out_share = held_out
        self.image_shape = (channels, size, size)

    def load(self) -> tuple[ImageSet, ImageSet]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"ImageFolder needs a folder of pictures, and {self.root} is none; name it with --data.root"
            )
        paths = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in self.suffixes)
        if len(paths) < 2:
            raise FileNotFoundError(
                f"ImageFolder needs at least two pictures ({', '.join(self.suffixes)}) in {self.root}, "
                f"found {len(paths)}"
            )
        places = [path.relative_to(self.root).parts for path in paths]
        classes = sorted({place[0] for place in places if len(place) > 1})
        labels = [classes.index(place[0]) if len(place) > 1 else -1 for place in places]
        images = ImageSet(torch.stack([self._read(path) for path in paths]), torch.tensor(labels))
        return self._split(images, self.held_out_share)

    def _read(self, path: Path) -> Tensor:
        channels, size, _ = self.image_shape
        try:
            with Image.open(path) as picture:
                picture = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} is damaged: expected a picture, but {error}") from error
        return torch.from_numpy(np.array(picture)).reshape(size, size, channels).permute(2, 0, 1)
