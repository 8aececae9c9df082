"""The data modules: what they give out, in which order, and what they say about files that are missing or damaged."""

import enum
import fractions
import gzip
import io
import itertools
import math
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import generator
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from scipy.io import savemat

from kdejsd import StandardNormal, plots
from kdejsd._plain import plain
from kdejsd.data import (
    MNIST,
    SVHN,
    CelebA,
    Digits,
    ExampleData,
    ExampleSet,
    FashionMNIST,
    Grid2D,
    ImageFolder,
    StoredExamples,
    files,
)
from kdejsd.models import built

FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, compressed: bool, counts=(30, 12)) -> dict[str, np.ndarray]:
    """Small idx files; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in zip(("train", "t10k"), counts, strict=True):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (count, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = random.integers(0, 10, count)
    for name, array in arrays.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def write_svhn(folder, counts=(30, 12)) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Small .mat files; returns the images [n, 32, 32, 3] and labels (1 to 10) that they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in zip(("train", "test"), counts, strict=True):
        images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = 1 + np.arange(count, dtype=np.uint8) % 10
        savemat(folder / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]})
        arrays[part] = images, labels
    return arrays


def write_celeba(folder, count=12, partition=True) -> None:
    """Pictures that are grey outside of the central 140 x 140 pixels and have a red that tells their number inside."""
    (folder / "img_align_celeba").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture = Image.new("RGB", (178, 218), (128, 128, 128))
        picture.paste((20 * number, 0, 255), (19, 39, 159, 179))
        picture.save(folder / "img_align_celeba" / f"{number + 1:06}.jpg", quality=95, subsampling=0)
    if partition:
        lines = [f"{n + 1:06}.jpg {0 if n < count - 5 else 1 if n < count - 3 else 2}\n" for n in range(count)]
        (folder / "list_eval_partition.txt").write_text("".join(lines))


def whole(loader) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def test_digits():
    data = Digits()
    assert len(data.training) == 1438 and len(data.held_out) == 359
    images, labels, index = whole(data.val_dataloader())
    assert images.shape == (359, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.unique().tolist() == list(range(10))
    assert index.tolist() == list(range(359))
    both = torch.cat([data.training.examples, data.held_out.examples]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # no digit is in both parts
    other = Digits(seed=1)
    assert not torch.equal(other.held_out.examples, data.held_out.examples)


def test_batches_are_shuffled_by_seed_and_epoch():
    def order(seed, epoch):
        loader = Digits(train_size=300, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return whole(loader)[2].tolist()

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == sorted(order(3, 1)) == list(range(300))
    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(o) for o in orders}) == 9


def test_the_last_batch_of_training_is_whole_and_of_validation_is_not():
    data = Digits(batch_size=64)
    assert [len(batch[0]) for batch in data.train_dataloader()] == [64] * (1438 // 64)
    assert len(data.train_dataloader()) == 22 and len(data.val_dataloader()) == 1


def test_train_size_is_a_subset_drawn_by_the_seed():
    def images(seed):
        return {image.numpy().tobytes() for image in Digits(train_size=200, seed=seed).training.examples}

    assert len(images(0)) > 190 and images(0) == images(0)
    assert images(0) != images(1)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("kind", "below"), [(MNIST, ""), (MNIST, "mnist"), (FashionMNIST, "fashion-mnist")])
def test_idx_files(tmp_path, compressed, kind, below):
    arrays = write_mnist(tmp_path / below, compressed)
    data = kind(str(tmp_path), batch_size=10)
    images, labels, index = data.training[torch.tensor([3, 7])]
    expected = torch.from_numpy(arrays["train-images-idx3-ubyte"])[[3, 7], None].float() / 255
    assert torch.equal(images, expected)
    assert labels.tolist() == arrays["train-labels-idx1-ubyte"][[3, 7]].tolist()
    assert index.tolist() == [3, 7]
    assert torch.equal(whole(data.val_dataloader())[1], torch.from_numpy(arrays["t10k-labels-idx1-ubyte"]))


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("below", "dotted"), [("raw", False), ("NAME/raw", False), ("", True)])
def test_idx_files_as_others_lay_them_out(tmp_path, kind, compressed, below, dotted):
    """torchvision's folders, and the names that some programs unpack to."""
    folder = tmp_path / below.replace("NAME", kind.__name__)
    arrays = write_mnist(folder, compressed)
    if dotted:
        for path in list(folder.iterdir()):
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
            (folder / path.name).mkdir()  # Kaggle's copy of MNIST has folders of these names beside the files
    data = kind(str(tmp_path), batch_size=10)
    assert data.held_out.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    path = next(path for path in folder.rglob("t10k-images*") if path.is_file())
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*: curl -O .*/t10k-images-idx3-ubyte\.gz"):
        kind(str(tmp_path), batch_size=10).setup()


@pytest.mark.parametrize("name", FILES)
def test_missing_file(tmp_path, name):
    write_mnist(tmp_path, compressed=True)
    (tmp_path / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        MNIST(str(tmp_path)).setup()
    text = str(error.value)
    names = [form + end for form in (name, name.replace("-idx", ".idx")) for end in (".gz", "")]
    places = [str(tmp_path / folder) for folder in ("", "mnist", "MNIST/raw", "raw")]
    assert f"needs {' or '.join(names)}, which is in none of {', '.join(places)}. Name its folder with --data" in text
    assert f"to get it: curl -O https://storage.googleapis.com/cvdf-datasets/mnist/{name}.gz" in text


def in_folder(root) -> list[ExampleData]:
    return [kind(root) for kind in (MNIST, FashionMNIST, SVHN, CelebA, ImageFolder)]


def test_a_root_is_expanded_and_kept_as_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path / "sets"))
    for root, place in (("~/x", "x"), ("$SETS/y", "sets/y"), ("~/${NOT_SET}", "${NOT_SET}"), (tmp_path, "")):
        for data in in_folder(root):
            assert data.root == tmp_path / place
            assert data.hparams["root"] == str(root) and type(data.hparams["root"]) is str
    write_mnist(tmp_path / "x", compressed=True)
    assert len(MNIST("~/x", batch_size=10).training) == 30


