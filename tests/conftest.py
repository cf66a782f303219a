"""What all tests share: programs that are compiled once, for this run and its child processes, and some pictures."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from children import HASTY
from PIL import Image

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # whose environment is that of the process that started it
if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sdjax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_configure(config: pytest.Config) -> None:
    if not IS_WORKER and config.option.markexpr == "not slow":
        os.environ.setdefault("XLA_FLAGS", HASTY)


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


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
