"""Defines what all sets of examples share: the set itself, the order of its batches, the data module."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from .._extras import train_extra
from .._numbers import integer
from .._plain import plain
from .standardization import Standardization

with train_extra():
    import lightning.pytorch as pl
Batch = tuple[Tensor, Tensor, Tensor]

_BATCH_SIZE = 100
_CHUNK = 10_000  # examples looked at at a time


class StoredExamples(ABC):
    """Reads examples from their files when they are asked for, for sets that are larger than memory.

    An `ExampleSet` takes it in place of a tensor. A subclass defines `read`.

    Args:
        count: N, the number of examples.
        dtype: of the examples that `read` returns: torch.uint8 (0 to 255) or torch.float32.

    Attributes:
        rows: [N] int64, the place of each example in the files.

    Example:
        >>> import torch
        >>> from kdejsd.data import StoredExamples
        >>> class Squares(StoredExamples):
        ...     def read(self, rows):
        ...         return rows[:, None].float() ** 2
        >>> examples = Squares(count=1000).subset(torch.tensor([3, 500]))
        >>> len(examples), examples[torch.tensor([1, 0])].tolist()
        (2, [[250000.0], [9.0]])
    """

    def __init__(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.rows = torch.arange(count)

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """Returns the examples [n, ...] at the places [n] int64 of the files."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Returns the examples of a tensor of indices, which may have any shape, as indexing a tensor does."""
        rows = self.rows[index]
        examples = self.read(rows.flatten())
        return examples.reshape(*rows.shape, *examples.shape[1:])

    def in_memory(self) -> Tensor:
        """Reads all of the examples into memory, in parts."""
        examples = torch.empty(0)
        for index in torch.arange(len(self)).split(_CHUNK):
            part = self[index]
            if not len(examples):
                examples = part.new_empty(len(self), *part.shape[1:])
            examples[index] = part
        return examples

    def subset(self, index: Tensor) -> StoredExamples:
        """Returns the given examples, numbered anew; they stay in their files."""
        chosen = copy(self)
        chosen.rows = self.rows[index]
        return chosen


class ExampleSet(Dataset[Batch]):
    """Holds examples and labels, and returns a batch by one index operation.

    Bytes are turned into float32 values from 0 to 1 when they are asked for.

    Args:
        examples: [N, ...], uint8 (0 to 255) or float32, in memory or stored in files (`StoredExamples`).
        labels: [N] int64, -1 for none.
        sources: [N], where each example comes from: the path of its file, or the number of its row in the file, from
            0. None for the examples of one file, all of them and in order.

    Raises:
        ValueError: if there are not as many sources as examples.

    Example:
        >>> import torch
        >>> from kdejsd.data import ExampleSet
        >>> examples = ExampleSet(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5))
        >>> batch, labels, indices = examples[torch.tensor([3, 0])]
        >>> batch.shape, float(batch.max()), labels
        (torch.Size([2, 1, 2, 2]), 1.0, tensor([3, 0]))
    """

    _sources: np.ndarray | None = None

    def __init__(
        self, examples: Tensor | StoredExamples, labels: Tensor, sources: Sequence[object] | np.ndarray | None = None
    ) -> None:
        self.examples = examples
        self.labels = labels
        if sources is not None:
            self._sources = np.asarray(sources)
            if self._sources.shape != (len(examples),):
                raise ValueError(f"sources must be one for each of the {len(examples)} examples, got {len(sources)}")

    @property
    def sources(self) -> np.ndarray:
        return np.arange(len(self)) if self._sources is None else self._sources

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int | Tensor) -> Batch:
        """Returns the example of an index, or the batch of a tensor of indices."""
        index = torch.as_tensor(index)
        examples = self.examples[index]
        if examples.dtype == torch.uint8:
            examples = examples.float() / 255
        return examples, self.labels[index], index

    def subset(self, indices: Tensor) -> ExampleSet:
        """Returns the set of the given examples, numbered anew."""
        examples = self.examples
        chosen = examples.subset(indices) if isinstance(examples, StoredExamples) else examples[indices]
        return ExampleSet(chosen, self.labels[indices], self.sources[np.asarray(indices)])

    def read(self) -> ExampleSet:
        """Returns the set with all of its examples in memory."""
        if isinstance(self.examples, Tensor):
            return self
        return ExampleSet(self.examples.in_memory(), self.labels, self._sources)


