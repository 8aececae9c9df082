"""The sizes at which the CPU's kernels cut their work, as the build tells them, and what lies beside these edges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from kdejsd._native import native

LEVELS = native().built_levels().split(",")


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """On the kernels of an instruction set; skips the test where the processor lacks it."""
    before = native().level()
    if not native().set_level(level):
        pytest.skip(f"this processor does not run {level}")
    try:
        yield
    finally:
        native().set_level(before)


def around(sizes: Iterable[int]) -> list[int]:
    """One below, at, and one above each size, as far as they are sizes."""
    return sorted({size + step for size in sizes for step in (-1, 0, 1)} - {-1, 0})


def edges(counted: str, level: str | None = None) -> list[int]:
    """Those of what an op counts, such as "kde_points": at the level in use, or at another one that runs here."""
    before = native().level()
    try:
        if level and not native().set_level(level):
            return []
        return around(native().tile_sizes()[counted].values())
    finally:
        native().set_level(before)


def at_edges(counted: str) -> pytest.MarkDecorator:
    """Runs a test with every `level` that the processor runs and every `size` at its edges."""
    cases = [(level, size) for level in LEVELS for size in edges(counted, level)]
    return pytest.mark.parametrize(("level", "size"), cases, ids=[f"{level}-{size}" for level, size in cases])
