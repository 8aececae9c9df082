"""Gathers the private names of torch that the ops need; test_torch.py checks what each one does."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter
from torch.utils._device import DeviceContext

# True inside vmap, func.grad, jvp and the other function transforms.
transforms_active = torch._C._are_functorch_transforms_active

# The dispatch keys of a tensor, and those that modes add to every call of this thread: by them torch itself decides
# what comes before the device's kernel.
_keys = torch._C._dispatch_keys
_added_keys = torch._C._dispatch_tls_local_include_set

_function_modes = torch._C._len_torch_function_stack
_function_mode = torch._C._get_function_stack_at

# Context in which a call goes to the device's kernel and not to the autograd one.
below_autograd = torch._C._AutoDispatchBelowAutograd

# How a backend, "cuda" or "mkldnn", takes the float32 products of a kind of operator: "tf32", "bf16", "ieee" or "none",
# however that was set. None before torch 2.9. torch.backends asks it too, but takes a microsecond to.
_float32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def _bits(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


# All keys but those that a dense tensor of a CPU or of CUDA has, and that change nothing for an operator of ours.
_OTHER_KEYS = ~_bits(
    *("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView", "BackendSelect")
)


def is_plain(arguments: Iterable[object]) -> bool:
    """Tells whether a call may use the addresses of its arguments, which are tensors, numbers and None.

    It may if they are ordinary dense tensors of a CPU or of CUDA, and no mode of torch is to see, change or record the
    call. Only cases that are known to be harmless pass. Everything else does not: tracing, function transforms, fake
    tensors, subclasses, other layouts, values that a flag negates or makes zero, and modes of later versions.
    """
    if torch.compiler.is_dynamo_compiling() or forward_ad._current_level >= 0:
        return False
    if _function_modes() and _function_modes_matter():
        return False
    keys = _added_keys().raw_repr()
    for argument in arguments:
        if argument is None:
            continue
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            keys |= _keys(argument).raw_repr()  # type: ignore[arg-type]
        elif kind is not float:
            return False
    return not keys & _OTHER_KEYS


def _function_modes_matter() -> bool:
    """Tells whether a mode other than `torch.set_default_device`'s is active; that one affects only new tensors."""
    return any(type(_function_mode(level)) is not DeviceContext for level in range(_function_modes()))


def forward_mode_active() -> bool:
    """Tells whether the call is inside a `forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def on_device(device: int) -> AbstractContextManager[None]:
    """Makes a CUDA device the current one for a while.

    Afterwards the caller's device becomes current again, as with torch's own operators: only where it already has a
    context. The CUDA runtime's cudaSetDevice would create one, of some 500 MB, on a device that is not used.
    """
    guard: AbstractContextManager[None] = torch.cuda.device(device)
    return guard


def cuda_stream(device: int) -> int:
    """Returns the handle of the device's current stream."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def reduced_precision_allowed(device_type: str) -> bool:
    """Tells whether float32 products may be taken in TF32 or as sums of two bfloat16 numbers on a type of device.

    The type is "cuda" or "cpu"; `torch.set_float32_matmul_precision` and the like decide.
    """
    if _float32_precision is None:
        return torch.get_float32_matmul_precision() != "highest"
    return _float32_precision("cuda" if device_type == "cuda" else "mkldnn", "matmul") in ("tf32", "bf16")
