"""Measures what busy neighbours cost the calls of several threads, as ratios to the quiet ones.

    python bench/bench_threads.py                       # one neighbour, under a minute
    python bench/bench_threads.py --neighbours 2 --threads 1 2 4

A neighbour is another process that counts, of the same priority and on any core. `quiet` is the median without one, in
ms; the others are medians, 90th percentiles and the longest of up to 300 calls, divided by that median. `alone` is the
share of the parallel regions that the caller ran without its team, having waited for it too long.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import harness
import machine
import torch

import kdejsd
from kdejsd._native import native

CALLS = 300


def ops() -> dict[str, Callable[[], object]]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))

    def log_prob(n: int, m: int, dim: int) -> Callable[[], object]:
        query, centers = randn(n, dim), randn(m, dim)
        return lambda: kdejsd.kde_log_prob(query, centers, 1.0)

    query, centers = randn(100, 8), randn(2000, 8).requires_grad_()
    inputs, codes, masses = randn(200, 20), randn(200, 3), randn(200, 1000).softmax(-1)
    latents, labels = randn(1500, 2), torch.arange(1500) % 5
    return {
        **{f"kde {n} x {m} x {dim}": log_prob(n, m, dim) for n, m, dim in ((100, 10_000, 8), (300, 10_000, 8))},
        "kde 4096 x 4096 x 2": log_prob(4096, 4096, 2),
        "centers 100 x 2000 x 8": lambda: kdejsd.kde_log_prob(query, centers, 1.0).sum().backward(),
        "omega 200 x 20 x 3": lambda: kdejsd.omega(inputs, codes, pairs="all"),
        "nearest 1500 x 2": lambda: kdejsd.nearest_other_class(latents, labels),
        "radius 200 x 1000": lambda: kdejsd.class_radius_bound(masses),
    }


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def times(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, sorted."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < CALLS and time.perf_counter() < end:
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--neighbours", type=int, default=1, help="busy processes (default 1)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="as torch.set_num_threads (default 1 2)")
    parser.add_argument("--seconds", type=float, default=0.7, help="for each op, the most (default 0.7)")
    arguments = parser.parse_args()
    harness.print_facts(machine.facts("cpu"))
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} threads, {arguments.neighbours} neighbours")
        print(f"  {'':24}{'quiet ms':>9}{'p90':>7}{'most':>7}{'busy: median':>14}{'p90':>7}{'most':>7}{'alone':>7}")
        for name, call in ops().items():
            call()
            quiet = times(call, arguments.seconds)
            before = native().regions()
            with neighbours(arguments.neighbours):
                busy = times(call, arguments.seconds)
            alone, teams = (now - then for now, then in zip(native().regions(), before, strict=True))
            unit = statistics.median(quiet)
            figures = [t / unit for s in (quiet, busy) for t in (s[len(s) // 2], s[9 * len(s) // 10], s[-1])][1:]
            columns = "".join(f"{figure:{width}.1f}" for figure, width in zip(figures, (7, 7, 14, 7, 7), strict=True))
            print(f"  {name:24}{unit:9.3f}{columns}{alone / (alone + teams):7.2f}")


if __name__ == "__main__":
    main()
