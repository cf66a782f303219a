"""Floor 4: load a checkpoint and call it."""

from __future__ import annotations

from sdjax.pipeline.loading import load
from sdjax.pipeline.pipeline import Pipeline

__all__ = ["Pipeline", "load"]
