"""Imports modules that have moved under their former names too, with a DeprecationWarning, for one version."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    "kdejsd.checkpoints": "kdejsd.runs.checkpoints",
    "kdejsd.divergences": "kdejsd.models.f_divergences",
    "kdejsd.models.classifier": "kdejsd.models.image_classifier",
    "kdejsd.report": "kdejsd.runs.report",
}


class _Finder(MetaPathFinder, Loader):
    """Finds the new module when Python asks for a former name."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is {new} now; the old name goes with the next version", DeprecationWarning, stacklevel=2
        )
        found = import_module(new)
        module.__doc__ = f"The former name of `{new}`."
        vars(module).update({name: value for name, value in vars(found).items() if not name.startswith("_")})


def install() -> None:
    """Registers the former names, before those of files, which an older copy that is installed too may have."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
