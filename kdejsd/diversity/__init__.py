"""Diversity of a latent space: class radius, its bounds and what they say about the number of classes."""

from ..ops.radius import class_radius_bound
from .bounds import collision_radius_bound, max_collision_entropy, uniform_radius_bound

__all__ = ["class_radius_bound", "collision_radius_bound", "max_collision_entropy", "uniform_radius_bound"]
"""How many different things a generator makes, read off the latent space that a classifier divides into classes."""
