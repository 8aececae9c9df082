"""Checks the numbers that the public functions are given."""

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
    """Returns the value of an argument that must be a real number.

    Python's and NumPy's numbers are taken, and arrays and tensors of one number without dimensions.

    Raises:
        TypeError: if it is anything else, such as a bool, a string, a complex number or an array with dimensions.
        ValueError: if it is beyond the range of float64.
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
    """Returns the values of an argument that must be real numbers, in any shape.

    An array or a tensor comes back as a tensor, a number as in `real`, and a sequence as a list of its converted items.

    Raises:
        TypeError: if it is anything else, such as an array or a tensor of bools or complex numbers.
        ValueError: if a number is beyond the range of float64.
    """
    if isinstance(values, np.ndarray) and values.ndim == 0:
        return real(name, values)
    if isinstance(values, (np.ndarray, Tensor)):
        try:
            # torch takes no negative strides, and warns of an array that is not to be written.
            tensor = (
                values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements=["C", "W"]))
            )
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
    """Returns the value of an argument that must be a positive, finite number.

    Raises:
        TypeError: if it is no real number, as in `real`.
        ValueError: if it is 0, negative, NaN or infinite.
    """
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def not_negative(name: str, value: RealNumber) -> float:
    """Returns the value of an argument that must be a finite number of at least 0.

    Raises:
        TypeError: if it is no real number, as in `real`.
        ValueError: if it is negative, NaN or infinite.
    """
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {number}")
    return number


def between(name: str, value: RealNumber, low: float, high: float) -> float:
    """Returns the value of an argument that must be above `low` and below `high`.

    Raises:
        TypeError: if it is no real number, as in `real`.
        ValueError: if it is outside the range.
    """
    number = real(name, value)
    if not low < number < high:
        raise ValueError(f"{name} must be above {low:g} and below {high:g}, got {number}")
    return number


def integer(name: str, value: Integer, least: int) -> int:
    """Returns the value of an argument that must be an integer of at least `least`.

    Python's and NumPy's integers are taken, and arrays and tensors of one integer without dimensions.

    Raises:
        TypeError: if it is anything else, such as a bool or a float, even a whole one.
        ValueError: if it is smaller than `least`.
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
    """Returns the item of an array or a tensor without dimensions, and anything else unchanged."""
    return value.item() if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0 else value


def _described(value: object) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"{type(value).__name__} of shape {list(value.shape)} and dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"
