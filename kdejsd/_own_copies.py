"""Indexes lagged codes by the training examples they belong to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._tensors import check_int64, checks_values

_MOST_EXAMPLES = 2**28  # whose places, of 8 bytes each, are not yet more than a mistaken index may cost


class OwnCopies:
    """Knows at which place the newest lagged code of each training example stands.

    Attributes:
        places: [e + 1] int64, the place for each of the examples 0 to e - 1, -1 for none. The last entry takes the
            places of codes whose example is not known, and is never read.
    """

    def __init__(self) -> None:
        self.places = torch.full((1,), -1)
        self._reserved: int | None = None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the index as `fn` moves a tensor."""
        self.places = fn(self.places)

    def reserve(self, num_examples: int) -> None:
        """Fixes how many examples there is room for, from the next `read` on."""
        self._reserved = num_examples

    def read(self, indices: Tensor | None, oldest: Tensor) -> None:
        """Builds the index from the examples of all codes.

        Args:
            indices: [m] int64, the examples of the codes, -1 where they are not known; None where there are no codes.
            oldest: the place of the oldest code.
        """
        room = self._reserved
        if room is None:
            room = 0 if indices is None else _room(indices)
        self.places = torch.full((room + 1,), -1, device=oldest.device)
        if indices is not None:
            age = torch.arange(len(indices), device=indices.device)
            age = (age - oldest) % len(indices)  # the greatest is the newest
            newest = self.places.scatter_reduce(0, indices.where(indices >= 0, room), age, "amax")
            self.places = ((newest + oldest) % len(indices)).where(newest >= 0, -1)

    def note(self, indices: Tensor, places: Tensor) -> None:
        """Notes the places [k] of codes of examples [k] that have just been put there."""
        self.places[indices.where(indices >= 0, len(self.places) - 1)] = places

    def find(self, index: Tensor, examples: Tensor) -> Tensor:
        """Returns the place of the newest code of each example [n] int64, or -1 where it has none.

        `examples` [m] are those of all codes now: a code may have gone from its place since it was noted.
        """
        place = self.places[index.clamp(-1, len(self.places) - 1)]
        return place.where((index >= 0) & (place >= 0) & (examples[place].round() == index), -1)

    def check(self, indices: Tensor, count: int) -> None:
        """Checks the number and dtype of the indices of examples, and makes room for them unless room is reserved.

        Raises:
            ValueError: if there are more or fewer than `count`, or an index for which there is no room.
            TypeError: if they are no int64 tensor.
        """
        if list(check_int64("indices", indices).shape) != [count]:
            raise ValueError(f"indices must have shape [{count}], got {list(indices.shape)}")
        if count == 0:
            return
        if self._reserved is not None:
            if looks_at(indices) and (highest := int(indices.max())) >= self._reserved:
                raise ValueError(f"indices must be below {self._reserved}, which is reserved, got {highest}")
        elif (room := _room(indices)) >= len(self.places):
            with torch.inference_mode(False):
                more = self.places.new_full((2 * room + 1,), -1)
                more[: len(self.places) - 1] = self.places[:-1]
                self.places = more


def _room(indices: Tensor) -> int:
    """Returns how many examples there must be room for, so that these have it."""
    highest = int(indices.max())
    if highest >= _MOST_EXAMPLES:
        raise ValueError(f"indices must be below {_MOST_EXAMPLES} unless there is a `reserve` for more, got {highest}")
    return highest + 1


def looks_at(values: Tensor) -> bool:
    """Tells whether to look at the values, which would make a GPU wait and break a compiled graph."""
    return checks_values() or (values.device.type == "cpu" and not torch.compiler.is_compiling())
