"""Lists a folder of pictures, and finds its classes and its parts to train on and to hold out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM = ("__MACOSX", "@eaDir", "lost+found")  # folders that no user has made; they may hold thumbnails
TRAINING = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "test", "testing")
NAMED = 10  # of many, in a note


@dataclass(eq=False)
class Tree:
    """Lists the pictures and folders of a folder by name, and what is left out."""

    path: Path
    pictures: list[Path] = field(default_factory=list)
    folders: list[Tree] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    def everything(self) -> Iterator[Tree]:
        """Yields the folder itself and all folders below it."""
        yield self
        for folder in self.folders:
            yield from folder.everything()

    @property
    def count(self) -> int:
        """Returns the number of pictures in it and below it."""
        return sum(len(tree.pictures) for tree in self.everything())

    def all_pictures(self) -> list[Path]:
        """Returns the pictures in it and below it, sorted by path."""
        return sorted(path for tree in self.everything() for path in tree.pictures)

    def holding(self) -> dict[str, Tree]:
        """Returns its folders that hold pictures, by name."""
        return {folder.name: folder for folder in self.folders if folder.count}


def read_tree(path: Path, suffixes: tuple[str, ...], above: tuple[tuple[int, int], ...] = ()) -> Tree:
    """Lists a folder with all below it; links are followed.

    Args:
        suffixes: the suffixes of pictures, in small letters.
        above: the folders that it is in.

    Raises:
        OSError: if a folder cannot be read, or a link leads to nothing.
        ValueError: if a link leads to a folder that it is in.
    """
    tree = Tree(path)
    try:
        status = path.stat()
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise type(error)(f"the folder {path} cannot be read: {error.strerror}") from error
    place = (status.st_dev, status.st_ino)
    if place in above:
        raise ValueError(f"{path} is a link to a folder that it is in, so that there is no end of pictures: remove it")
    for entry in entries:
        inside = path / entry.name
        if entry.name.startswith(".") or entry.name in SYSTEM:
            tree.hidden.append(inside)
        elif inside.is_dir() if entry.is_symlink() else entry.is_dir():
            tree.folders.append(read_tree(inside, suffixes, (*above, place)))
        elif entry.is_symlink() and not inside.exists():
            raise FileNotFoundError(f"{inside} is a link to {os.readlink(inside)}, which is not there")
        elif inside.suffix.lower() in suffixes:
            tree.pictures.append(inside)
        else:
            tree.others.append(inside)
    return tree


def parts_of(tree: Tree) -> tuple[Tree, Tree] | None:
    """Returns the folder with the pictures to train on and the one with those to hold out, or None.

    A folder has these parts if it has both, and no other folder with pictures except those with a name of a part. Next
    to other folders, train and test are classes like them.
    """
    holding = {name.lower(): folder for name, folder in tree.holding().items()}
    found = [[holding[name] for name in names if name in holding] for names in (TRAINING, HELD_OUT)]
    return (found[0][0], found[1][0]) if all(found) and _named_as_parts(tree) else None


def _named_as_parts(tree: Tree) -> bool:
    """Tells whether all its folders with pictures, at least one, have names of parts of a split."""
    holding = tree.holding()
    return bool(holding) and all(name.lower() in TRAINING + HELD_OUT for name in holding)


def check_whole(tree: Tree) -> None:
    """Refuses a folder that has no parts as `parts_of` finds them, and yet is more than folders of classes.

    Raises:
        ValueError: if the parts are in one of its folders, or one part is without the other.
    """
    holding = tree.holding()
    for folder in holding.values():
        if parts_of(folder) is not None:
            raise ValueError(
                f"root must be a folder of classes or hold the parts of a split, and the split is in {folder.path}: "
                f"name that folder with --data.root"
            )
    if _named_as_parts(tree):
        raise ValueError(
            f"root must be a folder of classes or hold both parts of a split, {' or '.join(TRAINING)} and "
            f"{' or '.join(HELD_OUT)}, and {tree.path} has {', '.join(holding)}: to hold out a share of the pictures "
            f"of a folder, name it with --data.root={next(iter(holding.values())).path}"
        )


def classes_of(training: Tree, held_out: Tree) -> list[str]:
    """Returns the sorted names of the classes, which both parts must have.

    Raises:
        ValueError: if one of them lacks a class.
    """
    names = [set(part.holding()) for part in (training, held_out)]
    for one, other, part in ((0, 1, held_out), (1, 0, training)):
        missing = sorted(names[one] - names[other])
        if missing:
            raise ValueError(
                f"{training.path} and {held_out.path} must have pictures of the same classes, and {part.path} has none "
                f"of {shortened(missing)}: to hold out a share of the training pictures instead, name their folder "
                f"with --data.root={training.path}"
            )
    return sorted(names[0])


def shortened(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def left_out(tree: Tree, used: list[Tree]) -> str:
    """Describes the content of a folder other than the pictures that are used; "" stands for nothing."""
    found = []
    pictures = tree.count - sum(part.count for part in used)
    if pictures:
        names = {part.name for part in used}
        places = [name for name in tree.holding() if name not in names] + [path.name for path in tree.pictures]
        found.append(f"{pictures} pictures in neither part ({shortened(places)})")
    empty = [
        _below(folder.path, tree)
        for part in ([tree] if tree in used else [tree, *used])
        for folder in part.folders
        if not folder.count
    ]
    if empty:
        found.append(f"{_many(len(empty), 'folder')} without pictures ({shortened(empty)})")
    hidden = [path for inside in tree.everything() for path in inside.hidden]
    if hidden:
        found.append(f"{len(hidden)} hidden or of the system ({shortened([_below(path, tree) for path in hidden])})")
    others = Counter(path.suffix.lower() or path.name for inside in tree.everything() for path in inside.others)
    if others:
        kinds = [f"{count} {kind}" for kind, count in others.most_common()]
        found.append(f"{_many(others.total(), 'file')} of other kinds ({shortened(kinds)})")
    return "; ".join(found)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _below(path: Path, tree: Tree) -> str:
    return path.relative_to(tree.path).as_posix()
