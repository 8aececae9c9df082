"""Evaluation mode for a while."""

from __future__ import annotations

from torch import nn


class evaluating:
    """Modules in evaluation mode; afterwards every submodule is in the mode it had. A method of a module stands for the
    module; other parts are passed over."""

    def __init__(self, *parts: object) -> None:
        owners = (getattr(part, "__self__", part) for part in parts)
        modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        self.modes = [(part, part.training) for module in modules for part in module.modules()]

    def __enter__(self) -> None:
        # Not eval(), which programs loaded by torch.export refuse.
        for part, _ in self.modes:
            part.training = False

    def __exit__(self, *_: object) -> None:
        for part, training in self.modes:
            part.training = training
