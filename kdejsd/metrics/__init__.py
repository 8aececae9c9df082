"""Measures codes, and how far generated examples are from real ones."""

from .frechet import InceptionFeatures, frechet_distance
from .two_samples import TwoSampleResult, sliced_wasserstein, two_sample_accuracy

__all__ = [
    "InceptionFeatures",
    "TwoSampleResult",
    "frechet_distance",
    "sliced_wasserstein",
    "two_sample_accuracy",
]
