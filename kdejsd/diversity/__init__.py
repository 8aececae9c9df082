"""Diversity of a latent space: class radius, its bounds and what they say about the number of classes."""

from ..ops.radius import class_radius_bound

__all__ = ["class_radius_bound"]
