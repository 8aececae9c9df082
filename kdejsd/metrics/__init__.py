"""Measures codes, the classes of generated examples, and how far these are from real examples.

Names with a capital are metrics of torchmetrics: use them in a loop, in a `MetricCollection`, or in `log` of a
LightningModule.
"""

from .classes import CollisionEntropy
from .codes import ClassRadius, CodeEntropy, CodeJSD
from .frechet import InceptionFeatures, frechet_distance
from .two_samples import (
    SlicedWasserstein,
    TwoSampleAccuracy,
    TwoSampleResult,
    sliced_wasserstein,
    two_sample_accuracy,
)

__all__ = [
    "ClassRadius",
    "CodeEntropy",
    "CodeJSD",
    "CollisionEntropy",
    "InceptionFeatures",
    "SlicedWasserstein",
    "TwoSampleAccuracy",
    "TwoSampleResult",
    "frechet_distance",
    "sliced_wasserstein",
    "two_sample_accuracy",
]
