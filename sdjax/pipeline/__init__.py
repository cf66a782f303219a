"""Floor 5: load a checkpoint and call it."""

from __future__ import annotations

from sdjax.pipeline.load import load, load_conditional
from sdjax.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "load", "load_conditional"]
