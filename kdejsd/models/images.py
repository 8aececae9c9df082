"""The models in the form that the command trains: their networks are built for images of a given shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from . import aae, ae, gen, semi, vae, wae
from .autoencoder import Autoencoder, Network
from .networks import FC


class ImageAutoencoder(Autoencoder):
    """A model whose networks are built for images of a given shape.

    Args:
        image_shape: (C, H, W).
        latent_dim: l, the dimension of the codes.
        network: builds encoder and decoder from (image_shape, latent_dim): `FC`, `Conv` or another class.
        kwargs: as in the model.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int = 2, network: Network = FC, **kwargs: Any) -> None:
        encoder, decoder = self.build_networks(network, image_shape, latent_dim)
        super().__init__(encoder, decoder, latent_dim, **kwargs)


def for_images(model: type[Autoencoder]) -> type[ImageAutoencoder]:
    """The model, under the same name, with the arguments of `ImageAutoencoder` in place of the networks."""
    attributes = {"__module__": __name__, "__doc__": model.__doc__}
    return cast("type[ImageAutoencoder]", type(model.__name__, (ImageAutoencoder, model), attributes))


AAE, AE, GEN, SemiSupervisedGEN, VAE, WAE = (
    for_images(model) for model in (aae.AAE, ae.AE, gen.GEN, semi.SemiSupervisedGEN, vae.VAE, wae.WAE)
)
