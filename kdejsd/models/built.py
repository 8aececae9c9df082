"""Gives the models a form in which they build their own networks, for examples of a given shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from . import aae, ae, gan, gen, lcvae, semi, stochastic, vae, wae
from .base import GenerativeModel
from .networks import FC, Network


class BuiltModel(GenerativeModel):
    """Builds a model together with its networks, for examples of a given shape.

    The result is of the model's own class: `built.VAE((1, 28, 28))` is a `kdejsd.models.VAE`. A class derived from such
    a form makes objects of itself.

    Args:
        example_shape: the shape of one example, such as (C, H, W) of an image or (d,) of a row of d columns.
        latent_dim: l, the dimension of the latents.
        network: builds encoder and decoder from (example_shape, latent_dim): `FC`, `Conv` or another class. A GAN's
            generator is a decoder, its discriminator an encoder to one number.
        kwargs: as in the model.

    Example:
        >>> from kdejsd import models
        >>> model = models.built.VAE((1, 28, 28), latent_dim=8, network=models.Conv)
        >>> type(model) is models.VAE, model.sample(3).shape
        (True, torch.Size([3, 1, 28, 28]))
    """

    def __init__(self, example_shape: Sequence[int], latent_dim: int = 2, network: Network = FC, **kwargs: Any) -> None:
        first, second = self.build_networks(network, example_shape, latent_dim, kwargs)
        super().__init__(first, second, latent_dim, **kwargs)  # type: ignore[arg-type]  # of the model, next in line
        built = vars(type(self)).get("_built")
        if built is not None:
            self.__class__ = built  # a form of arguments is no kind of model


def with_built_networks(model: type[GenerativeModel]) -> type[BuiltModel]:
    """Returns a form of a model class that builds its networks: it takes the arguments of `BuiltModel` instead of them.

    Use it for a model class of your own. It has the name of the class.

    Example:
        >>> from kdejsd.models import AE, with_built_networks
        >>> model = with_built_networks(AE)(example_shape=(3, 8, 8), latent_dim=4)
        >>> isinstance(model, AE), model.sample(2).shape
        (True, torch.Size([2, 3, 8, 8]))
    """
    if issubclass(model, BuiltModel):
        raise TypeError(
            f"model must take its networks as arguments, got {model.__name__}, which builds them for examples"
        )
    attributes = {"__module__": __name__, "__doc__": model.__doc__, "_built": model}
    return cast("type[BuiltModel]", type(model.__name__, (BuiltModel, model), attributes))


AAE, AE, GAN, GEN, LCVAE, SemiSupervisedGEN, StochasticGEN, VAE, WAE = (
    with_built_networks(model)
    for model in (
        *(aae.AAE, ae.AE, gan.GAN, gen.GEN, lcvae.LCVAE),
        *(semi.SemiSupervisedGEN, stochastic.StochasticGEN, vae.VAE, wae.WAE),
    )
)
