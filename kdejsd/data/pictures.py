"""Reads folders of pictures."""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .._extras import train_extra
from .._numbers import between, integer
from .base import ExampleData, ExampleSet, StoredExamples
from .files import find, folder_of, note, readable
from .tree import Tree, check_whole, classes_of, left_out, parts_of, read_tree, shortened

with train_extra():
    from PIL import Image, ImageOps, UnidentifiedImageError

_BITS, _WHITE_IS, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF: per sample; 0 if white is 0; 2 if signed


def in_bytes(picture: Image.Image) -> Image.Image:
    """Returns the picture as it is to be seen, in bytes (mode L or RGB).

    It is turned upright by its EXIF data and put over white where it is transparent. Of several frames the first one is
    taken. The range of its own kind of numbers becomes 0 to 255.

    Raises:
        ValueError: if its numbers have no known range: floating-point numbers that are not all from 0 to 1, signed
            integers, or integers of 32 bits.
        OSError, ValueError, SyntaxError and others, by format: if the picture is damaged.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    if tags.get(_SAMPLE_FORMAT, (1,))[0] == 2:
        raise ValueError("it has signed integers, whose black and white are unknown")
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if sixteen or picture.mode == "F":
        values = np.asarray(picture)
        top = 2 ** tags.get(_BITS, (16,))[0] - 1 if sixteen else 1
        lowest, highest = values.min(), values.max()
        if not (lowest >= 0 and highest <= top):
            raise ValueError(f"its values must be from 0 to {top}, and they are from {lowest:g} to {highest:g}")
        values = values * (255.0 / top)
        if tags.get(_WHITE_IS) == 0:
            values = 255 - values
        if "transparency" in picture.info:
            values = np.where(np.asarray(picture) == picture.info["transparency"], 255, values)
        return Image.fromarray(np.rint(values).astype(np.uint8))
    if picture.mode == "I":
        raise ValueError("it has integers of 32 bits, whose white is unknown")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


class Pictures(StoredExamples):
    """Reads pictures from their files, several at a time.

    Args:
        paths: the paths of the files.
        prepare: gives every picture its final size and colours.
        hint: the end of an error about a picture.
    """

    def __init__(self, paths: list[Path], prepare: Callable[[Image.Image], Image.Image], hint: str = "") -> None:
        super().__init__(len(paths), torch.uint8)
        self.paths = paths
        self.prepare = prepare
        self.hint = hint

    def read(self, rows: Tensor) -> Tensor:
        """Reads the pictures at the given places as bytes [n, C, H, W].

        Raises:
            FileNotFoundError, ValueError: if a picture is not there, or cannot be read.
        """
        images = torch.empty(0)
        said: list[tuple[Path, Warning | str, type[Warning]]] = []
        now = threading.local()

        def read(path: Path) -> Tensor:
            now.path = path
            return self._read(path)

        def remember(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            said.append((now.path, message, category))

        # Threads, as Pillow lets others run while it decodes. Its warnings, of a very large picture or of damaged EXIF
        # data, do not say which one they are about: the thread that warns does.
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.simplefilter("always")
            warnings.showwarning = remember
            for place, image in enumerate(pool.map(read, [self.paths[row] for row in rows.tolist()])):
                if place == 0:
                    images = image.new_empty(len(rows), *image.shape)
                images[place] = image
        for path, message, category in said:
            warnings.warn(f"the picture {path}: {message}", category, stacklevel=1)
        return images

    def _read(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as picture:
                pixels = np.array(self.prepare(in_bytes(picture)))
        except FileNotFoundError:
            raise FileNotFoundError(f"the picture {path} is missing{self.hint}") from None
        except UnidentifiedImageError:
            raise ValueError(f"{path} is no picture in any format that Pillow reads{self.hint}") from None
        except Exception as error:  # of many kinds, by format
            kind: type[Exception] = ValueError
            reason = str(error) or repr(error)
            if isinstance(error, OSError) and error.errno is not None:  # the system's: Pillow's own have no number
                kind, reason = type(error), str(error.strerror)
            raise kind(f"the picture {path} cannot be read: {reason}{self.hint}") from error
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


class ImageFolder(ExampleData):
    """Reads a folder of pictures; if they are in subfolders, the first subfolder is the class.

    Classes are numbered in the order of their names as text: 10 comes before 2. The root may hold a split: a folder
    train (or training), a folder val, valid, validation, test or testing, and no other folder with pictures. The
    pictures in the first are then trained on, and those in the other (the first of these that is there) are held out.
    The folders in them are the classes. One line on the terminal says which pictures were found and which were left
    out. Hidden files and folders, and those of the system (__MACOSX), are left out; links are followed.

    A picture is turned upright by its EXIF data and put over white where it is transparent. Of several frames the first
    one is taken. Values are scaled by the range of their type: 65535 is white in 16 bits, 1.0 in floating-point
    numbers.

    Args:
        root: the folder. `~` and environment variables are expanded.
        size: the side in pixels; a picture is cut to a square around its centre and resized.
        channels: 3 for colour, 1 for grey.
        held_out: the share of the pictures held out, drawn by the seed, where the root holds no split.
        keep_in_memory: read all pictures at the start, size x size x channels bytes each. False leaves them in their
            files and reads those of a minibatch when it comes, which takes longer in every epoch.
        kwargs: as in `ExampleData`.

    Raises:
        FileNotFoundError: if there is no such folder, no picture in it, or a link to nothing.
        OSError: if a file or folder cannot be read.
        ValueError: if a picture cannot be read, a split is incomplete, in another folder or of different classes, a
            link leads to a folder that it is in, or a setting is out of range.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from kdejsd.data import ImageFolder
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for color in ("red", "blue"):
        ...         Path(root, color).mkdir()
        ...         Image.new("RGB", (40, 30), color).save(Path(root, color, "one.png"))
        ...     data = ImageFolder(root, size=8, batch_size=1)
        ...     images, labels, indices = data.training[0]
        >>> images.shape, len(data.training), len(data.held_out)
        (torch.Size([3, 8, 8]), 1, 1)
    """

    suffixes: ClassVar[tuple[str, ...]] = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int = 32,
        channels: int = 3,
        held_out: float = 0.1,
        keep_in_memory: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        size, channels = integer("size", size, 1), integer("channels", channels, 1)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        self.root = folder_of(root)
        self.held_out_share = between("held_out", held_out, 0, 1)
        self.keep_in_memory = keep_in_memory
        self.example_shape = (channels, size, size)
        self._classes: list[str] = []

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """Returns the names of the classes' folders, in the order of their numbers; it reads the folder."""
        self.setup()
        return self._classes

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"ImageFolder needs a folder of pictures, and {self.root} is none; name it with --data.root"
            )
        tree = read_tree(self.root, self.suffixes)
        parts = parts_of(tree)
        if parts is None:
            check_whole(tree)
            classes = sorted(tree.holding())
            found = [self._labelled(tree, classes)]
            how = f"{len(found[0])} pictures in {self.root}"
        else:
            classes = classes_of(*parts)
            found = [self._labelled(part, classes) for part in parts]
            how = (
                f"{len(found[0])} pictures to train on in {parts[0].path}, {len(found[1])} held out in {parts[1].path}"
            )
        if len(found[0]) < 2:
            raise FileNotFoundError(
                f"ImageFolder needs at least two pictures ({', '.join(self.suffixes)}) in {self.root}, "
                f"found {len(found[0])}"
            )
        self._classes = [readable(name) for name in classes]
        counts = Counter(label for pictures in found for label in pictures.labels.tolist())
        of_classes = [f"{name} {counts[label]}" for label, name in enumerate(classes)]
        said = [how, f"classes: {shortened(of_classes)}" if classes else "no classes"]
        if classes and counts[-1]:
            said.append(f"without a class: {counts[-1]}")
        rest = left_out(tree, list(parts or (tree,)))
        note(self, "; ".join([*said, f"left out: {rest}"] if rest else said))
        return (found[0], found[1]) if parts else self._split(found[0], self.held_out_share)

    def _labelled(self, tree: Tree, classes: list[str]) -> ExampleSet:
        """Returns all pictures of a folder with their labels, in the order of their paths."""
        number = {name: label for label, name in enumerate(classes)}
        paths = tree.all_pictures()
        places = [path.relative_to(tree.path).parts for path in paths]
        labels = [number[place[0]] if len(place) > 1 else -1 for place in places]
        sources = [readable(path.relative_to(self.root).as_posix()) for path in paths]
        return ExampleSet(Pictures(paths, self._prepare), torch.tensor(labels), np.array(sources, object))

    def _prepare(self, picture: Image.Image) -> Image.Image:
        channels, size, _ = self.example_shape
        return ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (size, size))


