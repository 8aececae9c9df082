"""What every op asks before it calls its kernel, and the library that holds the operators.

An op has three ways in. Eager calls take the short one, an autograd Function around the raw call of the kernels.
Tracing (torch.compile, export, fake tensors) goes through the operators of the library `kdejsd`. Function transforms,
forward-mode AD and devices without a kernel go to the plain reference: it composes with anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._native import cuda_problem

COMPUTE_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_KERNEL_DEVICES = ("cpu", "cuda")
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, float, type(None)))

library = torch.library.Library("kdejsd", "DEF")  # registrations end with this object
TAGS = (torch.Tag.pt2_compliant_tag,)


def needs_reference(tensor: Tensor) -> bool:
    """Whether a call with this tensor goes to the plain reference; to be asked before anything else."""
    return _torch.transforms_active() or _torch.forward_mode_active() or tensor.device.type not in _KERNEL_DEVICES


def is_traced(arguments: Iterable[Tensor | float | None]) -> bool:
    """Whether a call with these arguments goes through the library's operator."""
    return (
        torch.compiler.is_compiling()
        or _torch.dispatch_modes() > 0
        or not _PLAIN_TYPES.issuperset(map(type, arguments))
    )


def needs_grad(arguments: Iterable[object]) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:  # a loop, as a generator expression would be a call for each of them
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def compute_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """The dtype that the kernels compute in for this tensor."""
    if tensor.dtype not in COMPUTE_DTYPE:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    return COMPUTE_DTYPE[tensor.dtype]


def check_companion(name: str, value: Tensor, first: str, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """That a further argument lies on the first one's device and has a dtype that goes with it."""
    if value.device != like.device:
        raise RuntimeError(
            f"{name} must be on the device of {first}, got {name} on {value.device} and {first} on {like.device}"
        )
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have the dtype of {first}, {like.dtype}; got {value.dtype}")


def broadcast_batch(batches: dict[str, torch.Size]) -> torch.Size:
    """The one shape of the leading dimensions of several arguments, by their names."""
    try:
        shape: torch.Size = torch.broadcast_shapes(*batches.values())
        return shape
    except RuntimeError:
        names, shapes = " and ".join(batches), " and ".join(str(list(batch)) for batch in batches.values())
        raise ValueError(f"the leading dimensions of {names} must broadcast, got {shapes}") from None


def checks_values() -> bool:
    """Whether what only the data can tell is to be an error (KDEJSD_CHECK=1)."""
    return os.environ.get("KDEJSD_CHECK") == "1" and not torch.compiler.is_compiling()


def check_finite(name: str, value: Tensor) -> None:
    if bad := int((~value.isfinite()).sum()):
        raise ValueError(f"{name} must be finite, got {bad} values that are NaN or infinite")


def check_cuda(name: str, tensor: Tensor) -> None:
    if tensor.is_cuda and (problem := cuda_problem()):
        raise RuntimeError(f"{name} is on {tensor.device}, but {problem}")


def launch(module: ModuleType, name: str, device: torch.device, *arguments: Any) -> None:
    """Calls a kernel of the compiled module, the one of this device. On CUDA it is queued on the current stream."""
    if device.type == "cpu":
        getattr(module, f"{name}_cpu")(*arguments, torch.get_num_threads())
        return
    index = device.index
    with _torch.on_device(index):
        size = getattr(module, f"{name}_workspace_cuda")(*arguments, index)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        getattr(module, f"{name}_cuda")(*arguments, workspace.data_ptr(), index, _torch.cuda_stream(index))


def refuse_forward_mode(operator: str, function: str) -> None:
    """For an operator called by itself: without this the tangent would be dropped without a word."""
    if _torch.forward_mode_active():
        raise RuntimeError(f"torch.ops.kdejsd.{operator} has no forward-mode derivative; call kdejsd.{function}")
