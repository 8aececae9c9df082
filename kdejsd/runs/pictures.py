"""Draws the pictures of a model, for its report and for boards that follow its training."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import plots
from .._extras import train_extra
from .._modes import evaluating
from ..data import ExampleData
from ..drawing import are_images, draw, draw_reconstructions
from ..models import Autoencoder, GenerativeModel
from .measuring import Encoded

with train_extra():
    from matplotlib.figure import Figure

_ROWS = 1000  # a histogram of fewer is ragged

CAPTIONS = {
    "latent": "The codes of held-out examples. Codes that follow their target are spread as it is: for a normal target "
    "they are densest in the middle, grow sparse outwards, and leave no empty places between the classes. If "
    "the axes are principal components and the codes are few, the first ones have variances above the target's and the "
    "last ones below it, by chance alone.",
    "reconstructions": "Held-out examples, and what is decoded from their codes.",
    "samples": "What the model makes of samples of the target.",
    "classes": "The latent space, coloured by the class of what is made from each of its places. A dot, of an "
    "autoencoder, is the code of an example, and one on another colour is decoded to an example of another class.",
}


def sample_count(data: ExampleData) -> int:
    """Returns how many samples of a model are drawn and measured.

    Example:
        >>> from kdejsd.data import Digits, Grid2D
        >>> from kdejsd.runs.pictures import sample_count
        >>> sample_count(Digits()), sample_count(Grid2D())
        (100, 10000)
    """
    return data.report_samples if are_images(data) else max(data.report_samples, _ROWS)


def pictures(
    model: GenerativeModel, data: ExampleData, samples: Tensor, held_out: Encoded | None = None
) -> dict[str, Figure]:
    """Draws samples of a model, and for an autoencoder held-out codes and reconstructions.

    Args:
        model: the model.
        data: its examples.
        samples: [n, ...], generated.
        held_out: the held-out examples with their codes, for an autoencoder.

    Returns:
        The pictures by the names of their files, in the order in which they are shown.

    Example:
        >>> from kdejsd.data import Digits
        >>> from kdejsd.models import AE, FC
        >>> from kdejsd.runs.measuring import encode_set
        >>> from kdejsd.runs.pictures import pictures
        >>> networks, data = FC((1, 8, 8), latent_dim=2), Digits()
        >>> model = AE(networks.encoder, networks.decoder, latent_dim=2)
        >>> list(pictures(model, data, model.sample(100), encode_set(model, data.held_out)))
        ['latent', 'reconstructions', 'samples']
    """
    drawn: dict[str, Figure] = {}
    if isinstance(model, Autoencoder) and held_out is not None:
        examples = data.held_out[torch.arange(min(sample_count(data), len(data.held_out)))][0]
        with torch.no_grad(), evaluating(model):
            reconstructions = model.reconstruct(examples.to(model.device, model.dtype)).cpu()  # type: ignore[arg-type]
        drawn["latent"] = plots.latent(held_out.codes, held_out.labels, model.target, data.class_names)
        drawn["reconstructions"] = draw_reconstructions(data, examples, reconstructions)
    return drawn | {"samples": draw(data, samples)}
