"""Compiled programs are kept where nobody else can put any, and found again."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sdjax.core.compilation import VARIABLE, keep_compiled

CODE = """
import sys
import jax
from sdjax.core.compilation import keep_compiled
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
told = []
jax.monitoring.register_event_listener(lambda event, **k: told.append(event.split("/")[-1]))
assert str(keep_compiled()) == sys.argv[1]
jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(3)).block_until_ready()
print(told.count("cache_hits"), told.count("cache_misses"))
"""


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    yield
    jax.config.update("jax_compilation_cache_dir", os.environ.get(VARIABLE))


def test_a_second_process_compiles_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CODE, str(tmp_path / "sdjax" / "compiled")]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    (hits, misses), (hits_again, misses_again) = (map(int, run.stdout.split()) for run in runs)
    assert (hits, misses_again) == (0, 0)
    assert misses == hits_again > 0


def test_the_folder_is_the_users_alone(tmp_path, unset, caplog):
    assert keep_compiled(tmp_path / "new") == tmp_path / "new"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "new")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "file").write_text("")
    for name in ("open", "link", "file", "file/below"):
        caplog.clear()
        assert keep_compiled(tmp_path / name) is None, name
        assert "compiled programs are not kept" in caplog.text
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "new")


def test_jaxs_own_variable_wins(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    assert keep_compiled(tmp_path / "other") == tmp_path / "chosen"
    assert not (tmp_path / "other").exists()
