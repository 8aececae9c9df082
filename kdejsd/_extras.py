"""What to say when a package of an optional part is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def train_extra() -> Iterator[None]:
    """Around the imports of packages that come with the extra `train`: names the missing one and how to install all.

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