@pytest.mark.parametrize(
    ("root", "error", "text"),
    [
        ("", ValueError, "root must name a folder, got ''"),  # "$DATA" of a shell in which DATA is not set
        (5, TypeError, "root must be the path of a folder, got 5"),
        (b"x", TypeError, "root must be a plain value, .*, got bytes"),
        (None, TypeError, "root must be the path of a folder, got None"),
    ],
)
def test_a_root_that_is_no_folder(root, error, text):
    for kind in (MNIST, FashionMNIST, SVHN, CelebA, ImageFolder):
        with pytest.raises(error, match=text):
            kind(root)
    for kind, name in ((MNIST, "train-images.*"), (SVHN, "train_32x32.mat"), (CelebA, "img_align_celeba")):
        with pytest.raises(
            FileNotFoundError, match=rf"needs {name}, and there is no folder {Path.cwd()}/no/where\. Name"
        ):
            kind("no/where").setup()


class Colour(str, enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (np.True_, True),
        (3, 3),
        (np.int64(3), 3),
        (np.array(3, np.uint8), 3),
        (torch.tensor(3), 3),
        (0.5, 0.5),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (fractions.Fraction(1, 2), 0.5),
        (np.str_("a"), "a"),
        (Colour.RED, "red"),
        (Path("a/b"), "a/b"),
        ((np.int64(1), [np.float64(2.0)], {np.str_("a"): Path("b")}), (1, [2.0], {"a": "b"})),
    ],
)
def test_plain_values(value, expected):
    def types(found):
        items = found.items() if isinstance(found, dict) else found if isinstance(found, (tuple, list)) else ()
        return type(found), [types(item) for item in items]

    assert plain(value, "x") == expected and types(plain(value, "x")) == types(expected)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1j, "complex"),
        (np.complex64(1), "complex64"),
        (torch.ones(2), r"Tensor of shape \[2\]"),
        (np.ones((2, 1)), r"ndarray of shape \[2, 1\]"),
        ([torch.ones(2)], "Tensor"),
        (b"x", "bytes"),
        ({1, 2}, "set"),
        (len, "builtin_function_or_method"),
        (np.datetime64("2020"), "datetime64"),
    ],
)
def test_values_that_no_checkpoint_can_hold(value, kind):
    with pytest.raises(TypeError, match=f"size must be a plain value, .*, got {kind}"):
        plain(value, "size")


def test_settings_become_plain_values(tmp_path):
    folder = ImageFolder(
        tmp_path,
        size=np.int64(8),
        channels=np.array(1),
        held_out=np.float64(0.5),
        batch_size=np.int32(4),
        train_size=torch.tensor(5),
        labelled_size=np.int64(3),
        seed=np.uint8(1),
    )
    grid = Grid2D(np.int64(1), np.int64(300), np.float32(0.5), np.int64(20))
    for data in (folder, grid):
        torch.save(dict(data.hparams), tmp_path / "settings.pt")
        assert torch.load(tmp_path / "settings.pt", weights_only=True) == data.hparams
        assert type(data.batch_size) is int and type(data.seed) is int
        state = data.train_dataloader().state_dict() if data is grid else {}
        assert {type(value) for value in state.values()} <= {int}
    assert [type(value) for value in folder.example_shape] == [int] * 3
    with pytest.raises(TypeError, match=r"train_size must be an integer, got \{300\} of type set"):
        Digits(train_size={300})


def test_what_a_subclass_takes_beside_settings_is_left_out_of_checkpoints():
    class Of(ExampleData):
        def __init__(self, images, scale, **kwargs):
            super().__init__(**kwargs)

    settings = {"train_size": None, "labelled_size": None, "seed": 3, "scale": 2.0}
    assert Of(torch.ones(5, 1, 8, 8), np.float64(2), seed=3).hparams == settings


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        (FILES[0], lambda b: struct.pack(">I", 2049) + b[4:], "expected the magic number 2051, found 2049"),
        (FILES[1], lambda b: b"<html>" + b[6:], "expected the magic number 2049, found 1013478509"),
        (FILES[0], lambda b: b[:-1], r"expected 23536 bytes for sizes \[30, 28, 28\], found 23535 bytes"),
        (FILES[2], lambda b: b + b"0", r"expected 9424 bytes for sizes \[12, 28, 28\], found 9425 bytes"),
        (FILES[3], lambda b: b"", "expected at least the 8 bytes of an idx header, found 0 bytes"),
        (FILES[1], lambda b: idx(np.zeros(29)), "expected 30 labels, one per image of train-images.*, found 29"),
        (FILES[0], lambda b: idx(np.zeros((30, 14, 14))), "expected images of 28 x 28 pixels, found 14 x 14"),
    ],
)
def test_damaged_file(tmp_path, name, damage, text):
    write_mnist(tmp_path, compressed=False)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is damaged: {text}; to get it: curl -O"):
        MNIST(str(tmp_path)).setup()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not gzip", lambda b: b[:20] + b"x" * 40])
def test_damaged_gzip(tmp_path, damage):
    write_mnist(tmp_path, compressed=True)
    path = tmp_path / f"{FILES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: expected a whole gzip file, found"):
        MNIST(str(tmp_path)).setup()


