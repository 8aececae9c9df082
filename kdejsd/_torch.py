"""The private names of torch that the ops need, all in one place; test_torch.py checks what each one does."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.autograd.forward_ad as forward_ad

# True inside vmap, func.grad, jvp and the other function transforms.
transforms_active = torch._C._are_functorch_transforms_active

# The number of active dispatch modes: fake tensors, tracing, profiling by mode.
dispatch_modes = torch._C._len_torch_dispatch_stack

# Context in which a call goes to the device's kernel and not to the autograd one.
below_autograd = torch._C._AutoDispatchBelowAutograd

# How a backend, "cuda" or "mkldnn", takes the float32 products of a kind of operator: "tf32", "bf16", "ieee" or "none",
# however that was set. None before torch 2.9. torch.backends asks it too, but takes a microsecond to.
_float32_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def forward_mode_active() -> bool:
    """True inside a `forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def on_device(device: int) -> AbstractContextManager[None]:
    """Makes a CUDA device the current one for a while.

    The caller's device is made current again as torch's own operators do it: only where it has a context already. The
    CUDA runtime's cudaSetDevice would make one, of some 500 MB, on a device that is not used.
    """
    guard: AbstractContextManager[None] = torch.cuda.device(device)
    return guard


def cuda_stream(device: int) -> int:
    """The handle of the device's current stream."""
    handle: int = torch._C._cuda_getCurrentRawStream(device)
    return handle


def reduced_precision_allowed(device_type: str) -> bool:
    """Whether float32 products may be taken in TF32, or as sums of two bfloat16 numbers, on a CUDA device or the CPU:
    `torch.set_float32_matmul_precision` and its kin."""
    if _float32_precision is None:
        return torch.get_float32_matmul_precision() != "highest"
    return _float32_precision("cuda" if device_type == "cuda" else "mkldnn", "matmul") in ("tf32", "bf16")
