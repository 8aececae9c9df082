"""Checks the tensors that functions are given: kind, dtype, device, shape, where asked for values; and splits them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

COMPUTE_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_CAST = {torch.float32, torch.float16, torch.bfloat16}  # what autocast makes float32 of


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    return value


def check_int64(name: str, value: Tensor) -> Tensor:
    if check_tensor(name, value).dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    return value


def compute_dtype(name: str, tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in COMPUTE_DTYPE:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    return COMPUTE_DTYPE[tensor.dtype]


def check_companion(name: str, value: Tensor, first: str, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks that a further argument lies on the first one's device and has a dtype that goes with it.

    Under autocast float32 and half types go together, as for torch's own operators that compute in float32.
    """
    if value.device != like.device:
        raise RuntimeError(
            f"{name} must be on the device of {first}, got {name} on {value.device} and {first} on {like.device}"
        )
    if value.dtype not in dtypes and not (
        {value.dtype, like.dtype} <= _CAST and torch.is_autocast_enabled(like.device.type)
    ):
        raise TypeError(f"{name} must have the dtype of {first}, {like.dtype}; got {value.dtype}")


def broadcast_batch(batches: dict[str, torch.Size]) -> torch.Size:
    """Returns the one shape that the leading dimensions of several arguments, given by their names, broadcast to."""
    try:
        shape: torch.Size = torch.broadcast_shapes(*batches.values())
        return shape
    except RuntimeError:
        names, shapes = " and ".join(batches), " and ".join(str(list(batch)) for batch in batches.values())
        raise ValueError(f"the leading dimensions of {names} must broadcast, got {shapes}") from None


def checks_values() -> bool:
    """Tells whether errors that only the data can show are to be looked for (KDEJSD_CHECK=1)."""
    try:  # os.environ.get does this too, in half as much time again
        return os.environ["KDEJSD_CHECK"] == "1" and not torch.compiler.is_compiling()
    except KeyError:
        return False


def check_finite(name: str, value: Tensor) -> None:
    if bad := int((~value.isfinite()).sum()):
        raise ValueError(f"{name} must be finite, got {bad} values that are NaN or infinite")


def cache_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Splits rows [n, l] into parts that a processor's cache holds while several operators go over them.

    On a GPU the parts are large, and only bound the memory that a copy takes.
    """
    parts: tuple[Tensor, ...] = rows.split(2**14 if rows.device.type == "cpu" else 2**20)
    return parts
