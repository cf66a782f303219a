from __future__ import annotations

import fsspec
import pytest
from etils import epath
from etils.epath import backend, gpath
from ml_collections import ConfigDict

from configs import openmoji


@pytest.fixture(scope="session")
def make_config(pictures):
    """make_config(variant, steps): a tiny config over the sixteen images whose rate does not depend on `steps`."""

    def make(variant: str, steps: int = 4) -> ConfigDict:
        config = openmoji.get_config(variant)
        config.data.source = f"folder:{pictures}"
        config.optim.schedule = "constant"
        config.optim.name = "adamw"
        config.train.steps = steps
        return config

    return make


@pytest.fixture
def bucket(monkeypatch):
    """A bucket in memory: no system call reaches it, all goes through epath and fsspec."""
    memory = fsspec.filesystem("memory")

    class Memory(type(backend.fsspec_backend)):
        def fs(self, path):
            del path
            return memory

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Memory())
    yield epath.Path("gs://bucket/run")
    memory.rm("/", recursive=True)
