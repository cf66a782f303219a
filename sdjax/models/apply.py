"""Calling a module with parameters that are kept beside it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from sdjax.core.tree import Params


def apply(module: nn.Module, params: Params, *inputs: Any, method: str | None = None) -> Any:
    """The output of a module, or of a method of it: all its variables are parameters, and none changes."""
    return module.apply({"params": params}, *inputs, method=method)
