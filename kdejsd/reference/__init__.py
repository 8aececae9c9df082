"""The ops in plain PyTorch, under the names they have in `kdejsd`: the truth they are tested against."""

from .kde import jsd, jsd_loss, kde_log_prob
from .omega import omega

__all__ = ["jsd", "jsd_loss", "kde_log_prob", "omega"]
