"""Measures a trained model: its codes, its discriminator's judgement, and the examples that it generates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._extras import train_extra
from ._modes import evaluating
from .divergence import target_jsd
from .entropy import kde_entropy
from .models.autoencoder import JSD_SAMPLES, Autoencoder
from .models.base import CHUNK
from .models.gan import GAN
from .targets import as_law

with train_extra():
    from torchmetrics.functional import mean_squared_error
    from torchmetrics.image.fid import FrechetInceptionDistance


@dataclass(frozen=True)
class Encoded:
    """Holds a set of examples after a pass through a model in evaluation mode.

    Attributes:
        codes: [n, l], on the model's device.
        labels: [n] int64, -1 for none.
        reconstruction_error: mean squared error per value.
        posterior: [n, l], a sample of each example's posterior where the model has one.

    Example:
        >>> import torch
        >>> from kdejsd.metrics import Encoded
        >>> encoded = Encoded(torch.zeros(100, 2), torch.full((100,), -1), reconstruction_error=0.02, posterior=None)
        >>> encoded.codes.shape
        torch.Size([100, 2])
    """

    codes: Tensor
    labels: Tensor
    reconstruction_error: float
    posterior: Tensor | None


@torch.no_grad()
def encode_set(model: Autoencoder, examples: Any, *, seed: int = 0) -> Encoded:
    """Encodes an example set (`kdejsd.data.ExampleSet`) and returns its codes, labels and reconstruction error.

    The seed is that of the posterior's samples.

    Example:
        >>> from kdejsd.data import Digits
        >>> from kdejsd.metrics import encode_set
        >>> from kdejsd.models import AE, FC
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> encode_set(AE(networks.encoder, networks.decoder, latent_dim=2), Digits().held_out).codes.shape
        torch.Size([359, 2])
    """
    codes, labels, posterior, squared = [], [], [], 0.0
    rng = torch.Generator(model.device).manual_seed(seed)
    with evaluating(model):
        for index in torch.arange(len(examples)).split(CHUNK):
            batch, batch_labels, _ = examples[index]
            batch = batch.to(model.device, model.dtype)
            codes.append(model.encode(batch))
            labels.append(batch_labels)
            error = mean_squared_error(model.decode(codes[-1]).flatten(), batch.flatten())
            squared += float(error) * len(batch)
            samples = model.posterior_samples(batch, rng)
            if samples is not None:
                posterior.append(samples)
    return Encoded(
        torch.cat(codes), torch.cat(labels), squared / len(examples), torch.cat(posterior) if posterior else None
    )


def code_measures(model: Autoencoder, encoded: Encoded, *, training: bool, seed: int = 0) -> dict[str, Any]:
    """Measures how well the codes of a set follow the target, as plain values.

    Args:
        model: the trained model.
        encoded: the set.
        training: whether it is the set that the model was trained on.
        seed: seeds the samples that the codes are compared with.

    Returns:
        * count: number of examples.
        * reconstruction_error: mean squared error per value.
        * latent_term, latent_term_of_target: the training loss's, in nats, and the mean of codes that follow the target
          (GEN; `matched_loss`).
        * gradient_weight: mean of 1 - r = p_t / (p_e + p_t); 0.5 where p_e = p_t, near 0 in the dead zone (GEN).
        * jsd, jsd_of_target: `Autoencoder.jsd` of at most 10 000 codes, in nats, and of as many samples of the target.
          GEN measures by the kernel that it was trained with, the other models by the optimal one.
        * matched_jsd, matched_jsd_of_target: `target_jsd` of both, by the optimal kernel for every model.
        * entropy, entropy_of_normal: of the whitened codes and of as many samples of the standard normal, in nats, each
          from at most 10 000 (`kde_entropy`, which is biased alike for both); None for codes that cannot be whitened.
        * variance, expected_variance: of each dimension, and what the loss aims at (`Autoencoder.expected_variance`;
          None if that is negative, where there is no such optimum, or not finite).
        * mean: of each dimension.
        * covariance_eigenvalues: ascending.
        * posterior: for a model whose encoder gives a law (VAE, StochasticGEN), the numbers of one sample of each
          example's posterior, which are what should follow the target. latent_term and gradient_weight are of these
          samples; the others above are of the posterior means.

    Example:
        >>> from kdejsd.data import Digits
        >>> from kdejsd.metrics import code_measures, encode_set
        >>> from kdejsd.models import AE, FC
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
        >>> encoded = encode_set(model, Digits().held_out)
        >>> measures = code_measures(model, encoded, training=False)
        >>> measures["jsd"] > measures["jsd_of_target"]  # nothing has been trained
        True
    """
    rng = torch.Generator(encoded.codes.device).manual_seed(seed)
    index = torch.arange(len(encoded.codes), device=encoded.codes.device) if training else None
    ideal = as_law(model.target).sample(min(len(encoded.codes), JSD_SAMPLES), rng)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        followed = encoded.codes if encoded.posterior is None else encoded.posterior
        latent_measures = model.latent_measures(followed, index)
    measures = {
        "count": len(encoded.codes),
        "reconstruction_error": encoded.reconstruction_error,
        **latent_measures,
        **_law_measures(model, encoded.codes, ideal, rng),
    }
    if encoded.posterior is not None:
        measures["posterior"] = _law_measures(model, encoded.posterior, ideal, rng)
    return measures


def _law_measures(model: Autoencoder, codes: Tensor, ideal: Tensor, rng: torch.Generator) -> dict[str, Any]:
    expected = model.expected_variance
    measures = {
        "jsd": float(model.jsd(codes[:JSD_SAMPLES], rng)),
        "jsd_of_target": float(model.jsd(ideal, rng)),
        "entropy": _entropy(codes),
        "entropy_of_normal": _entropy(torch.randn(codes.shape, generator=rng, device=codes.device)),
        "variance": codes.var(0).tolist(),
        "expected_variance": expected.tolist() if bool((expected >= 0).all() and expected.isfinite().all()) else None,
        "mean": codes.mean(0).tolist(),
        "covariance_eigenvalues": torch.linalg.eigvalsh(codes.T.double().cov().reshape(2 * codes.shape[1:])).tolist(),
        "matched_jsd": float(target_jsd(codes[:JSD_SAMPLES], model.target, rng)),
        "matched_jsd_of_target": float(target_jsd(ideal, model.target, rng)),
    }
    return measures


def _entropy(codes: Tensor) -> float | None:
    try:
        return float(kde_entropy(codes[:JSD_SAMPLES]))
    except ValueError:
        return None


@torch.no_grad()
def divergence_measures(model: GAN, examples: Any, *, seed: int = 0) -> dict[str, Any]:
    """Measures, by a GAN's own discriminator, how far its generated examples are from a set (`kdejsd.data.ExampleSet`).

    Args:
        model: the trained model, in evaluation mode during the call.
        examples: the set.
        seed: seeds the latents of as many generated examples.

    Returns:
        * count: of examples, at most 10 000, and a multiple of the model's packing.
        * divergence: `GAN.divergence`; NaN for a count of 0.

    Example:
        >>> from kdejsd.data import Digits
        >>> from kdejsd.metrics import divergence_measures
        >>> from kdejsd.models import FC, GAN
        >>> model = GAN(FC((1, 8, 8), 2).decoder, FC((1, 8, 8), 1).encoder, latent_dim=2)
        >>> divergence_measures(model, Digits().held_out)["count"]
        359
    """
    count = min(len(examples), JSD_SAMPLES) // model.packing * model.packing
    rng = torch.Generator().manual_seed(seed)
    total = 0.0 if count else math.nan
    with evaluating(model):
        for index in torch.arange(count).split(max(1, CHUNK // model.packing) * model.packing):
            real = examples[index][0].to(model.device, model.dtype)
            generated = model.decode(model.target_samples(len(real), rng))
            total += len(real) * float(model.divergence(real, generated))
    return {"count": count, "divergence": total / max(count, 1)}


def frechet_distance(real: Tensor, generated: Tensor, features: nn.Module) -> float:
    """Returns the Frechet distance between normals fitted to the features of two sets of images.

    It is |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., GANs Trained by a Two Time-Scale Update
    Rule, arXiv 1706.08500). With `InceptionFeatures` it is the FID; with other features it is no FID. Values of
    different features or of different numbers of images do not compare: the fewer images, the larger it is. Sums are in
    float64. Sets that are equal give 0 but for rounding, on either side of it.

    Args:
        real, generated: [n, C, H, W] each, at least 2 images, uint8 (0 to 255) or floating (0 to 1).
        features: images [n, C, H, W] float32 (0 to 1) -> [n, d], on any device; `ImageClassifier.features`,
            `InceptionFeatures` or another module. It is in evaluation mode during the call.

    Raises:
        ValueError: if images have another shape, are too few or out of range, or features have another shape.
        TypeError: if images are neither uint8 nor floating.

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
            for chunk in images.split(CHUNK):
                metric.update(extract(chunk), real=is_real)
    if not bool((metric.real_features_sum + metric.fake_features_sum).isfinite().all()):
        return math.nan  # of which no eigenvalues can be had
    return float(metric.compute())


class _Extracted(nn.Identity):
    """Tells torchmetrics the width of features that it is given in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class InceptionFeatures(nn.Module):
    """Computes the features of the FID: images [n, 1 or 3, H, W] float32 in [0, 1] -> [n, 2048].

    The network is Inception v3 of torch-fidelity. Nothing is downloaded here.

    Args:
        weights: file of its weights; None is where torch-fidelity keeps them.

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
