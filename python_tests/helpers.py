"""Shared by the tests: devices, dtypes, makers of inputs, and how errors are judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kdejsd._native import cuda_problem

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(bool(cuda_problem()), reason=cuda_problem() or "CUDA is usable"))
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float32, torch.float64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensor:
    """Standard normal points, the same for every dtype and device up to rounding."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)


def worst(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry of b (to 1 where that is smaller than 1)."""
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))


def operators(call: Callable[[], object]) -> list[str]:
    """The torch operators that a call runs, without those that other operators call."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        call()
    return [
        event.name
        for event in record.events()
        if event.name.startswith("aten::")
        and not (event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"))
    ]