def test_image_folder(tmp_path):
    for place, (name, color) in enumerate(
        [("b/red.png", (255, 0, 0)), ("a/blue.JPG", (0, 0, 255)), ("green.bmp", (0, 255, 0))]
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + 10 * place, 30), color).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    data = ImageFolder(str(tmp_path), size=16, held_out=0.3, batch_size=2)
    assert data.example_shape == (3, 16, 16)
    assert len(data.training) == 2 and len(data.held_out) == 1
    images = torch.cat([data.training[torch.arange(2)][0], data.held_out[torch.arange(1)][0]])
    labels = torch.cat([data.training.labels, data.held_out.labels])
    means = images.mean((2, 3))
    for label, channel in ((0, 2), (1, 0), (-1, 1)):  # subfolder a is class 0, b is 1; no subfolder is no class
        mean = means[labels == label][0]
        assert mean.argmax() == channel and mean.max() > 0.95
    assert data.class_names == ["a", "b"]
    sources = {-1: "green.bmp", 0: "a/blue.JPG", 1: "b/red.png"}
    for part in (data.training, data.held_out):
        assert part.sources.tolist() == [sources[label] for label in part.labels.tolist()]
    again = ImageFolder(str(tmp_path), size=16, held_out=0.3, batch_size=2)
    assert torch.equal(again.held_out.examples, data.held_out.examples)
    grey = ImageFolder(str(tmp_path), size=8, channels=1, batch_size=1)
    assert grey.training.examples.shape == (2, 1, 8, 8)


def test_names_of_folders_that_are_no_text_can_be_shown(tmp_path):
    for name in (b"K\xf6ln", b"two\nlines"):
        folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        os.mkdir(folder)
        for number in range(2):
            Image.new("L", (4, 4)).save(os.path.join(folder, f"{number}.png"))
    data = ImageFolder(tmp_path, size=4, batch_size=1, held_out=0.5)
    assert data.class_names == ["K\\xf6ln", "two\\nlines"]
    sources = [*data.training.sources, *data.held_out.sources]
    assert sorted(sources) == ["K\\xf6ln/0.png", "K\\xf6ln/1.png", "two\\nlines/0.png", "two\\nlines/1.png"]
    figure = plots.latent(torch.randn(4, 2), torch.arange(4) % 2, StandardNormal(2), data.class_names)
    figure.draw_without_rendering()


def test_an_example_keeps_its_source(tmp_path):
    class Numbers(StoredExamples):
        def read(self, rows):
            return rows[:, None].float()

    class Drawn(ExampleData):
        example_shape = (1,)

        def load(self):
            return self._split(ExampleSet(Numbers(100), torch.arange(100) % 10), held_out=0.3)

    for in_memory in (True, False):
        data = Drawn(train_size=40, labelled_size=5)
        data.keep_in_memory = in_memory
        for part in (data.training, data.held_out):
            assert part[torch.arange(len(part))][0][:, 0].tolist() == part.sources.tolist()
    assert (data.training.labels >= 0).sum() == 5
    named = ExampleSet(torch.zeros(3, 1), torch.arange(3), ["a", "b", "c"])
    assert named.subset([2, 0]).sources.tolist() == ["c", "a"]
    with pytest.raises(ValueError, match="sources must be one for each of the 3 examples, got 2"):
        ExampleSet(torch.zeros(3, 1), torch.arange(3), torch.arange(2))


def test_image_folder_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs a folder of pictures, and .*nowhere is none"):
        ImageFolder(str(tmp_path / "nowhere")).setup()
    with pytest.raises(FileNotFoundError, match=r"needs at least two pictures .* found 0"):
        ImageFolder(str(tmp_path)).setup()


def tiff(values, white_is_zero: bool = False, signed: bool = False, bits: int | None = None) -> bytes:
    """A picture of 2 x 2 pixels of the values' own kind, in their byte order."""
    order = "<" if values.dtype.newbyteorder("=") == values.dtype else ">"
    content = values.tobytes()
    tags = {
        **{256: 2, 257: 2, 258: bits or 8 * values.itemsize, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1},
        **{278: 2, 279: len(content), 339: 2 if signed else 3 if values.dtype.kind == "f" else 1},
    }
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return start + content + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def saved(picture: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **settings)
    return stream.getvalue()


