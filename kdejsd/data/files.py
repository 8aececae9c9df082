"""Finds the files of data sets, and makes the errors for files that are missing or damaged."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .._extras import train_extra
from .._plain import plain
from .base import ExampleData

with train_extra():
    from lightning.pytorch.utilities import rank_zero_only


def folder_of(root: str | os.PathLike[str]) -> Path:
    """Returns the folder that a root names, by `path_of`."""
    return path_of(root, "root", "a folder")


def path_of(path: str | os.PathLike[str], argument: str = "path", what: str = "a file") -> Path:
    """Returns the path that an argument names, with `~` and environment variables expanded.

    Raises:
        ValueError: if it is empty.
        TypeError: if it is neither text nor a path.
    """
    name = plain(path, argument)
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be the path of {what}, got {path!r}")
    if not name:  # what a variable that is not set leaves of "$DATA"; Path would take it for the current folder
        raise ValueError(f"{argument} must name {what}, got ''")
    return Path(os.path.expanduser(os.path.expandvars(name)))


def readable(name: str) -> str:
    """Returns the name of a file as text that any file and font can take: other bytes and characters are escaped."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def find(
    data: ExampleData,
    root: Path,
    folders: Sequence[str],
    names: Sequence[str],
    advice: str,
    is_there: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """Returns the file of one of these names in the root or in one of its folders; the first one found counts.

    Args:
        folders: the folders by their paths from the root, which is "".
        is_there: Path.is_dir finds a folder in place of a file.

    Raises:
        FileNotFoundError: if there is none.
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
    """Returns the error for a file that does not hold what it should; it says where to get a whole one."""
    return ValueError(f"{path} is damaged: expected {expected}, found {found}; {how_to_get(url)}")


def unreadable(data: ExampleData, path: Path, error: OSError, url: str) -> OSError:
    """Returns the error for a file that was found but cannot be read."""
    return type(error)(f"{type(data).__name__} cannot read {path}: {error.strerror}; {how_to_get(url)}")


@rank_zero_only
def note(data: ExampleData, text: str) -> None:
    """Tells the user, once for all ranks, which files were found."""
    print(f"{type(data).__name__}: {text}", file=sys.stderr)
