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
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import torch
from harness import GRADIENT, VALUE, Row, column, digits
from machine import Peaks
from scipy.special import ndtri
from torch import Tensor

import kdejsd
from kdejsd import reference

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
class Result(harness.Result):
    value_error: float = math.nan  # the largest relative one of a row
    gradient_error: float = math.nan  # |g - truth| / |truth|


def plain(p: Tensor) -> Tensor:
    """Is written as one writes it first."""
    z = torch.special.ndtri(p)
    return (p * z + torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)).sum(-1)


class _SciPy(torch.autograd.Function):
    """Computes it from SciPy's inverse, its gradient by the closed form beside the value."""

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


# ----------------------------------------------------------------------------------------------------------------------
# One size


@dataclass
class Problem(harness.Problem):
    result_type = Result

    size: Size
    p: Tensor

    @classmethod
    def make(cls, size: Size, dtype: torch.dtype, device: str) -> Problem:
        generator = torch.Generator().manual_seed(sum(size))
        logits = 2 * torch.randn(size, generator=generator, dtype=dtype)
        return cls(size, logits.softmax(-1).to(device).requires_grad_())

    def __post_init__(self) -> None:
        wide = self.p.detach()[: max(1, TRUTH_MASSES // self.size[1])].double().requires_grad_()
        value = reference.class_radius_bound(wide)
        self.truth = value.detach(), torch.autograd.grad(value.sum(), wide)[0]

    @property
    def work(self) -> float:
        return self.p.numel()

    def limit_ms(self, peaks: Peaks, gradient: bool) -> float:
        masses, dtype = self.p.numel(), self.p.dtype
        ratios = MULTIPLY_ADDS[dtype] if gradient else MULTIPLY_ADDS[dtype] // 2
        products, logarithms = masses * ratios / peaks.multiply_adds, masses / peaks.exponentials
        transfers = dtype.itemsize * masses * (2 if gradient else 1) / peaks.bytes
        work = products + logarithms if peaks.one_unit else max(products, logarithms)
        return 1e3 * max(work, transfers)

    def call(self, provider: Provider, mode: str) -> None:
        if mode == GRADIENT:
            self.p.grad = None
            provider.bound(self.p).sum().backward()
        else:
            with torch.no_grad():
                provider.bound(self.p)

    def check(self, provider: Provider, result: Result) -> None:
        wanted, slope = self.truth
        self.call(provider, GRADIENT)
        assert self.p.grad is not None
        value = provider.bound(self.p.detach())[: len(wanted)].double()
        result.value_error = ((value - wanted) / wanted).abs().max().item()
        result.gradient_error = ((self.p.grad[: len(wanted)].double() - slope).norm() / slope.norm()).item()
        if not (result.value_error <= WRONG and result.gradient_error <= WRONG):
            result.note = "wrong: not timed"


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def print_size(problem: Problem, results: list[Result], peaks: Peaks) -> None:
    limits = results[0].limits
    print(
        f"\nrows = {problem.size[0]}, classes = {problem.size[1]}: limit {digits(limits[GRADIENT])} ms for value and "
        f"gradient, {digits(limits[VALUE])} ms for the value alone\n  at {peaks}"
    )

    def columns(result: Result) -> str:
        return column(result.value_error, ".1e", 11) + column(result.gradient_error, ".1e", 10)

    harness.print_modes(results, f"{'value err':>11}{'grad err':>10}", columns)
    sys.stdout.flush()


FIELDS = (
    *("kernel", "provider", "mode", "metric", "unit", "rows", "classes", "value", "p20", "p80", "repeats", "note"),
    *harness.SHARED_FIELDS,
)


def csv_rows(problem: Problem, results: list[Result]) -> Iterator[Row]:
    base: Row = {"kernel": "radius", "rows": problem.size[0], "classes": problem.size[1]}
    for result in results:
        errors = {"value error": result.value_error, "gradient error": result.gradient_error}
        yield from harness.mode_rows(base, result, [(name, "relative", error) for name, error in errors.items()])


# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def size(text: str) -> Size:
        rows, classes = map(int, text.split(","))
        if min(rows, classes) < 1:
            raise ValueError
        return rows, classes

    quick = "small sizes, no provider that compiles first"
    return harness.parse(__doc__, size, "rows,classes", "--levels", "--gexp", quick=quick)


def main() -> int:
    arguments = parse_arguments()
    sizes = arguments.sizes or (QUICK if arguments.quick else FULL)
    candidates = providers(arguments.device, arguments.levels)
    if arguments.quick:
        candidates = {name: provider for name, provider in candidates.items() if not provider.compiles}
    seconds = (arguments.budget or (3 if arguments.quick else 40)) / (2 * len(sizes) * len(candidates))
    session = harness.Session(arguments)
    wrong = False
    with harness.csv_table(arguments.csv, FIELDS, session.shared) as write:
        for size in sizes:
            problem = Problem.make(size, session.dtype, session.device)
            results, peaks = session.measure(problem, candidates, seconds)
            print_size(problem, results, peaks)
            write(csv_rows(problem, results))
            wrong |= harness.kdejsd_failed(results)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
