"""sdjax: diffusion models of images in JAX and Flax, from training on a pod to a sample on a laptop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdjax.pipeline import Pipeline, load, load_conditional

__all__ = ["Pipeline", "load", "load_conditional"]


def __getattr__(name: str) -> Any:
    """Import the pipeline when it is first asked for: `import sdjax` alone costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("sdjax.pipeline"), name)
