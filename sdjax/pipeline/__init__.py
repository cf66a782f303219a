"""Floor 4: load a checkpoint and call it."""

from __future__ import annotations

from sdjax.pipeline.conditional import ConditionalPipeline
from sdjax.pipeline.loading import load, load_conditional
from sdjax.pipeline.pipeline import Pipeline

__all__ = ["ConditionalPipeline", "Pipeline", "load", "load_conditional"]
