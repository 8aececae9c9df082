"""Measures of a trained model that torchmetrics does not have: how well its codes follow their target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._extras import train_extra
from ._modes import evaluating
from .divergence import target_jsd
from .entropy import kde_entropy
from .models.autoencoder import CHUNK, JSD_SAMPLES, Autoencoder
from .targets import sample_target

with train_extra():
    from torchmetrics.functional import mean_squared_error


@dataclass(frozen=True)
class Encoded:
    """A set of images after a pass through a model in evaluation mode.

    Attributes:
        codes: [n, l], on the model's device.
        labels: [n] int64, -1 for none.
        reconstruction_error: mean squared error per pixel.
        posterior: [n, l], a sample of each image's posterior where the model has one.
    """

    codes: Tensor
    labels: Tensor
    reconstruction_error: float
    posterior: Tensor | None


@torch.no_grad()
def encode_set(model: Autoencoder, images: Any, *, seed: int = 0) -> Encoded:
    """Codes, labels and reconstruction error of an image set (`kdejsd.data.ImageSet`); the seed is of the samples of
    the posterior."""
    codes, labels, posterior, squared = [], [], [], 0.0
    generator = torch.Generator(model.device).manual_seed(seed)
    with evaluating(model):
        for index in torch.arange(len(images)).split(CHUNK):
            batch, batch_labels, _ = images[index]
            batch = batch.to(model.device)
            codes.append(model.encode(batch))
            labels.append(batch_labels)
            error = mean_squared_error(model.decode(codes[-1]).flatten(), batch.flatten())
            squared += float(error) * len(batch)
            samples = model.posterior_samples(batch, generator)
            if samples is not None:
                posterior.append(samples)
    return Encoded(
        torch.cat(codes), torch.cat(labels), squared / len(images), torch.cat(posterior) if posterior else None
    )


def code_measures(model: Autoencoder, encoded: Encoded, *, training: bool, seed: int = 0) -> dict[str, Any]:
    """How well the codes of a set follow the target, as plain values.

    Args:
        model: the trained model.
        encoded: the set.
        training: whether it is the set that the model was trained on.
        seed: of the samples that the codes are compared with.

    Returns:
        count: number of images.
        reconstruction_error: mean squared error per pixel.
        latent_term: the training loss's, in nats (GEN).
        gradient_weight: mean of 1 - r = p_t / (p_e + p_t); 0.5 where p_e = p_t, near 0 in the dead zone (GEN).
        jsd, jsd_of_target: `Autoencoder.jsd` of at most 10 000 codes, in nats, and of as many samples of the target.
            GEN measures by the kernel that it was trained with, the other models by the optimal one.
        matched_jsd, matched_jsd_of_target: `target_jsd` of both, by the optimal kernel for every model.
        entropy, entropy_of_normal: of the whitened codes and of as many samples of the standard normal, in nats, each
            from at most 10 000 (`kde_entropy`, which is biased alike for both); None for codes that cannot be whitened.
        variance, expected_variance: of each dimension, and what the loss aims at (`Autoencoder.expected_variance`;
            None if that is negative: there is no such optimum).
        mean: of each dimension.
        covariance_eigenvalues: ascending.
        posterior: for a model whose encoder gives a law (VAE), the numbers of one sample of each image's posterior,
            which are what should follow the target; those above are of the posterior means.
    """
    generator = torch.Generator(encoded.codes.device).manual_seed(seed)
    index = torch.arange(len(encoded.codes), device=encoded.codes.device) if training else None
    ideal = sample_target(model.target, min(len(encoded.codes), JSD_SAMPLES), generator)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        latent_measures = model.latent_measures(encoded.codes, index)
    measures = {
        "count": len(encoded.codes),
        "reconstruction_error": encoded.reconstruction_error,
        **latent_measures,
        **_law_measures(model, encoded.codes, ideal, generator),
    }
    if encoded.posterior is not None:
        measures["posterior"] = _law_measures(model, encoded.posterior, ideal, generator)
    return measures


def _law_measures(model: Autoencoder, codes: Tensor, ideal: Tensor, generator: torch.Generator) -> dict[str, Any]:
    expected = model.expected_variance
    measures = {
        "jsd": float(model.jsd(codes[:JSD_SAMPLES], generator)),
        "jsd_of_target": float(model.jsd(ideal, generator)),
        "entropy": _entropy(codes),
        "entropy_of_normal": _entropy(torch.randn(codes.shape, generator=generator, device=codes.device)),
        "variance": codes.var(0).tolist(),
        "expected_variance": expected.tolist() if bool((expected >= 0).all()) else None,
        "mean": codes.mean(0).tolist(),
        "covariance_eigenvalues": torch.linalg.eigvalsh(codes.T.double().cov().reshape(2 * codes.shape[1:])).tolist(),
        "matched_jsd": float(target_jsd(codes[:JSD_SAMPLES], model.target, generator)),
        "matched_jsd_of_target": float(target_jsd(ideal, model.target, generator)),
    }
    return measures


def _entropy(codes: Tensor) -> float | None:
    try:
        return float(kde_entropy(codes[:JSD_SAMPLES]))
    except ValueError:
        return None
