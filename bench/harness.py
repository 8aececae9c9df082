"""Shared by the benchmarks: arguments, header, limits around each size, interleaved rounds, table columns, CSV.

README.md beside this says how times are taken and what the columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import gc
import math
import signal
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch
from machine import Peaks
from torch import Tensor

from kdejsd._native import cuda_problem, native

GRADIENT, VALUE = "value+gradient", "value"
GRAPH = "graph"  # value and gradient, their kernels alone
ROUNDS = 5
MAX_REPEATS = 50
MAX_REPLAYS = 200
MAX_CAPTURED_MS = 200  # beyond, kernels are all that there is to a call
MAX_BUILD_SECONDS = 120  # for the first calls, which may compile
TRUTH_NUMBERS = 2**27  # n m l of the rows that are compared with float64
FACTS = ("threads", "machine", "versions", "commit", "date")
SHARED_FIELDS = ("dtype", "device", "level", *FACTS)

Row = dict[str, object]


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def parse(
    description: str, size: Callable[[str], object], metavar: str, *options: str, quick: str = "small sizes"
) -> argparse.Namespace:
    """The arguments that every benchmark has, and of those that some have, the named options."""
    some = {
        "--providers": {"nargs": "+", "metavar": "NAME", "help": "only these, and kdejsd"},
        "--levels": {"type": lambda text: text.split(","), "help": "kdejsd's instruction sets: base,v3,v4,amx"},
        "--gexp": {"type": float, "help": "likewise, exponentials in 1e9 a second"},
        "--centers": {"action": "store_true", "help": "the gradient for the centers too; only peers that have it"},
        "--graph": {"action": "store_true", "help": "on CUDA: also the kernels alone, by replays of a CUDA graph"},
        "--tune": {
            **{"type": tuning, "action": "extend", "metavar": "NAME=VALUE[,VALUE...]"},
            "help": "on CUDA: a row of kdejsd's for each value of this tuning; can be repeated",
        },
    }
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--sizes", type=size, nargs="+", metavar=metavar, help="instead of the usual ones")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument("--budget", type=float, help="seconds to spend on timing, about")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--fma-gflops", type=float, help="the machine's peak, where it cannot be measured")
    for option in options:
        parser.add_argument(option, **some[option])
    parser.set_defaults(levels=None, gexp=None, centers=False, graph=False, tune=[])
    arguments = parser.parse_args()
    if "--gexp" in options and (arguments.fma_gflops is None) != (arguments.gexp is None):
        parser.error("--fma-gflops and --gexp are given together or not at all")
    if unknown := set(arguments.levels or []) - set(machine.ARCHITECTURES):
        parser.error(f"--levels must be among {', '.join(machine.ARCHITECTURES)}, got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda":
        if problem := cuda_problem():
            parser.error(f"--device cuda: {problem}")
        if arguments.levels:
            parser.error("--levels is for --device cpu")
        if arguments.tune and (problem := tuning_problem(arguments.tune)):
            parser.error(f"--tune: {problem}")
    elif arguments.graph or arguments.tune:
        parser.error(f"{'--graph' if arguments.graph else '--tune'} is for --device cuda")
    order = list(machine.ARCHITECTURES).index
    arguments.levels = sorted(arguments.levels or [native().level()], key=order, reverse=True)
    return arguments


def tuning(text: str) -> list[tuple[str, int]]:
    name, _, values = text.partition("=")
    return [(name, int(value)) for value in values.split(",")]


def tuning_problem(tunings: list[tuple[str, int]]) -> str:
    """Why kdejsd's CUDA kernels cannot be tuned so, or "" if they can."""
    if not hasattr(native(), "cuda_tuning"):
        return "this build of kdejsd has no tuning"
    usual = native().cuda_tuning()
    for name, value in tunings:
        if name not in usual:
            return f"names must be among {', '.join(usual)}, got {name}"
        accepted = abs(value) < 2**31 and native().set_cuda_tuning(name, value)
        native().set_cuda_tuning(name, usual[name])
        if not accepted:
            return f"{name} cannot be {value}; the usual values are {', '.join(f'{k}={v}' for k, v in usual.items())}"
    return ""


