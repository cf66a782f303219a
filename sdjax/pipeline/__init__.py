"""Floor 4: load a checkpoint and call it."""

from __future__ import annotations

from sdjax.pipeline.conditional import ConditionalPipeline
from sdjax.pipeline.loading import load, load_conditional
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.pixels import PixelPipeline

__all__ = ["ConditionalPipeline", "Pipeline", "PixelPipeline", "load", "load_conditional"]
