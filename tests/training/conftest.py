from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import openmoji


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Runs of the same config compile the same step; once is enough."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Sixteen captioned pictures of one colour with a darker corner."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(16):
        image = np.full((32, 32, 3), rng.integers(0, 256, 3), np.uint8)
        image[:16, :16] //= 2
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"colour {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_config(pictures):
    """make_config(variant, steps): a tiny config over the sixteen pictures whose rate does not depend on `steps`."""

    def make(variant: str, steps: int = 4) -> ConfigDict:
        config = openmoji.get_config(variant)
        config.data.source = f"folder:{pictures}"
        config.optim.schedule = "constant"
        config.train.steps = steps
        return config

    return make
