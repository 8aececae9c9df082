"""Finds the class of each latent sample: the one that a classifier gives to the example generated from it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._modes import Map, evaluating, models_of
from .._numbers import integer


@torch.no_grad()
def latent_labels(
    generator: Map | None, classifier: Map, latents: Tensor, *, batch_size: int = 1000
) -> tuple[Tensor, int]:
    """Returns the class of each latent sample, argmax of classifier(generator(z)), and the number of classes there are.

    Models are in evaluation mode during the call.

    Args:
        generator: [B, d] -> what the classifier takes; None where the classifier acts on the latents.
        classifier: to logits, log-probabilities or probabilities [B, K], K at least 2.
        latents: [N, d], N at least 1, on the models' device.
        batch_size: latents at a time.

    Returns:
        labels [N] int64, on the device of the logits, and K.

    Raises:
        ValueError: if logits have another shape or are NaN, the number of classes changes, or batch_size is below 1.
        TypeError: if logits are no floating-point tensor.
    """
    batch_size = integer("batch_size", batch_size, 1)
    labels, undefined, counts = [], 0, set()
    with evaluating(generator, classifier):
        for z in latents.split(batch_size):
            logits = classifier(z if generator is None else generator(z))
            if not isinstance(logits, Tensor) or not logits.is_floating_point():
                kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
                raise TypeError(f"classifier must return a floating-point tensor of logits, got {kind}")
            if logits.ndim != 2 or len(logits) != len(z) or logits.shape[1] < 2:
                raise ValueError(f"classifier must return logits [{len(z)}, K], K at least 2; got {list(logits.shape)}")
            labels.append(logits.argmax(1))
            undefined += int(logits.isnan().any(1).sum())
            counts.add(logits.shape[1])
    if undefined:
        raise ValueError(f"classifier must not return NaN, and did for {undefined} of {len(latents)} samples")
    if len(counts) > 1:
        raise ValueError(f"classifier must return as many classes for every batch, got {sorted(counts)}")
    return torch.cat(labels), counts.pop()


def models_like(*parts: object) -> Tensor:
    """Returns an empty tensor with the device and dtype of the models' first parameter, or float32 on the CPU."""
    parameter = next((parameter for model in models_of(*parts) for parameter in model.parameters()), torch.empty(0))
    return parameter.detach().new_empty(0)
