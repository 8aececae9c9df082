"""Shared by the tests: devices, dtypes, makers of inputs, how errors are judged, and groups of processes."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kdejsd._native import cuda_problem, native

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


def run_here(script: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script as a command would, but in this process, which has imported what takes long."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    threads, level, folder = torch.get_num_threads(), native().level(), os.getcwd()
    try:
        os.chdir(cwd or folder)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
            patch.syspath_prepend(str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        os.chdir(folder)
        torch.set_num_threads(threads)
        native().set_level(level)
    return subprocess.CompletedProcess(script, status, out.getvalue(), err.getvalue())


def _started(rank: int, ranks: int, port: int, folder: Path, work: Callable[[int, int], object]) -> None:
    """One process of a group, as torchrun starts it, whose results go into a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    torch.save(work(rank, ranks), folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _joined(rank: int, ranks: int, work: Callable[[int, int], object]) -> object:
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    return work(rank, ranks)


def results_of_ranks(ranks: int, folder: Path, work: Callable[[int, int], object], *, joined: bool = True) -> list[Any]:
    """Returns what `work(rank, ranks)` gives in each process of a group, in the order of the ranks.

    With joined=False each process must join the group by itself.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    work = functools.partial(_joined, work=work) if joined else work
    # One process imports what takes long, the ranks are forks of it.
    mp.get_context("forkserver").set_forkserver_preload(["kdejsd.runs.fit"])
    mp.start_processes(_started, (ranks, port, folder, work), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