class CelebA(ExampleData):
    """Reads CelebA's faces in colour, 64x64: the 162 770 training images, and the test set's 19 962 held out.

    The pictures are aligned and cropped faces of celebrities. Of the 178 x 218 pixels the central 140 x 140 are taken
    and resized, as in "Wasserstein Auto-Encoders". There are no labels. An image takes 12 288 bytes of memory: 2.0 GB
    for training and 245 MB held out. With train_size only that many training images are read.

    Args:
        root: a folder with the folder img_align_celeba and the file list_eval_partition.txt or .csv (beside the folder,
            in it, or in Eval/), or with a folder celeba/ or Img/ that has them. Without the file one in ten images is
            held out, drawn by the seed. `~` and environment variables are expanded.
        keep_in_memory: as in `ImageFolder`.
        kwargs: as in `ExampleData`.

    Raises:
        FileNotFoundError: if there is no such folder, or a picture is not there.
        ValueError: if a picture or a line of the file cannot be read, a picture has another size, and in the cases of
            `ExampleData`.

    Source: Liu, Luo, Wang, Tang, "Deep Learning Face Attributes in the Wild" (2015); the crop: Tolstikhin, Bousquet,
    Gelly, Schoelkopf, "Wasserstein Auto-Encoders", https://arxiv.org/abs/1711.01558.

    Example:
        >>> from kdejsd.data import CelebA
        >>> data = CelebA("~/data", train_size=10_000)
        >>> len(data.training), len(data.held_out)  # doctest: +SKIP
        (10000, 19962)
    """

    example_shape = (3, 64, 64)
    crop: ClassVar[tuple[int, int, int, int]] = (19, 39, 159, 179)
    how_to_get: ClassVar[str] = (
        "to get it: unpack img_align_celeba.zip (Align&Cropped Images) from "
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    )

    def __init__(self, root: str | os.PathLike[str], keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = folder_of(root)
        self.keep_in_memory = keep_in_memory

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        folder = find(
            self, self.root, ("", "celeba", "Img", "celeba/Img"), ("img_align_celeba",), self.how_to_get, Path.is_dir
        )
        beside = [folder.parent, folder, folder.parent.parent / "Eval"]
        if (folder / folder.name).is_dir():  # as Kaggle's copy is unpacked
            folder = folder / folder.name
            beside.append(folder)
        found = sorted(name for name in os.listdir(folder) if name.endswith(".jpg") and not name.startswith("."))
        if len(found) < 2:
            raise FileNotFoundError(f"CelebA needs pictures (.jpg) in {folder}, found {len(found)}; {self.how_to_get}")
        partitions = [place / f"list_eval_partition.{suffix}" for place in beside for suffix in ("txt", "csv")]
        partition = next((path for path in partitions if path.is_file()), None)
        if partition is None:
            note(self, f"{len(found)} pictures in {folder}, and no list_eval_partition: one in ten is held out")
            return self._split(self._pictures(folder, found), held_out=0.1)
        names = self._partition(partition)
        unknown = len(set(found).difference(*names.values()))
        note(
            self,
            f"{len(names['0'])} pictures to train on and {len(names['2'])} held out in {folder}, by {partition}; "
            f"left out: {len(names['1'])} for validation" + (f", {unknown} that it does not name" if unknown else ""),
        )
        return self._pictures(folder, names["0"]), self._pictures(folder, names["2"])

    def _partition(self, path: Path) -> dict[str, list[str]]:
        """Returns the names of the pictures for training ("0"), validation ("1") and test ("2")."""
        names: dict[str, list[str]] = {"0": [], "1": [], "2": []}
        for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
            fields = line.replace(",", " ").split()
            if number == 1 and fields == ["image_id", "partition"]:
                continue
            if len(fields) != 2 or fields[1] not in names:
                raise ValueError(
                    f"{path} is damaged: expected a picture's name and 0, 1 or 2 in line {number}, found {line[:80]!r}"
                )
            names[fields[1]].append(fields[0])
        if not names["0"] or not names["2"]:
            raise ValueError(f"{path} is damaged: expected pictures for training (0) and for the test (2), found none")
        return names

    def _pictures(self, folder: Path, names: list[str]) -> ExampleSet:
        pictures = Pictures([folder / name for name in names], self._prepare, f"; {self.how_to_get}")
        sources = np.array([readable(name) for name in names], object)
        return ExampleSet(pictures, torch.full((len(names),), -1), sources)

    def _prepare(self, picture: Image.Image) -> Image.Image:
        if picture.size != (178, 218):
            raise ValueError(f"it should have 178 x 218 pixels and has {picture.size[0]} x {picture.size[1]}")
        return picture.convert("RGB").crop(self.crop).resize((64, 64), Image.Resampling.BICUBIC)
