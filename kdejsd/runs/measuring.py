"""Measures a trained model on a set of examples: by its codes, or by its discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._extras import train_extra
from .._modes import evaluating
from ..divergence import target_jsd
from ..entropy import kde_entropy
from ..metrics._rows import MOST
from ..models.autoencoder import Autoencoder
from ..models.base import CHUNK
from ..models.gan import GAN
from ..targets import as_law

_DRAWS = 20  # at most, of a measure that draws numbers

with train_extra():
    from torchmetrics.functional import mean_squared_error


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
        >>> from kdejsd.runs.measuring import Encoded
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
    """Encodes a set of examples (`kdejsd.data.ExampleSet`): returns their codes, labels and reconstruction error.

    The seed is that of the posterior's samples.

    Example:
        >>> from kdejsd.data import Digits
        >>> from kdejsd.models import AE, FC
        >>> from kdejsd.runs.measuring import encode_set
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
        * latent_term, latent_term_of_target: the training loss's latent term in nats, and its mean for codes that
          follow the target (GEN; `matched_loss`).
        * gradient_weight: mean of 1 - r = p_t / (p_e + p_t); 0.5 where p_e = p_t, near 0 in the dead zone (GEN).
        * jsd, jsd_of_target: `Autoencoder.jsd` in nats, of at most 10 000 codes and of as many samples of the target. A
          GEN uses the kernel that it was trained with, the other models the optimal one. For few codes it is a mean
          over several draws of the random numbers involved.
        * matched_jsd, matched_jsd_of_target: `target_jsd` of both, by the optimal kernel for every model.
        * entropy, entropy_of_normal: `kde_entropy` in nats, of the whitened codes and of as many samples of the
          standard normal, at most 10 000 each. Both have the same bias. None for codes that cannot be whitened.
        * variance, expected_variance: of each dimension, and the variance that the loss aims at
          (`Autoencoder.expected_variance`). The latter is None if it is negative, where there is no such optimum, or
          not finite.
        * mean: of each dimension.
        * covariance_eigenvalues: ascending.
        * posterior: for a model whose encoder gives a distribution (VAE, StochasticGEN), these numbers for one sample
          of each example's posterior. These samples are what should follow the target. latent_term and gradient_weight
          are of these samples; the others above are of the posterior means.

    Example:
        >>> from kdejsd.data import Digits
        >>> from kdejsd.models import AE, FC
        >>> from kdejsd.runs.measuring import code_measures, encode_set
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
        >>> encoded = encode_set(model, Digits().held_out)
        >>> measures = code_measures(model, encoded, training=False)
        >>> measures["jsd"] > measures["jsd_of_target"]  # nothing has been trained
        True
    """
    rng = torch.Generator(encoded.codes.device).manual_seed(seed)
    index = torch.arange(len(encoded.codes), device=encoded.codes.device) if training else None
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        followed = encoded.codes if encoded.posterior is None else encoded.posterior
        latent_measures = model.latent_measures(followed, index)
    measures = {
        "count": len(encoded.codes),
        "reconstruction_error": encoded.reconstruction_error,
        **latent_measures,
        **_law_measures(model, encoded.codes, rng),
    }
    if encoded.posterior is not None:
        measures["posterior"] = _law_measures(model, encoded.posterior, rng)
    return measures


def _law_measures(model: Autoencoder, codes: Tensor, rng: torch.Generator) -> dict[str, Any]:
    expected = model.expected_variance
    count = min(len(codes), MOST)

    def matched(z: Tensor) -> Tensor:
        return target_jsd(z, model.target, rng)

    def of_codes(jsd: Callable[[Tensor], Tensor]) -> float:
        return _mean_of_draws(count, lambda: jsd(codes[:count]))

    def of_target(jsd: Callable[[Tensor], Tensor]) -> float:
        return _mean_of_draws(count, lambda: jsd(as_law(model.target).sample(count, rng)))

    measures = {
        "jsd": of_codes(lambda z: model.jsd(z, rng)),
        "jsd_of_target": of_target(lambda z: model.jsd(z, rng)),
        "entropy": _entropy(codes),
        "entropy_of_normal": _entropy(torch.randn(codes.shape, generator=rng, device=codes.device)),
        "variance": codes.var(0).tolist(),
        "expected_variance": expected.tolist() if bool((expected >= 0).all() and expected.isfinite().all()) else None,
        "mean": codes.mean(0).tolist(),
        "covariance_eigenvalues": torch.linalg.eigvalsh(codes.T.double().cov().reshape(2 * codes.shape[1:])).tolist(),
        "matched_jsd": of_codes(matched),
        "matched_jsd_of_target": of_target(matched),
    }
    return measures


def _mean_of_draws(count: int, measure: Callable[[], Tensor]) -> float:
    """Returns the mean of a measure of `count` samples that draws numbers, over the more draws the fewer they are.

    A single draw for 57 codes has a standard deviation of 0.02 nats, more than what there is to see.
    """
    draws = min(_DRAWS, -(-MOST // count))
    return sum(float(measure()) for _ in range(draws)) / draws


def _entropy(codes: Tensor) -> float | None:
    try:
        return float(kde_entropy(codes[:MOST]))
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
        * count: the number of examples, at most 10 000, and a multiple of the model's packing.
        * divergence: `GAN.divergence`; NaN for a count of 0.

    Example:
        >>> from kdejsd.data import Digits
        >>> from kdejsd.models import FC, GAN
        >>> from kdejsd.runs.measuring import divergence_measures
        >>> model = GAN(FC((1, 8, 8), 2).decoder, FC((1, 8, 8), 1).encoder, latent_dim=2)
        >>> divergence_measures(model, Digits().held_out)["count"]
        359
    """
    count = min(len(examples), MOST) // model.packing * model.packing
    rng = torch.Generator().manual_seed(seed)
    total = 0.0 if count else math.nan
    with evaluating(model):
        for index in torch.arange(count).split(max(1, CHUNK // model.packing) * model.packing):
            real = examples[index][0].to(model.device, model.dtype)
            generated = model.decode(model.target_samples(len(real), rng))
            total += len(real) * float(model.divergence(real, generated))
    return {"count": count, "divergence": total / max(count, 1)}
