"""What all tests share: programs that are compiled once, for this run alone and its child processes."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

CACHE = tempfile.mkdtemp(prefix="sdjax-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(scope="session", autouse=True)
def _no_cache_is_left():
    yield
    shutil.rmtree(CACHE, ignore_errors=True)
