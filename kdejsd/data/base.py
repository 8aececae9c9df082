"""Defines the parts that all sets of images share: the set in memory, the order of its batches, the data module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from .._extras import train_extra
from .._numbers import integer
from .._plain import plain

with train_extra():
    import lightning.pytorch as pl
Batch = tuple[Tensor, Tensor, Tensor]


class ImageSet(Dataset[Batch]):
    """Holds images and labels in memory, and returns a batch by one index operation.

    Args:
        images: [N, C, H, W], uint8 (0 to 255) or float32 (0 to 1).
        labels: [N] int64.

    Example:
        >>> import torch
        >>> from kdejsd.data import ImageSet
        >>> images = ImageSet(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5))
        >>> batch, labels, indices = images[torch.tensor([3, 0])]
        >>> batch.shape, float(batch.max()), labels
        (torch.Size([2, 1, 2, 2]), 1.0, tensor([3, 0]))
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Tensor) -> Batch:
        """Returns the example of an index, or the batch of a tensor of indices."""
        index = torch.as_tensor(index)
        images = self.images[index]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return images, self.labels[index], index

    def subset(self, indices: Tensor) -> ImageSet:
        """Returns the set of the given examples, which are numbered anew."""
        return ImageSet(self.images[indices], self.labels[indices])

    def read(self) -> ImageSet:
        """Returns the set itself, which has been read."""
        return self


class ImageSource(Protocol):
    """Describes images that may still be in their files, so that only those that are used need to be read."""

    def __len__(self) -> int: ...

    def subset(self: Source, indices: Tensor) -> Source:
        """Returns the images of the given indices."""

    def read(self) -> ImageSet:
        """Returns all of the images in memory."""


Source = TypeVar("Source", bound=ImageSource)


class BatchOrder(DistributedSampler[Tensor]):
    """Yields batches of indices, shuffled anew every epoch by the seed and the epoch's number alone.

    On several ranks each gets its own `batch_size` indices of batches that are `ranks` times as large. It is a
    DistributedSampler so that Lightning puts none in its place.

    Lightning tells the epoch through `set_epoch`. `position` is the number of batches given out in this epoch. A run
    resumed within an epoch goes on with the batches that were left: `start` is that epoch and the number of its batches
    that are skipped.

    Args:
        count: the number of examples.
        batch_size: indices per batch, on each rank.
        seed: the seed of the order; None keeps the examples in order, and their last batch though it may be smaller.
        rank: this rank's number.
        ranks: the number of ranks.

    Example:
        >>> from kdejsd.data import BatchOrder
        >>> order = BatchOrder(count=10, batch_size=4, seed=0)
        >>> [len(batch) for batch in order]  # of a last, smaller batch training sees nothing
        [4, 4]
        >>> [batch.tolist() for batch in BatchOrder(count=5, batch_size=3, seed=None)]
        [[0, 1, 2], [3, 4]]
    """

    def __init__(self, count: int, batch_size: int, seed: int | None, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(range(count), ranks, rank)  # type: ignore[arg-type]
        self.count = count
        self.batch_size = batch_size
        self.shuffle_seed = seed
        self.position = 0
        self.start = (0, 0)

    def __len__(self) -> int:
        # Training leaves out what does not fill a batch: batch statistics of a handful of codes would be poor.
        size = self.batch_size * self.num_replicas
        return self.count // size if self.shuffle_seed is not None else -(-self.count // size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(self.count)
        if self.shuffle_seed is not None:
            # Not seed + epoch: the orders of neighbouring seeds would be shifted copies of each other.
            mixed = int(np.random.SeedSequence((self.shuffle_seed, self.epoch)).generate_state(1, np.uint64)[0]) >> 1
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mixed))
        epoch, skipped = self.start
        self.position = skipped if epoch == self.epoch else 0
        for batch in order.split(self.batch_size * self.num_replicas)[self.position : len(self)]:
            self.position += 1
            yield batch.split(self.batch_size)[self.rank]


