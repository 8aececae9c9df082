"""Holds what all ops share: the choice of the way a call takes, the call of a kernel, and the library of operators.

An op has three ways in, and `road` says which one a call takes. Ordinary eager calls take the short one, an autograd
Function around the raw call of the kernels. Function transforms, forward-mode AD and devices without a kernel go to the
plain reference, which composes with anything. Everything else (torch.compile, export, torch.jit.trace, fake tensors,
modes and subclasses of any kind) goes through the operators of the library `kdejsd`, where torch does for a mode what
it does for its own operators, or refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _torch
from .._native import cuda_problem

KERNEL_DTYPE = {torch.float32: "kFloat32", torch.float64: "kFloat64"}  # DType of csrc/kernels.h
_KERNEL_DEVICES = ("cpu", "cuda")

library = torch.library.Library("kdejsd", "DEF")  # registrations end with this object
_TAGS = (torch.Tag.pt2_compliant_tag,)
# Of operators that look at values, which waits for the device: no CUDA graph has them. Older torch has no such tag.
_LOOKING_TAGS = (*_TAGS, *(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)))


def road(arguments: Sequence[Tensor | float | None]) -> Literal["kernel", "operator", "reference"]:
    """Returns the way that a call with these arguments takes.

    The address of a tensor is taken only after "kernel", and in the operators' own kernels, which torch calls with
    ordinary tensors.
    """
    if _torch.is_plain(arguments):
        return "kernel"
    if _torch.transforms_active() or _torch.forward_mode_active():
        return "reference"
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.device.type not in _KERNEL_DEVICES:
            return "reference"
    return "operator"


def needs_grad(arguments: Iterable[object]) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:  # a loop, as a generator expression would be a call for each of them
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def check_cuda(name: str, tensor: Tensor) -> None:
    if tensor.is_cuda and (problem := cuda_problem()):
        raise RuntimeError(f"{name} is on {tensor.device}, but {problem}")


def launch(module: ModuleType, name: str, device: torch.device, args: Any) -> None:
    """Calls the kernel for this device with its struct; on CUDA it is queued on the current stream."""
    if device.type == "cpu":
        getattr(module, f"{name}_cpu")(args, torch.get_num_threads())
        return
    index = device.index
    with _torch.on_device(index):
        size = getattr(module, f"{name}_workspace_cuda")(args, index)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        getattr(module, f"{name}_cuda")(args, workspace.data_ptr(), index, _torch.cuda_stream(index))


def operator(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
    *,
    of: str | None = None,
    looks_at_values: bool = False,
) -> Any:
    """Registers the operator kdejsd::NAME, and returns it.

    Args:
        name: of the operator.
        kernel: what computes it, on the CPU and on CUDA.
        fake: makes empty results; the annotations of its arguments and results are the operator's schema.
        function: takes the arguments where one of them needs a gradient; None where none is passed on.
        of: the public function that has a forward-mode derivative; None where the operator refuses nothing.
        looks_at_values: whether it waits for the device, so that no CUDA graph may have it.
    """
    schema = torch.library.infer_schema(fake, mutates_args=())
    library.define(name + schema, tags=_LOOKING_TAGS if looks_at_values else _TAGS)
    for key in ("CPU", "CUDA"):
        library.impl(name, kernel, key)
    torch.library.register_fake(f"kdejsd::{name}", fake, lib=library)
    overload = getattr(torch.ops.kdejsd, name).default
    if of is None:
        return overload

    def above_autograd(*arguments: Any) -> Any:
        if _torch.forward_mode_active():  # the tangent would be lost without a word
            raise RuntimeError(f"torch.ops.kdejsd.{name} has no forward-mode derivative; call kdejsd.{of}")
        if function is not None and needs_grad(arguments):
            return function.apply(*arguments)
        with _torch.below_autograd():
            return overload(*arguments)

    library.impl(name, above_autograd, "Autograd")
    return overload
