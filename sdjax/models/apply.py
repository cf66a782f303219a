"""Calling a Flax module whose variables are all parameters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from sdjax.core.tree import Params


def apply(module: nn.Module, params: Params, *inputs: Any, method: str | None = None) -> Any:
    """Output of a module, or of a method of it; no variable changes."""
    return module.apply({"params": params}, *inputs, method=method)
