"""Explains how to install a package of an optional part that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def train_extra() -> Iterator[None]:
    """Names the missing package of the extra `train`, and how to install all of them, for the imports inside.

    Raises:
        ModuleNotFoundError: in place of the one raised inside.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'kdejsd needs the package "{error.name}" for this, and it is not installed: pip install "kdejsd[train]"',
            name=error.name,
        ) from error
