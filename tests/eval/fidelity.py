"""torch-fidelity's modules without torchvision, which their package imports and what is used of them does not need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from unittest import mock


def fidelity(name: str) -> types.ModuleType:
    """The module torch_fidelity.<name>, loaded among empty stand-ins for its neighbours."""
    spec = importlib.util.find_spec("torch_fidelity")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    neighbours = {"torch_fidelity": package, "torch_fidelity.utils": mock.MagicMock()}
    kept = {key: module for key, module in sys.modules.items() if key.startswith("torch_fidelity")}
    sys.modules.update(neighbours)
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    finally:
        for key in [key for key in sys.modules if key.startswith("torch_fidelity")]:
            del sys.modules[key]
        sys.modules.update(kept)
