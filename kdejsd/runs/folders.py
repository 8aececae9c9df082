"""Makes the folder of a run and folders beside it, finds the checkpoint in one, and writes files whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
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


def own_folder(checkpoint: Path) -> Path | None:
    """Returns the folder of the run whose newest checkpoint this is; None for a checkpoint that lies elsewhere."""
    folder = (checkpoint if len(checkpoint.parts) > 1 else checkpoint.absolute()).parent.parent
    is_newest = checkpoint.absolute().parts[-2:] == _LAST.parts
    return folder if is_newest and (folder / "config.yaml").is_file() else None


def missing_folders(folder: Path) -> list[Path]:
    """Returns a folder and those above it, the innermost first, without those that exist."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def logs(folder: Path) -> set[Path]:
    """Returns the files of TensorBoard in a folder."""
    return set(folder.glob("events.out.tfevents*"))


def discard(folder: Path, made: Iterable[Path], before: Collection[Path]) -> None:
    """Removes what a run that has trained nothing has left in a folder, and the folders that were made for it.

    Only files that a run writes are removed, and of those in its own folder only what has been logged since. Folders
    are removed if they are empty then, the innermost first.

    Args:
        folder: the run's folder.
        made: the folders that the run has made; empty for a run in a folder that was there.
        before: the files of TensorBoard that were there.
    """
    with contextlib.suppress(OSError):
        left = logs(folder) - set(before)
        if not before:
            left |= {folder / "hparams.yaml"}
        for path in left:
            path.unlink(missing_ok=True)
        for path in made:
            path.rmdir()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that at any moment it is the old one or the new one, whole.

    It is written to the disk as FILE.part, and then renamed.

    Raises:
        OSError: if it cannot be written; the file that was there before stays untouched.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # where a folder can be opened, for the rename to survive a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"{len(content)} bytes cannot be written to {path}: {error.strerror}") from error


def run_folder(checkpoint: Path) -> Path:
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder
