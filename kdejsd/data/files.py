"""The files of data sets: where they are looked for, and what an error says of one that is missing or damaged."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .._extras import train_extra
from .._plain import plain
from .base import ImageData

with train_extra():
    from lightning.pytorch.utilities import rank_zero_only


def folder_of(root: str | os.PathLike[str]) -> Path:
    """The folder that a root names, with `~` and environment variables put in.

    Raises:
        ValueError: it names none.
        TypeError: neither text nor a path.
    """
    name = plain(root, "root")
    if not isinstance(name, str):
        raise TypeError(f"root must be the path of a folder, got {root!r}")
    if not name:  # what a variable that is not set leaves of "$DATA"; Path would take it for the current folder
        raise ValueError("root must name a folder, got ''")
    return Path(os.path.expanduser(os.path.expandvars(name)))


def find(
    data: ImageData,
    root: Path,
    folders: Sequence[str],
    names: Sequence[str],
    advice: str,
    is_there: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """The file of one of these names in the root or in one of its folders; what stands first goes first.

    Args:
        folders: by their paths from the root, which is "".
        is_there: Path.is_dir for a folder in place of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    places = [root / folder for folder in folders]
    for place in places:
        for name in names:
            if is_there(place / name):
                return place / name
    where = (
        f"which is in none of {', '.join(map(str, places))}"
        if root.is_dir()
        else f"and there is no folder {root.absolute()}"
    )
    raise FileNotFoundError(
        f"{type(data).__name__} needs {' or '.join(names)}, {where}. Name its folder with --data.root; {advice}"
    )


def how_to_get(url: str) -> str:
    return f"to get it: curl -O {url}"


def damaged(path: Path, expected: str, found: str, url: str) -> ValueError:
    """Returns the error for a file that does not hold what it should; a whole one can be had from the URL."""
    return ValueError(f"{path} is damaged: expected {expected}, found {found}; {how_to_get(url)}")


def unreadable(data: ImageData, path: Path, error: OSError, url: str) -> OSError:
    """Returns the error for a file that was there when it was looked for."""
    return type(error)(f"{type(data).__name__} cannot read {path}: {error.strerror}; {how_to_get(url)}")


@rank_zero_only
def note(data: ImageData, text: str) -> None:
    """Tells the user, once for all ranks, what was found."""
    print(f"{type(data).__name__}: {text}", file=sys.stderr)
