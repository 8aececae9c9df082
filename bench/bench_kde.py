"""Times jsd_loss, value and gradient, against other ways to compute it; checks each of them first.

    python bench/bench_kde.py                                     # the whole CPU table, about 6 minutes
    python bench/bench_kde.py --quick                             # small sizes, under 40 seconds
    python bench/bench_kde.py --device cuda --csv results.csv
    python bench/bench_kde.py --sizes 256,20000,40 --levels v4,v3 --threads 1

README.md beside this says how the work is counted, what the limit is, and what the peers are.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import machine
import peers
import torch
from machine import Peaks
from peers import Provider
from torch import Tensor

from kdejsd import reference
from kdejsd._native import cuda_problem, native

Size = tuple[int, int, int]

# The first is there for what a call costs beside its work.
QUICK: list[Size] = [(8, 16, 4), (100, 10_000, 8), (300, 10_000, 8), (4096, 4096, 2), (256, 20_000, 40)]
CPU: list[Size] = [*QUICK, (512, 100_000, 40), (512, 100_000, 256), (512, 1_000_000, 64)]
CUDA: list[Size] = [*CPU[:-1], (100, 100_000, 40), (100, 1_000_000, 64), CPU[-1], (1024, 1_000_000, 64)]

GRADIENT, VALUE = "value+gradient", "value"
ROUNDS = 5
MAX_REPEATS = 50
MAX_CALL_SECONDS = 20  # what would take longer, by its times at smaller sizes, is left out
MAX_BUILD_SECONDS = 120  # for the first call, which may compile
TRUTH_NUMBERS = 2**27  # n m l of the rows that are compared with float64
WRONG_VALUE, WRONG_GRADIENT = 1e-3, 1e-2  # relative; beyond these a provider is wrong


@dataclass
class Result:
    """What was found out about one provider at one size."""

    provider: str
    size: Size
    note: str = ""  # why there are no times
    value_error: float = math.nan  # nats, the largest among the codes that were compared
    gradient_error: float = math.nan  # |g - truth| / |truth| over the same codes
    mib: float = math.nan
    others: float = math.nan  # cores that other processes kept busy while the times were taken
    times: dict[str, list[float]] = field(default_factory=dict)  # milliseconds by mode


# ----------------------------------------------------------------------------------------------------------------------
# Truth


def some_rows(size: Size) -> Tensor:
    n, m, dim = size
    return torch.linspace(0, n - 1, max(1, min(n, TRUTH_NUMBERS // (m * dim)))).long()


def truth(codes: Tensor, lagged: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Terms of jsd_loss [n] and their gradients [n, l] in float64: kdejsd's reference over chunks of the centers."""
    m, dim = lagged.shape
    wide = codes.detach().double().requires_grad_()
    log_probs, scores = [], []
    for chunk in lagged.double().split(max(1, 2**22 // wide.numel())):
        part = reference.kde.kde_log_prob(wide, chunk, bandwidth) + math.log(len(chunk) / m)
        scores.append(torch.autograd.grad(part.sum(), wide)[0])
        log_probs.append(part.detach())
    parts = torch.stack(log_probs)
    log_prob = parts.logsumexp(0)
    score = ((parts - log_prob).exp().unsqueeze(-1) * torch.stack(scores)).sum(0)
    wide = wide.detach()
    gap = -0.5 * wide.square().sum(-1) - 0.5 * dim * math.log(2 * math.pi) - log_prob
    return math.log(2) - torch.nn.functional.softplus(gap), gap.sigmoid().unsqueeze(-1) * (score + wide)


# ----------------------------------------------------------------------------------------------------------------------
# One size


@dataclass
class Problem:
    size: Size
    codes: Tensor
    lagged: Tensor
    bandwidth: float

    @classmethod
    def make(cls, size: Size, dtype: torch.dtype, device: str) -> Problem:
        n, m, dim = size
        generator = torch.Generator().manual_seed(n + m + dim)
        points = torch.randn(n + m, dim, generator=generator, dtype=dtype).to(device)
        # Scott's rule: a bandwidth of the size that one would use there.
        return cls(size, points[:n].clone().requires_grad_(), points[n:].clone(), m ** (-1 / (dim + 4)))

    def call(self, provider: Provider, mode: str) -> None:
        if provider.level:
            peers.use_level(provider.level)
        if mode == GRADIENT:
            self.codes.grad = None
            provider.loss(self.codes, self.lagged, self.bandwidth, "mean").backward()
        else:
            with torch.no_grad():
                provider.loss(self.codes, self.lagged, self.bandwidth, "mean")

    def check(self, provider: Provider, rows: Tensor, wanted: tuple[Tensor, Tensor], result: Result) -> None:
        """Compares with the truth; the result says what is wrong."""
        self.call(provider, GRADIENT)
        assert self.codes.grad is not None
        gradient = self.codes.grad[rows].double() * len(self.codes)  # of the terms, where the loss is their mean
        with torch.no_grad():
            terms = provider.loss(self.codes, self.lagged, self.bandwidth, "none")[rows].double()
        result.value_error = (terms - wanted[0]).abs().max().item()
        result.gradient_error = ((gradient - wanted[1]).norm() / wanted[1].norm()).item()
        scale = max(1.0, wanted[0].abs().max().item())
        if not (result.value_error <= WRONG_VALUE * scale and result.gradient_error <= WRONG_GRADIENT):
            result.note = "wrong: not timed"


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds, as soon as Python runs again."""

    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def timed(call: Callable[[], None], repeats: int, device: str) -> list[float]:
    """Milliseconds of each of the calls."""
    if device == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start_s))
    return times


def run_size(
    problem: Problem,
    candidates: dict[str, Provider | str],
    device: str,
    seconds: float,
    most_memory: float,
    pace: dict[str, float],
) -> list[Result]:
    """Checks every candidate, then times those that are right, interleaved.

    Args:
        seconds: to spend on one candidate in one mode.
        most_memory: bytes that a candidate may hold, if there are as many.
        pace: seconds per n m (l + 8) of each candidate, for what a call will take; brought up to date.
    """
    n, m, dim = problem.size
    itemsize = problem.codes.element_size()
    work = n * m * (dim + 8)
    rows = some_rows(problem.size).to(problem.codes.device)
    wanted = truth(problem.codes[rows], problem.lagged, problem.bandwidth)
    results, fit = [], []
    estimates: dict[tuple[str, str], float] = {}  # seconds

    def times_of(provider: Provider, mode: str, repeats: int) -> list[float]:
        return timed(lambda: problem.call(provider, mode), repeats, device)

    def estimate(provider: Provider, mode: str) -> float:
        return 1e-3 * times_of(provider, mode, 1)[0]

    for name, provider in candidates.items():
        result = Result(name, problem.size)
        results.append(result)
        if isinstance(provider, str):
            result.note = provider
            continue
        held = itemsize * provider.held(n, m, dim)
        room = min(0.8 * machine.available_bytes(device), most_memory)
        if held > room:
            result.note = f"does not fit: needs {held / 2**30:.1f} GiB, has {room / 2**30:.1f}"
            continue
        if pace.get(name, 0) * work > MAX_CALL_SECONDS:
            result.note = f"left out: about {pace[name] * work:.0f} s a call"
            continue
        try:
            with time_limit(MAX_BUILD_SECONDS):
                problem.check(provider, rows, wanted, result)
                with machine.peak_memory(device) as peak:
                    estimates[name, GRADIENT] = estimate(provider, GRADIENT)
                estimates[name, VALUE] = estimate(provider, VALUE)
            result.mib = peak.mib
            if work > 10**7:  # below, a call's own cost
                pace[name] = estimates[name, GRADIENT] / work
        except TimeoutError:
            result.note = f"not ready after {MAX_BUILD_SECONDS} s"
        except Exception as error:  # whatever a peer raises is its entry
            result.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60] if str(error) else ''}"
        if not result.note:
            fit.append((provider, result))
    gc.collect()
    gc.disable()
    load = machine.OthersLoad()
    for _ in range(ROUNDS):
        for provider, result in fit:
            for mode in (GRADIENT, VALUE):
                expected = estimates[provider.name, mode]
                fewest = 1 if expected > 2 else 3
                repeats = max(fewest, min(MAX_REPEATS, int(seconds / max(expected, 1e-6))))
                times = result.times.setdefault(mode, [])
                if len(times) < repeats:
                    if expected < 0.1:
                        problem.call(provider, mode)  # its data and code back into the caches
                    times += times_of(provider, mode, -(-repeats // ROUNDS))
    gc.enable()
    for _, result in fit:
        result.others = load.cores()
    return results


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]


def digits(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def print_size(problem: Problem, results: list[Result], limits: Callable[[str, str], float], peaks: Peaks) -> None:
    n, m, dim = problem.size
    ours = {mode: statistics.median(results[0].times[mode]) for mode in results[0].times}
    print(
        f"\nn = {n}, m = {m}, l = {dim}, h = {problem.bandwidth:.3f}: limit {digits(limits('', GRADIENT))} ms "
        f"for value and gradient, {digits(limits('', VALUE))} ms for the value alone\n"
        f"  at {peaks}; other processes kept {results[0].others:.2f} cores busy"
    )
    print(
        f"  {'':16}{'value+gradient, ms':>24}{'limit':>7}{'ratio':>7}{'value, ms':>24}{'limit':>7}{'ratio':>7}"
        f"{'value err':>11}{'grad err':>10}{'MiB':>8}"
    )
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
        errors = [f"{e:.1e}" if not math.isnan(e) else "" for e in (result.value_error, result.gradient_error)]
        mib = "" if math.isnan(result.mib) else f"{result.mib:.1f}"
        line += f"{errors[0]:>11}{errors[1]:>10}{mib:>8}"
        print(
            f"  {result.provider:16}{result.note}"
            if result.note and not errors[0]
            else f"{line}  {result.note}".rstrip()
        )
    sys.stdout.flush()


FIELDS = (
    *("kernel", "provider", "mode", "metric", "unit", "n", "m", "l", "bandwidth", "value", "p20", "p80", "repeats"),
    *("others", "note", "dtype", "device", "level", "threads", "machine", "versions", "commit", "date"),
)


def csv_rows(
    problem: Problem, results: list[Result], limits: Callable[[str, str], float]
) -> Iterator[dict[str, object]]:
    for result in results:
        base: dict[str, object] = {
            "kernel": "jsd_loss",
            "provider": result.provider,
            "note": result.note,
            "bandwidth": problem.bandwidth,
            "others": result.others,
            **dict(zip("nml", problem.size, strict=True)),
        }
        if result.note:
            yield {**base, "metric": "time", "unit": "ms"}
        for mode, times in result.times.items():
            median, low, high = spread(times)
            measured = {**base, "mode": mode}
            yield {
                **measured,
                "metric": "time",
                "unit": "ms",
                "value": median,
                "p20": low,
                "p80": high,
                "repeats": len(times),
            }
            yield {**measured, "metric": "share of limit", "value": limits(result.provider, mode) / median}
        for metric, unit, value in (
            ("value error", "nats", result.value_error),
            ("gradient error", "relative", result.gradient_error),
            ("peak extra memory", "MiB", result.mib),
        ):
            if not math.isnan(value):
                yield {**base, "mode": GRADIENT, "metric": metric, "unit": unit, "value": value}


# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    def size(text: str) -> Size:
        n, m, dim = map(int, text.split(","))
        if min(n, m, dim) < 1:
            raise ValueError
        return n, m, dim

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--sizes", type=size, nargs="+", metavar="n,m,l", help="instead of the usual ones")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, no provider that compiles first or holds over 1 GiB"
    )
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="only these, and kdejsd")
    parser.add_argument("--levels", type=lambda text: text.split(","), help="kdejsd's instruction sets: base,v3,v4")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument("--budget", type=float, help="seconds to spend on timing, about")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--fma-gflops", type=float, help="the machine's peak, where it cannot be measured")
    parser.add_argument("--gexp", type=float, help="likewise, exponentials in 1e9 a second")
    arguments = parser.parse_args()
    if (arguments.fma_gflops is None) != (arguments.gexp is None):
        parser.error("--fma-gflops and --gexp are given together or not at all")
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
    given = (arguments.fma_gflops, arguments.gexp) if arguments.gexp else None
    sizes = arguments.sizes or (QUICK if arguments.quick else CUDA if device == "cuda" else CPU)

    candidates = peers.providers(device, levels)
    if arguments.providers:
        if unknown := set(arguments.providers) - set(candidates):
            raise SystemExit(f"--providers must be among {sorted(candidates)}, got {sorted(unknown)}")
        candidates = {k: v for k, v in candidates.items() if k.startswith("kdejsd") or k in arguments.providers}
    if arguments.quick:
        candidates = {k: v for k, v in candidates.items() if isinstance(v, str) or not v.compiles}

    facts = machine.facts(device)

    def measure_peaks() -> dict[str, Peaks]:
        found = {}
        for level in levels:
            peers.use_level(level)
            found[level] = (
                machine.cpu_peaks(level, dtype, given) if device == "cpu" else machine.cuda_peaks(dtype, given)
            )
        return found

    try:
        before = measure_peaks()
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    facts["limits"] = "; ".join(map(str, before.values()))
    if device == "cuda":
        facts["products"] = machine.cuda_products()
    for key, value in facts.items():
        print(f"{key:16}{value}")

    shared = {
        "dtype": arguments.dtype,
        "device": device,
        **{k: facts[k] for k in ("threads", "machine", "versions", "commit", "date")},
    }
    budget = arguments.budget or (8 if arguments.quick else 150)
    seconds = budget / (2 * len(sizes) * len(candidates))
    most_memory = 2.0**30 if arguments.quick else math.inf
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
            results = run_size(problem, candidates, device, seconds, most_memory, pace)
            after = measure_peaks()
            peaks = {level: after[level].or_higher(before[level]) for level in levels}
            before = after

            def limit_of(name: str, mode: str, size: Size = size, peaks: dict[str, Peaks] = peaks) -> float:
                provider = candidates.get(name)
                level = provider.level if isinstance(provider, Provider) and provider.level else levels[0]
                return peaks[level].limit_ms(*size, dtype.itemsize, mode == GRADIENT)

            print_size(problem, results, limit_of, peaks[levels[0]])
            if writer:
                for row in csv_rows(problem, results, limit_of):
                    writer.writerow({**shared, **row, "level": levels[0]})
            wrong |= any(r.provider.startswith("kdejsd") and r.note for r in results)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
