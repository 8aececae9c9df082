"""Times omega, value and gradients, against other ways to compute it; checks each of them first.

    python bench/bench_omega.py                                  # the CPU table, about 3 minutes
    python bench/bench_omega.py --quick                          # small sizes, under 30 seconds
    python bench/bench_omega.py --device cuda --csv results.csv
    python bench/bench_omega.py --sizes all,4096,784,10 --threads 1

README.md beside this says how the work is counted and how times are taken.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
from harness import GRADIENT, VALUE, Row, column, digits
from machine import Peaks
from torch import Tensor

import kdejsd
from kdejsd import reference
from kdejsd.reference.omega import pair_ratios

Size = tuple[str, int, int, int]  # pairs, b, d, l

QUICK: list[Size] = [("halves", 8, 16, 4), ("halves", 300, 784, 10), ("all", 300, 784, 10), ("all", 1024, 784, 10)]
CPU: list[Size] = [*QUICK, ("halves", 4096, 784, 10), ("all", 8192, 64, 8), ("all", 1000, 12288, 64)]
CPU += [("all", 4096, 784, 10)]
CUDA: list[Size] = [*CPU, ("all", 16384, 784, 10)]

OFFSETS = {"error": 0.0, "error, offset": 100.0}  # of the inputs in each check of errors
WRONG = 1e-2  # relative; beyond it, without an offset, a provider is wrong
CHUNK_NUMBERS = 2**24  # differences that the plain chunked form holds at once


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


# ----------------------------------------------------------------------------------------------------------------------
# One size


@dataclass
class Result(harness.Result):
    errors: dict[str, float] = field(default_factory=dict)  # relative, of value and gradients by kind of inputs


@dataclass
class Problem(harness.Problem):
    result_type = Result

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

    def __post_init__(self) -> None:
        self.truths = {kind: truth(self.inputs + by, self.codes, self.size[0]) for kind, by in OFFSETS.items()}

    @property
    def work(self) -> float:
        return multiply_adds(self.size, True)

    def held(self, provider: Provider) -> float:
        return self.inputs.element_size() * provider.held(self.size[1], self.size[2])

    def limit_ms(self, peaks: Peaks, gradient: bool) -> float:
        """The multiply-adds, or every argument read once and every gradient written once."""
        size = self.inputs.element_size() * (self.inputs.numel() + self.codes.numel()) * (2 if gradient else 1)
        return 1e3 * max(multiply_adds(self.size, gradient) / peaks.multiply_adds, size / peaks.bytes)

    def call(self, provider: Provider, mode: str) -> None:
        if mode == GRADIENT:
            self.inputs.grad = self.codes.grad = None
            provider.ratio_sum(self.inputs, self.codes, self.size[0]).backward()
        else:
            with torch.no_grad():
                provider.ratio_sum(self.inputs, self.codes, self.size[0])

    def check(self, provider: Provider, result: Result) -> None:
        for kind, offset in OFFSETS.items():
            result.errors[kind] = self.error(provider, offset, self.truths[kind])
        if not result.errors["error"] <= WRONG:
            result.note = "wrong: not timed"

    def error(self, provider: Provider, offset: float, wanted: tuple[Tensor, ...]) -> float:
        """The largest of the relative errors of value, input gradient and code gradient."""
        leaves = [(self.inputs.detach() + offset).requires_grad_(), self.codes.detach().requires_grad_()]
        total = provider.ratio_sum(*leaves, self.size[0])
        found = (total.detach(), *torch.autograd.grad(total, leaves))
        return max(
            ((got.double() - truth).norm() / truth.norm()).item() for got, truth in zip(found, wanted, strict=True)
        )


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def print_size(problem: Problem, results: list[Result], peaks: Peaks) -> None:
    pairs, b, d, dim = problem.size
    limits = results[0].limits
    print(
        f"\npairs = {pairs}, b = {b}, d = {d}, l = {dim}: {1e-9 * problem.work:.3g} G multiply-adds, "
        f"limit {digits(limits[GRADIENT])} ms for value and gradients, {digits(limits[VALUE])} ms for the value alone\n"
        f"  at {peaks}; other processes kept {results[0].others:.2f} cores busy"
    )

    def columns(result: Result) -> str:
        return "".join(column(error, ".1e", 10) for error in result.errors.values()) + column(result.mib, ".1f", 8)

    harness.print_modes(results, f"{'error':>10}{'at +100':>10}{'MiB':>8}", columns)
    sys.stdout.flush()


FIELDS = (
    *("pairs", "kernel", "provider", "mode", "metric", "unit", "b", "d", "l", "value", "p20", "p80", "repeats"),
    *("others", "note", *harness.SHARED_FIELDS),
)


def csv_rows(problem: Problem, results: list[Result]) -> Iterator[Row]:
    for result in results:
        base: Row = {"kernel": "omega", "others": result.others}
        base |= dict(zip(("pairs", "b", "d", "l"), problem.size, strict=True))
        figures = [(kind, "relative", error) for kind, error in result.errors.items()]
        yield from harness.mode_rows(base, result, [*figures, ("peak extra memory", "MiB", result.mib)])


# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def size(text: str) -> Size:
        pairs, b, d, dim = text.split(",")
        if pairs not in PROVIDERS or int(b) < 2 or min(int(d), int(dim)) < 1 or (pairs == "halves" and int(b) % 2):
            raise ValueError
        return pairs, int(b), int(d), int(dim)

    return harness.parse(__doc__, size, "pairs,b,d,l", "--providers")


def main() -> int:
    arguments = parse_arguments()
    sizes = arguments.sizes or (QUICK if arguments.quick else CUDA if arguments.device == "cuda" else CPU)
    wanted = harness.chosen({name: p for of in PROVIDERS.values() for name, p in of.items()}, arguments.providers)
    candidates = {pairs: {name: p for name, p in of.items() if name in wanted} for pairs, of in PROVIDERS.items()}
    seconds = (arguments.budget or (6 if arguments.quick else 90)) / (2 * sum(len(candidates[s[0]]) for s in sizes))
    session = harness.Session(arguments)
    wrong = False
    with harness.csv_table(arguments.csv, FIELDS, session.shared) as write:
        for size in sizes:
            problem = Problem.make(size, session.dtype, session.device)
            results, peaks = session.measure(problem, candidates[size[0]], seconds)
            print_size(problem, results, peaks)
            write(csv_rows(problem, results))
            wrong |= harness.kdejsd_failed(results)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
