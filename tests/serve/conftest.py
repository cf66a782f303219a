"""A server's engine over a tiny model of Stable Diffusion 1."""

from __future__ import annotations

import json
from typing import Any

import pytest
import zoo
from a1111_server import a1111  # noqa: F401
from tiny_checkpoints import tiny_checkpoint

import sdjax
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.data.text.tokenizer_training import train_tokenizer
from sdjax.serve.engine import Engine
from sdjax.serve.models import Models
from sdjax.serve.worker import EngineOptions


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of diffusers with random weights."""
    parent = tmp_path_factory.mktemp("served")
    words = ("red heart", "blue cat with a hat")
    size = train_tokenizer(words, parent / "tokenizer", 560).vocab_size
    path = parent / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": zoo.TOKENS}))
    write_checkpoint(parent / "model", tiny_checkpoint("sd1", parent / "tokenizer", size))
    return parent / "model"


@pytest.fixture(scope="session")
def served(folder):
    """served(**options): an engine that has started; it is stopped at the end."""
    engines = []

    def serve(sources: dict | None = None, memory: int | None = None, limits: Any = None, **options: Any) -> Engine:
        models = Models(sources or {"tiny": str(folder)}, lambda source: sdjax.load(source), memory)
        engine = Engine(models, EngineOptions(**options), limits)
        engines.append(engine)
        engine.start([]).result(60.0)
        return engine

    yield serve
    for engine in engines:
        engine.stop(60.0)


@pytest.fixture(scope="session")
def engine(served):
    """An engine whose requests share batches of four."""
    return served(batch_sizes=(4,))
