"""A trainer for scripts that print their own progress and keep their own records."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl


def quiet_trainer(**options: Any) -> pl.Trainer:
    """Returns a trainer on one device that prints nothing and, unless the options say so, leaves nothing behind."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    settings: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**settings | options)
