"""Keeps lagged codes up to date in a training loop of your own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ._modes import Map, evaluating, models_of
from ._numbers import integer
from .lagged import LaggedKDE

_CHUNK = 1000  # examples encoded at a time


class LaggedRefresh:
    """Encodes the lagged examples anew every few training steps, for a training loop of your own.

    It draws the m examples of a `LaggedKDE` from the training set, once and by a seed. Call `step` before each loss.
    Every `every` steps it encodes these examples and hands the codes to `LaggedKDE.refresh`. Encoding takes place in
    evaluation mode and without gradients; afterwards the encoder is in the mode that it had.

    On several ranks of torch.distributed every rank makes its own object, and all call `step` equally often. After
    `LaggedKDE.shard`, each rank encodes only its own share of the examples.

    A checkpoint needs two states: that of the `LaggedKDE`, which has the codes, and that of this object, which has the
    number of the step. Accelerate takes both objects themselves (`register_for_checkpointing`), Fabric as parts of its
    state. If the codes are sharded, both would save only the first rank's. Then save the steps and call `refresh` after
    loading, or save `LaggedKDE.gathered_state` yourself.

    Args:
        lagged: the `LaggedKDE` whose codes are to be kept up to date.
        encoder: examples [n, ...] -> codes [n, l]; a module, or a function or method of one. If the module is in
            DistributedDataParallel or DataParallel, the module inside encodes.
        examples: the training set: a tensor [N, ...], or a Dataset whose items are examples or begin with them. N is at
            least m.
        every: k_b, the number of steps from one refresh to the next.
        keep_examples: keep the m examples in memory, on the device of the lagged codes. False reads them from the set
            at every refresh.
        seed: the seed of the draw, the same on all ranks.

    Attributes:
        indices: [m] int64, the examples in the training set; only this rank's share where the codes are sharded.
        steps: the number of training steps so far.

    Raises:
        ValueError: if there are fewer than m examples, or a number is out of range.
        TypeError: if the examples are neither a tensor nor a Dataset with indices and a length, or a number is no
            integer.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, Algorithm
    1.

    Example:
        >>> import torch
        >>> from kdejsd import LaggedKDE, LaggedRefresh
        >>> examples = torch.rand(500, 64, generator=torch.Generator().manual_seed(0))
        >>> encoder = torch.nn.Linear(64, 2)
        >>> lagged = LaggedKDE(num_centers=200, latent_dim=2, bandwidth=0.3)
        >>> refresh = LaggedRefresh(lagged, encoder, examples, every=10)
        >>> [refresh.step() for _ in range(12)].count(True)  # at the first step and at the eleventh
        2
        >>> index = torch.arange(100)
        >>> lagged.loss(encoder(examples[index]), index).shape
        torch.Size([])
    """

    def __init__(
        self,
        lagged: LaggedKDE,
        encoder: Map,
        examples: Tensor | Dataset[Any],
        every: int = 1,
        *,
        keep_examples: bool = True,
        seed: int = 0,
    ) -> None:
        indexed = isinstance(examples, (Tensor, Dataset)) and not isinstance(examples, IterableDataset)
        if not indexed or not hasattr(examples, "__len__"):
            raise TypeError(
                f"examples must be a tensor or a Dataset with indices and a length, got {type(examples).__name__}"
            )
        self.every = integer("every", every, 1)
        generator = torch.Generator().manual_seed(integer("seed", seed, 0))
        count = len(examples)
        if count < lagged.num_centers:
            raise ValueError(f"examples must be at least num_centers = {lagged.num_centers}, got {count}")
        self.lagged = lagged
        self.encoder = encoder.module if isinstance(encoder, (DistributedDataParallel, DataParallel)) else encoder
        self._drawn = torch.randperm(count, generator=generator)[: lagged.num_centers].sort().values
        self.steps = 0
        self._examples = examples
        self._kept: Tensor | None = None
        self._keep = keep_examples
        lagged.reserve(count)

    @property
    def indices(self) -> Tensor:
        return self.lagged.share(self._drawn)

    def step(self) -> bool:
        """Counts a training step, refreshes the codes if it is time, and returns whether it did.

        The first step refreshes, and from then on every `every`-th.
        """
        due = self.steps % self.every == 0
        if due:
            self.refresh()
        self.steps += 1
        return due

    @torch.no_grad()
    def refresh(self) -> None:
        """Encodes the lagged examples by the encoder as it is now, whatever the step.

        Raises:
            ValueError: if the codes have another shape than the lagged ones, or are not finite (`LaggedKDE.refresh`).
        """
        with evaluating(self.encoder):
            self.lagged.refresh(map(self.encoder, self._batches()), self.indices.to(self.lagged.examples.device))

    def _batches(self) -> Iterator[Tensor]:
        """Yields the lagged examples in parts, on the device of the encoder."""
        parameters = (parameter for model in models_of(self.encoder) for parameter in model.parameters())
        device = next((parameter.device for parameter in parameters), self.lagged.examples.device)
        if not self._keep:
            yield from (part.to(device) for part in read(self._examples, self.indices))
            return
        if self._kept is None or self._kept.device != device:
            self._kept = torch.cat([part.to(device) for part in read(self._examples, self.indices)])
        yield from self._kept.split(_CHUNK)

    def state_dict(self) -> dict[str, int]:
        """Returns the number of training steps so far."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a state that `state_dict` returned."""
        self.steps = integer("steps", state["steps"], 0)


def read(examples: Tensor | Dataset[Any], indices: Tensor) -> Iterator[Tensor]:
    """Yields the examples of a training set at indices [k] int64, in parts of at most 1000, as in `LaggedRefresh`."""
    for chosen in indices.split(_CHUNK):
        if isinstance(examples, Tensor):
            yield examples[chosen.to(examples.device)]
            continue
        # A generator of its own, so that the global random state stays as it is.
        loader = DataLoader(Subset(examples, chosen.tolist()), batch_size=len(chosen), generator=torch.Generator())
        batch = next(iter(loader))
        part = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(part, Tensor):
            raise TypeError(f"items of examples must be tensors or begin with one, got {type(part).__name__}")
        yield part
