"""The Frechet distance against closed forms, and the classifier whose features it takes."""

import importlib.util
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import points
from torch import nn

from kdejsd.data import Digits
from kdejsd.metrics import InceptionFeatures, frechet_distance
from kdejsd.models.image_classifier import ImageClassifier, classifier_for

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU available but not used"
)


class Affine(nn.Module):
    """Features that are normal where the pixels are: of any width, and with a mean far from 0."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(points(pixels, width, seed=9))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 30 + images.flatten(1).double() @ self.weight


def normal_images(n: int, seed: int, scale: float = 0.05, shift: float = 0.5) -> torch.Tensor:
    return (shift + scale * points(n, 2, 3, 3, dtype=torch.float32, seed=seed)).clamp(0, 1)


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    s, t = (np.atleast_2d(np.cov(x.T)) for x in (a, b))
    root = scipy.linalg.sqrtm(s @ t)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * root.real))


@pytest.mark.parametrize(("n", "m", "width"), [(3000, 2500, 7), (1001, 40, 18), (500, 500, 1)])
def test_closed_form_of_normal_features(n, m, width):
    real, generated = normal_images(n, 0), normal_images(m, 1, scale=0.08, shift=0.4)
    features = Affine(18, width)
    with torch.no_grad():
        a, b = (features(images).numpy().reshape(-1, width) for images in (real, generated))
    expected = closed_form(a, b)
    if width == 1:
        assert expected == pytest.approx((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2)
    assert expected > 0.01
    assert frechet_distance(real, generated, features) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(generated, real, features) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_and_fewer_images_than_features():
    images = normal_images(12, 0)
    features = Affine(18, 18)  # covariances of rank 11
    assert frechet_distance(images, images.flip(0), features) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(images, normal_images(12, 1), features) > 0.01


def test_bytes_are_the_same_images():
    numbers = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    features = Affine(16, 3)
    expected = frechet_distance(numbers.float() / 255, other, features)
    assert frechet_distance(numbers, other.double(), features) == pytest.approx(expected, rel=1e-6)


def test_features_are_in_evaluation_mode_meanwhile():
    features = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(18, 4))
    features[1].eval()
    real, generated = normal_images(100, 0), normal_images(100, 1)
    first = frechet_distance(real, generated, features)
    assert first == frechet_distance(real, generated, features)
    assert features.training and features[2].training and not features[1].training
    assert not any(parameter.grad is not None for parameter in features.parameters())


def test_nan_gives_nan():
    real = normal_images(20, 0)
    real[3, 0, 0, 0] = math.nan
    assert math.isnan(frechet_distance(real, normal_images(20, 1), Affine(18, 3)))


@pytest.mark.parametrize(
    ("real", "generated", "features", "kind", "text"),
    [
        (torch.rand(5, 3, 3), torch.rand(5, 1, 3, 3), nn.Flatten(), ValueError, r"real must have shape \[n, C, H, W\]"),
        (torch.rand(5, 1, 3, 3), torch.rand(1, 1, 3, 3), nn.Flatten(), ValueError, r"generated .* got \[1, 1, 3, 3\]"),
        (torch.rand(5, 1, 3, 3), torch.rand(5, 1, 3, 4), nn.Flatten(), ValueError, r"\[1, 3, 3\], got \[1, 3, 4\]"),
        (torch.ones(5, 1, 3, 3).long(), torch.rand(5, 1, 3, 3), nn.Flatten(), TypeError, "real must be uint8 or float"),
        (
            torch.rand(5, 1, 3, 3),
            255 * torch.ones(5, 1, 3, 3),
            nn.Flatten(),
            ValueError,
            r"generated must lie between 0 and 1 \(uint8: 255\), got 255 to 255",
        ),
        (-torch.ones(5, 1, 3, 3), torch.rand(5, 1, 3, 3), nn.Flatten(), ValueError, "real must lie .* got -1 to -1"),
        (torch.rand(5, 1, 3, 3), torch.rand(5, 1, 3, 3), nn.Identity(), ValueError, r"features must return \[2, d\]"),
    ],
)
def test_refusals(real, generated, features, kind, text):
    with pytest.raises(kind, match=text):
        frechet_distance(real, generated, features)


def test_inception_says_what_is_missing(tmp_path):
    if importlib.util.find_spec("torch_fidelity") is None:
        with pytest.raises(RuntimeError, match="pip install torch-fidelity"):
            InceptionFeatures()
    else:
        missing = tmp_path / "weights.pth"
        with pytest.raises(
            RuntimeError, match=f"need the weights {missing}; to get them: curl -L -o {missing} https://"
        ):
            InceptionFeatures(missing)


def test_classifier_is_trained_stored_and_found_again(tmp_path, monkeypatch):
    path = tmp_path / "made" / "digits.ckpt"
    data = Digits()
    state = torch.get_rng_state()
    classifier = classifier_for(data, path, epochs=8)
    assert torch.equal(torch.get_rng_state(), state) and not classifier.training
    images, labels, _ = data.held_out[torch.arange(len(data.held_out))]
    with torch.no_grad():
        right = (classifier(images).argmax(1) == labels).double().mean()
        features = classifier.features(images)
    assert right > 0.95 and float(classifier.accuracy) == pytest.approx(float(right), abs=1e-6)
    assert str(classifier) == f"Digits classifier, {100 * right:.1f} % of held-out images right"
    assert features.shape == (359, 128)
    assert "state_dict" in torch.load(path, weights_only=True)

    monkeypatch.setattr(pl, "Trainer", None)  # nothing is trained again
    again = classifier_for(data, path)
    assert str(again) == str(classifier)
    with torch.no_grad():
        assert torch.equal(again.features(images), features)
    train = data.training[torch.arange(359)][0]
    near, far = (frechet_distance(images, other, again.features) for other in (train, 1 - images))
    assert 0 < 10 * near < far


def test_classifier_by_seed(tmp_path):
    weights = [
        classifier_for(Digits(train_size=200), tmp_path / name, epochs=1, seed=seed).head.weight
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_classifier_refusals(tmp_path):
    with pytest.raises(ValueError, match="a classifier needs a label for every image, and 1338 have none"):
        classifier_for(Digits(labelled_size=100), tmp_path / "a.ckpt")
    trainer = pl.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(ImageClassifier((1, 8, 8), 10, "MNIST"), datamodule=Digits())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="must hold a classifier of Digits, got one of MNIST"):
        classifier_for(Digits(), tmp_path / "b.ckpt")


@pytest.mark.parametrize("example_shape", [(1, 28, 28), (3, 32, 32), (2, 5, 7), (1, 1, 1)])
def test_classifier_of_any_images(example_shape):
    classifier = ImageClassifier(example_shape, 4, "none").eval()
    assert classifier(torch.rand(3, *example_shape)).shape == (3, 4)
    assert math.isnan(float(classifier.accuracy))
