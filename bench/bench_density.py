"""Times kdejsd.sklearn.KernelDensity against other density estimators, and says how far each is from the truth.

    python bench/bench_density.py                        # some minutes
    python bench/bench_density.py --quick                # small sizes, some seconds
    python bench/bench_density.py --sizes 20000,8 --limit 600 --csv density.csv
    python bench/bench_density.py --device cuda

A size is n and l: log-densities at n points by n kernels, all in l dimensions. Calls are as people make them, NumPy
arrays in and out. README.md beside this says the rest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import harness
import machine
import numpy as np
import torch
from harness import Row, column, digits, some_rows, spread_columns

from kdejsd import reference
from kdejsd._native import cuda_problem
from kdejsd.sklearn import KernelDensity

Size = tuple[int, int]
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
LogDensity = Callable[[Array], Array]

QUICK: list[Size] = [(1000, dim) for dim in (1, 2, 8, 64)]
USUAL: list[Size] = [(n, dim) for dim in (1, 2, 8, 64) for n in (1000, 10_000, 100_000)]
CUDA: list[Size] = [(n, dim) for dim in (1, 2, 8, 16, 64) for n in (1000, 10_000, 100_000)]

MAX_REPEATS = 20
GRID = {1: 2**14, 2: 2**9}  # points in each dimension, of an estimate on a grid


@dataclass(frozen=True)
class Provider:
    name: str
    fit: Callable[[Array, float], LogDensity]
    dims: tuple[int, ...] | None = None  # the numbers of dimensions that it takes, if not all
    held: Callable[[int, int], float] = lambda n, dim: 0  # bytes that a call holds at once
    debiased: bool = False


@dataclass
class Result:
    provider: str
    note: str = ""  # why there are no times
    fit: list[float] = field(default_factory=list)  # milliseconds
    score: list[float] = field(default_factory=list)
    error: float = math.nan  # of a log-density, the largest


# ----------------------------------------------------------------------------------------------------------------------
# Estimators


def ours(dtype: type, x: Array, h: float, **settings: Any) -> LogDensity:
    density = KernelDensity(h, **settings).fit(x.astype(dtype, copy=False))
    return density.score_samples  # type: ignore[no-any-return]


def sklearn(exact: bool, x: Array, h: float) -> LogDensity:
    from sklearn.neighbors import KernelDensity as Peer

    return Peer(bandwidth=h, **({"leaf_size": len(x)} if exact else {})).fit(x).score_samples  # type: ignore[no-any-return]


def scipy(x: Array, h: float) -> LogDensity:
    from scipy.stats import gaussian_kde

    density = gaussian_kde(x.T, bw_method=h)  # in units of the data's covariance, which here is I
    return lambda query: density.logpdf(query.T)


def kdepy_tree(x: Array, h: float) -> LogDensity:
    from KDEpy import TreeKDE

    density = TreeKDE(bw=h).fit(x)
    return lambda query: np.log(density.evaluate(query))


def kdepy_fft(x: Array, h: float) -> LogDensity:
    """Estimates the density on a grid, and interpolates it linearly."""
    from KDEpy import FFTKDE
    from scipy.interpolate import RegularGridInterpolator

    dim = x.shape[1]
    grid, values = FFTKDE(bw=h).fit(x).evaluate((GRID[dim],) * dim)
    axes = [np.unique(axis) for axis in grid.reshape(-1, dim).T]
    values = values.reshape([len(axis) for axis in axes])
    density = RegularGridInterpolator(axes, values, bounds_error=False, fill_value=0)
    return lambda query: np.log(density(query))


def torch_kde(device: str, x: Array, h: float) -> LogDensity:
    from torchkde import KernelDensity as Peer

    density = Peer(bandwidth=h, kernel="gaussian").fit(torch.from_numpy(x).to(device))
    return lambda query: density.score_samples(torch.from_numpy(query).to(device)).numpy(force=True)


def flash_sd_kde(x: Array, h: float) -> LogDensity:
    from flash_sd_kde import FlashSDKDE

    return FlashSDKDE(bandwidth=h).fit(x).score_samples  # type: ignore[no-any-return]


def providers(device: str) -> dict[str, Provider | str]:
    """All of them by name, or why one is not there; kdejsd first."""
    settings = {"device": device}
    found: dict[str, Provider | str] = {
        "kdejsd": Provider("kdejsd", partial(ours, np.float64, **settings)),
        "kdejsd float32": Provider("kdejsd float32", partial(ours, np.float32, **settings)),
    }
    peers = [("torch-kde", "torchkde", partial(torch_kde, device), {"held": lambda n, dim: 24 * n * n * dim})]
    if device == "cuda":
        debiased = partial(ours, np.float32, debias=True, **settings)
        found["kdejsd debiased"] = Provider("kdejsd debiased", debiased, debiased=True)
        peers.append(("flash-sd-kde", "flash_sd_kde", flash_sd_kde, {"dims": (16,), "debiased": True}))
    else:
        peers = [
            ("sklearn", "sklearn", partial(sklearn, False), {}),
            ("sklearn exact", "sklearn", partial(sklearn, True), {}),
            ("scipy", "scipy", scipy, {}),
            ("KDEpy tree", "KDEpy", kdepy_tree, {"dims": (1, 2)}),
            ("KDEpy FFT", "KDEpy", kdepy_fft, {"dims": (1, 2)}),
            *peers,
        ]
    for name, module, fit, options in peers:
        found[name] = "not installed" if find_spec(module) is None else Provider(name, fit, **options)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# One size


class Problem:
    """Samples whose covariance is the identity, as many other points, and the truth at some of them."""

    def __init__(self, size: Size) -> None:
        n, dim = self.size = size
        random = np.random.default_rng(n + dim)
        x = random.normal(size=(n, dim))
        x -= x.mean(0)
        self.samples = np.linalg.solve(np.linalg.cholesky(np.cov(x.T).reshape(dim, dim)), x.T).T.copy()
        self.query = random.normal(size=(n, dim))
        self.bandwidth = n ** (-1 / (dim + 4))  # Scott's
        self.rows = some_rows((n, n, dim))
        self._truth: dict[bool, Array] = {}

    def truth(self, debiased: bool) -> Array:
        """Returns log-densities in float64, from all differences; moved centers are those of kdejsd in float64."""
        if debiased not in self._truth:
            centers = torch.from_numpy(self.samples)
            if debiased:
                centers = KernelDensity(self.bandwidth, debias=True).fit(centers).centers_
            rows = torch.from_numpy(self.query)[self.rows].split(max(1, 2**22 // centers.numel()))
            found = [reference.kde_log_prob(query, centers, self.bandwidth) for query in rows]
            self._truth[debiased] = torch.cat(found).numpy()
        return self._truth[debiased]

    def measure(self, provider: Provider, budget: float, device: str = "cpu") -> Result:
        result = Result(provider.name)
        try:
            result.fit, log_density = repeated(lambda: provider.fit(self.samples, self.bandwidth), budget, device)
            result.score, found = repeated(lambda: log_density(self.query), budget, device)
        except Exception as error:  # whatever a peer raises is its entry
            if provider.name.startswith("kdejsd"):
                raise
            return Result(provider.name, harness.error_line(error))
        with np.errstate(invalid="ignore"):
            difference = np.abs(found[self.rows] - self.truth(provider.debiased))
        result.error = float(np.where(np.isnan(difference), math.inf, difference).max())
        return result


def repeated(call: Callable[[], Any], budget: float, device: str) -> tuple[list[float], Any]:
    """Returns the milliseconds of a call, and what came of it: of one if it is beyond the budget, else of some more."""
    found: list[Any] = [None]

    def keep() -> None:
        found[0] = call()
        if device == "cuda":
            torch.cuda.synchronize()  # what `fit` has begun may still run

    if device == "cuda":
        keep()  # not timed: it may start the device, compile kernels or try out their settings
    first = harness.timed(keep, 1, "cpu")
    repeats = min(MAX_REPEATS, int(1e3 * budget / first[0]))
    return harness.timed(keep, repeats, "cpu") if repeats else first, found[0]


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written

FIELDS = ("provider", "n", "l", "bandwidth", "fit_ms", "score_ms", "p20", "p80", "repeats", "ratio", "error", "note")


def ratio(result: Result, results: list[Result]) -> float:
    """Returns how many times as long as kdejsd a provider takes to score."""
    return statistics.median(result.score) / statistics.median(results[0].score)


def print_size(problem: Problem, results: list[Result], others: float) -> None:
    n, dim = problem.size
    print(f"\nn = {n}, l = {dim}, h = {problem.bandwidth:.3f}; other processes kept {others:.2f} cores busy")
    print(f"  {'':16}{'fit, ms':>9}{'score, ms':>24}{'ratio':>8}{'error':>10}")
    for result in results:
        if result.note:
            print(f"  {result.provider:16}{result.note}")
            continue
        times = f"{digits(statistics.median(result.fit)):>9}{spread_columns(result.score)}"
        print(f"  {result.provider:16}{times}{digits(ratio(result, results)):>8}{column(result.error, '.1e', 10)}")
    sys.stdout.flush()


def csv_rows(problem: Problem, results: list[Result]) -> Iterator[Row]:
    n, dim = problem.size
    for result in results:
        row: Row = {"provider": result.provider, "n": n, "l": dim, "bandwidth": problem.bandwidth, "note": result.note}
        if not result.note:
            score = dict(zip(("score_ms", "p20", "p80"), harness.spread(result.score), strict=True))
            row |= {"fit_ms": statistics.median(result.fit), **score, "repeats": len(result.score)}
            row |= {"ratio": ratio(result, results), "error": result.error}
        yield row


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    def size(text: str) -> Size:
        n, dim = map(int, text.split(","))
        if min(n, dim) < 1 or n <= dim:
            raise ValueError
        return n, dim

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=size, nargs="+", metavar="n,l", help="instead of the usual ones; n above l")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and kdejsd")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument(
        "--limit", type=float, default=60, metavar="SECONDS", help="longer calls of peers are left out (60)"
    )
    parser.add_argument("--budget", type=float, default=1, metavar="SECONDS", help="for repeats of a short call (1)")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and (problem := cuda_problem()):
        parser.error(f"--device cuda: {problem}")
    return arguments


def reason(provider: Provider | str, size: Size, expected: float, arguments: argparse.Namespace) -> str:
    """Returns why a provider is not run at a size, where a call is expected to take so many seconds, or ""."""
    if isinstance(provider, str):
        return provider
    if provider.dims and size[1] not in provider.dims:
        return f"takes l = {', '.join(map(str, provider.dims))} alone"
    held = provider.held(*size)
    if held > 0.8 * machine.available_bytes(arguments.device):
        return f"does not fit: needs {held / 2**30:.1f} GiB"
    if expected > arguments.limit and not provider.name.startswith("kdejsd"):
        return f"left out: about {expected:.0f} s a call"
    return ""


def main(argv: list[str] | None = None) -> None:
    arguments = arguments_of(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sizes = arguments.sizes or (QUICK if arguments.quick else CUDA if arguments.device == "cuda" else USUAL)
    candidates = harness.chosen(providers(arguments.device), arguments.providers)
    facts = machine.facts(arguments.device)
    harness.print_facts(facts)
    shared: Row = {"device": arguments.device} | {key: facts[key] for key in harness.FACTS}
    seconds: dict[tuple[str, int], float] = {}  # per pair, of each provider in so many dimensions, where it was last
    with harness.csv_table(arguments.csv, (*FIELDS, "device", *harness.FACTS), shared) as write:
        for n, dim in sizes:
            problem, results, load = Problem((n, dim)), [], machine.OthersLoad()
            for name, provider in candidates.items():
                expected = seconds.get((name, dim), 0) * n**2
                if note := reason(provider, (n, dim), expected, arguments):
                    results.append(Result(name, note))
                    continue
                result = problem.measure(provider, arguments.budget, arguments.device)
                results.append(result)
                if not result.note:
                    seconds[name, dim] = 1e-3 * statistics.median(result.score) / n**2
            print_size(problem, results, load.cores())
            write(csv_rows(problem, results))


if __name__ == "__main__":
    main()
