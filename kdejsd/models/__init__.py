"""Provides autoencoders whose codes follow a known distribution, and GANs, as LightningModules.

You pass the networks to a model. `kdejsd.models.built` has each model in a form that builds its networks for examples
of a given shape, and `kdejsd.models.f_divergences` has the divergences that a GAN can minimise.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

# ruff: noqa: F403, F405 (of _all.py, which is read when its first name is asked for: f-divergences need no Lightning)
if TYPE_CHECKING:
    from ._all import *

__all__ = [
    "AAE",
    "AE",
    "FC",
    "GAN",
    "GEN",
    "LCVAE",
    "VAE",
    "WAE",
    "Autoencoder",
    "AutoencoderNetworks",
    "BuiltModel",
    "Conv",
    "DeepConv",
    "GenerativeModel",
    "HalfDeepConv",
    "ImageClassifier",
    "RealNVP",
    "SemiSupervisedGEN",
    "StochasticGEN",
    "with_built_networks",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}._all"), name)
    if name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
