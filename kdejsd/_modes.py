"""Puts modules into evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

Map: TypeAlias = Callable[[Tensor], Tensor]  # a network, a function, or a method of either


def models_of(*parts: object) -> list[nn.Module]:
    """Returns the modules among the parts; a method of a module stands for the module."""
    owners = (getattr(part, "__self__", part) for part in parts)
    return [owner for owner in owners if isinstance(owner, nn.Module)]


class evaluating:
    """Keeps the `models_of` the parts in evaluation mode; at the end every submodule returns to the mode it had."""

    def __init__(self, *parts: object) -> None:
        self.modes = [(part, part.training) for model in models_of(*parts) for part in model.modules()]

    def __enter__(self) -> None:
        # Not eval(), which programs loaded by torch.export refuse.
        for part, _ in self.modes:
            part.training = False

    def __exit__(self, *_: object) -> None:
        for part, training in self.modes:
            part.training = training
