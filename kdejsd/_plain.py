"""Reduces values to Python's own types, so that a checkpoint made of them loads with `weights_only=True`."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any, name: str) -> Any:
    """Returns the value as an int, float, bool, str or None, or as a tuple, list or dict of these.

    NumPy's numbers, 0-dim arrays and 0-dim tensors become Python's numbers, and paths become text.

    Args:
        value: the value that was given.
        name: the name of the argument that it was given for.

    Raises:
        TypeError: if the value is of another kind.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # NumPy's text and that of enumerations are subclasses
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0):
        number = value.item()
        if isinstance(number, (bool, int, float, str)):
            return number
    elif isinstance(value, numbers.Integral):
        return int(value)
    elif isinstance(value, numbers.Real):
        return float(value)
    elif isinstance(value, os.PathLike):
        return os.fsdecode(value)
    elif isinstance(value, (tuple, list)):
        items = [plain(item, name) for item in value]
        return items if isinstance(value, list) else tuple(items)
    elif isinstance(value, Mapping):
        return {plain(key, name): plain(item, name) for key, item in value.items()}
    kind = type(value).__name__
    if isinstance(value, (np.ndarray, Tensor)):
        kind += f" of shape {list(value.shape)}"
    raise TypeError(
        f"{name} must be a plain value, which a checkpoint can hold (a number, text, a path, None, or tuples, lists "
        f"and dicts of these), got {kind}"
    )
