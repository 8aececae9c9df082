"""Measures how the time of a training step is shared out."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Sums the durations of named spans, in seconds.

    On a GPU the spans are pairs of events, read once they have passed, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._started: dict[str, float | torch.cuda.Event] = {}
        self._pending: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._seconds: dict[str, float] = {}

    @torch.compiler.disable
    def start(self, name: str) -> None:
        self._started[name] = self._now()

    @torch.compiler.disable
    def stop(self, name: str) -> None:
        begin, end = self._started.pop(name), self._now()
        if isinstance(begin, float):
            assert isinstance(end, float)
            self._add(name, end - begin)
        else:
            assert not isinstance(end, float)
            self._pending.setdefault(name, []).append((begin, end))
            self._collect(name)

    def __getstate__(self) -> dict[str, object]:
        """Returns the sums for a copy, without spans that have not passed, whose events cannot be copied."""
        return {"_cuda": self._cuda, "_started": {}, "_pending": {}, "_seconds": dict(self._seconds)}

    def share(self, part: str, whole: str) -> float:
        """Returns the seconds of one span over those of another, of the time passed so far; 0 at the start."""
        total = self._seconds.get(whole, 0.0)
        return self._seconds.get(part, 0.0) / total if total > 0 else 0.0

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self, name: str) -> None:
        pending = self._pending[name]
        while pending and pending[0][1].query():
            begin, end = pending.pop(0)
            self._add(name, begin.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