class BatchOrder(DistributedSampler[Tensor]):
    """Yields the indices of batches, shuffled anew every epoch by the seed and the number of the epoch alone.

    On several ranks, batches are `ranks` times as large, and each rank gets its own `batch_size` indices of each. (The
    class is a DistributedSampler so that Lightning puts none in its place.)

    Lightning sets the epoch by `set_epoch`. `position` is the number of batches given out in this epoch. A run that
    resumes within an epoch continues with the batches that were left: `start` is that epoch and the number of its
    batches to skip.

    Args:
        count: the number of examples.
        batch_size: indices per batch, on each rank.
        seed: the seed of the order; None keeps the examples in order, and keeps a smaller last batch.
        rank: this rank's number.
        ranks: the number of ranks.

    Example:
        >>> from kdejsd.data import BatchOrder
        >>> order = BatchOrder(count=10, batch_size=4, seed=0)
        >>> [len(batch) for batch in order]  # training leaves out a smaller last batch
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

    There are no worker processes: an index operation takes less time than handing a batch over. Pictures that stay in
    their files are read by several threads.

    Args:
        dataset: the examples.
        order: the order of the batches.
        sampler: the sampler that Lightning passes when it makes the loader anew. A SequentialSampler gives batches in
            the order of the examples; any other leaves `order` as it is.

    Example:
        >>> from kdejsd.data import Digits
        >>> loader = Digits(batch_size=50).train_dataloader()
        >>> examples, labels, indices = next(iter(loader))
        >>> examples.shape, len(loader), loader.state_dict()["position"]
        (torch.Size([50, 1, 8, 8]), 28, 1)
    """

    def __init__(self, dataset: ExampleSet, order: BatchOrder, sampler: object = None, **_: object) -> None:
        # Lightning makes a loader anew with what it finds in it and another sampler: that of the examples as they
        # stand, for the same minibatches in every epoch (`overfit_batches`), and the order itself for predictions.
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
        """Continues from a state that `state_dict` returned.

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
                f"needs the same batches: {'; '.join(changed)} (batch_size: of all ranks; count: of training examples)"
            )
        self.order.start = (state["epoch"], state["position"])


class ExampleData(pl.LightningDataModule):
    """Provides examples to train on: a training set, a held-out set, and batches of them.

    It is the base class of all sets. For a set of your own, derive from it and define `example_shape` and `load`.
    Checkpoints keep those arguments of the constructor that are numbers or text; others, such as objects, are left out.

    Args:
        batch_size: examples per training step, on each device; None is 100, or all training examples where they are
            fewer.
        train_size: train on this many examples, drawn by the seed; None takes all.
        labelled_size: keep the labels of this many training examples, drawn by the seed, and hide the others (-1); None
            keeps all. Held-out examples keep theirs.
        seed: the seed of the draws and of the order of the batches.

    Raises:
        ValueError: if batch_size or train_size is below 1 or larger than the training set, or labelled_size is below 0
            or larger than the number of examples trained on.
        TypeError: if a number is no integer.

    Example:
        >>> from kdejsd.data import Digits
        >>> data = Digits(train_size=1000, labelled_size=10)
        >>> len(data.training), int((data.training.labels >= 0).sum()), int((data.held_out.labels >= 0).sum())
        (1000, 10, 359)
    """

    example_shape: tuple[int, ...]
    class_names: Sequence[object] = ()  # in the order of the classes' numbers, if they have names
    keep_in_memory = True  # read all examples at the start; False leaves them in their files
    standardization: Standardization | None = None  # of examples that are not as they stand in their files
    report_samples: ClassVar[int] = 100  # of a model, drawn and measured in its report

    def __init__(
        self,
        batch_size: int | None = None,
        train_size: int | None = None,
        labelled_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size is not None:
            batch_size = integer("batch_size", batch_size, 1)
        seed = integer("seed", seed, 0)
        if train_size is not None:
            train_size = integer("train_size", train_size, 1)
            if batch_size is not None and train_size < batch_size:
                raise ValueError(f"train_size must be at least batch_size = {batch_size}, got {train_size}")
        if labelled_size is not None:
            labelled_size = integer("labelled_size", labelled_size, 0)
        self.batch_size = _BATCH_SIZE if batch_size is None else batch_size
        self._at_most_all = batch_size is None  # of the examples in a batch
        self.train_size = train_size
        self.labelled_size = labelled_size
        self.seed = seed
        self._sets: tuple[ExampleSet, ExampleSet] | None = None
        self.save_hyperparameters(logger=False)  # so that a checkpoint says what it was trained on
        if batch_size is None:  # Lightning's BatchSizeFinder would take it from there
            self.hparams.pop("batch_size", None)
        for name, value in list(self.hparams.items()):
            try:
                self.hparams[name] = plain(value, name)
            except TypeError:
                del self.hparams[name]

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        """Returns all training examples and the held-out examples."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def setup(self, stage: str | None = None) -> None:
        """Reads the examples once; later calls do nothing."""
        if self._sets is not None:
            return
        training, held_out = self.load()
        count = len(training)
        if self._at_most_all:
            self.batch_size = min(self.batch_size, count if self.train_size is None else self.train_size)
        for name, size in (("train_size", self.train_size), ("batch_size", self.batch_size)):
            if size is not None and size > count:
                raise ValueError(f"{name} must be at most {count}, the number of training examples, got {size}")
        if self.train_size is not None:
            training = training.subset(self._shuffled(count)[: self.train_size].sort().values)
        if self.keep_in_memory:
            training, held_out = training.read(), held_out.read()
        if self.labelled_size is not None:
            labels = self._hidden(training.labels, self.labelled_size)
            training = ExampleSet(training.examples, labels, training._sources)
        self._sets = _finite(self, "training", training), _finite(self, "held-out", held_out)

    @property
    def training(self) -> ExampleSet:
        """Returns the examples trained on."""
        self.setup()
        assert self._sets is not None
        return self._sets[0]

    @property
    def held_out(self) -> ExampleSet:
        """Returns the examples kept out of training."""
        self.setup()
        assert self._sets is not None
        return self._sets[1]

    def train_dataloader(self) -> BatchLoader:
        rank, ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        count = len(self.training)
        if self.batch_size * ranks > count:
            raise ValueError(
                f"batch_size must be at most {count // ranks}, {count} training examples for {ranks} devices, got "
                f"{self.batch_size}"
            )
        return BatchLoader(self.training, BatchOrder(count, self.batch_size, self.seed, rank, ranks))

    def val_dataloader(self) -> BatchLoader:
        """Returns batches of all held-out examples, on every rank: measures do not depend on the number of ranks."""
        return BatchLoader(self.held_out, BatchOrder(len(self.held_out), max(self.batch_size, 1000), None))

    def predict_dataloader(self) -> BatchLoader:
        """Returns batches of the held-out examples."""
        return self.val_dataloader()

    # In a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Returns the standardisation, with which examples that come later can be read like those trained on."""
        return {} if self.standardization is None else {"standardization": self.standardization.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads all examples from here on as those of the checkpoint were read."""
        if "standardization" in state:
            found = Standardization.from_state_dict(state["standardization"])
            if found != self.standardization:
                self.standardization, self._sets = found, None

    # What a set knows of its examples, and of those that a model makes like them

    @property
    def columns(self) -> list[str]:
        """Returns the names of the columns where an example is a row of values; by default they are numbered from 1."""
        return [str(number) for number in range(1, math.prod(self.example_shape) + 1)]

    def restored(self, examples: Tensor) -> Tensor:
        """Returns examples [n, ...] in the units of their files, which most sets have not changed."""
        self.setup()
        return examples if self.standardization is None else self.standardization.undone(examples)

    def sample_measures(self, examples: Tensor) -> dict[str, float]:
        """Measures generated examples [n, ...] by the known distribution of the set; {} where it is not known."""
        return {}

    def classifier(self) -> Callable[[Tensor], Tensor] | None:
        """Returns the set's own classifier, examples [n, ...] -> logits [n, K]; None for most sets, which have none."""
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

    def _split(self, examples: ExampleSet, held_out: float) -> tuple[ExampleSet, ExampleSet]:
        """Splits examples into two parts drawn by the seed; the second has the share `held_out`, at least one."""
        training, rest = self._parts(len(examples), held_out)
        return examples.subset(training), examples.subset(rest)

    def _parts(self, count: int, held_out: float) -> tuple[Tensor, Tensor]:
        """Draws the indices, in order, of the two parts of `_split`, of `count` examples; each has one at least."""
        order = self._shuffled(count)
        held = min(max(1, round(held_out * count)), count - 1)
        return order[held:].sort().values, order[:held].sort().values


def _finite(data: ExampleData, part: str, examples: ExampleSet) -> ExampleSet:
    """Returns the examples if all their values are finite, for which stored ones are read in parts."""
    if examples.examples.dtype.is_floating_point:
        bad = []
        for index in torch.arange(len(examples)).split(_CHUNK):
            spoiled = (~examples.examples[index].isfinite()).flatten(1).any(1)
            bad += index[spoiled].tolist()
        if bad:
            some = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
            raise ValueError(
                f"{type(data).__name__} must have finite examples, and {len(bad)} of its {len(examples)} {part} "
                f"examples have NaN or infinity: {some}"
            )
    return examples
