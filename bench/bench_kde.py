"""Times jsd_loss, value and gradient, against other ways to compute it; checks each of them first.

    python bench/bench_kde.py                                     # the whole CPU table, about 6 minutes
    python bench/bench_kde.py --quick                             # small sizes, under 40 seconds
    python bench/bench_kde.py --device cuda --csv results.csv
    python bench/bench_kde.py --sizes 256,20000,40 --levels v4,v3 --threads 1
    python bench/bench_kde.py --centers                           # with the gradient for the centers, a second pass
    python bench/bench_kde.py --device cuda --graph               # also the kernels alone, by CUDA graphs
    python bench/bench_kde.py --device cuda --tune tensor_from=2,5,8    # a row of kdejsd's for each of these values

README.md beside this says how the work is counted, what the limit is, and what the peers are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import harness
import peers
import torch
from harness import GRADIENT, VALUE, Row, column, digits, some_rows
from machine import Peaks
from peers import Provider
from torch import Tensor

from kdejsd import reference

Size = tuple[int, int, int]

# The first is there for what a call costs beside its work.
QUICK: list[Size] = [(8, 16, 4), (100, 10_000, 8), (300, 10_000, 8), (4096, 4096, 2), (256, 20_000, 40)]
CPU: list[Size] = [*QUICK, (512, 100_000, 40), (512, 100_000, 256), (512, 1_000_000, 64)]
CUDA: list[Size] = [*QUICK, (4096, 100_000, 1), (512, 100_000, 16), (512, 100_000, 40), (512, 100_000, 256)]
CUDA += [(100, 100_000, 40), (100, 1_000_000, 64), CPU[-1], (1024, 1_000_000, 64)]

CENTERS: list[Size] = [*QUICK[1:], (512, 20_000, 256)]


@dataclass
class Result(harness.Result):
    value_error: float = math.nan  # nats, the largest among the codes that were compared
    gradient_error: float = math.nan  # |g - truth| / |truth| over the same codes


# ----------------------------------------------------------------------------------------------------------------------
# Truth


def truth(codes: Tensor, lagged: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of jsd_loss [n], their gradients [n, l], and the gradient of their sum for the centers [m, l], in float64:
    kdejsd's reference over chunks of the centers."""
    m, dim = lagged.shape
    wide = codes.detach().double().requires_grad_()
    chunks = lagged.detach().double().split(max(1, 2**22 // wide.numel()))

    def log_share(chunk: Tensor) -> Tensor:
        return reference.kde.kde_log_prob(wide, chunk, bandwidth) + math.log(len(chunk) / m)

    log_probs, scores = [], []
    for chunk in chunks:
        part = log_share(chunk)
        scores.append(torch.autograd.grad(part.sum(), wide)[0])
        log_probs.append(part.detach())
    parts = torch.stack(log_probs)
    log_prob = parts.logsumexp(0)
    shares = (parts - log_prob).exp()
    score = (shares.unsqueeze(-1) * torch.stack(scores)).sum(0)
    target = -0.5 * wide.detach().square().sum(-1) - 0.5 * dim * math.log(2 * math.pi)
    weight = (target - log_prob).sigmoid()
    for_centers = [
        torch.autograd.grad((log_share(chunk.requires_grad_()) * weight * share).sum(), chunk)[0]
        for chunk, share in zip(chunks, shares, strict=True)
    ]
    value = math.log(2) - torch.nn.functional.softplus(target - log_prob)
    return value, weight.unsqueeze(-1) * (score + wide.detach()), torch.cat(for_centers)


# ----------------------------------------------------------------------------------------------------------------------
# One size


@dataclass
class Problem(harness.Problem):
    result_type = Result

    size: Size
    codes: Tensor
    lagged: Tensor
    bandwidth: float

    @classmethod
    def make(cls, size: Size, dtype: torch.dtype, device: str, centers: bool = False) -> Problem:
        """`centers`: the gradient is for the centers too."""
        n, m, dim = size
        generator = torch.Generator().manual_seed(n + m + dim)
        points = torch.randn(n + m, dim, generator=generator, dtype=dtype).to(device)
        # Scott's rule: a bandwidth of the size that one would use there.
        lagged = points[n:].clone().requires_grad_(centers)
        return cls(size, points[:n].clone().requires_grad_(), lagged, m ** (-1 / (dim + 4)))

    def __post_init__(self) -> None:
        self.centers = self.lagged.requires_grad
        self.rows = (torch.arange(self.size[0]) if self.centers else some_rows(self.size)).to(self.codes.device)
        self.truth = truth(self.codes[self.rows], self.lagged, self.bandwidth)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.codes, self.lagged

    @property
    def work(self) -> float:
        n, m, dim = self.size
        return n * m * (dim + 8)

    def unfit(self, provider: Provider) -> str:
        return provider.unfit(*self.size)

    def held(self, provider: Provider) -> float:
        return self.codes.element_size() * provider.held(*self.size)

    def limit_ms(self, peaks: Peaks, gradient: bool) -> float:
        passes = 2 if gradient and self.centers else 1  # the second as long as the first
        return passes * peaks.limit_ms(*self.size, self.codes.element_size(), gradient)

    def call(self, provider: Provider, mode: str) -> None:
        if mode == GRADIENT:
            harness.drop_gradients(self)
            provider.loss(self.codes, self.lagged, self.bandwidth, "mean").backward()
        else:
            with torch.no_grad():
                provider.loss(self.codes, self.lagged, self.bandwidth, "mean")

    def check(self, provider: Provider, result: Result) -> None:
        value, slope, slope_of_centers = self.truth
        self.call(provider, GRADIENT)
        assert self.codes.grad is not None
        gradient = self.codes.grad[self.rows].double() * len(self.codes)  # of the terms, where the loss is their mean
        with torch.no_grad():
            terms = provider.loss(self.codes, self.lagged, self.bandwidth, "none")[self.rows].double()
        result.value_error = (terms - value).abs().max().item()
        result.gradient_error = ((gradient - slope).norm() / slope.norm()).item()
        if self.centers:
            assert self.lagged.grad is not None
            difference = self.lagged.grad.double() * len(self.codes) - slope_of_centers
            error = (difference.norm() / slope_of_centers.norm()).item()
            result.gradient_error = max(result.gradient_error, error)
        scale = max(1.0, value.abs().max().item())
        most = provider.tolerance
        if not (result.value_error <= most.value * scale and result.gradient_error <= most.gradient):
            result.note = "wrong: not timed"


def failed(results: list[Result], candidates: Mapping[str, Provider | str]) -> bool:
    """Whether something is wrong with kdejsd as it comes: in full precision, without tuning."""

    def as_it_comes(provider: Provider | str) -> bool:
        return isinstance(provider, str) or (provider.tolerance == peers.FLOAT32 and not provider.tuning)

    return harness.kdejsd_failed([result for result in results if as_it_comes(candidates[result.provider])])


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def tensor_limits(problem: Problem, peaks: Peaks, mode: str) -> dict[str, float]:
    """Least milliseconds with products on a GPU's tensor cores, by how they are taken; empty where there is no such."""
    if not peaks.float16:
        return {}
    ways = {"three in float16": 3, "one in float16": 1}
    return {way: problem.limit_ms(peaks.on_tensor_cores(n), mode == GRADIENT) for way, n in ways.items()}


def print_size(problem: Problem, results: list[Result], peaks: Peaks) -> None:
    n, m, dim = problem.size
    limits = results[0].limits
    print(
        f"\nn = {n}, m = {m}, l = {dim}, h = {problem.bandwidth:.3f}: limit {digits(limits[GRADIENT])} ms "
        f"for value and gradient{'s' if problem.centers else ''}, {digits(limits[VALUE])} ms for the value alone\n"
        f"  at {peaks}; other processes kept {results[0].others:.2f} cores busy"
    )
    if on_tensor_cores := tensor_limits(problem, peaks, GRADIENT):
        ways = {"float32": limits[GRADIENT], **on_tensor_cores}
        print(f"  limits: {', '.join(f'{way} {digits(ms)} ms' for way, ms in ways.items())}; shares are of the first")

    def columns(result: Result) -> str:
        return (
            column(result.value_error, ".1e", 11)
            + column(result.gradient_error, ".1e", 10)
            + column(result.mib, ".1f", 8)
        )

    harness.print_modes(results, f"{'value err':>11}{'grad err':>10}{'MiB':>8}", columns)
    sys.stdout.flush()


FIELDS = (
    *("kernel", "provider", "mode", "metric", "unit", "n", "m", "l", "bandwidth", "value", "p20", "p80", "repeats"),
    *("others", "note", *harness.SHARED_FIELDS),
)


def csv_rows(problem: Problem, results: list[Result], peaks: Peaks) -> Iterator[Row]:
    kernel = "jsd_loss, centers" if problem.centers else "jsd_loss"
    size: Row = {"kernel": kernel, "bandwidth": problem.bandwidth, **dict(zip("nml", problem.size, strict=True))}
    for mode in problem.modes:
        for way, ms in tensor_limits(problem, peaks, mode).items():
            yield {**size, "mode": mode, "metric": f"limit, {way}", "unit": "ms", "value": ms}
    for result in results:
        base: Row = {**size, "others": result.others}
        figures = (
            ("value error", "nats", result.value_error),
            ("gradient error", "relative", result.gradient_error),
            ("peak extra memory", "MiB", result.mib),
        )
        yield from harness.mode_rows(base, result, figures)


# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def size(text: str) -> Size:
        n, m, dim = map(int, text.split(","))
        if min(n, m, dim) < 1:
            raise ValueError
        return n, m, dim

    quick = "small sizes, no provider that compiles first or holds over 1 GiB"
    options = ("--providers", "--levels", "--gexp", "--centers", "--graph", "--tune")
    return harness.parse(__doc__, size, "n,m,l", *options, quick=quick)


def main() -> int:
    arguments = parse_arguments()
    usual = CENTERS if arguments.centers else CUDA if arguments.device == "cuda" else CPU
    sizes = arguments.sizes or (QUICK if arguments.quick else usual)
    candidates = harness.chosen(
        peers.providers(arguments.device, arguments.levels, arguments.tune), arguments.providers
    )
    if arguments.centers:
        candidates = {k: v for k, v in candidates.items() if isinstance(v, str) or v.for_centers}
    if arguments.quick:
        candidates = {k: v for k, v in candidates.items() if isinstance(v, str) or not v.compiles}
    timed = sum(not isinstance(provider, str) for provider in candidates.values())
    modes = 3 if arguments.graph else 2
    seconds = (arguments.budget or (8 if arguments.quick else 150)) / (modes * len(sizes) * timed)
    most_memory = 2.0**30 if arguments.quick else math.inf
    session = harness.Session(arguments)
    wrong = False
    with harness.csv_table(arguments.csv, FIELDS, session.shared) as write:
        for size in sizes:
            problem = Problem.make(size, session.dtype, session.device, arguments.centers)
            results, peaks = session.measure(problem, candidates, seconds, most_memory)
            print_size(problem, results, peaks)
            write(csv_rows(problem, results, peaks))
            wrong |= failed(results, candidates)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
