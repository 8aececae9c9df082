"""Autoencoders with a shaped latent space, and GANs, as LightningModules; their networks are arguments.

`kdejsd.models.images` has each of them in a form that builds its networks for images of a given shape, and
`kdejsd.models.f_divergences` the divergences that a GAN can lower.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._all import *  # noqa: F403 (mypy reads all names there)


def __getattr__(name: str) -> Any:
    # Read when the first model is asked for: the f-divergences do without Lightning.
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}._all"), name)


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
