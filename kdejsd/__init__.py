"""Trains latent codes to follow a known distribution, and measures how well they do and how diverse a generator is."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import extend_path as _extend_path
from typing import TYPE_CHECKING, Any

# Python started in the source folder imports the files there; the compiled module of an installed copy is found too.
__path__ = _extend_path(__path__, __name__)

from . import _former_names
from ._version import __version__

# ruff: noqa: F403, F405 (of _all.py, which is read when its first name is asked for: `kdejsd --help` needs no torch)
if TYPE_CHECKING:
    from ._all import *

_former_names.install()

__all__ = [
    "ClassRadius",
    "GaussianMixture",
    "LaggedKDE",
    "LaggedRefresh",
    "NoveltyScore",
    "RadiusBiasWarning",
    "StandardNormal",
    "__version__",
    "build_info",
    "class_radius",
    "class_radius_bound",
    "class_radius_search",
    "collision_probability",
    "collision_probability_from_counts",
    "collision_radius_bound",
    "compare_diversity",
    "diversity_report",
    "entropy_bandwidth",
    "jsd",
    "jsd_loss",
    "kde_entropy",
    "kde_log_prob",
    "latent_holes",
    "load",
    "matched_loss",
    "max_collision_entropy",
    "nearest_other_class",
    "novelty_score",
    "omega",
    "optimal_bandwidth",
    "renyi_entropy",
    "residual_variance",
    "uniform_radius_bound",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        names = vars(import_module("._all", __name__))
        globals().update({name: names[name] for name in __all__ if name in names})
        return names[name]
    if name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = ["diversity", "models", "ops", "reference", "runs", "targets"]
    if find_spec("lightning") is not None:  # of the extra `train`
        modules += ["data", "metrics", "plots"]
    if find_spec("sklearn") is not None:  # of the extra `sklearn`, and of `train`
        modules += ["sklearn"]
    return sorted([*__all__, *modules])
