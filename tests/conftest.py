"""What all tests share: programs that are compiled once, for this run alone and its child processes."""

from __future__ import annotations

import os
import shutil
import tempfile

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # whose environment is that of the process that started it
if not IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sdjax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
