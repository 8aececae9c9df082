"""Lagged codes sharded over ranks: what the latent term costs, by a model that is checked here and reckons for GPUs.

    python bench/bench_ranks.py                 # two processes of one thread each, under a minute
    python bench/bench_ranks.py --quick         # small sizes, under 20 seconds

`LaggedKDE.loss` with the kernel's noise, as GEN takes it, value and gradient, for n codes on each of R ranks (gloo) and
m lagged codes on all of them together. The model of a step:

    step(R, n, m, l) = kernel(R n, m / R, l) + gather(n l + 2 n numbers of each rank) + sum(R n + R n (l + 2) numbers)

The kernel's time is that of a pass over m / R codes for R n queries, in all processes at once and without a word
between them; those of the collectives are fitted, before, as a latency and a rate for each, over the sizes in question.
`model / measured` is what the model is worth. Each time is the slowest rank's, from a common start.

Then the same model for GPUs, with these assumptions in place of measurements: the kernel at 70 % of the float32 limit
of an H200 by its data sheet (67 TFLOP/s, 4.2e12 exponentials a second, 4.8 TB/s), links of 450 GB/s in each direction
within a node of 8 (NVLink 4) and 50 GB/s between nodes (400 Gbit/s for each GPU), ring algorithms, and a latency of 20
microseconds a collective within a node and 40 between nodes. `codes` is the memory of a rank's lagged codes, `refresh`
how many of them a rank encodes a step if each is renewed every 10 steps.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import machine
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kdejsd import LaggedKDE
from kdejsd._ranks import gathered
from kdejsd.ops.streamed import streamed_log_prob

N = 256
BANDWIDTH = 1.9
SIZES = ((10_000, 8), (10_000, 64), (100_000, 8), (100_000, 64), (1_000_000, 64))  # m, l
QUICK = ((2_000, 8), (4_000, 64))
H200 = machine.Peaks(67e12 / 2, 4.2e12, 4.8e12, "data sheet", one_unit=False)
SHARE_OF_LIMIT = 0.7
NODE, WITHIN, BETWEEN = 8, (20e-6, 450e9), (40e-6, 50e9)  # latency in seconds and bytes a second of a collective
GPU_RANKS, GPU_N = (1, 8, 64), 512
GPU_SIZES = ((100_000, 64), (1_000_000, 64), (1_000_000, 256), (10_000_000, 64), (100_000_000, 64))
FIELDS = (
    *("part", "ranks", "n", "m", "l", "ms", "p20", "p80", "kernel_ms", "gather_ms", "sum_ms", "model_ms"),
    *("codes_mib", "refresh", "others", *harness.FACTS),
)


def numbers(n: int, dim: int, ranks: int) -> tuple[int, int]:
    """Bytes that each rank gives to the gathering of float32 queries and int64 indices, and to the two sums: of the
    log-sums in float64, and of weights, counts and gradients in float32."""
    return n * (4 * dim + 8), ranks * n * (8 + 4 * (dim + 2))


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call, those of the slowest rank from a common start."""
    found = []
    for _ in range(repeats + 1):
        dist.barrier()
        began = time.perf_counter()
        call()
        slowest = torch.tensor(1e3 * (time.perf_counter() - began))
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(float(slowest))
    return found[1:]


def step(n: int, m: int, dim: int) -> Callable[[], object]:
    """The latent term of n codes on this rank, with m lagged codes on all."""
    module = LaggedKDE(m, dim, BANDWIDTH)
    module.shard()
    generator = torch.Generator().manual_seed(module.rank)
    module.refresh(torch.randn(len(module.codes), dim, generator=generator), module.share(torch.arange(m)))
    z, noise = (torch.randn(n, dim, generator=generator) for _ in range(2))
    z.requires_grad_()
    index = torch.arange(n)
    return lambda: module.loss(z, index, noise=noise).backward()


