"""What all tests share: programs that are compiled once, for all runs and their child processes, and some images."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from children import HASTY
from compilations import Compilations
from PIL import Image

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # whose environment is that of the process that started it
CACHE_BYTES = 4 * 2**30
LONG = Path(__file__).with_name("long.txt")
BUDGET = 2_300  # programs that a default run may compile; about 2,000 of them in 4,300 tests


def cache_folder() -> Path:
    """Compiled programs of earlier runs: $SDJAX_TEST_CACHE, else `sdjax-tests` in the user's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SDJAX_TEST_CACHE") or Path(caches) / "sdjax-tests")


def prune(folder: Path) -> None:
    """Removes the oldest programs beyond CACHE_BYTES."""
    files = sorted(
        ((file.stat(), file) for file in folder.glob("*-cache")),
        key=lambda pair: -pair[0].st_mtime,
    )
    size = 0
    for stat, file in files:
        size += stat.st_size
        if size > CACHE_BYTES:
            file.unlink(missing_ok=True)


if not IS_WORKER:
    cache_folder().mkdir(parents=True, exist_ok=True)
    prune(cache_folder())
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin, and would take the other worker's core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compilations", action="store_true", help="show which tests compiled longest")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have ignored by what runs in background
    if not IS_WORKER and config.option.markexpr in ("not slow", "long"):
        os.environ.setdefault("XLA_FLAGS", HASTY)
    is_default = config.option.markexpr == "not slow" and is_whole(config)
    if is_default:
        config.option.markexpr = "not slow and not long"
    config.pluginmanager.register(Compilations(config.option.compilations, BUDGET if is_default else None))


def is_whole(config: pytest.Config) -> bool:
    """True where no file or test was named."""
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that `long.txt` names."""
    names = {line for line in LONG.read_text().splitlines() if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in names:
            item.add_marker("long")


def pytest_collection_finish(session: pytest.Session) -> None:
    if IS_WORKER or not session.config.getoption("numprocesses", None):  # not where tests are only handed out
        import tracing

        tracing.begin()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Sixteen captioned images of one colour with a darker corner."""
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
