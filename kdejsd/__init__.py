"""Kernel-density Jensen-Shannon divergence and latent diversity, differentiable in torch."""

import pkgutil

# Python started in the source folder imports the files there; the compiled module of an installed copy is found too.
__path__ = pkgutil.extend_path(__path__, __name__)

from ._native import build_info  # noqa: E402
from ._version import __version__  # noqa: E402
from .divergence import jsd, jsd_loss  # noqa: E402
from .ops.kde import kde_log_prob  # noqa: E402
from .targets import GaussianMixture, StandardNormal  # noqa: E402

__all__ = [
    "GaussianMixture",
    "StandardNormal",
    "__version__",
    "build_info",
    "jsd",
    "jsd_loss",
    "kde_log_prob",
]
