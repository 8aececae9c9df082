"""Times omega, value and gradients, against other ways to compute it; checks each of them first.

    python bench/bench_omega.py                                  # the CPU table, about 3 minutes
    python bench/bench_omega.py --quick                          # small sizes, under 30 seconds
    python bench/bench_omega.py --device cuda --csv results.csv
    python bench/bench_omega.py --sizes all,4096,784,10 --threads 1

README.md beside this says how the work is counted and how times are taken.
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
from typing import Any

import machine
import torch
from bench_kde import FIELDS as KDE_FIELDS
from bench_kde import GRADIENT, MAX_CALL_SECONDS, MAX_REPEATS, ROUNDS, VALUE, digits, spread, timed
from machine import Peaks
from torch import Tensor

import kdejsd
from kdejsd import reference
from kdejsd._native import cuda_problem, native
from kdejsd.reference.omega import pair_ratios

Size = tuple[str, int, int, int]  # pairs, b, d, l

QUICK: list[Size] = [("halves", 8, 16, 4), ("halves", 300, 784, 10), ("all", 300, 784, 10), ("all", 1024, 784, 10)]
CPU: list[Size] = [*QUICK, ("halves", 4096, 784, 10), ("all", 8192, 64, 8), ("all", 1000, 12288, 64)]
CPU += [("all", 4096, 784, 10)]
CUDA: list[Size] = [*CPU, ("all", 16384, 784, 10)]

OFFSET = 100.0  # of the inputs in the second check of errors
WRONG = 1e-2  # relative; beyond it, without an offset, a provider is wrong
CHUNK_NUMBERS = 2**24  # differences that the plain chunked form holds at once

FIELDS = ["pairs", *(name for name in KDE_FIELDS if name not in ("n", "m", "bandwidth"))]
FIELDS[FIELDS.index("l") : FIELDS.index("l") + 1] = ["b", "d", "l"]


# ----------------------------------------------------------------------------------------------------------------------
# Providers: (inputs, codes, pairs) -> sum over the pairs, with gradients for both through autograd


def _ours(inputs: Tensor, codes: Tensor, pairs: str) -> Tensor:
    return kdejsd.omega(inputs, codes, pairs=pairs)  # type: ignore[call-overload, no-any-return]


def _composed(inputs: Tensor, codes: Tensor, pairs: str) -> Tensor:
    """kdejsd's reference: torch's operators, one after the other."""
    return reference.omega(inputs, codes, pairs=pairs)  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    """Differences of all pairs, some samples against the ones after them at a time, each chunk's gradient at once."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, wanted: bool) -> Tensor:
        b, d = inputs.shape
        rows = max(1, CHUNK_NUMBERS // (b * d))
        total = inputs.new_zeros(())
        gradients = [torch.zeros_like(inputs), torch.zeros_like(codes)]
        for start in range(0, b, rows):
            with torch.set_grad_enabled(wanted):
                leaves = [t[start:].detach().requires_grad_(wanted) for t in (inputs, codes)]
                x, z = ((t[:rows].unsqueeze(1) - t.unsqueeze(0)) for t in leaves)
                own = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
                ratios = pair_ratios(x, z)
                part = ratios.masked_fill(torch.arange(x.shape[1], device=x.device) <= own, 0.0).sum()
            if wanted:
                for whole, found in zip(gradients, torch.autograd.grad(part, leaves), strict=True):
                    whole[start:] += found
            total += part.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(grad * t for t in ctx.saved_tensors), None)


def _differences(inputs: Tensor, codes: Tensor, pairs: str) -> Tensor:
    return _Chunked.apply(inputs, codes, torch.is_grad_enabled())  # type: ignore[no-untyped-call, no-any-return]


def _sum_of_ratios(squares: Tensor, code_squares: Tensor) -> Tensor:
    """From [b, b]: every pair stands there twice."""
    own = torch.eye(len(squares), dtype=torch.bool, device=squares.device)
    return (code_squares / squares.masked_fill(own, 1.0)).masked_fill(own, 0.0).sum() / 2


def _cdist(mode: str) -> Callable[[Tensor, Tensor, str], Tensor]:
    def ratio_sum(inputs: Tensor, codes: Tensor, pairs: str) -> Tensor:
        return _sum_of_ratios(*(torch.cdist(t, t, compute_mode=mode).square() for t in (inputs, codes)))

    return ratio_sum


def _pdist(inputs: Tensor, codes: Tensor, pairs: str) -> Tensor:
    return (torch.pdist(codes).square() / torch.pdist(inputs).square()).sum()


