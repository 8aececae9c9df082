"""Implements the ops in plain PyTorch, under the names they have in `kdejsd`: the fast ops are tested against these.

Use them to check results, or where a torch transform does not take the fast ops. They run on any device that torch has
and compose with every torch transform, but hold the differences of all pairs in memory.
"""

from .kde import jsd, jsd_loss, kde_log_prob
from .nearest import nearest_other_class
from .omega import omega
from .radius import class_radius_bound

__all__ = ["class_radius_bound", "jsd", "jsd_loss", "kde_log_prob", "nearest_other_class", "omega"]
