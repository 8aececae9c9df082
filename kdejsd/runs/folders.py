"""Makes the folder of a run, and folders beside it."""

from __future__ import annotations

from pathlib import Path


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


def run_folder(checkpoint: str) -> Path:
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == "checkpoints" else folder
