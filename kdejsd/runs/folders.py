"""Makes the folder of a run and folders beside it, and finds the checkpoint in one."""

from __future__ import annotations

import os
from pathlib import Path

_LAST = Path("checkpoints", "last.ckpt")  # the newest checkpoint, in the folder of a run


def fresh_folder(out: str | None, stem: Path) -> Path:
    """Makes and returns the folder that was asked for, or the first of STEM-1, STEM-2, ... that does not exist yet."""
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"out must be a new or empty folder, and {folder} is not")
        _make(folder, exist_ok=True)
        return folder
    number = 1
    while True:
        folder = stem.with_name(f"{stem.name}-{number}")
        try:
            _make(folder, exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return folder


def _make(folder: Path, exist_ok: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be made: {error.strerror}; name another one with --out") from error


def checkpoint_of(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a checkpoint, which is named by itself or by the folder of its run.

    Raises:
        FileNotFoundError: if there is neither.

    Example:
        >>> import os, tempfile
        >>> from kdejsd.runs.folders import checkpoint_of
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     os.mkdir(os.path.join(folder, "checkpoints"))
        ...     _ = open(os.path.join(folder, "checkpoints", "last.ckpt"), "w")
        ...     print(checkpoint_of(folder).relative_to(folder))
        checkpoints/last.ckpt
    """
    named = Path(path)
    if not named.exists():
        raise FileNotFoundError(f"the checkpoint {named} does not exist")
    if not named.is_dir():
        return named
    last = named / _LAST
    if not last.is_file():
        raise FileNotFoundError(
            f"the folder {named} is not that of a run with a checkpoint: there is no {last}; name a checkpoint's file "
            "or the folder that kdejsd fit has made"
        )
    return last


def run_folder(checkpoint: str) -> Path:
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == "checkpoints" else folder
