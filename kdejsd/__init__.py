"""Measures, differentiably in torch, how well latent codes follow a target law and how diverse a generator is."""

import pkgutil as _pkgutil

# Python started in the source folder imports the files there; the compiled module of an installed copy is found too.
__path__ = _pkgutil.extend_path(__path__, __name__)

from . import _former_names
from ._native import build_info
from ._version import __version__
from .bandwidth import entropy_bandwidth, optimal_bandwidth
from .diversity import (
    ClassRadius,
    RadiusBiasWarning,
    class_radius,
    class_radius_search,
    collision_probability,
    collision_probability_from_counts,
    collision_radius_bound,
    compare_diversity,
    diversity_report,
    latent_holes,
    max_collision_entropy,
    renyi_entropy,
    uniform_radius_bound,
)
from .entropy import kde_entropy
from .jsd import jsd, jsd_loss
from .lagged import LaggedKDE
from .novelty import NoveltyScore, novelty_score, residual_variance
from .ops.kde import kde_log_prob
from .ops.nearest import nearest_other_class
from .ops.omega import omega
from .ops.radius import class_radius_bound
from .targets import GaussianMixture, StandardNormal

_former_names.install()

__all__ = [
    "ClassRadius",
    "GaussianMixture",
    "LaggedKDE",
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
    "max_collision_entropy",
    "nearest_other_class",
    "novelty_score",
    "omega",
    "optimal_bandwidth",
    "renyi_entropy",
    "residual_variance",
    "uniform_radius_bound",
]
