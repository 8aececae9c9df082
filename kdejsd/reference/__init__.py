"""The ops in plain PyTorch, under the names they have in `kdejsd`: the truth they are tested against."""

from .kde import jsd, jsd_loss, kde_log_prob
from .nearest import nearest_other_class
from .radius import class_radius_bound

__all__ = ["class_radius_bound", "jsd", "jsd_loss", "kde_log_prob", "nearest_other_class"]
