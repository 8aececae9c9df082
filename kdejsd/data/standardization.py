"""Standardises examples by the mean and the standard deviation of those trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from .._extras import train_extra

with train_extra():
    from sklearn.preprocessing import StandardScaler


class Standardization:
    """Standardises examples: subtracts a mean from each value and divides it by a standard deviation, in float64.

    In float64 a column of large numbers, such as times, keeps digits that float32 has no room for.

    Args:
        mean, scale: of the shape of one example, float64.

    Example:
        >>> import torch
        >>> from kdejsd.data.standardization import Standardization
        >>> times = torch.tensor([[1_700_000_000.0], [1_700_000_002.0]], dtype=torch.float64)
        >>> standardization = Standardization.of([times])
        >>> examples = standardization.done(times)
        >>> examples.flatten().tolist(), torch.equal(standardization.undone(examples), times)
        ([-1.0, 1.0], True)
    """

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self.mean = mean
        self.scale = scale

    @classmethod
    def of(cls, parts: Iterable[Tensor]) -> Standardization:
        """Returns the one by the mean and standard deviation of all examples in the parts, each [n, ...] float64.

        The standard deviation of a value that is the same in all of them is 0.
        """
        scaler = StandardScaler()
        unit = lowest = highest = None
        shape: torch.Size = torch.Size()
        for part in parts:
            if len(part):
                shape = part.shape[1:]
                values = part.flatten(1).numpy()
                if unit is None:  # a power of two, which costs no digits, so that squares neither overflow nor vanish
                    unit = np.ldexp(1.0, np.frexp(np.abs(values).max(0))[1].clip(-1000, 1000))
                scaler.partial_fit(values / unit)
                low, high = values.min(0), values.max(0)
                lowest = low if lowest is None else np.minimum(lowest, low)
                highest = high if highest is None else np.maximum(highest, high)
        if lowest is None:
            raise ValueError("parts must hold one example at least, got none")
        scale = np.where(lowest == highest, 0.0, unit * np.sqrt(scaler.var_))
        return cls(torch.from_numpy(unit * scaler.mean_).reshape(shape), torch.from_numpy(scale).reshape(shape))

    def done(self, examples: Tensor) -> Tensor:
        """Returns examples [n, ...] of any dtype standardised, in float32."""
        return ((examples.double() - self.mean) / self.scale).float()

    def undone(self, examples: Tensor) -> Tensor:
        """Returns standardised examples [n, ...] in their own units, in float64."""
        return examples.double() * self.scale.to(examples.device) + self.mean.to(examples.device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Standardization):
            return False
        return torch.equal(self.mean, other.mean) and torch.equal(self.scale, other.scale)

    __hash__ = None  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns mean and scale by their names."""
        return {"mean": self.mean, "scale": self.scale}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Standardization:
        """Returns the one whose `state_dict` it was."""
        return cls(state["mean"], state["scale"])
