"""The data modules: what they give out, in which order, and what they say about files that are missing or damaged."""

import gzip
import math
import os
import struct
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import generator
from PIL import Image
from scipy.io import savemat

from kdejsd.data import MNIST, SVHN, CelebA, Digits, FashionMNIST, Grid2D, ImageData, ImageFolder, base
from kdejsd.models import images

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
    both = torch.cat([data.training.images, data.held_out.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # no digit is in both parts
    other = Digits(seed=1)
    assert not torch.equal(other.held_out.images, data.held_out.images)


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
        return {image.numpy().tobytes() for image in Digits(train_size=200, seed=seed).training.images}

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


@pytest.mark.parametrize("name", FILES)
def test_missing_file(tmp_path, name):
    write_mnist(tmp_path, compressed=True)
    (tmp_path / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        MNIST(str(tmp_path)).setup()
    text = str(error.value)
    assert f"{name}.gz" in text and str(tmp_path) in text and "--data.root" in text and "curl -O https://" in text


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
    assert data.image_shape == (3, 16, 16)
    assert len(data.training) == 2 and len(data.held_out) == 1
    images = torch.cat([data.training[torch.arange(2)][0], data.held_out[torch.arange(1)][0]])
    labels = torch.cat([data.training.labels, data.held_out.labels])
    means = images.mean((2, 3))
    for label, channel in ((0, 2), (1, 0), (-1, 1)):  # subfolder a is class 0, b is 1; no subfolder is no class
        mean = means[labels == label][0]
        assert mean.argmax() == channel and mean.max() > 0.95
    again = ImageFolder(str(tmp_path), size=16, held_out=0.3, batch_size=2)
    assert torch.equal(again.held_out.images, data.held_out.images)
    grey = ImageFolder(str(tmp_path), size=8, channels=1, batch_size=1)
    assert grey.training.images.shape == (2, 1, 8, 8)


def test_image_folder_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs a folder of pictures, and .*nowhere is none"):
        ImageFolder(str(tmp_path / "nowhere")).setup()
    with pytest.raises(FileNotFoundError, match=r"needs at least two pictures .* found 0"):
        ImageFolder(str(tmp_path)).setup()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b\.png is damaged: expected a picture"):
        ImageFolder(str(tmp_path), batch_size=1).setup()


@pytest.mark.parametrize("below", ["", "svhn"])
def test_svhn(tmp_path, below):
    arrays = write_svhn(tmp_path / below)
    data = SVHN(str(tmp_path), batch_size=10)
    assert data.image_shape == (3, 32, 32) and data.training.images.dtype == torch.uint8
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
    assert data.training.images.shape == (7, 3, 64, 64) and data.held_out.images.shape == (3, 3, 64, 64)
    assert data.training.images.dtype == torch.uint8 and data.training.labels.unique().tolist() == [-1]
    for part, numbers in ((data.training, range(7)), (data.held_out, range(9, 12))):
        for image, number in zip(part.images.float(), numbers, strict=True):
            # The centre reaches to the very edge, where cutting it a pixel wider would mix in grey.
            expected = torch.tensor([20.0 * number, 0, 255])[:, None, None]
            assert (image - expected).abs().mean() < 3 and (image - expected).abs().max() < 6


def test_celeba_reads_only_what_is_trained_on(tmp_path):
    write_celeba(tmp_path)
    chosen = CelebA(str(tmp_path), batch_size=2, train_size=3, seed=1)
    numbers = [round(float(image[0].float().mean()) / 20) for image in chosen.training.images]
    assert len(set(numbers)) == 3 and numbers == sorted(numbers)
    for number in set(range(7)) - set(numbers):
        (tmp_path / "img_align_celeba" / f"{number + 1:06}.jpg").write_bytes(b"not to be read")
    again = CelebA(str(tmp_path), batch_size=2, train_size=3, seed=1)
    assert torch.equal(again.training.images, chosen.training.images)
    with pytest.raises(ValueError, match="damaged"):
        CelebA(str(tmp_path), batch_size=2).setup()


def test_celeba_without_a_partition_holds_out_one_in_ten(tmp_path):
    write_celeba(tmp_path, count=20, partition=False)
    data = CelebA(str(tmp_path), batch_size=2)
    assert len(data.training) == 18 and len(data.held_out) == 2
    assert not torch.equal(CelebA(str(tmp_path), batch_size=2, seed=3).held_out.images, data.held_out.images)


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
    with pytest.raises(ValueError, match=rf"000003\.jpg is damaged: .*; {source}"):
        setup()
    Image.new("RGB", (178, 178)).save(picture)
    with pytest.raises(ValueError, match=r"000003\.jpg is damaged: .* 178 x 218 pixels and has 178 x 178; to get it"):
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
    assert torch.equal(some.training.images, everything.training.images)
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
        (lambda: Digits(train_size=50), "train_size must be at least batch_size = 100, got 50"),
        (lambda: Digits(labelled_size=-1), "labelled_size must not be negative, got -1"),
        (lambda: Digits(train_size=300, labelled_size=301).setup(), "labelled_size must be at most 300, .* got 301"),
        (lambda: Digits(seed=-1), "seed must not be negative, got -1"),
        (lambda: Digits(train_size=1439).setup(), "train_size must be at most 1438, .* got 1439"),
        (lambda: Digits(batch_size=1439).setup(), "batch_size must be at most 1438, .* got 1439"),
        (lambda: ImageFolder("x", size=0), "size must be at least 1, got 0"),
        (lambda: ImageFolder("x", channels=4), r"channels must be 1 \(grey\) or 3 \(colour\), got 4"),
        (lambda: ImageFolder("x", held_out=1.0), r"held_out must be between 0 and 1, got 1\.0"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()


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
    assert images.shape == (150_000, 2, 1, 1) and images.dtype == torch.float32 and data.image_shape == (2, 1, 1)
    expected = [[x, y] for y in (-2.0, 0.0, 2.0) for x in (-2.0, 0.0, 2.0)]
    assert data.modes.tolist() == expected and labels.unique().tolist() == list(range(9))
    counts = labels.bincount()
    assert (((counts - 150_000 / 9) / math.sqrt(150_000 / 9)).abs() < 4).all()
    for label in range(9):
        points = images[labels == label].flatten(1).double()
        error = 0.05 / math.sqrt(len(points))
        assert ((points.mean(0) - data.modes[label]).abs() < 4 * error).all()
        assert ((points.T.cov() - 0.0025 * torch.eye(2)).abs() < 5 * 0.0025 * math.sqrt(2 / len(points))).all()
    assert torch.equal(data.classify(images), labels)  # no point is 20 standard deviations away
    assert len(torch.cat([data.training.images, data.held_out.images]).flatten(1).unique(dim=0)) > 199_000
    assert torch.equal(Grid2D(1, 200_000, held_out=0.25).training.images, data.training.images)
    assert not torch.equal(Grid2D(1, 200_000, held_out=0.25, seed=1).training.images, data.training.images)
    assert len(Grid2D(3, 100).modes) == 49 and Grid2D(0, 100).modes.tolist() == [[0.0, 0.0]]
    assert len(Grid2D(train_size=500, batch_size=100).training) == 500


def test_the_classifier_of_a_grid_gives_the_posterior_of_the_modes():
    data = Grid2D(1, 100)
    points = torch.rand(50, 2, 1, 1, generator=generator()).double() * 6 - 3
    parts = torch.distributions.Normal(data.modes.double()[None], 0.05).log_prob(points.flatten(1)[:, None]).sum(2)
    for form in (points, points.flatten(1)):
        torch.testing.assert_close(data.classifier()(form).log_softmax(1), parts.log_softmax(1))
    assert data.logits(points.float()).dtype == torch.float32
    assert torch.equal(data.classify(points + 100), torch.full((50,), 8))
    with pytest.raises(ValueError, match=r"images must have shape \[n, 2, 1, 1\] or \[n, 2\], got \[4, 3, 1, 1\]"):
        data.logits(torch.zeros(4, 3, 1, 1))


def test_measures_of_the_modes():
    data = Grid2D()
    modes = data.modes
    perfect = data.sample_measures(modes.repeat(4, 1))
    assert perfect == {"modes_captured": 25, "high_quality_share": 1.0, "reverse_kl": pytest.approx(0, abs=1e-15)}
    collapsed = data.sample_measures(modes[7].repeat(10, 1)[:, :, None, None])
    assert collapsed == {"modes_captured": 1, "high_quality_share": 1.0, "reverse_kl": pytest.approx(math.log(25))}
    # Three standard deviations are 0.15: two good points, one that counts for mode 1 but is not good, one far outside.
    points = modes[[0, 0, 1, 24]] + torch.tensor([[0.149, 0.0], [0.0, -0.149], [0.11, 0.11], [50.0, 50.0]])
    expected = 0.5 * math.log(0.5 * 25) + 2 * 0.25 * math.log(0.25 * 25)
    assert data.sample_measures(points) == {
        "modes_captured": 1,
        "high_quality_share": 0.5,
        "reverse_kl": pytest.approx(expected),
    }
    own = data.sample_measures(data.training.images)
    assert own["modes_captured"] == 25 and own["high_quality_share"] == pytest.approx(1 - math.exp(-4.5), abs=0.002)
    assert 0 < own["reverse_kl"] < 3 * 24 / (2 * len(data.training))
    points[2, 1] = math.nan
    assert all(math.isnan(value) for value in data.sample_measures(points).values())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Grid2D(-1), "n must not be negative, got -1"),
        (lambda: Grid2D(num_samples=1), "num_samples must be at least 2, got 1"),
        (lambda: Grid2D(held_out=1.0), r"held_out must be above 0 and leave points to train on, got 1\.0"),
        (lambda: Grid2D(num_samples=3, held_out=0.9), r"held_out must be above 0 and leave .*, got 0\.9"),
        (lambda: Grid2D(num_samples=100).training, "batch_size must be at most 90, the number of training images"),
    ],
)
def test_a_grid_refuses(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_data_with_images_that_are_not_finite_are_refused():
    class Spoiled(ImageData):
        def load(self):
            training, held_out = Digits().load()
            training.images[[3, 5], 0, 0, 0] = torch.nan
            return training, held_out

    with pytest.raises(
        ValueError, match=r"Spoiled must have finite images, and 2 of its 1438 training images .*: 3, 5"
    ):
        Spoiled().setup()


@pytest.mark.parametrize(("data", "write"), [(MNIST, write_mnist), (SVHN, write_svhn)])
def test_a_file_that_vanishes_while_it_is_looked_for(tmp_path, monkeypatch, data, write):
    write(tmp_path, **({"compressed": True} if data is MNIST else {}))
    found = base.find

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
        trainer.fit(images.AE(Digits.image_shape, 2), Digits(batch_size=50, train_size=150))
    assert seen.batches == 2 * [list(range(50)), list(range(50, 100))]
