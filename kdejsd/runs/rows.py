"""Measures how well each column of rows is decoded, and how far generated rows are from real ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._modes import evaluating
from ..data import ExampleData, ExampleSet
from ..metrics import sliced_wasserstein, two_sample_accuracy
from ..models import Autoencoder
from ..models.base import CHUNK
from ..plots import variance_explained

_DECODED = 10_000  # examples of a set whose columns are measured
_COMPARED = 1000  # generated and held-out examples that are compared: a forest of more takes many seconds
_LEAST = 5  # examples that a classifier needs of each set


@torch.no_grad()
def column_measures(model: Autoencoder, data: ExampleData, examples: ExampleSet, codes: Tensor) -> dict[str, Any]:
    """Measures how well the columns of a set are decoded, by its first 10 000 examples.

    Args:
        model: the trained model.
        data: the data module that the set is of.
        examples: the set, of examples of any shape; each of their values is a column.
        codes: [n, l], the codes of the set.

    Returns:
        * variance_explained: the share of the variance of all columns together that the reconstructions explain, in the
          units that the model sees; NaN where no column varies.
        * variance_explained_least: the same share for the column where it is lowest; NaN where no column varies.
        * columns: for each column by its name the `error`, the root mean squared error in the units of its file, and
          the `variance_explained`.

    Example:
        >>> from kdejsd.data import Grid2D
        >>> from kdejsd.models import AE, FC
        >>> from kdejsd.runs.rows import column_measures
        >>> data, networks = Grid2D(num_samples=1000), FC((2,), latent_dim=2)
        >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
        >>> held_out = data.held_out
        >>> column_measures(model, data, held_out, model.encode(held_out.examples))["columns"]["1"].keys()
        dict_keys(['error', 'variance_explained'])
    """
    originals, decoded = [], []
    with evaluating(model):
        for index in torch.arange(min(len(examples), _DECODED)).split(CHUNK):
            originals.append(examples[index][0])
            decoded.append(model.decode(codes[index.to(codes.device)]).cpu())
    sets = torch.cat(originals), torch.cat(decoded)
    first, second = (rows.flatten(1).double() for rows in sets)
    spread = (first - first.mean(0)).square().sum()
    together = 1 - (first - second).square().sum() / spread if spread > 0 else math.nan  # as of one example
    first, second = (data.restored(rows).flatten(1).double() for rows in sets)
    errors, shares = (first - second).square().mean(0).sqrt(), variance_explained(first, second)
    known = shares[~shares.isnan()]
    return {
        "variance_explained": float(together),
        "variance_explained_least": float(known.min()) if len(known) else math.nan,
        "columns": {
            name: {"error": error, "variance_explained": share}
            for name, error, share in zip(data.columns, errors.tolist(), shares.tolist(), strict=True)
        },
    }


def two_sample_measures(data: ExampleData, samples: Tensor) -> dict[str, float]:
    """Measures how far generated examples are from as many held-out ones, at most 1000 of each.

    Args:
        data: the data module.
        samples: [n, ...], generated.

    Returns:
        * sliced_wasserstein, two_sample_accuracy: of the generated examples against held-out ones (`kdejsd.metrics`),
          in the units that the model sees; NaN if a sample is not finite.
        * sliced_wasserstein_of_training, two_sample_accuracy_of_training: of as many training examples, to compare
          with.
        * two_sample_standard_error: of the accuracy, if both sets are of one distribution.
        * two_sample_count: the number of examples of each set that were compared.

        Nothing, if a set has fewer than 5 examples.

    Example:
        >>> import torch
        >>> from kdejsd.data import Grid2D
        >>> from kdejsd.runs.rows import two_sample_measures
        >>> found = two_sample_measures(Grid2D(num_samples=1000), torch.zeros(100, 2))
        >>> found["two_sample_accuracy"] > 0.9 > found["two_sample_accuracy_of_training"]
        True
    """
    count = min(len(samples), len(data.held_out), len(data.training), _COMPARED)
    if count < _LEAST:
        return {}
    held_out, training = (_drawn(part, count) for part in (data.held_out, data.training))
    generated = samples[:count].detach().to(held_out)
    distances, accuracies = {}, {}
    for name, rows in (("", generated), ("_of_training", training)):
        finite = bool(rows.isfinite().all())
        distances[f"sliced_wasserstein{name}"] = sliced_wasserstein(rows, held_out) if finite else math.nan
        accuracy, error = two_sample_accuracy(rows, held_out) if finite else (math.nan, math.nan)
        accuracies[f"two_sample_accuracy{name}"] = accuracy
    return {**distances, **accuracies, "two_sample_standard_error": error, "two_sample_count": count}


def _drawn(examples: ExampleSet, count: int) -> Tensor:
    """Returns so many examples of a set, drawn at random: files are often sorted."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return examples[order[:count].sort().values][0]
