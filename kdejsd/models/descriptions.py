"""Describes networks and targets by plain values, from which they can be built again, as the command does."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from .._plain import plain
from ..targets import GaussianMixture, IsotropicNormal, StandardNormal


def description(value: Any) -> Any:
    """Returns plain settings that describe a class, a function, a `functools.partial` of a class, or a target.

    They have the form that the command reads: an import path, or `class_path` with `init_args`. None is returned for
    values that cannot be described so, such as a lambda, an object of a class of your own or a torch Distribution.

    Example:
        >>> from functools import partial
        >>> from kdejsd.models import FC
        >>> from kdejsd.models.descriptions import description
        >>> description(FC), description(partial(FC, hidden=(16,)))
        ('kdejsd.models.networks.FC', {'class_path': 'kdejsd.models.networks.FC', 'init_args': {'hidden': (16,)}})
        >>> print(description(lambda shape, dim: FC(shape, dim)))
        None
    """
    if type(value) is GaussianMixture:
        parts = {"means": value.means, "scales": value.scales, "weights": value.log_weights.exp()}
        return _made_by(GaussianMixture, {name: part.tolist() for name, part in parts.items()})
    if type(value) is StandardNormal:
        return _made_by(StandardNormal, {"dim": value.dim})
    if type(value) is IsotropicNormal:
        return _made_by(IsotropicNormal, {"dim": value.dim, "variance": value.variance})
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        with suppress(TypeError):  # of an argument that is no plain value
            return _made_by(value.func, {name: plain(arg, name) for name, arg in value.keywords.items()})
        return None
    return import_path(value)


def import_path(value: Any) -> str | None:
    """Returns the path from which a class or a function can be imported; None if it stands inside of a function."""
    name = getattr(value, "__qualname__", None)
    return None if name is None or "<" in name else f"{value.__module__}.{name}"


def _made_by(kind: type, arguments: dict[str, Any]) -> dict[str, Any] | None:
    path = import_path(kind)
    return None if path is None else {"class_path": path, "init_args": arguments}
