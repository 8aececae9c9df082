"""Explains how to install a package of an optional part that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Names the missing package of an extra, and how to install all of them, for the imports inside.

    Raises:
        ModuleNotFoundError: in place of the one raised inside.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]  # which may be there in part
        raise ModuleNotFoundError(
            f'kdejsd needs the package "{package}" for this, and it is not installed: pip install "kdejsd[{name}]"',
            name=error.name,
        ) from error


def train_extra() -> AbstractContextManager[None]:
    """Returns `extra("train")`, whose packages most of the modules above need."""
    return extra("train")