class BatchLoader(DataLoader[Batch]):
    """Loads whole batches by index in this process, and keeps its place in the epoch for checkpoints.

    There are no workers, since an index operation takes less time than handing a batch over.

    Args:
        dataset: the images.
        order: the order of the batches.
        sampler: the sampler that Lightning puts in when it makes the loader anew. A SequentialSampler leads to batches
            in the order of the images; any other leaves `order` as it is.

    Example:
        >>> from kdejsd.data import Digits
        >>> loader = Digits(batch_size=50).train_dataloader()
        >>> images, labels, indices = next(iter(loader))
        >>> images.shape, len(loader), loader.state_dict()["position"]
        (torch.Size([50, 1, 8, 8]), 28, 1)
    """

    def __init__(self, dataset: ImageSet, order: BatchOrder, sampler: object = None, **_: object) -> None:
        # Lightning makes a loader anew with what it finds in it and another sampler: that of the images as they stand,
        # for the same minibatches in every epoch (`overfit_batches`), and the order itself for predictions.
        if isinstance(sampler, SequentialSampler):
            order = BatchOrder(order.count, order.batch_size, None, order.rank, order.num_replicas)
        # A generator of its own, so that making an iterator does not advance the global random state.
        super().__init__(dataset, sampler=order, batch_size=None, num_workers=0, generator=torch.Generator())
        self.order = order

    def state_dict(self) -> dict[str, Any]:
        order = self.order
        return {
            "epoch": order.epoch,
            "position": order.position,
            "batch_size": order.batch_size * order.num_replicas,
            "count": order.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            ValueError: if the state is from within an epoch and the batches are others now.
        """
        now = self.state_dict()
        changed = [
            f"{name} must stay {state[name]}, got {now[name]}"
            for name in ("batch_size", "count")
            if state.get(name, now[name]) != now[name]
        ]
        if changed and state["position"] < state["count"] // state["batch_size"]:
            raise ValueError(
                f"the checkpoint is from within an epoch, after {state['position']} batches, and the rest of the epoch "
                f"needs the same batches: {'; '.join(changed)} (batch_size: of all ranks; count: of training images)"
            )
        self.order.start = (state["epoch"], state["position"])


class ImageData(pl.LightningDataModule):
    """Provides images to train on: a training set, a held-out set, and batches of them.

    A subclass defines `image_shape` and `load`. Its settings go into checkpoints, as Python's own numbers and text; any
    other argument of its constructor, such as an object, is left out there.

    Args:
        batch_size: images per training step, on each device.
        train_size: train on this many images, drawn by the seed; None takes all.
        labelled_size: keep the labels of this many training images, drawn by the seed, and hide the others (-1); None
            keeps all. Held-out images keep theirs.
        seed: the seed of the draws and of the order of the batches.

    Raises:
        ValueError: if batch_size or train_size is below 1 or larger than the training set, or labelled_size is below 0
            or larger than the number of images trained on.
        TypeError: if a number is no integer.

    Example:
        >>> from kdejsd.data import Digits
        >>> data = Digits(train_size=1000, labelled_size=10)
        >>> len(data.training), int((data.training.labels >= 0).sum()), int((data.held_out.labels >= 0).sum())
        (1000, 10, 359)
    """

    image_shape: tuple[int, int, int]
    report_samples: ClassVar[int] = 100  # of a model, drawn and measured in its report

    def __init__(
        self,
        batch_size: int = 100,
        train_size: int | None = None,
        labelled_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        batch_size = integer("batch_size", batch_size, 1)
        seed = integer("seed", seed, 0)
        if train_size is not None:
            train_size = integer("train_size", train_size, 1)
            if train_size < batch_size:
                raise ValueError(f"train_size must be at least batch_size = {batch_size}, got {train_size}")
        if labelled_size is not None:
            labelled_size = integer("labelled_size", labelled_size, 0)
        self.batch_size = batch_size
        self.train_size = train_size
        self.labelled_size = labelled_size
        self.seed = seed
        self._sets: tuple[ImageSet, ImageSet] | None = None
        self.save_hyperparameters(logger=False)  # so that a checkpoint says what it was trained on
        for name, value in list(self.hparams.items()):
            try:
                self.hparams[name] = plain(value, name)
            except TypeError:
                del self.hparams[name]

    def load(self) -> tuple[ImageSource, ImageSource]:
        """Returns all training images and the held-out images."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def setup(self, stage: str | None = None) -> None:
        """Reads the images once; later calls do nothing."""
        if self._sets is not None:
            return
        training, held_out = self.load()
        count = len(training)
        for name, size in (("train_size", self.train_size), ("batch_size", self.batch_size)):
            if size is not None and size > count:
                raise ValueError(f"{name} must be at most {count}, the number of training images, got {size}")
        if self.train_size is not None:
            training = training.subset(self._shuffled(count)[: self.train_size].sort().values)
        images = training.read()
        if self.labelled_size is not None:
            images = ImageSet(images.images, self._hidden(images.labels, self.labelled_size))
        self._sets = _finite(self, "training", images), _finite(self, "held-out", held_out.read())

    @property
    def training(self) -> ImageSet:
        """Returns the images trained on."""
        self.setup()
        assert self._sets is not None
        return self._sets[0]

    @property
    def held_out(self) -> ImageSet:
        """Returns the images kept out of training."""
        self.setup()
        assert self._sets is not None
        return self._sets[1]

    def train_dataloader(self) -> BatchLoader:
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        count = len(self.training)
        if self.batch_size * ranks > count:
            raise ValueError(
                f"batch_size must be at most {count // ranks}, {count} training images for {ranks} devices, got "
                f"{self.batch_size}"
            )
        return BatchLoader(self.training, BatchOrder(count, self.batch_size, self.seed, rank, ranks))

    def val_dataloader(self) -> BatchLoader:
        """Returns batches of all held-out images, on every rank: so measures do not depend on the number of ranks."""
        return BatchLoader(self.held_out, BatchOrder(len(self.held_out), max(self.batch_size, 1000), None))

    def predict_dataloader(self) -> BatchLoader:
        """Returns batches of the held-out images."""
        return self.val_dataloader()

    # What a set knows of images that a model makes like its own

    def sample_measures(self, images: Tensor) -> dict[str, float]:
        """Measures generated images [n, C, H, W] by the known law of the set; most sets know none and return {}."""
        return {}

    def classifier(self) -> Callable[[Tensor], Tensor] | None:
        """Returns the set's own classifier, images [n, C, H, W] -> logits [n, K], or None: most sets have none."""
        return None

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def _hidden(self, labels: Tensor, kept: int) -> Tensor:
        """Returns the labels with all but `kept` of them replaced by -1."""
        known = torch.nonzero(labels >= 0)[:, 0]
        if kept > len(known):
            raise ValueError(f"labelled_size must be at most {len(known)}, the number of labels trained on, got {kept}")
        chosen = known[self._shuffled(len(known))[:kept]]
        return torch.full_like(labels, -1).index_copy(0, chosen, labels[chosen])

    def _split(self, images: Source, held_out: float) -> tuple[Source, Source]:
        """Splits images into two parts drawn by the seed; the second has the share `held_out` of them, at least one."""
        order = self._shuffled(len(images))
        count = max(1, round(held_out * len(images)))
        return images.subset(order[count:].sort().values), images.subset(order[:count].sort().values)


def _finite(data: ImageData, part: str, images: ImageSet) -> ImageSet:
    """Returns the images if all their values are finite."""
    if images.images.is_floating_point():
        bad = (~images.images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            some = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            raise ValueError(
                f"{type(data).__name__} must have finite images, and {len(bad)} of its {len(images)} {part} images "
                f"have NaN or infinity: {some}"
            )
    return images
