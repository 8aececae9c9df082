"""The former name of `kdejsd.jsd`."""

import warnings

from .jsd import codes_jsd as codes_jsd
from .jsd import jsd as jsd
from .jsd import jsd_loss as jsd_loss
from .jsd import target_jsd as target_jsd

warnings.warn("kdejsd.divergence is kdejsd.jsd now; the old name goes with the next version", DeprecationWarning, 2)
