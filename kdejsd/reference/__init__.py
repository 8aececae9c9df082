"""Implements the ops in plain PyTorch, under the names they have in `kdejsd`: the truth they are tested against.

Everything here runs on any device torch has and composes with every torch transform, with all differences in memory.
"""

from .kde import jsd, jsd_loss, kde_log_prob
from .nearest import nearest_other_class
from .omega import omega
from .radius import class_radius_bound

__all__ = ["class_radius_bound", "jsd", "jsd_loss", "kde_log_prob", "nearest_other_class", "omega"]
