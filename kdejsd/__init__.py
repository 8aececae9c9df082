"""Kernel-density Jensen-Shannon divergence and latent diversity, differentiable in torch."""

from .divergence import jsd, jsd_loss
from .ops.kde import kde_log_prob
from .targets import GaussianMixture, StandardNormal

__all__ = ["GaussianMixture", "StandardNormal", "jsd", "jsd_loss", "kde_log_prob"]