def chosen(candidates: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """The named ones and kdejsd's; all, if there are no names."""
    if unknown := set(names or []) - set(candidates):
        raise SystemExit(f"--providers must be among {sorted(candidates)}, got {sorted(unknown)}")
    return {name: p for name, p in candidates.items() if not names or name.startswith("kdejsd") or name in names}


# ----------------------------------------------------------------------------------------------------------------------
# One size


@dataclass
class Result:
    """Holds what was found out about one provider at one size."""

    provider: str
    note: str = ""  # why there are no times
    graph_note: str = ""  # why there are none by a CUDA graph, where they were asked for
    mib: float = math.nan
    others: float = math.nan  # cores that other processes kept busy while the times were taken
    times: dict[str, list[float]] = field(default_factory=dict)  # milliseconds by mode
    medians: dict[str, list[float]] = field(default_factory=dict)  # of each round, likewise
    limits: dict[str, float] = field(default_factory=dict)  # least milliseconds by mode


class Problem(ABC):
    """A problem of one size. Providers are what its methods take; those with a `level` run at that instruction set,
    those with a `tuning` with CUDA kernels so tuned."""

    result_type: type[Result] = Result
    modes: tuple[str, ...] = (GRADIENT, VALUE)
    leaves: tuple[Tensor, ...] = ()  # where a call leaves gradients
    max_call_seconds = 20  # what would take longer, by its times at smaller sizes, is left out

    @property
    @abstractmethod
    def work(self) -> float:
        """Returns a number that the time of a call is about proportional to."""

    @abstractmethod
    def call(self, provider: Any, mode: str) -> object:
        """Makes the call that is timed."""

    @abstractmethod
    def check(self, provider: Any, result: Any) -> None:
        """Writes the errors into the result, and a note if they are too large."""

    @abstractmethod
    def limit_ms(self, peaks: Peaks, gradient: bool) -> float:
        """The least time of a call."""

    def held(self, provider: Any) -> float:
        """Bytes that a call holds at once."""
        return 0

    def unfit(self, provider: Any) -> str:
        """Why the provider cannot take this size, or "" if it can."""
        return ""


def some_rows(size: tuple[int, int, int]) -> Tensor:
    """Which of n rows to compare with the truth, where that takes m l numbers each."""
    n, m, dim = size
    return torch.linspace(0, n - 1, max(1, min(n, TRUTH_NUMBERS // (m * dim)))).long()


def use_level(level: str) -> None:
    """Makes kdejsd's kernels those of one instruction set.

    Raises:
        ValueError: it was not built, or this processor lacks it.
    """
    if not native().set_level(level):
        raise ValueError(f"levels must be among {native().built_levels()} that this processor can run, got {level!r}")


def use_tuning(tuning: Mapping[str, int]) -> None:
    """Tunes kdejsd's CUDA kernels.

    Raises:
        ValueError: there is no such name, or the value is out of its range.
    """
    for name, value in tuning.items():
        if not native().set_cuda_tuning(name, value):
            raise ValueError(f"kdejsd's CUDA kernels cannot be tuned by {name}={value}")


@contextlib.contextmanager
def arrangements(candidates: Mapping[str, Any]) -> Iterator[Callable[[Any], None]]:
    """A function that makes kdejsd's kernels what a provider asks for: of its level, or with its tuning.

    All that a provider's tuning does not name is as it was before, and so is everything in the end.
    """
    tuned = any(getattr(provider, "tuning", None) for provider in candidates.values())
    usual: dict[str, int] = native().cuda_tuning() if tuned else {}

    def arrange(provider: Any) -> None:
        if level := getattr(provider, "level", None):
            use_level(level)
        use_tuning({**usual, **getattr(provider, "tuning", {})})

    try:
        yield arrange
    finally:
        use_tuning(usual)


def error_line(error: BaseException) -> str:
    """Its type, and what it says first."""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0][:60]}"


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


def timed(call: Callable[[], object], repeats: int, device: str) -> list[float]:
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


def captured(problem: Problem, provider: Any) -> torch.cuda.CUDAGraph:
    """A call of value and gradient as a CUDA graph, by the rules of torch's documentation."""
    here, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    # What the first calls on a stream build or allocate for it must not fall into the capture.
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.call(provider, GRADIENT)
    here.wait_stream(side)
    drop_gradients(problem)  # so that the captured call makes them in the graph's own memory
    # torch.cuda.graph leaves its own stream the current one if the capture fails; the outer context takes it back.
    with torch.cuda.stream(here), torch.cuda.graph(graph, stream=side):
        problem.call(provider, GRADIENT)
    return graph


def drop_gradients(problem: Problem) -> None:
    for leaf in problem.leaves:
        leaf.grad = None


def graph_times(problem: Problem, provider: Any, replays: int) -> list[float]:
    """Milliseconds of the kernels of a call of value and gradient, which follow each other without a gap."""
    graph = captured(problem, provider)
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / replays)
    return times


def time_graphs(
    problem: Problem,
    fit: list[tuple[Any, Any]],
    seconds: float,
    uncaptured: dict[str, str],
    arrange: Callable[[Any], None],
) -> None:
    """Adds the times of the kernels alone to the results, or why there are none.

    One provider after the other, when all calls have been timed: a capture that fails can leave traces in torch.
    """
    for provider, result in fit:
        call_ms = statistics.median(result.times[GRADIENT])
        if call_ms > MAX_CAPTURED_MS:
            result.graph_note = "not captured: long calls are kernels alone"
            continue
        if result.provider not in uncaptured:
            replays = max(1, min(MAX_REPLAYS, int(1e3 * seconds / ROUNDS / call_ms)))
            arrange(provider)
            try:
                result.times[GRAPH] = graph_times(problem, provider, replays)
            except Exception as error:
                cause: BaseException = error
                while cause.__context__:  # what ended the capture, before what came of that
                    cause = cause.__context__
                uncaptured[result.provider] = f"not captured: {error_line(cause)}"
                with contextlib.suppress(Exception):
                    torch.zeros((), device="cuda")  # takes up an error that is kept for the next kernel
            drop_gradients(problem)
        result.graph_note = uncaptured.get(result.provider, "")


def time_rounds(
    problem: Problem,
    fit: list[tuple[Any, Any]],
    estimates: Mapping[tuple[str, str], float],
    device: str,
    seconds: float,
    arrange: Callable[[Any], None],
) -> None:
    """Adds times to the results, in rounds in which every provider has its turn."""
    gc.collect()
    gc.disable()
    load = machine.OthersLoad()
    for _ in range(ROUNDS):
        for provider, result in fit:
            arrange(provider)
            for mode in problem.modes:
                expected = estimates[result.provider, mode]
                fewest = 1 if expected > 2 else 3
                repeats = max(fewest, min(MAX_REPEATS, int(seconds / max(expected, 1e-6))))
                times = result.times.setdefault(mode, [])
                if len(times) < repeats:
                    if expected < 0.1:
                        problem.call(provider, mode)  # its data and code back into the caches
                    call = functools.partial(problem.call, provider, mode)
                    found = timed(call, -(-repeats // ROUNDS), device)
                    times += found
                    result.medians.setdefault(mode, []).append(statistics.median(found))
    gc.enable()
    for _, result in fit:
        result.others = load.cores()


def run_size(
    problem: Problem,
    candidates: Mapping[str, Any],
    device: str,
    seconds: float,
    pace: dict[str, float],
    most_memory: float = math.inf,
    uncaptured: dict[str, str] | None = None,
) -> list[Any]:
    """Checks every candidate, then times those that are right, interleaved.

    Args:
        candidates: providers by name, or why one is not there.
        seconds: to spend on one candidate in one mode.
        pace: seconds per work of each candidate, for what a call will take; brought up to date.
        most_memory: bytes that a candidate may hold, if there are as many.
        uncaptured: None, or where the kernels alone are to be timed too, why that failed for a candidate, which then is
            not tried again; brought up to date.
    """
    results, fit = [], []
    estimates: dict[tuple[str, str], float] = {}  # seconds
    with arrangements(candidates) as arrange:
        for name, provider in candidates.items():
            result = problem.result_type(name)
            results.append(result)
            if isinstance(provider, str):
                result.note = provider
                continue
            if reason := problem.unfit(provider):
                result.note = reason
                continue
            held, room = problem.held(provider), min(0.8 * machine.available_bytes(device), most_memory)
            if held > room:
                result.note = f"does not fit: needs {held / 2**30:.1f} GiB, has {room / 2**30:.1f}"
                continue
            if pace.get(name, 0) * problem.work > problem.max_call_seconds:
                result.note = f"left out: about {pace[name] * problem.work:.0f} s a call"
                continue
            try:
                arrange(provider)
                with time_limit(MAX_BUILD_SECONDS):
                    problem.check(provider, result)
                    calls = {mode: functools.partial(problem.call, provider, mode) for mode in problem.modes}
                    first, *rest = problem.modes
                    with machine.peak_memory(device) as peak:
                        estimates[name, first] = 1e-3 * timed(calls[first], 1, device)[0]
                    for mode in rest:
                        estimates[name, mode] = 1e-3 * timed(calls[mode], 1, device)[0]
                result.mib = peak.mib
                if problem.work > 10**7:  # below, a call's own cost
                    pace[name] = estimates[name, first] / problem.work
            except TimeoutError:
                result.note = f"not ready after {MAX_BUILD_SECONDS} s"
            except Exception as error:  # whatever a peer raises is its entry
                result.note = error_line(error)
            if not result.note:
                fit.append((provider, result))
        time_rounds(problem, fit, estimates, device, seconds, arrange)
        if uncaptured is not None:
            time_graphs(problem, fit, seconds, uncaptured, arrange)
    return results


# ----------------------------------------------------------------------------------------------------------------------
# A run over the sizes


def print_facts(facts: dict[str, str]) -> None:
    for key, value in facts.items():
        print(f"{key:16}{value}")


class Session:
    """A run with its arguments: prints its header, then measures one size after the other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.device, self.dtype = arguments.device, getattr(torch, arguments.dtype)
        self._levels: list[str] = arguments.levels
        gexp = math.inf if arguments.gexp is None else arguments.gexp
        self._given = (arguments.fma_gflops, gexp) if arguments.fma_gflops else None
        self._pace: dict[str, float] = {}
        self._uncaptured: dict[str, str] | None = {} if arguments.graph else None
        facts = machine.facts(self.device)
        products = machine.cuda_products() if self.device == "cuda" else {}
        self._float16 = products.get("float16", 0.0) if self.dtype == torch.float32 else 0.0
        try:
            self._peaks = self._measure_peaks()
        except (RuntimeError, ValueError) as error:
            raise SystemExit(str(error)) from error
        facts["limits"] = "; ".join(map(str, self._peaks.values()))
        if products:
            reached = (f"{name} {2e-12 * rate:.0f} TFLOP/s" for name, rate in products.items())
            facts["products"] = f"torch's matrix product reaches {', '.join(reached)}"
        print_facts(facts)
        self.shared: Row = {"dtype": arguments.dtype, "device": self.device, "level": self._levels[0]}
        self.shared |= {key: facts[key] for key in FACTS}

    def _measure_peaks(self) -> dict[str, Peaks]:
        """By level."""
        if self.device == "cuda":
            peaks = dataclasses.replace(machine.cuda_peaks(self.dtype, self._given), float16=self._float16)
            return dict.fromkeys(self._levels, peaks)
        for level in self._levels:
            use_level(level)  # raises where the processor lacks it
        return {level: machine.cpu_peaks(level, self.dtype, self._given) for level in self._levels}

    def measure(
        self, problem: Problem, candidates: Mapping[str, Any], seconds: float, most_memory: float = math.inf
    ) -> tuple[list[Any], Peaks]:
        """Works like run_size, with limits by the higher peaks of before and after, which it returns too."""
        results = run_size(problem, candidates, self.device, seconds, self._pace, most_memory, self._uncaptured)
        before, self._peaks = self._peaks, self._measure_peaks()
        peaks = {level: after.or_higher(before[level]) for level, after in self._peaks.items()}
        for result in results:
            level = getattr(candidates[result.provider], "level", None) or self._levels[0]
            modes = {*problem.modes, *result.times}
            result.limits = {mode: problem.limit_ms(peaks[level], mode != VALUE) for mode in modes}
        return results, peaks[self._levels[0]]


def kdejsd_failed(results: list[Any]) -> bool:
    return any(result.provider.startswith("kdejsd") and result.note for result in results)


# ----------------------------------------------------------------------------------------------------------------------
# What is printed and written


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(times) < 2:
        only = times[0] if times else math.nan
        return only, only, only
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]


def digits(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def column(x: float, form: str, width: int) -> str:
    """Blank for what is not known."""
    return f"{'' if math.isnan(x) else format(x, form):>{width}}"


def spread_columns(values: list[float]) -> str:
    median, low, high = spread(values)
    return f"{digits(median):>7}{f'({digits(low)}-{digits(high)})':>17}"


def print_modes(results: list[Any], headings: str, columns: Callable[[Any], str]) -> None:
    """A table with each mode's times, shares of the limit and ratios to the first row's, and each one's own columns."""
    ours = {mode: statistics.median(times) for mode, times in results[0].times.items()}
    modes = [GRADIENT, VALUE, *([GRAPH] if any(GRAPH in result.times for result in results) else [])]
    width = max(16, *(len(result.provider) for result in results))
    print(f"  {'':{width}}" + "".join(f"{f'{mode}, ms':>24}{'limit':>7}{'ratio':>7}" for mode in modes) + headings)
    for result in results:
        name = f"  {result.provider:{width}}"
        line = name
        for mode in modes:
            if mode not in result.times:
                line += " " * 38
                continue
            median = statistics.median(result.times[mode])
            line += f"{spread_columns(result.times[mode])}{100 * result.limits[mode] / median:6.0f}%"
            line += f"{digits(median / ours[mode]) if mode in ours else '':>7}"
        own, note = columns(result), result.note or result.graph_note
        print(f"{line}{own}  {note}".rstrip() if own.strip() else f"{name}{note}")


def spread_fields(values: list[float]) -> Row:
    return {**dict(zip(("value", "p20", "p80"), spread(values), strict=True)), "repeats": len(values)}


def mode_rows(base: Row, result: Any, figures: Iterable[tuple[str, str, float]]) -> Iterator[Row]:
    """Times and shares of the limit in both modes, and figures (metric, unit, value) where they are known."""
    base = {"provider": result.provider, "note": result.note, **base}
    if result.note:
        yield {**base, "metric": "time", "unit": "ms"}
    if result.graph_note:
        yield {**base, "mode": GRAPH, "metric": "time", "unit": "ms", "note": result.graph_note}
    for mode, times in result.times.items():
        yield {**base, "mode": mode, "metric": "time", "unit": "ms", **spread_fields(times)}
        share = result.limits[mode] / statistics.median(times)
        yield {**base, "mode": mode, "metric": "share of limit", "value": share}
    for metric, unit, value in figures:
        if not math.isnan(value):
            yield {**base, "mode": GRADIENT, "metric": metric, "unit": unit, "value": value}


@contextlib.contextmanager
def csv_table(path: Path | None, fields: Iterable[str], shared: Row) -> Iterator[Callable[[Iterable[Row]], None]]:
    """A function that writes rows, with what they share, to the file; to nowhere without a path."""
    if path is None:
        yield lambda rows: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(fields))
        writer.writeheader()

        def write(rows: Iterable[Row]) -> None:
            writer.writerows({**shared, **row} for row in rows)
            file.flush()  # what was measured is there, whatever ends the next size

        yield write
