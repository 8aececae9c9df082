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
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import harness
import numpy as np
import torch
from harness import VALUE, Row, digits, some_rows, spread_columns
from machine import Peaks
from torch import Tensor

import kdejsd

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
CHUNK_NUMBERS = 2**25  # of a block of pairs in the peers that make one
WRONG = 1e-2  # a distance's error, relative to the largest one: beyond, a provider is wrong


@dataclass(frozen=True)
class Provider:
    name: str
    find: Callable[[Tensor, Tensor], Found]
    level: str | None = None  # instruction set of kdejsd's kernels


@dataclass
class Result(harness.Result):
    error: float = math.nan  # of a distance, relative to the largest one
    right: float = math.nan  # share of the samples whose index is that of a nearest sample


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
class Problem(harness.Problem):
    result_type = Result
    modes = (VALUE,)
    max_call_seconds = 30

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

    @property
    def work(self) -> float:
        n, d, _ = self.size
        return n * n * d

    def limit_ms(self, peaks: Peaks, gradient: bool) -> float:
        return 1e3 * self.multiply_adds() / peaks.multiply_adds

    def call(self, provider: Provider, mode: str) -> Found:
        return provider.find(self.latents, self.labels)

    def __post_init__(self) -> None:
        n, d, _ = self.size
        self.rows = some_rows((n, n, d)).to(self.latents.device)
        self.squares = self.truth(self.rows)

    def truth(self, rows: Tensor) -> Tensor:
        """Squared distances in float64."""
        wide, found = self.latents.double(), []
        for i in rows.split(max(1, 2**24 // self.latents.numel())):
            squares = (wide[i].unsqueeze(1) - wide).square().sum(-1)
            found.append(squares.masked_fill(self.labels[i].unsqueeze(1) == self.labels, math.inf).amin(1))
        return torch.cat(found)

    def check(self, provider: Provider, result: Result) -> None:
        rows, squares = self.rows, self.squares
        distance, index = (t[rows] for t in self.call(provider, VALUE))
        truth = squares.sqrt()
        result.error = float((distance.double() - truth).abs().max() / truth.max())
        chosen = (self.latents[rows].double() - self.latents[index].double()).square().sum(-1)
        other = self.labels[index] != self.labels[rows]
        result.right = float((other & (chosen <= squares * (1 + 1e-5))).double().mean())
        if not result.error <= WRONG:
            result.note = "wrong: not timed"


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def ratios(result: Result, ours: Result) -> list[float]:
    """How many times as long as kdejsd it took, in each round that both were in."""
    return [a / b for a, b in zip(result.medians[VALUE], ours.medians.get(VALUE, []), strict=False)]


def print_size(problem: Problem, results: list[Result], peaks: Peaks) -> None:
    n, d, kind = problem.size
    print(
        f"\nN = {n}, d = {d}, {kind}: limit of comparing all pairs {digits(results[0].limits[VALUE])} ms\n"
        f"  at {peaks}; other processes kept {results[0].others:.2f} cores busy"
    )
    print(f"  {'':18}{'ms':>24}{'limit':>8}{'ratio':>24}{'error':>10}{'right':>8}{'MiB':>8}")
    for result in results:
        if not result.times:
            print(f"  {result.provider:18}{result.note}")
            continue
        times = result.times[VALUE]
        line = f"  {result.provider:18}{spread_columns(times)}"
        line += f"{100 * result.limits[VALUE] / statistics.median(times):7.0f}%"
        line += f"{spread_columns(ratios(result, results[0]))}{result.error:>10.1e}{100 * result.right:>7.2f}%"
        print(f"{line}{result.mib:>8.1f}")
    sys.stdout.flush()


FIELDS = (
    *("kernel", "provider", "metric", "unit", "n", "d", "labels", "value", "p20", "p80", "repeats", "others", "note"),
    *harness.SHARED_FIELDS,
)


def csv_rows(problem: Problem, results: list[Result]) -> Iterator[Row]:
    for result in results:
        base: Row = {"kernel": "nearest", "provider": result.provider, "note": result.note, "others": result.others}
        base |= dict(zip(("n", "d", "labels"), problem.size, strict=True))
        if result.note:
            yield {**base, "metric": "time", "unit": "ms"}
        for times in result.times.values():
            yield {**base, "metric": "time", "unit": "ms", **harness.spread_fields(times)}
            yield {**base, "metric": "ratio to kdejsd", **harness.spread_fields(ratios(result, results[0]))}
            share = result.limits[VALUE] / statistics.median(times)
            yield {**base, "metric": "share of limit", "value": share}
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

    return harness.parse(__doc__, size, "N,d,labels", "--providers", "--levels")


def main() -> int:
    arguments = parse_arguments()
    sizes = arguments.sizes or (QUICK if arguments.quick else USUAL)
    candidates = harness.chosen(providers(arguments.device, arguments.levels), arguments.providers)
    seconds = (arguments.budget or (8 if arguments.quick else 150)) / (len(sizes) * len(candidates))
    session = harness.Session(arguments)
    wrong = False
    with harness.csv_table(arguments.csv, FIELDS, session.shared) as write:
        for size in sizes:
            problem = Problem.make(size, session.dtype, session.device)
            results, peaks = session.measure(problem, candidates, seconds)
            print_size(problem, results, peaks)
            write(csv_rows(problem, results))
            wrong |= any(r.provider.startswith("kdejsd") and (r.note or r.right < 1) for r in results)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
