"""Finds the classes of models and data by the names that the command takes."""

from __future__ import annotations

import importlib
import inspect

from .errors import did_you_mean


def class_named(option: str, name: str, base: type) -> type:
    """Returns the class with a short name or an import path.

    Raises:
        ValueError: if there is none.
    """
    if not name.isidentifier():
        return class_at(name, f"--{option}")
    known = {cls.__name__: cls for cls in subclasses(base)}
    if name not in known:
        raise ValueError(
            f"--{option} must be one of {', '.join(known)} or the import path of a class, got {name}"
            f"{did_you_mean(name, known)}"
        )
    return known[name]


def class_at(path: str, option: str = "") -> type:
    """Returns the class at an import path.

    Raises:
        ValueError: if there is none. The error names the option that the path was given for.
    """
    module, _, name = path.rpartition(".")
    try:
        found: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {path} is not the import path of a class: {error}") from error
    return found


def subclasses(base: type) -> list[type]:
    """Returns the classes that are derived from a class, near and far, without the abstract ones."""
    found: list[type] = []
    cls: type
    for cls in base.__subclasses__():
        found += [cls, *subclasses(cls)]
    return [cls for cls in found if not inspect.isabstract(cls)]
