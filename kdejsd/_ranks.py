"""Lets the processes of torch.distributed's default group exchange tensors; one process alone is a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._tensors import checks_values


def rank_and_size() -> tuple[int, int]:
    """Returns this process's number in the group, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(t: Tensor, name: str) -> Tensor:
    """Gathers the tensors [n, ...] of all ranks into one [R n, ...], in the order of the ranks; no gradient passes.

    Raises:
        ValueError: if n differs between ranks. On a GPU the check would wait for the device; there it is made only with
            KDEJSD_CHECK=1 in the environment.
    """
    size = dist.get_world_size()
    if t.device.type == "cpu" or checks_values():
        counts = _gathered(torch.tensor([len(t)], device=t.device), size).tolist()
        if counts != [len(t)] * size:
            raise ValueError(f"{name} must be as many on every rank, got {counts}")
    return _gathered(t.detach().contiguous(), size)


def _gathered(t: Tensor, size: int) -> Tensor:
    whole = t.new_empty(size * len(t), *t.shape[1:])
    if t.numel():
        dist.all_gather(list(whole.chunk(size)), t)  # into views: no copy of the whole is made
    return whole


def of_first(t: Tensor) -> Tensor:
    """Returns the first rank's tensor on every rank; all ranks give tensors of one shape and dtype.

    It is moved through the group's own device.
    """
    if rank_and_size()[1] > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        sent = t.to(device)
        dist.broadcast(sent, 0)
        t = sent.to(t.device)
    return t


def summed(t: Tensor) -> Tensor:
    """Returns the sum of all ranks' tensors of the same shape; the gradient is that of the sum of all ranks' losses."""
    result: Tensor = _Sum.apply(t)  # type: ignore[no-untyped-call]
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)  # type: ignore[no-untyped-call, no-any-return]
