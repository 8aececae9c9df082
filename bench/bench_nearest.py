"""Times nearest_other_class against other ways to compute it; checks each of them first.

    python bench/bench_nearest.py                                     # the whole CPU table, some 20 minutes
    python bench/bench_nearest.py --quick                             # small sizes, some 20 seconds
    python bench/bench_nearest.py --device cuda --csv results.csv
    python bench/bench_nearest.py --sizes 50000,10,sectors --threads 1

A size is N, d and how the samples, standard normal, are divided into ten classes: "sectors" of the first two
coordinates, where most samples are far from other classes, or at "random", where all are amid them. Trees know nothing
of classes: each class asks a tree that holds all the others. README.md beside this says the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import machine
import numpy as np
import peers
import torch
from bench_kde import ROUNDS, digits, some_rows, spread, time_limit, timed
from machine import Peaks
from torch import Tensor

import kdejsd
from kdejsd._native import cuda_problem, native

Size = tuple[int, int, str]
Found = tuple[Tensor, Tensor]  # distance and index, [N] each

CLASSES = 10
QUICK: list[Size] = [(100, 2, "sectors"), (5000, 2, "sectors"), (5000, 10, "sectors")]
USUAL: list[Size] = [
    *QUICK,
    *((50_000, d, kind) for d in (2, 5, 10) for kind in ("sectors", "random")),
    (100_000, 2, "sectors"),
    (100_000, 10, "sectors"),
    (20_000, 64, "sectors"),
]
MAX_REPEATS = 30
MAX_CALL_SECONDS = 30  # what would take longer, by its times at smaller sizes, is left out
MAX_CHECK_SECONDS = 120
CHUNK_NUMBERS = 2**25  # of a block of pairs in the peers that make one
WRONG = 1e-2  # a distance's error, relative to the largest one: beyond, a provider is wrong


@dataclass(frozen=True)
class Provider:
    name: str
    find: Callable[[Tensor, Tensor], Found]
    level: str | None = None  # instruction set of kdejsd's kernels


@dataclass
class Result:
    """What was found out about one provider at one size."""

    provider: str
    note: str = ""  # why there are no times
    error: float = math.nan  # of a distance, relative to the largest one
    right: float = math.nan  # share of the samples whose index is that of a nearest sample
    mib: float = math.nan
    others: float = math.nan  # cores that other processes kept busy while the times were taken
    times: list[float] = field(default_factory=list)  # milliseconds
    rounds: list[float] = field(default_factory=list)  # median of each round


# ----------------------------------------------------------------------------------------------------------------------
# Ways to find the nearest


def chunked(compute_mode: str) -> Callable[[Tensor, Tensor], Found]:
    def find(latents: Tensor, labels: Tensor) -> Found:
        rows = max(1, CHUNK_NUMBERS // len(latents))
        found = []
        for x, y in zip(latents.split(rows), labels.split(rows), strict=True):
            distances = torch.cdist(x, latents, compute_mode=compute_mode)
            found.append(distances.masked_fill_(y.unsqueeze(1) == labels, math.inf).min(1))
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    return find


def by_tree(make: Callable[[np.ndarray], Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]) -> Provider:
    def find(latents: Tensor, labels: Tensor) -> Found:
        points, classes = latents.numpy(), labels.numpy()
        distance, index = np.empty(len(points)), np.empty(len(points), np.int64)
        for c in np.unique(classes):
            own, others = np.flatnonzero(classes == c), np.flatnonzero(classes != c)
            found, at = make(points[others])(points[own])
            distance[own], index[own] = found.reshape(-1), others[at.reshape(-1)]
        return torch.from_numpy(distance), torch.from_numpy(index)

    return Provider("", find)


def providers(device: str, levels: list[str]) -> dict[str, Provider | str]:
    """All of them by name, or why one is not there; kdejsd first."""
    found: dict[str, Provider | str] = {}
    for level in levels if device == "cpu" else [None]:
        name = "kdejsd" if level in (None, levels[0]) else f"kdejsd {level}"
        found[name] = Provider(name, lambda x, y: tuple(kdejsd.nearest_other_class(x, y)), level)
    found["gemm"] = Provider("gemm", chunked("use_mm_for_euclid_dist"))
    found["cdist"] = Provider("cdist", chunked("donot_use_mm_for_euclid_dist"))
    if device == "cuda":
        return found
    trees: dict[str, Provider | str] = {}
    try:
        from scipy.spatial import cKDTree

        trees["scipy cKDTree"] = by_tree(
            lambda points: lambda own: cKDTree(points).query(own, workers=torch.get_num_threads())
        )
    except ImportError:
        trees["scipy cKDTree"] = "not installed"
    try:
        from sklearn.neighbors import BallTree, KDTree

        trees["sklearn KDTree"] = by_tree(lambda points: KDTree(points).query)
        trees["sklearn BallTree"] = by_tree(lambda points: BallTree(points).query)
    except ImportError:
        trees |= {"sklearn KDTree": "not installed", "sklearn BallTree": "not installed"}
    return found | {n: Provider(n, t.find) if isinstance(t, Provider) else t for n, t in trees.items()}


# ----------------------------------------------------------------------------------------------------------------------
# One size


@dataclass
class Problem:
    size: Size
    latents: Tensor
    labels: Tensor

    @classmethod
    def make(cls, size: Size, dtype: torch.dtype, device: str) -> Problem:
        n, d, kind = size
        generator = torch.Generator().manual_seed(n + d)
        latents = torch.randn(n, d, generator=generator, dtype=torch.float64)
        if kind == "random":
            labels = torch.randint(CLASSES, (n,), generator=generator)
        else:
            turns = torch.atan2(latents[:, 1], latents[:, 0]) / (2 * math.pi) + 0.5
            labels = (turns * CLASSES).long().clamp_max(CLASSES - 1)
        return cls(size, latents.to(device, dtype), labels.to(device))

    def multiply_adds(self) -> float:
        """Of all pairs of different classes."""
        counts = torch.bincount(self.labels).double()
        return float(counts.sum().square() - counts.square().sum()) * self.size[1]

    def call(self, provider: Provider) -> Found:
        if provider.level:
            peers.use_level(provider.level)
        return provider.find(self.latents, self.labels)

    def truth(self, rows: Tensor) -> Tensor:
        """Squared distances in float64."""
        wide, found = self.latents.double(), []
        for i in rows.split(max(1, 2**24 // self.latents.numel())):
            squares = (wide[i].unsqueeze(1) - wide).square().sum(-1)
            found.append(squares.masked_fill(self.labels[i].unsqueeze(1) == self.labels, math.inf).amin(1))
        return torch.cat(found)

    def check(self, provider: Provider, rows: Tensor, squares: Tensor, result: Result) -> None:
        distance, index = (t[rows] for t in self.call(provider))
        truth = squares.sqrt()
        result.error = float((distance.double() - truth).abs().max() / truth.max())
        chosen = (self.latents[rows].double() - self.latents[index].double()).square().sum(-1)
        other = self.labels[index] != self.labels[rows]
        result.right = float((other & (chosen <= squares * (1 + 1e-5))).double().mean())
        if not result.error <= WRONG:
            result.note = "wrong: not timed"


def run_size(
    problem: Problem, candidates: dict[str, Provider | str], device: str, seconds: float, pace: dict[str, float]
) -> list[Result]:
    """Checks every candidate, then times those that are right, interleaved.

    Args:
        seconds: to spend on one candidate.
        pace: seconds per N^2 d of each candidate, for what a call will take; brought up to date.
    """
    n, d, _ = problem.size
    rows = some_rows((n, n, d)).to(problem.latents.device)
    squares = problem.truth(rows)
    results, fit, estimates = [], [], {}
    for name, provider in candidates.items():
        result = Result(name)
        results.append(result)
        if isinstance(provider, str):
            result.note = provider
            continue
        if pace.get(name, 0) * n * n * d > MAX_CALL_SECONDS:
            result.note = f"left out: about {pace[name] * n * n * d:.0f} s a call"
            continue
        try:
            with time_limit(MAX_CHECK_SECONDS):
                problem.check(provider, rows, squares, result)
                with machine.peak_memory(device) as peak:
                    estimates[name] = 1e-3 * timed(lambda p=provider: problem.call(p), 1, device)[0]
            result.mib = peak.mib
            if n * n * d > 10**8:
                pace[name] = estimates[name] / (n * n * d)
        except TimeoutError:
            result.note = f"not ready after {MAX_CHECK_SECONDS} s"
        except Exception as error:  # whatever a peer raises is its entry
            result.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60] if str(error) else ''}"
        if not result.note:
            fit.append((provider, result))
    gc.collect()
    gc.disable()
    load = machine.OthersLoad()
    for _ in range(ROUNDS):
        for provider, result in fit:
            expected = estimates[provider.name]
            repeats = max(1 if expected > 2 else 3, min(MAX_REPEATS, int(seconds / max(expected, 1e-6))))
            if len(result.times) < repeats:
                if expected < 0.1:
                    problem.call(provider)  # its data and code back into the caches
                times = timed(lambda p=provider: problem.call(p), -(-repeats // ROUNDS), device)
                result.times += times
                result.rounds.append(statistics.median(times))
    gc.enable()
    for _, result in fit:
        result.others = load.cores()
    return results


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def ratios(result: Result, ours: Result) -> list[float]:
    """How many times as long as kdejsd it took, in each round that both were in."""
    return [a / b for a, b in zip(result.rounds, ours.rounds, strict=False)]


def print_size(problem: Problem, results: list[Result], limit: float, peaks: Peaks) -> None:
    n, d, kind = problem.size
    print(
        f"\nN = {n}, d = {d}, {kind}: limit of comparing all pairs {digits(limit)} ms\n"
        f"  at {peaks}; other processes kept {results[0].others:.2f} cores busy"
    )
    print(f"  {'':18}{'ms':>24}{'limit':>8}{'ratio':>24}{'error':>10}{'right':>8}{'MiB':>8}")
    for result in results:
        if not result.times:
            print(f"  {result.provider:18}{result.note}")
            continue
        median, low, high = spread(result.times)
        line = f"  {result.provider:18}{digits(median):>7}{f'({digits(low)}-{digits(high)})':>17}"
        line += f"{100 * limit / median:7.0f}%"
        middle, low, high = spread(ratios(result, results[0]))
        line += f"{digits(middle):>7}{f'({digits(low)}-{digits(high)})':>17}"
        print(f"{line}{result.error:>10.1e}{100 * result.right:>7.2f}%{result.mib:>8.1f}")
    sys.stdout.flush()


FIELDS = (
    *("kernel", "provider", "metric", "unit", "n", "d", "labels", "value", "p20", "p80", "repeats", "others", "note"),
    *("dtype", "device", "level", "threads", "machine", "versions", "commit", "date"),
)


def csv_rows(problem: Problem, results: list[Result], limit: float) -> Iterator[dict[str, object]]:
    for result in results:
        base: dict[str, object] = {
            "kernel": "nearest",
            "provider": result.provider,
            "note": result.note,
            "others": result.others,
            **dict(zip(("n", "d", "labels"), problem.size, strict=True)),
        }
        if result.note:
            yield {**base, "metric": "time", "unit": "ms"}
        if result.times:
            for metric, unit, values in (
                ("time", "ms", result.times),
                ("ratio to kdejsd", "", ratios(result, results[0])),
            ):
                median, low, high = spread(values)
                row = {"metric": metric, "unit": unit, "value": median, "p20": low, "p80": high, "repeats": len(values)}
                yield {**base, **row}
            yield {**base, "metric": "share of limit", "value": limit / statistics.median(result.times)}
        for metric, unit, value in (
            ("error", "relative", result.error),
            ("nearest found", "share", result.right),
            ("peak extra memory", "MiB", result.mib),
        ):
            if not math.isnan(value):
                yield {**base, "metric": metric, "unit": unit, "value": value}


# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def size(text: str) -> Size:
        n, d, kind = text.split(",")
        if int(n) < 2 or int(d) < 2 or kind not in ("sectors", "random"):
            raise ValueError
        return int(n), int(d), kind

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--sizes", type=size, nargs="+", metavar="N,d,labels", help="instead of the usual ones")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and kdejsd")
    parser.add_argument("--levels", type=lambda text: text.split(","), help="kdejsd's instruction sets: base,v3,v4")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument("--budget", type=float, help="seconds to spend on timing, about")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--fma-gflops", type=float, help="the machine's peak, where it cannot be measured")
    arguments = parser.parse_args()
    if unknown := set(arguments.levels or []) - set(machine.ARCHITECTURES):
        parser.error(f"--levels must be among {', '.join(machine.ARCHITECTURES)}, got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda":
        if problem := cuda_problem():
            parser.error(f"--device cuda: {problem}")
        if arguments.levels:
            parser.error("--levels is for --device cpu")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    levels = sorted(arguments.levels or [native().level()], key=list(machine.ARCHITECTURES).index, reverse=True)
    given = (arguments.fma_gflops, math.inf) if arguments.fma_gflops else None
    sizes = arguments.sizes or (QUICK if arguments.quick else USUAL)

    candidates = providers(device, levels)
    if arguments.providers:
        if unknown := set(arguments.providers) - set(candidates):
            raise SystemExit(f"--providers must be among {sorted(candidates)}, got {sorted(unknown)}")
        candidates = {k: v for k, v in candidates.items() if k.startswith("kdejsd") or k in arguments.providers}

    def measure_peaks() -> Peaks:
        return machine.cpu_peaks(levels[0], dtype, given) if device == "cpu" else machine.cuda_peaks(dtype, given)

    facts = machine.facts(device)
    try:
        before = measure_peaks()
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    for key, value in {**facts, "limits": str(before)}.items():
        print(f"{key:16}{value}")

    shared = {
        "dtype": arguments.dtype,
        "device": device,
        "level": levels[0],
        **{k: facts[k] for k in ("threads", "machine", "versions", "commit", "date")},
    }
    seconds = (arguments.budget or (8 if arguments.quick else 150)) / (len(sizes) * len(candidates))
    pace: dict[str, float] = {}
    wrong = False
    with contextlib.ExitStack() as stack:
        writer = None
        if arguments.csv:
            arguments.csv.parent.mkdir(parents=True, exist_ok=True)
            writer = csv.DictWriter(stack.enter_context(arguments.csv.open("w", newline="")), FIELDS)
            writer.writeheader()
        for size in sizes:
            problem = Problem.make(size, dtype, device)
            results = run_size(problem, candidates, device, seconds, pace)
            after = measure_peaks()
            peaks, before = after.or_higher(before), after
            limit = 1e3 * problem.multiply_adds() / peaks.multiply_adds
            print_size(problem, results, limit, peaks)
            if writer:
                for row in csv_rows(problem, results, limit):
                    writer.writerow({**shared, **row})
            wrong |= any(r.provider.startswith("kdejsd") and (r.note or r.right < 1) for r in results)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