def repeats(m: int, dim: int) -> int:
    return max(15, min(100, 2_000_000_000 // (N * m * dim)))


def kernel(n: int, m: int, dim: int) -> Callable[[], object]:
    """Computes what a rank does between the collectives: its part of the density of n queries, from m codes."""
    generator = torch.Generator().manual_seed(0)
    codes, z = (torch.randn(count, dim, generator=generator) for count in (m, n))
    z.requires_grad_()
    own = torch.arange(n)
    return lambda: streamed_log_prob(z, codes, BANDWIDTH, own)[0].sum().backward()


def sharded(rank: int, ranks: int, port: int, sizes: list[tuple[int, int]], file: str) -> None:
    """One of the ranks; the first one writes down the times of the collectives and of the steps."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    found: dict[str, Any] = {"gather": [], "sum": [], "kernels": [], "steps": []}
    for count in (2**8, 2**12, 2**14, 2**16, 2**18):
        t = torch.randn(count)
        for name, call in {"gather": lambda t=t: gathered(t, "numbers"), "sum": lambda t=t: dist.all_reduce(t)}.items():
            found[name].append((4 * count, statistics.median(timed(call, 50))))
    for m, dim in sizes:
        count = repeats(m, dim)
        found["kernels"].append(timed(kernel(ranks * N, m // ranks, dim), count))
        found["steps"].append(timed(step(N, m, dim), count))
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


def run_ranks(ranks: int, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "times.pt")
        mp.spawn(sharded, (ranks, port, sizes, file), nprocs=ranks)
        found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def fitted(times: list[tuple[int, float]]) -> tuple[float, float]:
    """Latency in ms, and ms a byte: the line with the least relative errors."""
    size, ms = np.array(times).T
    columns = np.stack([np.ones_like(size), size], 1) / ms[:, None]
    latency, slope = np.linalg.lstsq(columns, np.ones_like(ms), rcond=None)[0]
    return float(latency), float(slope)


def measured_rows(ranks: int, sizes: list[tuple[int, int]]) -> list[harness.Row]:
    load = machine.OthersLoad()
    found = run_ranks(ranks, sizes)
    lines = {name: fitted(found[name]) for name in ("gather", "sum")}
    print(f"\n{ranks} ranks of one thread each (gloo), {N} codes on each")
    for name, (latency, slope) in lines.items():
        print(
            f"  {name}: {1e3 * latency:.0f} us and {1e-6 / slope:.2f} GB/s; measured "
            + ", ".join(f"{1e3 * ms:.0f} us for {size / 1024:.0f} KiB" for size, ms in found[name])
        )
    print(
        f"\n  {'m':>9}{'l':>5}{'measured ms':>13}{'(p20-p80)':>18}{'kernel':>9}{'gather':>9}{'sum':>9}"
        f"{'model':>9}{'model / measured':>18}"
    )
    rows = []
    for (m, dim), kernels, steps in zip(sizes, found["kernels"], found["steps"], strict=True):
        middle, low, high = harness.spread(steps)
        kernel_ms = statistics.median(kernels)
        bytes_gathered, bytes_summed = numbers(N, dim, ranks)
        gather = 2 * lines["gather"][0] + lines["gather"][1] * bytes_gathered
        total = 2 * lines["sum"][0] + lines["sum"][1] * bytes_summed
        model = kernel_ms + gather + total
        rows.append(
            {
                **{"part": "measured", "ranks": ranks, "n": N, "m": m, "l": dim, "ms": middle, "p20": low, "p80": high},
                **{"kernel_ms": kernel_ms, "gather_ms": gather, "sum_ms": total, "model_ms": model},
                **{"codes_mib": 4 * dim * m / ranks / machine.MIB, "others": load.cores()},
            }
        )
        print(
            f"  {m:9}{dim:5}{middle:13.2f}{f'({low:.2f}-{high:.2f})':>18}{kernel_ms:9.2f}{gather:9.2f}{total:9.2f}"
            f"{model:9.2f}{model / middle:18.2f}"
        )
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# GPUs


def reckoned(ranks: int, m: int, dim: int) -> harness.Row:
    n = GPU_N
    kernel_ms = H200.limit_ms(ranks * n, math.ceil(m / ranks), dim, 4, gradient=True) / SHARE_OF_LIMIT
    latency, rate = WITHIN if ranks <= NODE else BETWEEN
    bytes_gathered, bytes_summed = numbers(n, dim, ranks)
    there = 1e3 * latency * (ranks > 1)
    gather = 2 * there + 1e3 * (ranks - 1) * bytes_gathered / rate
    total = 2 * there + 1e3 * 2 * (ranks - 1) / ranks * bytes_summed / rate
    return {
        **{"part": "reckoned", "ranks": ranks, "n": n, "m": m, "l": dim, "kernel_ms": kernel_ms, "gather_ms": gather},
        **{"sum_ms": total, "model_ms": kernel_ms + gather + total, "codes_mib": 4 * dim * m / ranks / machine.MIB},
        "refresh": m / ranks / 10,
    }


def print_reckoned(rows: list[harness.Row]) -> None:
    print(f"\nreckoned for H200 GPUs, {GPU_N} codes on each; ms")
    print(
        f"  {'m':>11}{'l':>5}{'GPUs':>6}{'batch':>8}{'kernel':>10}{'gather':>9}{'sum':>9}{'step':>10}"
        f"{'us a code':>11}{'codes MiB':>11}{'refresh':>11}"
    )
    for row in rows:
        batch = row["ranks"] * row["n"]
        print(
            f"  {row['m']:11}{row['l']:5}{row['ranks']:6}{batch:8}{row['kernel_ms']:10.3f}{row['gather_ms']:9.3f}"
            f"{row['sum_ms']:9.3f}{row['model_ms']:10.3f}{1e3 * row['model_ms'] / batch:11.3f}"
            f"{row['codes_mib']:11.0f}{row['refresh']:11.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--ranks", type=int, default=2, help="not more than there are cores (default 2)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers here too")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {arguments.ranks}")
    torch.set_num_threads(1)
    facts = machine.facts("cpu")
    harness.print_facts(facts)
    rows = measured_rows(arguments.ranks, list(QUICK if arguments.quick else SIZES))
    reckonings = [reckoned(ranks, m, dim) for m, dim in GPU_SIZES for ranks in GPU_RANKS]
    print_reckoned(reckonings)
    with harness.csv_table(arguments.csv, FIELDS, {key: facts[key] for key in harness.FACTS}) as write:
        write(rows + reckonings)


if __name__ == "__main__":
    main()
