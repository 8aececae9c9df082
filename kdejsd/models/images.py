"""The models in the form that the command trains: their networks are built for images of a given shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from . import aae, ae, gan, gen, lcvae, semi, stochastic, vae, wae
from .base import GenerativeModel
from .networks import FC, Network


class ImageModel(GenerativeModel):
    """A model whose networks are built for images of a given shape.

    Args:
        image_shape: (C, H, W).
        latent_dim: l, the dimension of the latents.
        network: builds encoder and decoder from (image_shape, latent_dim): `FC`, `Conv` or another class. A GAN's
            generator is a decoder, its discriminator an encoder to one number.
        kwargs: as in the model.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int = 2, network: Network = FC, **kwargs: Any) -> None:
        first, second = self.build_networks(network, image_shape, latent_dim, kwargs)
        super().__init__(first, second, latent_dim, **kwargs)  # type: ignore[arg-type]  # of the model, next in line


def for_images(model: type[GenerativeModel]) -> type[ImageModel]:
    """The model, under the same name, with the arguments of `ImageModel` in place of the networks."""
    attributes = {"__module__": __name__, "__doc__": model.__doc__}
    return cast("type[ImageModel]", type(model.__name__, (ImageModel, model), attributes))


AAE, AE, GAN, GEN, LCVAE, SemiSupervisedGEN, StochasticGEN, VAE, WAE = (
    for_images(model)
    for model in (
        *(aae.AAE, ae.AE, gan.GAN, gen.GEN, lcvae.LCVAE),
        *(semi.SemiSupervisedGEN, stochastic.StochasticGEN, vae.VAE, wae.WAE),
    )
)
