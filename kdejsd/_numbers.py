"""What counts as a number where the public functions take one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

import numpy as np
import torch
from torch import Tensor

RealNumber: TypeAlias = SupportsFloat
Integer: TypeAlias = SupportsIndex


def real(name: str, value: RealNumber) -> float:
    """The value of an argument that is to be a real number: Python's and NumPy's, and arrays and tensors of one such.

    Raises:
        TypeError: anything else, among it bools, strings, complex numbers and arrays with dimensions.
        ValueError: one beyond the range of float64.
    """
    if isinstance(value, float):
        return float(value)
    number = _single(value)
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, Real):
        raise TypeError(f"{name} must be a real number, got {_described(value)}")
    try:
        return float(number)
    except OverflowError:  # of Python's integers and fractions
        digits = len(str(abs(math.trunc(number))))
        raise ValueError(f"{name} must be in the range of float64, got a number of {digits} digits") from None


def reals(name: str, values: Any) -> Any:
    """The values of an argument that is to be real numbers in any shape: an array or a tensor as a tensor, a number as
    in `real`, and a list of what the items of a sequence are.

    Raises:
        TypeError: anything else, among it arrays and tensors of bools or complex numbers.
        ValueError: as in `real`.
    """
    if isinstance(values, np.ndarray) and values.ndim == 0:
        return real(name, values)
    if isinstance(values, (np.ndarray, Tensor)):
        try:
            tensor = values if isinstance(values, Tensor) else torch.from_numpy(values)
        except TypeError:  # an array of objects
            return reals(name, values.tolist())
        if tensor.dtype == torch.bool or tensor.is_complex():
            raise TypeError(f"{name} must be real numbers, got {_described(values)}")
        return tensor
    if isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        items = [reals(name, value) for value in values]
        return [item.tolist() if isinstance(item, Tensor) else item for item in items]
    return real(name, values)


def positive(name: str, value: RealNumber) -> float:
    """`real`, of one that is positive and finite.

    Raises:
        TypeError: as in `real`.
        ValueError: 0, a negative number, NaN or infinity.
    """
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def not_negative(name: str, value: RealNumber) -> float:
    """`real`, of one that is at least 0 and finite.

    Raises:
        TypeError: as in `real`.
        ValueError: a negative number, NaN or infinity.
    """
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {number}")
    return number


def between(name: str, value: RealNumber, low: float, high: float) -> float:
    """`real`, of one that is above `low` and below `high`.

    Raises:
        TypeError: as in `real`.
        ValueError: another number.
    """
    number = real(name, value)
    if not low < number < high:
        raise ValueError(f"{name} must be above {low:g} and below {high:g}, got {number}")
    return number


def integer(name: str, value: Integer, least: int) -> int:
    """The value of an argument that is to be an integer of at least `least`: Python's and NumPy's, and arrays and
    tensors of one such.

    Raises:
        TypeError: anything else, among it bools and floats that are whole.
        ValueError: a smaller one.
    """
    number = _single(value)
    try:
        if isinstance(number, (bool, np.bool_)):
            raise TypeError
        found = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {_described(value)}") from None
    if found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found


def _single(value: Any) -> Any:
    """What stands in an array or a tensor without dimensions; anything else as it is."""
    return value.item() if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0 else value


def _described(value: object) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{type(value).__name__} of shape {list(value.shape)} and dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"
