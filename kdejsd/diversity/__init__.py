"""How many different things a generator makes, read off the latent space that a classifier divides into classes."""

from .bounds import collision_radius_bound, max_collision_entropy, uniform_radius_bound
from .radius import ClassRadius, RadiusBiasWarning, SearchedRadius, class_radius, class_radius_search

__all__ = [
    "ClassRadius",
    "RadiusBiasWarning",
    "SearchedRadius",
    "class_radius",
    "class_radius_search",
    "collision_radius_bound",
    "max_collision_entropy",
    "uniform_radius_bound",
]
