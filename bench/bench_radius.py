"""Times class_radius_bound, value and gradient, against other ways to compute it; checks each of them first.

    python bench/bench_radius.py                       # about a minute
    python bench/bench_radius.py --quick               # small sizes, a few seconds
    python bench/bench_radius.py --device cuda --csv results.csv
    python bench/bench_radius.py --sizes 4096,1000 --levels v4,v3,base --dtype float64

Rows are softmax distributions. The work of one mass is one logarithm (counted as an exponential), the multiply-adds of
two rational functions, and its bytes: the mass read, and its derivative written if wanted. README.md beside this says
how limits, ratios and spreads are measured.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers
import torch
from bench_kde import GRADIENT, MAX_REPEATS, ROUNDS, VALUE, digits, spread, timed
from machine import Peaks
from scipy.special import ndtri
from torch import Tensor

import kdejsd
from kdejsd import reference
from kdejsd._native import cuda_problem, native

Size = tuple[int, int]  # rows, classes

QUICK: list[Size] = [(1, 10), (256, 1000)]
FULL: list[Size] = [(1, 10), (256, 10), (256, 1000), (4096, 1000), (64, 100_000)]
MULTIPLY_ADDS = {torch.float32: 20, torch.float64: 35}  # coefficients of the two ratios
WRONG = 1e-2  # relative error of value or gradient beyond which a provider is not timed
TRUTH_MASSES = 2**17  # that are compared with float64


@dataclass(frozen=True)
class Provider:
    name: str
    bound: Callable[[Tensor], Tensor]
    level: str | None = None  # instruction set of kdejsd's kernels
    compiles: bool = False


@dataclass
class Result:
    provider: str
    note: str = ""
    value_error: float = math.nan  # the largest relative one of a row
    gradient_error: float = math.nan  # |g - truth| / |truth|
    times: dict[str, list[float]] = field(default_factory=dict)  # milliseconds by mode


def plain(p: Tensor) -> Tensor:
    """As one writes it first."""
    z = torch.special.ndtri(p)
    return (p * z + torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)).sum(-1)


class _SciPy(torch.autograd.Function):
    """The same from SciPy's inverse, its gradient by the closed form beside the value."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        masses = p.detach().numpy()
        z = ndtri(masses)
        density = np.exp(-0.5 * z * z) / masses.dtype.type(math.sqrt(2 * math.pi))
        if p.requires_grad:
            ctx.save_for_backward(torch.from_numpy(masses / density))
        return torch.from_numpy((masses * z + density).sum(-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.unsqueeze(-1) * ctx.saved_tensors[0]


def providers(device: str, levels: list[str]) -> dict[str, Provider]:
    names = ["kdejsd", *(f"kdejsd {level}" for level in levels[1:])]
    found = [
        Provider(name, kdejsd.class_radius_bound, None if device == "cuda" else level)
        for name, level in zip(names, levels, strict=True)
    ]
    found.append(Provider("plain", plain))
    found.append(Provider("plain compiled", torch.compile(plain, dynamic=True), compiles=True))
    if device == "cpu":
        found.append(Provider("scipy", _SciPy.apply))
    return {provider.name: provider for provider in found}


def limit_ms(peaks: Peaks, size: Size, dtype: torch.dtype, gradient: bool) -> float:
    masses = size[0] * size[1]
    ratios = MULTIPLY_ADDS[dtype] if gradient else MULTIPLY_ADDS[dtype] // 2
    products, logarithms = masses * ratios / peaks.multiply_adds, masses / peaks.exponentials
    transfers = dtype.itemsize * masses * (2 if gradient else 1) / peaks.bytes
    work = products + logarithms if peaks.one_unit else max(products, logarithms)
    return 1e3 * max(work, transfers)


def run_size(p: Tensor, candidates: dict[str, Provider], device: str, seconds: float) -> list[Result]:
    """Checks every candidate, then times those that are right, interleaved; `seconds` for each in each mode."""
    rows = slice(0, max(1, TRUTH_MASSES // p.shape[1]))
    wide = p.detach()[rows].double().requires_grad_()
    wanted = reference.class_radius_bound(wide)
    (slope,) = torch.autograd.grad(wanted.sum(), wide)

    def call(provider: Provider, mode: str) -> None:
        if provider.level:
            peers.use_level(provider.level)
        if mode == GRADIENT:
            p.grad = None
            provider.bound(p).sum().backward()
        else:
            with torch.no_grad():
                provider.bound(p)

    results, fit = [], []
    estimates: dict[tuple[str, str], float] = {}
    for provider in candidates.values():
        result = Result(provider.name)
        results.append(result)
        call(provider, GRADIENT)
        assert p.grad is not None
        value = provider.bound(p.detach())[rows].double()
        result.value_error = ((value - wanted) / wanted).abs().max().item()
        result.gradient_error = ((p.grad[rows].double() - slope).norm() / slope.norm()).item()
        if not (result.value_error <= WRONG and result.gradient_error <= WRONG):
            result.note = "wrong: not timed"
            continue
        fit.append((provider, result))
        for mode in (GRADIENT, VALUE):
            estimates[provider.name, mode] = 1e-3 * timed(lambda p=provider, m=mode: call(p, m), 1, device)[0]
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for provider, result in fit:
            for mode in (GRADIENT, VALUE):
                repeats = max(ROUNDS, min(MAX_REPEATS, int(seconds / max(estimates[provider.name, mode], 1e-6))))
                call(provider, mode)  # its data and code back into the caches
                times = result.times.setdefault(mode, [])
                times += timed(lambda p=provider, m=mode: call(p, m), -(-repeats // ROUNDS), device)
    gc.enable()
    return results


# ----------------------------------------------------------------------------------------------------------------------


def print_size(size: Size, results: list[Result], limits: Callable[[str, str], float], peaks: Peaks) -> None:
    ours = {mode: statistics.median(times) for mode, times in results[0].times.items()}
    print(
        f"\nrows = {size[0]}, classes = {size[1]}: limit {digits(limits('', GRADIENT))} ms for value and gradient, "
        f"{digits(limits('', VALUE))} ms for the value alone\n  at {peaks}"
    )
    heading = f"{'value+gradient, ms':>24}{'limit':>7}{'ratio':>7}{'value, ms':>24}{'limit':>7}{'ratio':>7}"
    print(f"  {'':16}{heading}{'value err':>11}{'grad err':>10}")
    for result in results:
        line = f"  {result.provider:16}"
        for mode in (GRADIENT, VALUE):
            if mode not in result.times:
                line += " " * 38
                continue
            median, low, high = spread(result.times[mode])
            line += f"{digits(median):>7}{f'({digits(low)}-{digits(high)})':>17}"
            line += f"{100 * limits(result.provider, mode) / median:6.0f}%"
            line += f"{digits(median / ours[mode]) if ours else '':>7}"
        print(f"{line}{result.value_error:11.1e}{result.gradient_error:10.1e}  {result.note}".rstrip())
    sys.stdout.flush()


FIELDS = (
    *("kernel", "provider", "mode", "metric", "unit", "rows", "classes", "value", "p20", "p80", "repeats", "note"),
    *("dtype", "device", "level", "threads", "machine", "versions", "commit", "date"),
)


def csv_rows(size: Size, results: list[Result], limits: Callable[[str, str], float]) -> Iterator[dict[str, object]]:
    for result in results:
        base = {"kernel": "radius", "provider": result.provider, "rows": size[0], "classes": size[1]}
        base["note"] = result.note
        for mode, times in result.times.items():
            median, low, high = spread(times)
            time = {"value": median, "p20": low, "p80": high, "repeats": len(times)}
            yield {**base, "mode": mode, "metric": "time", "unit": "ms", **time}
            yield {**base, "mode": mode, "metric": "share of limit", "value": limits(result.provider, mode) / median}
        for metric, error in (("value error", result.value_error), ("gradient error", result.gradient_error)):
            yield {**base, "mode": GRADIENT, "metric": metric, "unit": "relative", "value": error}


def parse_arguments() -> argparse.Namespace:
    def size(text: str) -> Size:
        rows, classes = map(int, text.split(","))
        if min(rows, classes) < 1:
            raise ValueError
        return rows, classes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--sizes", type=size, nargs="+", metavar="rows,classes", help="instead of the usual ones")
    parser.add_argument("--quick", action="store_true", help="small sizes, no provider that compiles first")
    parser.add_argument("--levels", type=lambda text: text.split(","), help="kdejsd's instruction sets: base,v3,v4")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument("--budget", type=float, help="seconds to spend on timing, about")
    parser.add_argument("--csv", type=Path, help="where to write every measurement")
    parser.add_argument("--fma-gflops", type=float, help="the machine's multiply-adds, instead of measured")
    parser.add_argument("--gexp", type=float, help="likewise, exponentials in 1e9 a second")
    arguments = parser.parse_args()
    if (arguments.fma_gflops is None) != (arguments.gexp is None):
        parser.error("--fma-gflops and --gexp are given together or not at all")
    if unknown := set(arguments.levels or []) - set(machine.ARCHITECTURES):
        parser.error(f"--levels must be among {', '.join(machine.ARCHITECTURES)}, got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and (problem := cuda_problem()):
        parser.error(f"--device cuda: {problem}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    levels = sorted(arguments.levels or [native().level()], key=list(machine.ARCHITECTURES).index, reverse=True)
    given = (arguments.fma_gflops, arguments.gexp) if arguments.gexp else None
    candidates = providers(device, levels)
    if arguments.quick:
        candidates = {name: provider for name, provider in candidates.items() if not provider.compiles}
    sizes = arguments.sizes or (QUICK if arguments.quick else FULL)

    def measure_peaks(level: str) -> Peaks:
        return machine.cuda_peaks(dtype, given) if device == "cuda" else machine.cpu_peaks(level, dtype, given)

    facts = machine.facts(device)
    try:
        before = {level: measure_peaks(level) for level in levels}
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    for key, value in facts.items():
        print(f"{key:16}{value}")
    shared = {"dtype": arguments.dtype, "device": device, "level": levels[0]}
    shared |= {key: facts[key] for key in ("threads", "machine", "versions", "commit", "date")}
    seconds = (arguments.budget or (3 if arguments.quick else 40)) / (2 * len(sizes) * len(candidates))
    rows: list[dict[str, object]] = []
    wrong = False
    for size in sizes:
        generator = torch.Generator().manual_seed(sum(size))
        p = (2 * torch.randn(size, generator=generator, dtype=dtype)).softmax(-1).to(device).requires_grad_()
        results = run_size(p, candidates, device, seconds)
        after = {level: measure_peaks(level) for level in levels}
        peaks = {level: after[level].or_higher(before[level]) for level in levels}
        before = after

        def limits(name: str, mode: str, size: Size = size, peaks: dict[str, Peaks] = peaks) -> float:
            level = candidates[name].level if name in candidates else None
            return limit_ms(peaks[level or levels[0]], size, dtype, mode == GRADIENT)

        print_size(size, results, limits, peaks[levels[0]])
        rows += [{**shared, **row} for row in csv_rows(size, results, limits)]
        wrong |= any(result.provider.startswith("kdejsd") and result.note for result in results)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
