"""Measures of a trained model that torchmetrics does not have: how well its codes follow their target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._extras import train_extra
from ._modes import evaluating
from .entropy import kde_entropy
from .models import GEN
from .models.gen import JSD_SAMPLES, target_moments
from .targets import sample_target

with train_extra():
    from torchmetrics.functional import mean_squared_error

_CHUNK = 1000  # images at a time


@dataclass(frozen=True)
class Encoded:
    """A set of images after a pass through a model in evaluation mode.

    Attributes:
        codes: [n, l], on the model's device.
        labels: [n] int64, -1 for none.
        reconstruction_error: mean squared error per pixel.
    """

    codes: Tensor
    labels: Tensor
    reconstruction_error: float


@torch.no_grad()
def encode_set(model: GEN, images: Any) -> Encoded:
    """Codes, labels and reconstruction error of an image set (`kdejsd.data.ImageSet`)."""
    codes, labels, squared = [], [], 0.0
    with evaluating(model):
        for index in torch.arange(len(images)).split(_CHUNK):
            batch, batch_labels, _ = images[index]
            batch = batch.to(model.device)
            codes.append(model.encode(batch))
            labels.append(batch_labels)
            error = mean_squared_error(model.decode(codes[-1]).flatten(), batch.flatten())
            squared += float(error) * len(batch)
    return Encoded(torch.cat(codes), torch.cat(labels), squared / len(images))


def code_measures(model: GEN, encoded: Encoded, *, training: bool, seed: int = 0) -> dict[str, Any]:
    """How well the codes of a set follow the target, as plain values.

    Args:
        model: the trained model.
        encoded: the set.
        training: whether it is the set that the lagged codes are from.
        seed: of the samples that the codes are compared with.

    Returns:
        count: number of images.
        reconstruction_error: mean squared error per pixel.
        latent_term: the training loss's, in nats.
        jsd, jsd_of_target: `LaggedKDE.jsd` of at most 10 000 codes, in nats, and of as many samples of the target.
        gradient_weight: mean of 1 - r = p_t / (p_e + p_t); 0.5 where p_e = p_t, near 0 in the dead zone.
        entropy, entropy_of_normal: of the whitened codes and of as many samples of the standard normal, in nats, each
            from at most 10 000 (`kde_entropy`, which is biased alike for both); None for codes that cannot be whitened.
        variance, expected_variance: of each dimension, and what the loss aims at: the target's with the smoothed
            target, less by h^2 with the target itself (None if that is negative: there is no such optimum).
        mean: of each dimension.
        covariance_eigenvalues: ascending.
    """
    codes = encoded.codes
    count, dim = codes.shape
    lagged = model.lagged
    generator = torch.Generator(codes.device).manual_seed(seed)
    index = torch.arange(count, device=codes.device) if training else None
    ideal = sample_target(lagged.target, min(count, JSD_SAMPLES), generator)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        terms = model.latent_terms(codes, index)
    return {
        "count": count,
        "reconstruction_error": encoded.reconstruction_error,
        "latent_term": float(terms.mean()),
        "jsd": float(lagged.jsd(codes[:JSD_SAMPLES], generator)),
        "jsd_of_target": float(lagged.jsd(ideal, generator)),
        "gradient_weight": float(model.gradient_weight(terms)),
        "entropy": _entropy(codes),
        "entropy_of_normal": _entropy(torch.randn(codes.shape, generator=generator, device=codes.device)),
        "variance": codes.var(0).tolist(),
        "expected_variance": _expected_variance(model),
        "mean": codes.mean(0).tolist(),
        "covariance_eigenvalues": torch.linalg.eigvalsh(codes.T.double().cov().reshape(dim, dim)).tolist(),
    }


def _entropy(codes: Tensor) -> float | None:
    try:
        return float(kde_entropy(codes[:JSD_SAMPLES]))
    except ValueError:
        return None


def _expected_variance(model: GEN) -> list[float] | None:
    variance = target_moments(model.lagged.target)[1]
    if not model.lagged.smoothed:
        variance = variance - model.lagged.bandwidth**2
    return variance.tolist() if bool((variance >= 0).all()) else None
