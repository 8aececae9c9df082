"""Measures how far generated images are from real ones by the features of a network."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .._extras import train_extra
from .._modes import evaluating

with train_extra():
    from torchmetrics.image.fid import FrechetInceptionDistance

_CHUNK = 1000  # images at a time


def frechet_distance(real: Tensor, generated: Tensor, features: nn.Module) -> float:
    """Returns the Frechet distance between two sets of images: between normals fitted to their features.

    With `InceptionFeatures` it is the FID; with other features it is no FID. Compare only values of the same features
    and the same numbers of images: with fewer images it is larger. With means mu and covariances S of the features it
    is |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). Sums are in float64. Equal sets give 0 up to rounding, which
    may be negative.

    Args:
        real, generated: [n, C, H, W] each, at least 2 images, uint8 (0 to 255) or floating (0 to 1).
        features: images [n, C, H, W] float32 (0 to 1) -> [n, d], on any device; `ImageClassifier.features`,
            `InceptionFeatures` or another module. It is in evaluation mode during the call.

    Returns:
        The distance, a float.

    Raises:
        ValueError: if images have another shape, are too few or out of range, or features have another shape.
        TypeError: if images are neither uint8 nor floating.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    https://arxiv.org/abs/1706.08500.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import frechet_distance
        >>> real = torch.rand(100, 1, 2, 2, generator=torch.Generator().manual_seed(0)) / 2
        >>> round(frechet_distance(real, real + 0.5, features=torch.nn.Flatten()), 4)  # 4 means differ by 0.5
        1.0
    """
    for name, images in (("real", real), ("generated", generated)):
        if images.ndim != 4 or len(images) < 2:
            raise ValueError(f"{name} must have shape [n, C, H, W] with n at least 2, got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"{name} must be uint8 or floating-point, got {images.dtype}")
        if images.is_floating_point() and bool(((images < 0) | (images > 1)).any()):
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"{name} must lie between 0 and 1 (uint8: 255), got {low:g} to {high:g}")
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"generated must have images of the shape of real, {list(real.shape[1:])}, got {list(generated.shape[1:])}"
        )
    device = next((parameter.device for parameter in features.parameters()), torch.device("cpu"))

    def extract(images: Tensor) -> Tensor:
        images = images.to(device)
        found: Tensor = features(images.float() / 255 if images.dtype == torch.uint8 else images.float())
        if found.ndim != 2 or len(found) != len(images):
            raise ValueError(f"features must return [{len(images)}, d], got {list(found.shape)}")
        return found.double()

    with torch.no_grad(), evaluating(features):
        metric = FrechetInceptionDistance(_Extracted(extract(real[:2]).shape[1])).to(device)
        for images, is_real in ((real, True), (generated, False)):
            for chunk in images.split(_CHUNK):
                metric.update(extract(chunk), real=is_real)
    if not bool((metric.real_features_sum + metric.fake_features_sum).isfinite().all()):
        return math.nan  # the eigenvalues cannot be computed
    return float(metric.compute())


class _Extracted(nn.Identity):
    """Tells torchmetrics the width of features that it is given in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class InceptionFeatures(nn.Module):
    """Computes the features of the FID: images [n, 1 or 3, H, W] float32 in [0, 1] -> [n, 2048].

    The network is Inception v3 of torch-fidelity. Nothing is downloaded here: its weights must be there.

    Args:
        weights: the file of its weights; None is the place where torch-fidelity keeps them.

    Raises:
        RuntimeError: if torch-fidelity or its weights are not there.

    Example:
        >>> from pathlib import Path
        >>> from kdejsd.metrics import InceptionFeatures
        >>> InceptionFeatures(Path("missing.pth"))
        Traceback (most recent call last):
        RuntimeError: Inception features need ...
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        if find_spec("torch_fidelity") is None:
            raise RuntimeError("Inception features need torch-fidelity: pip install torch-fidelity")
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        name = URL_INCEPTION_V3.rpartition("/")[2]
        path = Path(torch.hub.get_dir()) / "checkpoints" / name if weights is None else weights
        if not path.is_file():
            raise RuntimeError(
                f"Inception features need the weights {path}; to get them: curl -L -o {path} {URL_INCEPTION_V3}"
            )
        self.network = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path)).inception

    def forward(self, images: Tensor) -> Tensor:
        pixels = (255 * images).round().byte().expand(-1, 3, -1, -1)
        features: Tensor = self.network(pixels)
        return features
