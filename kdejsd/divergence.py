from .reference.kde import jsd as jsd, jsd_loss as jsd_loss
