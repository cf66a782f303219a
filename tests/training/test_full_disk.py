"""A disk that is full: the run stops at once, with one line that says what is intact."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_run
from etils import epath
from test_checkpoint import position_at, restored, save, state_at

import train
from configs.common import base
from sdjax.core.errors import UserError
from sdjax.training.checkpoint import Checkpoints, _hush_closed_loops


@pytest.fixture
def at_most():
    """at_most(bytes): no file of this process can be larger, which fails as a full disk does; for ever by default."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int = before[0]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    limit()


def test_only_closed_event_loops_are_hushed(monkeypatch):
    """After a failure Orbax' own tasks end in loops that it has closed."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(str(found.exc_value)))
    _hush_closed_loops()
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))  # pyright: ignore[reportArgumentType]
    assert seen == ["something else"]


def save_and_check(checkpoints: Checkpoints) -> None:
    checkpoints.save(state_at(4), position_at(4), {})
    for _ in range(1000):
        checkpoints.check()
        time.sleep(0.01)


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_once(at_most, monkeypatch, tmp_path):
    """Its writing fails in the background: the next `check` says so, and what is there stays as it is."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    full, later = tmp_path / "full", tmp_path / "later"
    save(full, 2)
    with Checkpoints(epath.Path(full), base()) as checkpoints:
        at_most(1000)
        message = rf"cannot write {full}/checkpoints/4: File too large; .*; the checkpoint of step 2 is intact"
        with pytest.raises(UserError, match=message) as error:
            save_and_check(checkpoints)
        at_most()
        assert "\n" not in str(error.value)
        assert checkpoints.latest == 2
    shutil.copytree(full, later)  # as another process finds it: threads of this one still write
    assert restored(later) == 2
    assert save(later, 4) == [2, 4]


FAILING = {"metrics": "tensorboard/events", "previews": "samples/samples_0000002.png", "export": "export"}


@pytest.mark.parametrize("case", FAILING)
def test_what_else_cannot_be_written_names_place_and_step(case, make_config, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / FAILING[case]))

    monkeypatch.setattr(train, "make_task", tiny_run.make_task)
    config = make_config("autoencoder_tiny", 2)
    config.train.update(checkpoint_every=1, log_every=2)
    if case == "metrics":
        monkeypatch.setattr("sdjax.training.tensorboard.TensorBoard.scalars", fail)
    elif case == "previews":
        monkeypatch.setattr("sdjax.training.metrics.write_whole", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    kept = 1 if case == "metrics" else 2
    message = rf"step 2: cannot write {tmp_path / FAILING[case]}.*: No space left on device; make room and run the "
    with pytest.raises(UserError, match=rf"{message}same command again; the checkpoint of step {kept} is intact"):
        train.train_and_evaluate(config, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(train, "make_task", tiny_run.make_task)
    assert (train.train_and_evaluate(config, tmp_path) / "net.safetensors").exists()