def _expanded(points: Tensor) -> Tensor:
    """[b, b]: |a|^2 + |b|^2 - 2 a.b"""
    squares = points.square().sum(-1)
    return squares.unsqueeze(1) + squares - 2 * points @ points.T


def _gemm(inputs: Tensor, codes: Tensor, pairs: str) -> Tensor:
    return _sum_of_ratios(_expanded(inputs), _expanded(codes))


def _by_hand(inputs: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and both gradients from expanded squares and products of the weights: no graph, in place."""
    inverse = _expanded(inputs).fill_diagonal_(math.inf).reciprocal_()
    ratios = _expanded(codes).mul_(inverse)
    total = ratios.sum() / 2
    dcodes = 2 * (inverse.sum(1, keepdim=True) * codes - inverse @ codes)
    weights = inverse.mul_(ratios)
    return total, 2 * (weights @ inputs - weights.sum(1, keepdim=True) * inputs), dcodes


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return _expanded(codes).div_(_expanded(inputs).fill_diagonal_(math.inf)).sum() / 2
        total, *gradients = _by_hand(inputs, codes)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(grad * t for t in ctx.saved_tensors), None)


def _gemm_by_hand(inputs: Tensor, codes: Tensor, pairs: str) -> Tensor:
    return _ByHand.apply(inputs, codes, torch.is_grad_enabled())  # type: ignore[no-untyped-call, no-any-return]


@dataclass(frozen=True)
class Provider:
    ratio_sum: Callable[[Tensor, Tensor, str], Tensor]
    held: Callable[[int, int], float]  # numbers that value + gradient hold at once, from (b, d)


PROVIDERS: dict[str, dict[str, Provider]] = {
    "halves": {"kdejsd": Provider(_ours, lambda b, d: 0), "composed": Provider(_composed, lambda b, d: 3 * b * d)},
    "all": {
        "kdejsd": Provider(_ours, lambda b, d: 2 * b * d),
        "differences": Provider(_differences, lambda b, d: 4 * CHUNK_NUMBERS),
        "cdist": Provider(_cdist("donot_use_mm_for_euclid_dist"), lambda b, d: 8 * b * b),
        "pdist": Provider(_pdist, lambda b, d: 4 * b * b),
        "cdist mm": Provider(_cdist("use_mm_for_euclid_dist"), lambda b, d: 8 * b * b),
        "gemm": Provider(_gemm, lambda b, d: 8 * b * b),
        "gemm by hand": Provider(_gemm_by_hand, lambda b, d: 4 * b * b),
    },
}


def truth(inputs: Tensor, codes: Tensor, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and both gradients in float64. All pairs from products of centered points: b x b memory, 1e-12 exact."""
    x, z = inputs.detach().double(), codes.detach().double()
    if pairs == "all":
        return _by_hand(x - x.mean(0), z - z.mean(0))
    leaves = [x.requires_grad_(), z.requires_grad_()]
    total = reference.omega(*leaves)
    return total.detach(), *torch.autograd.grad(total, leaves)  # type: ignore[union-attr, return-value, arg-type]


def multiply_adds(size: Size, gradient: bool) -> float:
    """Of one call: each pair's differences squared, and once more weighted for either sample."""
    pairs, b, d, dim = size
    return (b // 2 if pairs == "halves" else b * (b - 1) // 2) * (d + dim) * (3 if gradient else 1)


def limit_ms(peaks: Peaks, size: Size, itemsize: int, gradient: bool) -> float:
    """The least time: the multiply-adds, or every argument read once and every gradient written once."""
    numbers = size[1] * (size[2] + size[3]) * (2 if gradient else 1)
    return 1e3 * max(multiply_adds(size, gradient) / peaks.multiply_adds, itemsize * numbers / peaks.bytes)


# ----------------------------------------------------------------------------------------------------------------------
# One size


@dataclass
class Result:
    """What was found out about one provider at one size."""

    provider: str
    note: str = ""  # why there are no times
    errors: dict[str, float] = field(default_factory=dict)  # relative, of value and gradients by offset
    mib: float = math.nan
    others: float = math.nan  # cores that other processes kept busy while the times were taken
    times: dict[str, list[float]] = field(default_factory=dict)  # milliseconds by mode


@dataclass
class Problem:
    size: Size
    inputs: Tensor
    codes: Tensor

    @classmethod
    def make(cls, size: Size, dtype: torch.dtype, device: str) -> Problem:
        _, b, d, dim = size
        generator = torch.Generator().manual_seed(b + d + dim)
        inputs = torch.rand(b, d, generator=generator, dtype=dtype)  # as images are, in [0, 1]
        codes = torch.randn(b, dim, generator=generator, dtype=dtype)
        return cls(size, *(t.to(device).requires_grad_() for t in (inputs, codes)))

    def call(self, provider: Provider, mode: str) -> None:
        if mode == GRADIENT:
            self.inputs.grad = self.codes.grad = None
            provider.ratio_sum(self.inputs, self.codes, self.size[0]).backward()
        else:
            with torch.no_grad():
                provider.ratio_sum(self.inputs, self.codes, self.size[0])

    def error(self, provider: Provider, offset: float, wanted: tuple[Tensor, ...]) -> float:
        """The largest of the relative errors of value, input gradient and code gradient."""
        leaves = [(self.inputs.detach() + offset).requires_grad_(), self.codes.detach().requires_grad_()]
        total = provider.ratio_sum(*leaves, self.size[0])
        found = (total.detach(), *torch.autograd.grad(total, leaves))
        return max(
            ((got.double() - truth).norm() / truth.norm()).item() for got, truth in zip(found, wanted, strict=True)
        )


def run_size(
    problem: Problem, candidates: dict[str, Provider], device: str, seconds: float, pace: dict[str, float]
) -> list[Result]:
    """Checks every candidate, then times those that are right, interleaved.

    Args:
        seconds: to spend on one candidate in one mode.
        pace: seconds per multiply-add of each candidate, for what a call will take; brought up to date.
    """
    work = multiply_adds(problem.size, True)
    offsets = {"error": 0.0, "error, offset": OFFSET}
    truths = {name: truth(problem.inputs + offset, problem.codes, problem.size[0]) for name, offset in offsets.items()}
    results: list[Result] = []
    fit: list[tuple[Provider, Result]] = []
    estimates: dict[tuple[str, str], float] = {}
    for name, provider in candidates.items():
        result = Result(name)
        results.append(result)
        held = problem.inputs.element_size() * provider.held(problem.size[1], problem.size[2])
        room = 0.8 * machine.available_bytes(device)
        if held > room:
            result.note = f"does not fit: needs {held / 2**30:.1f} GiB, has {room / 2**30:.1f}"
        elif pace.get(name, 0) * work > MAX_CALL_SECONDS:
            result.note = f"left out: about {pace[name] * work:.0f} s a call"
        if result.note:
            continue
        for kind, offset in offsets.items():
            result.errors[kind] = problem.error(provider, offset, truths[kind])
        if not result.errors["error"] <= WRONG:
            result.note = "wrong: not timed"
            continue
        with machine.peak_memory(device) as peak:
            estimates[name, GRADIENT] = 1e-3 * timed(lambda p=provider: problem.call(p, GRADIENT), 1, device)[0]
        estimates[name, VALUE] = 1e-3 * timed(lambda p=provider: problem.call(p, VALUE), 1, device)[0]
        result.mib = peak.mib
        if work > 10**7:  # below, a call's own cost
            pace[name] = estimates[name, GRADIENT] / work
        fit.append((provider, result))
    gc.collect()
    gc.disable()
    load = machine.OthersLoad()
    for _ in range(ROUNDS):
        for provider, result in fit:
            for mode in (GRADIENT, VALUE):
                expected = estimates[result.provider, mode]
                repeats = max(1 if expected > 2 else 3, min(MAX_REPEATS, int(seconds / max(expected, 1e-6))))
                times = result.times.setdefault(mode, [])
                if len(times) < repeats:
                    if expected < 0.1:
                        problem.call(provider, mode)  # its data and code back into the caches
                    times += timed(lambda p=provider, m=mode: problem.call(p, m), -(-repeats // ROUNDS), device)
    gc.enable()
    for _, result in fit:
        result.others = load.cores()
    return results


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def print_size(size: Size, results: list[Result], limits: dict[str, float], peaks: Peaks) -> None:
    ours = {mode: statistics.median(times) for mode, times in results[0].times.items()}
    pairs, b, d, dim = size
    print(
        f"\npairs = {pairs}, b = {b}, d = {d}, l = {dim}: {1e-9 * multiply_adds(size, True):.3g} G multiply-adds, "
        f"limit {digits(limits[GRADIENT])} ms for value and gradients, {digits(limits[VALUE])} ms for the value alone\n"
        f"  at {peaks}; other processes kept {results[0].others:.2f} cores busy"
    )
    print(
        f"  {'':14}{'value+gradient, ms':>26}{'limit':>7}{'ratio':>7}{'value, ms':>26}{'limit':>7}{'ratio':>7}"
        f"{'error':>10}{f'at +{OFFSET:.0f}':>10}{'MiB':>8}"
    )
    for result in results:
        line = f"  {result.provider:14}"
        for mode in (GRADIENT, VALUE):
            if mode not in result.times:
                line += " " * 40
                continue
            median, low, high = spread(result.times[mode])
            line += f"{digits(median):>8}{f'({digits(low)}-{digits(high)})':>18}{100 * limits[mode] / median:6.0f}%"
            line += f"{digits(median / ours[mode]) if ours else '':>7}"
        line += "".join(f"{error:10.1e}" for error in result.errors.values())
        line += "" if math.isnan(result.mib) else f"{result.mib:8.1f}"
        print(f"{line}  {result.note}".rstrip() if result.errors else f"  {result.provider:14}{result.note}")
    sys.stdout.flush()


def csv_rows(size: Size, results: list[Result], limits: dict[str, float]) -> Iterator[dict[str, object]]:
    for result in results:
        base: dict[str, object] = {
            "kernel": "omega",
            "provider": result.provider,
            "note": result.note,
            "others": result.others,
            **dict(zip(("pairs", "b", "d", "l"), size, strict=True)),
        }
        if result.note:
            yield {**base, "metric": "time", "unit": "ms"}
        for mode, times in result.times.items():
            median, low, high = spread(times)
            row = {**base, "mode": mode}
            counted = {"value": median, "p20": low, "p80": high, "repeats": len(times)}
            yield {**row, "metric": "time", "unit": "ms", **counted}
            yield {**row, "metric": "share of limit", "value": limits[mode] / median}
        for name, error in result.errors.items():
            yield {**base, "mode": GRADIENT, "metric": name, "unit": "relative", "value": error}
        if not math.isnan(result.mib):
            yield {**base, "mode": GRADIENT, "metric": "peak extra memory", "unit": "MiB", "value": result.mib}


# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def size(text: str) -> Size:
        pairs, b, d, dim = text.split(",")
        if pairs not in PROVIDERS or int(b) < 2 or min(int(d), int(dim)) < 1 or (pairs == "halves" and int(b) % 2):
            raise ValueError
        return pairs, int(b), int(d), int(dim)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--sizes", type=size, nargs="+", metavar="pairs,b,d,l", help="instead of the usual ones")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and kdejsd")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument("--budget", type=float, help="seconds to spend on timing, about")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--fma-gflops", type=float, help="the machine's peak, where it cannot be measured")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and (problem := cuda_problem()):
        parser.error(f"--device cuda: {problem}")
    names = {name for of_pairs in PROVIDERS.values() for name in of_pairs}
    if unknown := set(arguments.providers or []) - names:
        parser.error(f"--providers must be among {sorted(names)}, got {sorted(unknown)}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    given = (arguments.fma_gflops, math.inf) if arguments.fma_gflops else None
    sizes = arguments.sizes or (QUICK if arguments.quick else CUDA if device == "cuda" else CPU)
    wanted = {"kdejsd", *(arguments.providers or (name for of in PROVIDERS.values() for name in of))}

    def measure_peaks() -> Peaks:
        if device == "cuda":
            return machine.cuda_peaks(dtype, given)
        return machine.cpu_peaks(native().level(), dtype, given)

    facts = machine.facts(device)
    try:
        before = measure_peaks()
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    facts["limits"] = str(before)
    if device == "cuda":
        facts["products"] = machine.cuda_products()
    for key, value in facts.items():
        print(f"{key:16}{value}")
    shared = {
        "dtype": arguments.dtype,
        "device": device,
        "level": native().level(),
        **{key: facts[key] for key in ("threads", "machine", "versions", "commit", "date")},
    }
    budget = arguments.budget or (6 if arguments.quick else 90)
    seconds = budget / (2 * sum(len(wanted & set(PROVIDERS[size[0]])) for size in sizes))
    pace: dict[str, float] = {}
    wrong = False
    with contextlib.ExitStack() as stack:
        writer = None
        if arguments.csv:
            arguments.csv.parent.mkdir(parents=True, exist_ok=True)
            writer = csv.DictWriter(stack.enter_context(arguments.csv.open("w", newline="")), FIELDS)
            writer.writeheader()
        for size in sizes:
            candidates = {name: p for name, p in PROVIDERS[size[0]].items() if name in wanted}
            results = run_size(Problem.make(size, dtype, device), candidates, device, seconds, pace)
            after = measure_peaks()
            peaks = after.or_higher(before)
            before = after
            limits = {m: limit_ms(peaks, size, dtype.itemsize, m == GRADIENT) for m in (GRADIENT, VALUE)}
            print_size(size, results, limits, peaks)
            if writer:
                for row in csv_rows(size, results, limits):
                    writer.writerow({**shared, **row})
            wrong |= bool(results[0].note)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
