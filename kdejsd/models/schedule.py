"""Sets the course of the learning rates over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


class HalfCosine(LRScheduler):
    """Lowers the learning rates to 0 along a half cosine over the run.

    At step t of T each rate is its first value times (1 + cos(pi t / T)) / 2, and 0 from step T on. Something else may
    set a rate meanwhile (a tuner, a callback, a user). Such a rate is not overwritten: it falls along the cosine from
    its new value on.

    Args:
        optimizer: the optimizer whose rates are lowered.
        total: returns T. It is called at every step, since only the run knows T and tuners change it. The rates stay as
            they are while T is infinite or not positive: Lightning says so while it does not know T.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total: Callable[[], float]) -> None:
        self._total = total
        super().__init__(optimizer)
        # torch warns at a first step before the optimiser's, and a GAN's generator does not train in every minibatch.
        self._step_count += 1

    def get_lr(self) -> list[Any]:
        if self.last_epoch > 0:
            self._take_over(self.last_epoch - 1)
        share = self._share(self.last_epoch)
        return [base * share for base in self.base_lrs]

    def go_to(self, step: int) -> None:
        """Sets the rates of this step, of a run whose T may have changed."""
        self._take_over(step)
        self.last_epoch = step
        share = self._share(step)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * share
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "_total"}

    def _take_over(self, step: int) -> None:
        """Starts again from rates that something else has set at this step."""
        share = self._share(step)
        for i, (group, last) in enumerate(zip(self.optimizer.param_groups, self._last_lr, strict=True)):
            if group["lr"] != last and share > 0:
                self.base_lrs[i] = group["lr"] / share

    def _share(self, step: int) -> float:
        total = self._total() if step > 0 else math.inf  # before the first step the run may not know
        return (1 + math.cos(math.pi * min(step / total, 1))) / 2 if total > 0 else 1.0