def of(mode: str, *pixels, palette=()) -> Image.Image:
    picture = Image.new(mode, (2, 2))
    if palette:
        picture.putpalette(palette)
    for place, pixel in enumerate(pixels):
        picture.putpixel((place % 2, place // 2), pixel)
    return picture


def as_read(folder, content: bytes, channels: int, size: int = 2) -> torch.Tensor:
    """Returns what ImageFolder makes of a file: [channels, size, size]."""
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(content)
    return ImageFolder(folder, size=size, channels=channels, batch_size=1).training.examples[0]


GREY = np.array([[65535, 40000], [300, 0]])
PALETTE = (255, 0, 0, 0, 0, 255)
SIXTEEN = [255, 156, 1, 0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (saved(Image.fromarray(GREY.astype(np.uint16)), "png"), SIXTEEN),
        (saved(Image.fromarray(GREY.astype(np.uint16)), "png", transparency=40000), [255, 255, 1, 0]),
        (saved(Image.fromarray(GREY.astype(np.uint16)), "ppm"), SIXTEEN),
        (saved(Image.fromarray(GREY.astype(np.uint16)), "tiff", compression="tiff_lzw"), SIXTEEN),
        (tiff(GREY.astype("<u2")), SIXTEEN),
        (tiff(GREY.astype(">u2")), SIXTEEN),
        (tiff(GREY.astype("<u2"), white_is_zero=True), [0, 99, 254, 255]),
        (tiff(np.frombuffer(bytes([0xFF, 0xF8, 0x00, 0x01, 0x00, 0x00]), np.uint8), bits=12), [255, 128, 1, 0]),
        (tiff(np.array([1, 0.5, 0.2, 0], "<f4")), [255, 128, 51, 0]),
        (tiff(np.array([1, 0.5, 0.2, 0], ">f4")), [255, 128, 51, 0]),
        (tiff(np.array([1, 0.5, 0.2, 0], "<f4"), white_is_zero=True), [0, 128, 204, 255]),
        (saved(of("1", 1, 0, 0, 1), "png"), [255, 0, 0, 255]),
        (saved(of("LA", (0, 255), (0, 0), (0, 51), (200, 255)), "png"), [0, 255, 204, 200]),
        (saved(of("LA", (0, 255), (0, 0), (0, 51), (200, 255)), "tiff"), [0, 255, 204, 200]),
        (saved(of("L", 7, 8, 9, 10), "png", transparency=8), [7, 255, 9, 10]),
    ],
    ids=itertools.count(),
)
def test_grey_is_read_by_its_own_range(tmp_path, content, expected):
    assert as_read(tmp_path, content, 1).flatten().tolist() == expected
    assert as_read(tmp_path, content, 3).tolist() == [torch.tensor(expected).reshape(2, 2).tolist()] * 3


WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (saved(of("RGBA", (200, 0, 0, 0), (200, 0, 0, 255), (*RED, 51), (0, 0, 0, 0)), "png"),
         [WHITE, (200, 0, 0), (255, 204, 204), WHITE]),
        (saved(of("RGBA", (200, 0, 0, 0), (*BLUE, 255)), "webp", lossless=True), [WHITE, BLUE, WHITE, WHITE]),
        (saved(of("RGB", RED, BLUE), "png", transparency=RED), [WHITE, BLUE, (0, 0, 0), (0, 0, 0)]),
        (saved(of("P", 0, 1, 1, 0, palette=PALETTE), "png"), [RED, BLUE, BLUE, RED]),
        (saved(of("P", 0, 1, 1, 0, palette=PALETTE), "png", transparency=0), [WHITE, BLUE, BLUE, WHITE]),
        (saved(of("P", 0, 1, 1, 0, palette=PALETTE), "png", transparency=bytes([51, 255])),
         [(255, 204, 204), BLUE, BLUE, (255, 204, 204)]),
        (saved(of("P", 0, 1, 1, 0, palette=PALETTE), "gif", transparency=0), [WHITE, BLUE, BLUE, WHITE]),
        (saved(of("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), "tiff"), [(0, 255, 255), (0, 0, 0), WHITE, WHITE]),
        (saved(Image.new("RGB", (2, 2), RED), "gif", save_all=True, append_images=[Image.new("RGB", (2, 2), BLUE)]),
         [RED] * 4),
        (saved(Image.new("RGB", (2, 2), RED), "tiff", save_all=True, append_images=[Image.new("RGB", (2, 2), BLUE)]),
         [RED] * 4),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_colour_is_read_as_it_is_seen(tmp_path, content, expected):
    """Transparent is white, and of several frames the first one is taken."""
    assert as_read(tmp_path, content, 3).flatten(1).T.tolist() == [list(pixel) for pixel in expected]


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (1, 1)), (6, (0, 1)), (8, (1, 0)), (2, (0, 1))])
def test_pictures_are_turned_upright(tmp_path, kind, orientation, corner):
    picture = Image.new("L", (16, 16))
    picture.paste(255, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = as_read(tmp_path, saved(picture, kind, exif=exif), 1, size=16)[0].float()
    quarters = torch.nn.functional.avg_pool2d(read[None], 8)[0]
    assert quarters[corner] > 250 and quarters.sum() < 260


def test_exif_data_that_are_damaged_do_no_harm(tmp_path):
    content = saved(Image.new("L", (2, 2), 100), "jpeg", exif=b"Exif\0\0rubbish")
    assert as_read(tmp_path, content, 1).flatten().tolist() == [100] * 4


def large_png() -> bytes:
    """The beginning of a picture of 200 megapixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 20_000, 10_000, 8, 0, 0, 0, 0), b"IDAT")
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no picture", "is no picture in any format that Pillow reads"),
        (b"", "is no picture in any format that Pillow reads"),
        (saved(Image.new("RGB", (99, 99)), "jpeg")[:-50], "cannot be read: image file is truncated"),
        (saved(Image.effect_noise((99, 99), 9), "png")[:-500], "cannot be read: .*truncated"),
        (large_png(), r"cannot be read: Image size \(200000000 pixels\) exceeds limit"),
        (tiff(np.array([255, 0.5, 0, 0], "<f4")), "cannot be read: its values must be from 0 to 1, .* from 0 to 255"),
        (tiff(np.array([0.5, -1, 0, 0], "<f4")), "cannot be read: its values must be from 0 to 1, .* from -1 to 0.5"),
        (tiff(np.array([0.5, np.nan, 0, 0], "<f4")), "cannot be read: its values must be from 0 to 1, .* nan to nan"),
        (tiff(GREY.astype("<u4")), "cannot be read: it has integers of 32 bits"),
        (tiff(GREY.astype("<u4"), signed=True), "cannot be read: it has signed integers"),
        (tiff(GREY.astype("<u2"), signed=True), "cannot be read: it has signed integers"),
        (tiff(GREY.astype(np.uint8), signed=True), "cannot be read: it has signed integers"),
    ],
    ids=itertools.count(),
)
def test_pictures_that_are_refused(tmp_path, content, text):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/b\.png {text}") as error:
        ImageFolder(str(tmp_path), batch_size=1).setup()
    assert "\n" not in str(error.value)


def test_a_picture_that_the_system_cannot_read(tmp_path, monkeypatch):
    def refused(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(PermissionError, match=r"the picture .*\.png cannot be read: Permission denied"):
        ImageFolder(str(tmp_path), batch_size=1).setup()


def with_damaged_exif() -> bytes:
    picture = Image.new("RGB", (8, 8))
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x09\0\0\0")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "Image size .64 pixels. exceeds limit of 50 pixels"), (with_damaged_exif(), "Corrupt EXIF data")],
)
def test_what_pillow_warns_of_a_picture_has_its_name(tmp_path, monkeypatch, content, text):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 if content is None else 1000)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8) if name == "a.jpg" else (4, 4)).save(tmp_path / name)
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.warns(UserWarning if content else Image.DecompressionBombWarning, match=text) as said:
        ImageFolder(tmp_path, batch_size=1).setup()
    assert {str(warning.message).split(":")[0] for warning in said} == {f"the picture {tmp_path}/a.jpg"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning if content is None else UserWarning)
        ImageFolder(tmp_path, batch_size=1).setup()


def write_pictures(root, **counts: int) -> None:
    """Grey pictures in folders, by their paths; a picture's value is its folder's place."""
    for place, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("L", (4, 4), 10 * place).save(root / folder / f"{number}.png")


def found_by(capsys, root, **settings) -> tuple[list[tuple[int, int]], list[tuple[int, int]], str]:
    """(value, label) of the pictures trained on and held out, and what is said."""
    data = ImageFolder(root, size=2, channels=1, batch_size=1, **settings)
    parts = [
        sorted(zip(part.examples[:, 0, 0, 0].tolist(), part.labels.tolist(), strict=True))
        for part in (data.training, data.held_out)
    ]
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ImageFolder: ") and err.count("\n") == 1 and err.endswith("\n")
    return parts[0], parts[1], err.removeprefix("ImageFolder: ").strip()


def test_what_is_hidden_is_left_out(tmp_path, capsys):
    write_pictures(
        tmp_path, **{".ipynb_checkpoints": 1, "__MACOSX/b": 1, "b": 2, "a": 2, "c": 0, "b/.cache": 1, "b/d.png": 1}
    )
    (tmp_path / "b" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "notes.TXT").touch()
    (tmp_path / "a" / "x.heic").touch()
    (tmp_path / "a" / "y.heic").touch()
    Image.new("L", (4, 4), 200).save(tmp_path / "b" / "deeper.png")
    training, held_out, said = found_by(capsys, tmp_path)
    assert sorted(training + held_out) == [(20, 1), (20, 1), (30, 0), (30, 0), (60, 1), (200, 1)]
    assert said == (
        f"6 pictures in {tmp_path}; classes: a 2, b 4; left out: 1 folder without pictures (c); "
        "5 hidden or of the system (.DS_Store, .ipynb_checkpoints, __MACOSX, b/._0.png, b/.cache); "
        "3 files of other kinds (2 .heic, 1 .txt)"
    )


def test_what_was_found_is_said_once_and_in_short(tmp_path, capsys, monkeypatch):
    write_pictures(tmp_path, **{f"{number}": 1 for number in range(12)})
    Image.new("L", (4, 4), 200).save(tmp_path / "at_the_root.png")
    training, held_out, said = found_by(capsys, tmp_path)
    names = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7"]  # classes in the order of their names as text
    assert {label: value for value, label in training + held_out}[2] == 100
    assert said == (
        f"13 pictures in {tmp_path}; classes: {', '.join(f'{name} 1' for name in names)} and 2 more; without a class: 1"
    )
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    ImageFolder(tmp_path, batch_size=1).setup()
    assert capsys.readouterr().err == ""


def test_links_are_followed(tmp_path, capsys):
    write_pictures(tmp_path, **{"elsewhere/x": 2, "root/a": 2})
    root = tmp_path / "root"
    (root / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "a" / "again.png").symlink_to(root / "a" / "0.png")
    training, held_out, said = found_by(capsys, root)
    assert sorted(training + held_out) == [(0, 1), (0, 1), (10, 0), (10, 0), (10, 0)]
    assert said == f"5 pictures in {root}; classes: a 3, b 2"


@pytest.mark.parametrize(
    ("link", "target", "error", "text"),
    [
        ("a/loop", "..", ValueError, "a/loop is a link to a folder that it is in"),
        ("loop", ".", ValueError, "loop is a link to a folder that it is in"),
        ("b/to_c", "../c", ValueError, "b/to_c/to_b is a link to a folder that it is in"),
        ("d", "nowhere", FileNotFoundError, "d is a link to nowhere, which is not there"),
        ("d.png", "nowhere.png", FileNotFoundError, r"d\.png is a link to nowhere\.png, which is not there"),
        ("self", "self", FileNotFoundError, "self is a link to self, which is not there"),
    ],
)
def test_links_that_are_refused(tmp_path, link, target, error, text):
    write_pictures(tmp_path, a=2, b=1, c=1)
    (tmp_path / link).symlink_to(target)
    if link == "b/to_c":
        (tmp_path / "c/to_b").symlink_to("../b")
    with pytest.raises(error, match=f"{tmp_path}/{text}"):
        ImageFolder(tmp_path, batch_size=1).setup()


def test_a_folder_that_the_system_cannot_read(tmp_path, monkeypatch):
    def refused(path):
        if path.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    write_pictures(tmp_path, a=2, b=2)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match=f"the folder {tmp_path}/a cannot be read: Permission denied"):
        ImageFolder(tmp_path, batch_size=1).setup()


@pytest.mark.parametrize("first", ["train", "Training"])
@pytest.mark.parametrize("other", ["val", "VALID", "validation", "test", "Testing"])
def test_a_split_is_understood(tmp_path, capsys, first, other):
    write_pictures(
        tmp_path, **{f"{first}/a": 3, f"{first}/b": 2, f"{other}/a/deep": 1, f"{other}/b": 1, f"{other}/.x": 1}
    )
    (tmp_path / "labels.csv").touch()
    training, held_out, said = found_by(capsys, tmp_path)
    assert training == [(0, 0)] * 3 + [(10, 1)] * 2 and held_out == [(20, 0), (30, 1)]
    assert said == (
        f"5 pictures to train on in {tmp_path}/{first}, 2 held out in {tmp_path}/{other}; classes: a 4, b 3; left out: "
        f"1 hidden or of the system ({other}/.x); 1 file of other kinds (1 .csv)"
    )


def test_of_two_parts_to_hold_out_the_validation_is_taken(tmp_path, capsys):
    write_pictures(tmp_path, **{"train": 2, "val": 2, "test": 3, "more": 0, "train/empty": 0})
    training, held_out, said = found_by(capsys, tmp_path)
    assert training == [(0, -1)] * 2 and held_out == [(10, -1)] * 2
    assert said == (
        f"2 pictures to train on in {tmp_path}/train, 2 held out in {tmp_path}/val; no classes; "
        "left out: 3 pictures in neither part (test); 2 folders without pictures (more, train/empty)"
    )


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"train/a": 2, "train/b": 1, "val/a": 1}, "same classes, and .*/val has none of b: .*--data.root=.*/train"),
        ({"train/a": 2, "val/a": 1, "val/c": 1}, "same classes, and .*/train has none of c"),
        ({"train/a": 2, "test": 1}, "same classes, and .*/test has none of a"),
        ({"train/a": 2, "train/b": 2, "val": 0}, "hold both parts .* has train: .*--data.root=.*/train"),
        ({"test/a": 2, "valid/a": 2}, "hold both parts of a split, train or training and val or .* has test, valid"),
        ({"data/train/a": 2, "data/val/a": 2}, "the split is in .*/data: name that folder with --data.root"),
        ({"bottle/train/a": 2, "bottle/test/a": 2, "nut/train/a": 2}, "the split is in .*/bottle: name that"),
    ],
)
def test_splits_that_are_refused(tmp_path, counts, text):
    write_pictures(tmp_path, **counts)
    with pytest.raises(ValueError, match=text):
        ImageFolder(tmp_path, batch_size=1).setup()


@pytest.mark.parametrize("names", [("car", "train"), ("car", "test", "train"), ("Train", "bus", "car", "val")])
def test_a_class_may_have_the_name_of_a_part(tmp_path, capsys, names):
    write_pictures(tmp_path, **dict.fromkeys(names, 2))
    training, held_out, said = found_by(capsys, tmp_path)
    assert sorted(training + held_out) == sorted(2 * [(10 * label, label) for label in range(len(names))])
    assert said.endswith(f"classes: {', '.join(f'{name} 2' for name in names)}")


def test_folders_of_classes_named_as_parts_are_no_split_elsewhere(tmp_path, capsys):
    write_pictures(tmp_path, **{"car/test": 1, "car/train": 1, "car/road": 1, "bus": 1})
    training, held_out, _ = found_by(capsys, tmp_path)
    assert sorted(training + held_out) == [(0, 1), (10, 1), (20, 1), (30, 0)]


@pytest.mark.parametrize("below", ["", "svhn"])
def test_svhn(tmp_path, below):
    arrays = write_svhn(tmp_path / below)
    data = SVHN(str(tmp_path), batch_size=10)
    assert data.example_shape == (3, 32, 32) and data.training.examples.dtype == torch.uint8
    for part, held in (("train", data.training), ("test", data.held_out)):
        images, labels, _ = held[torch.arange(len(held))]
        expected, numbers = arrays[part]
        assert torch.equal(images, torch.from_numpy(expected).permute(0, 3, 1, 2).float() / 255)
        assert labels.tolist() == [0 if number == 10 else number for number in numbers]
    assert len(SVHN(str(tmp_path), batch_size=10, train_size=20).training) == 20


@pytest.mark.parametrize("name", ["train_32x32.mat", "test_32x32.mat"])
def test_missing_svhn(tmp_path, name):
    write_svhn(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"SVHN needs {name}, .*--data\.root; to get it: curl -O http://.*{name}"
    ):
        SVHN(str(tmp_path), batch_size=10).setup()


IMAGES, LABELS = np.zeros((32, 32, 3, 5), np.uint8), np.ones((5, 1), np.uint8)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: p.write_bytes(b"<html>not found</html>" * 20), "expected a MATLAB file of version 5 with X and y"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "expected a MATLAB file of version 5 with X and y"),
        (lambda p: p.write_bytes(b""), "expected a MATLAB file of version 5 with X and y"),
        (lambda p: savemat(p, {"X": IMAGES}), r"expected a MATLAB file .*KeyError\('y'\)"),
        (lambda p: savemat(p, {"X": IMAGES[:28, :28], "y": LABELS}), r"bytes X .*, found uint8 .*\[28, 28, 3, 5\]"),
        (lambda p: savemat(p, {"X": IMAGES / 255, "y": LABELS}), "bytes X .*, found float64"),
        (lambda p: savemat(p, {"X": IMAGES, "y": LABELS[:4]}), "expected 5 labels y, one per image, found 4"),
        (lambda p: savemat(p, {"X": IMAGES, "y": 0 * LABELS}), "expected labels y from 1 to 10, found 0 to 0"),
    ],
)
def test_damaged_svhn(tmp_path, damage, text):
    write_svhn(tmp_path)
    damage(tmp_path / "test_32x32.mat")
    with pytest.raises(ValueError, match=rf"test_32x32\.mat is damaged: .*{text}.*; to get it: curl -O http://"):
        SVHN(str(tmp_path), batch_size=10).setup()


@pytest.mark.parametrize("below", ["", "celeba"])
def test_celeba(tmp_path, below):
    write_celeba(tmp_path / below)
    data = CelebA(str(tmp_path), batch_size=2)
    assert data.training.examples.shape == (7, 3, 64, 64) and data.held_out.examples.shape == (3, 3, 64, 64)
    assert data.training.examples.dtype == torch.uint8 and data.training.labels.unique().tolist() == [-1]
    for part, numbers in ((data.training, range(7)), (data.held_out, range(9, 12))):
        for image, number in zip(part.examples.float(), numbers, strict=True):
            # The centre reaches to the very edge, where cutting it a pixel wider would mix in grey.
            expected = torch.tensor([20.0 * number, 0, 255])[:, None, None]
            assert (image - expected).abs().mean() < 3 and (image - expected).abs().max() < 6


@pytest.mark.parametrize(
    ("pictures", "partition"),
    [
        ("img_align_celeba", "list_eval_partition.csv"),
        ("img_align_celeba", "img_align_celeba/list_eval_partition.csv"),
        ("img_align_celeba/img_align_celeba", "list_eval_partition.csv"),  # Kaggle's copy
        ("img_align_celeba/img_align_celeba", "img_align_celeba/list_eval_partition.txt"),
        ("Img/img_align_celeba", "Eval/list_eval_partition.txt"),  # the authors' own
        ("celeba/Img/img_align_celeba", "celeba/Eval/list_eval_partition.txt"),
    ],
)
def test_celeba_uses_its_own_partition(tmp_path, capsys, pictures, partition):
    write_celeba(tmp_path / "made")
    folder, file = tmp_path / pictures, tmp_path / partition
    folder.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "made/img_align_celeba").rename(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (tmp_path / "made/list_eval_partition.txt").read_text().splitlines()[1:]
    if file.suffix == ".csv":
        lines = ["\ufeffimage_id,partition", *(line.replace(" ", ",") for line in lines)]
    file.write_text("\n".join(lines))
    (folder / "._000001.jpg").touch()
    data = CelebA(tmp_path, batch_size=2)
    for part, numbers in ((data.training, range(1, 7)), (data.held_out, range(9, 12))):
        assert [round(float(image[0].float().mean()) / 20) for image in part.examples] == list(numbers)
    assert capsys.readouterr().err == (
        f"CelebA: 6 pictures to train on and 3 held out in {folder}, by {file}; left out: 2 for validation, 1 that it "
        "does not name\n"
    )


def test_celeba_reads_only_what_is_trained_on(tmp_path):
    write_celeba(tmp_path)
    chosen = CelebA(str(tmp_path), batch_size=2, train_size=3, seed=1)
    numbers = [round(float(image[0].float().mean()) / 20) for image in chosen.training.examples]
    assert len(set(numbers)) == 3 and numbers == sorted(numbers)
    for number in set(range(7)) - set(numbers):
        (tmp_path / "img_align_celeba" / f"{number + 1:06}.jpg").write_bytes(b"not to be read")
    again = CelebA(str(tmp_path), batch_size=2, train_size=3, seed=1)
    assert torch.equal(again.training.examples, chosen.training.examples)
    with pytest.raises(ValueError, match="is no picture"):
        CelebA(str(tmp_path), batch_size=2).setup()


def test_celeba_without_a_partition_holds_out_one_in_ten(tmp_path, capsys):
    write_celeba(tmp_path, count=20, partition=False)
    (tmp_path / "img_align_celeba/._000001.jpg").touch()
    data = CelebA(str(tmp_path), batch_size=2)
    assert len(data.training) == 18 and len(data.held_out) == 2
    sources = {*data.training.sources, *data.held_out.sources}
    assert sources == {f"{number:06}.jpg" for number in range(1, 21)}
    folder = tmp_path / "img_align_celeba"
    assert capsys.readouterr().err == (
        f"CelebA: 20 pictures in {folder}, and no list_eval_partition: one in ten is held out\n"
    )
    assert not torch.equal(CelebA(str(tmp_path), batch_size=2, seed=3).held_out.examples, data.held_out.examples)


def test_celeba_refusals(tmp_path):
    def setup():
        CelebA(str(tmp_path), batch_size=2).setup()

    source = r"to get it: unpack img_align_celeba\.zip .*CelebA\.html"
    with pytest.raises(FileNotFoundError, match=rf"CelebA needs img_align_celeba, .*--data\.root; {source}"):
        setup()
    (tmp_path / "img_align_celeba").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"CelebA needs pictures .* found 0; {source}"):
        setup()
    write_celeba(tmp_path)
    picture, partition = tmp_path / "img_align_celeba" / "000003.jpg", tmp_path / "list_eval_partition.txt"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"000003\.jpg cannot be read: .*; {source}"):
        setup()
    Image.new("RGB", (178, 178)).save(picture)
    with pytest.raises(
        ValueError, match=r"000003\.jpg cannot be read: .* 178 x 218 pixels and has 178 x 178; to get it"
    ):
        setup()
    picture.unlink()
    with pytest.raises(FileNotFoundError, match=rf"the picture .*000003\.jpg is missing; {source}"):
        setup()
    partition.write_text("000001.jpg 0\n000002.jpg 3\n")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt is damaged: .* in line 2, found '000002\.jpg 3'"):
        setup()
    partition.write_text("000001.jpg 0\n")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt is damaged: .* found none"):
        setup()


def test_labels_are_hidden_but_for_some_drawn_by_the_seed():
    everything, some = Digits(train_size=500), Digits(train_size=500, labelled_size=120)
    assert torch.equal(some.training.examples, everything.training.examples)
    known = some.training.labels >= 0
    assert int(known.sum()) == 120 and (some.training.labels[~known] == -1).all()
    assert torch.equal(some.training.labels[known], everything.training.labels[known])
    assert torch.equal(some.held_out.labels, everything.held_out.labels)
    other = Digits(train_size=500, labelled_size=120, seed=1)
    assert not torch.equal(other.training.labels >= 0, known)
    assert (Digits(labelled_size=0).training.labels == -1).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Digits(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: Digits(100, train_size=50), "train_size must be at least batch_size = 100, got 50"),
        (lambda: Digits(labelled_size=-1), "labelled_size must be at least 0, got -1"),
        (lambda: Digits(train_size=300, labelled_size=301).setup(), "labelled_size must be at most 300, .* got 301"),
        (lambda: Digits(seed=-1), "seed must be at least 0, got -1"),
        (lambda: Digits(train_size=1439).setup(), "train_size must be at most 1438, .* got 1439"),
        (lambda: Digits(batch_size=1439).setup(), "batch_size must be at most 1438, .* got 1439"),
        (lambda: ImageFolder("x", size=0), "size must be at least 1, got 0"),
        (lambda: ImageFolder("x", channels=4), r"channels must be 1 \(grey\) or 3 \(colour\), got 4"),
        (lambda: ImageFolder("x", held_out=1.0), r"held_out must be above 0 and below 1, got 1\.0"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_batch_of_all_devices_is_no_larger_than_the_training_set():
    data = Digits(batch_size=150, train_size=300)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)
    assert len(data.train_dataloader()) == 1
    data.trainer.world_size = 4
    with pytest.raises(ValueError, match="batch_size must be at most 75, 300 training examples for 4 devices, got 150"):
        data.train_dataloader()


def test_real_mnist():
    root = os.environ.get("KDEJSD_DATA")
    if root is None:
        pytest.skip("set KDEJSD_DATA to the folder that holds mnist/ to test with the real files")
    data = MNIST(root, train_size=10_000)
    assert len(data.training) == 10_000 and len(data.held_out) == 10_000
    assert data.held_out.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    images, _, _ = data.held_out[torch.arange(10_000)]
    assert images.mean().item() == pytest.approx(0.1325, abs=1e-4)


def test_grid_has_the_law_of_its_modes():
    data = Grid2D(1, 200_000, held_out=0.25)
    assert len(data.training) == 150_000 and len(data.held_out) == 50_000
    images, labels, _ = data.training[torch.arange(150_000)]
    assert images.shape == (150_000, 2) and images.dtype == torch.float32 and data.example_shape == (2,)
    expected = [[x, y] for y in (-2.0, 0.0, 2.0) for x in (-2.0, 0.0, 2.0)]
    assert data.modes.tolist() == expected and labels.unique().tolist() == list(range(9))
    counts = labels.bincount()
    assert (((counts - 150_000 / 9) / math.sqrt(150_000 / 9)).abs() < 4).all()
    for label in range(9):
        points = images[labels == label].double()
        error = 0.05 / math.sqrt(len(points))
        assert ((points.mean(0) - data.modes[label]).abs() < 4 * error).all()
        assert ((points.T.cov() - 0.0025 * torch.eye(2)).abs() < 5 * 0.0025 * math.sqrt(2 / len(points))).all()
    assert torch.equal(data.classify(images), labels)  # no point is 20 standard deviations away
    assert len(torch.cat([data.training.examples, data.held_out.examples]).flatten(1).unique(dim=0)) > 199_000
    assert torch.equal(Grid2D(1, 200_000, held_out=0.25).training.examples, data.training.examples)
    assert not torch.equal(Grid2D(1, 200_000, held_out=0.25, seed=1).training.examples, data.training.examples)
    assert len(Grid2D(3, 100).modes) == 49 and Grid2D(0, 100).modes.tolist() == [[0.0, 0.0]]
    assert len(Grid2D(train_size=500, batch_size=100).training) == 500


def test_the_classifier_of_a_grid_gives_the_posterior_of_the_modes():
    data = Grid2D(1, 100)
    points = torch.rand(50, 2, generator=generator()).double() * 6 - 3
    parts = torch.distributions.Normal(data.modes.double()[None], 0.05).log_prob(points[:, None]).sum(2)
    torch.testing.assert_close(data.classifier()(points).log_softmax(1), parts.log_softmax(1))
    assert data.logits(points.float()).dtype == torch.float32
    assert torch.equal(data.classify(points + 100), torch.full((50,), 8))
    with pytest.raises(ValueError, match=r"points must have shape \[n, 2\], got \[4, 3, 1, 1\]"):
        data.logits(torch.zeros(4, 3, 1, 1))


def test_measures_of_the_modes():
    data = Grid2D()
    modes = data.modes
    perfect = data.sample_measures(modes.repeat(4, 1))
    assert perfect == {"modes_captured": 25, "high_quality_share": 1.0, "reverse_kl": pytest.approx(0, abs=1e-15)}
    collapsed = data.sample_measures(modes[7].repeat(10, 1))
    assert collapsed == {"modes_captured": 1, "high_quality_share": 1.0, "reverse_kl": pytest.approx(math.log(25))}
    # Three standard deviations are 0.15: two good points, one that counts for mode 1 but is not good, one far outside.
    points = modes[[0, 0, 1, 24]] + torch.tensor([[0.149, 0.0], [0.0, -0.149], [0.11, 0.11], [50.0, 50.0]])
    expected = 0.5 * math.log(0.5 * 25) + 2 * 0.25 * math.log(0.25 * 25)
    assert data.sample_measures(points) == {
        "modes_captured": 1,
        "high_quality_share": 0.5,
        "reverse_kl": pytest.approx(expected),
    }
    own = data.sample_measures(data.training.examples)
    assert own["modes_captured"] == 25 and own["high_quality_share"] == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert 0 < own["reverse_kl"] < 3 * 24 / (2 * len(data.training))
    points[2, 1] = math.nan
    assert all(math.isnan(value) for value in data.sample_measures(points).values())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Grid2D(-1), "n must be at least 0, got -1"),
        (lambda: Grid2D(num_samples=1), "num_samples must be at least 2, got 1"),
        (lambda: Grid2D(held_out=1.0), r"held_out must be above 0 and below 1, got 1\.0"),
        (lambda: Grid2D(num_samples=3, held_out=0.9), r"held_out must leave points to train on, got 0\.9"),
        (lambda: Grid2D(num_samples=100).training, "batch_size must be at most 90, the number of training examples"),
    ],
)
def test_a_grid_refuses(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_data_with_images_that_are_not_finite_are_refused():
    class Spoiled(ExampleData):
        def load(self):
            training, held_out = Digits().load()
            training.examples[[3, 5], 0, 0, 0] = torch.nan
            return training, held_out

    with pytest.raises(
        ValueError, match=r"Spoiled must have finite examples, and 2 of its 1438 training examples .*: 3, 5"
    ):
        Spoiled().setup()


@pytest.mark.parametrize(("data", "write"), [(MNIST, write_mnist), (SVHN, write_svhn)])
def test_a_file_that_vanishes_while_it_is_looked_for(tmp_path, monkeypatch, data, write):
    write(tmp_path, **({"compressed": True} if data is MNIST else {}))
    found = files.find

    def find_and_lose(*args):
        path = found(*args)
        path.unlink()
        return path

    monkeypatch.setattr(sys.modules[data.__module__], "find", find_and_lose)
    with pytest.raises(
        FileNotFoundError, match=f"{data.__name__} cannot read {tmp_path}/train.*: No such file.*to get it"
    ):
        data(str(tmp_path)).setup()


def test_to_overfit_the_same_minibatches_come_in_every_epoch():
    class Seen(pl.Callback):
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, model, batch, *_):
            self.batches.append(batch[2].tolist())

    seen = Seen()
    trainer = pl.Trainer(
        max_epochs=2,
        overfit_batches=2,
        accelerator="cpu",
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer.fit(built.AE(Digits.example_shape, 2), Digits(batch_size=50, train_size=150))
    assert seen.batches == 2 * [list(range(50)), list(range(50, 100))]
