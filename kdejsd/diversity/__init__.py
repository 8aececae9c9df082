"""Measures how many different things a generator makes, by the classes that a classifier gives to its samples."""

from .bounds import collision_radius_bound, max_collision_entropy, uniform_radius_bound
from .class_entropy import collision_probability, collision_probability_from_counts, renyi_entropy
from .holes import LatentHoles, latent_holes
from .radius import ClassRadius, RadiusBiasWarning, SearchedRadius, class_radius, class_radius_search
from .report import DiversityComparison, DiversityReport, compare_diversity, diversity_report

__all__ = [
    "ClassRadius",
    "DiversityComparison",
    "DiversityReport",
    "LatentHoles",
    "RadiusBiasWarning",
    "SearchedRadius",
    "class_radius",
    "class_radius_search",
    "collision_probability",
    "collision_probability_from_counts",
    "collision_radius_bound",
    "compare_diversity",
    "diversity_report",
    "latent_holes",
    "max_collision_entropy",
    "renyi_entropy",
    "uniform_radius_bound",
]
