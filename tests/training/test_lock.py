"""A workdir has one run: the second is refused, what a killed one left is recognised, on this machine and on others."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_run
from etils import epath

import train
from sdjax.core.errors import UserError
from sdjax.training import lock
from sdjax.training.lock import LOCK, Lock

HERE = rf"in use by process {os.getpid()} on "


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    for name, seconds in (("BEAT", 0.02), ("PATIENCE", 0.3), ("SETTLE", 0.05)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture(params=["local", "bucket"])
def workdir(request, tmp_path):
    return epath.Path(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket")


def leave(workdir, **changes) -> None:
    """The lock of a run that did not end well."""
    with Lock(workdir):
        record = json.loads((workdir / LOCK).read_text())
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / LOCK).write_text(json.dumps(record | {"run": "another"} | changes))


def test_the_second_run_is_refused_and_the_third_is_not(workdir):
    with Lock(workdir) as first:
        with pytest.raises(UserError, match=HERE) as error, Lock(workdir):
            pass
        assert "\n" not in str(error.value)
        first.check()
        assert (workdir / LOCK).exists()
    assert not (workdir / LOCK).exists()
    with Lock(workdir):
        pass


def test_an_unused_workdir_leaves_no_folder(tmp_path):
    with Lock(epath.Path(tmp_path / "run")):
        pass
    assert not (tmp_path / "run").exists()
    with Lock(epath.Path(tmp_path / "run")):
        (tmp_path / "run/file").touch()
    assert (tmp_path / "run/file").exists()
    with Lock(epath.Path(tmp_path / "run")):
        (tmp_path / "run/file").unlink()
    assert (tmp_path / "run").exists()


def test_a_process_that_ended_has_no_lock(workdir, caplog):
    """It is recognised at once, also where another process has its number by now."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for changes in ({"pid": ended.pid}, {"started": 1}, {"pid": ended.pid, "started": None}):
        leave(workdir, **changes)
        caplog.clear()
        before = time.monotonic()
        with caplog.at_level(logging.WARNING, "sdjax"), Lock(workdir) as taken:
            assert time.monotonic() - before < lock.PATIENCE
            taken.check()
        assert "was left by process" in caplog.text


FOREIGN = {
    "another machine": '{"machine": "moon", "host": "moon", "pid": 7}',
    "cut to nothing": "",
    "a list": "[1]",
    "no number": '{"pid": "x"}',
    "zeros": "\x00" * 80,
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_machines_are_watched(case, workdir):
    """A file that nobody touches is of a run that is gone, one that is touched of one that lives."""
    text = FOREIGN[case]
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / LOCK).write_text(text)
    with Lock(workdir):
        pass
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / LOCK).write_text(text)
    ended = threading.Event()

    def touch():
        while not ended.wait(0.01):
            (workdir / LOCK).write_text(text + " " * (time.monotonic_ns() % 1000))

    thread = threading.Thread(target=touch)
    thread.start()
    message = r"in use by process (7|\?|x) on (moon|an unknown host); wait"
    try:
        with pytest.raises(UserError, match=message), Lock(workdir):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_run_shows_that_it_is_alive(workdir):
    with Lock(workdir) as held:
        before = held._sign()
        assert any(held._sign() != before or time.sleep(0.01) for _ in range(500))


def test_a_run_that_lost_its_workdir_stops(workdir):
    """As one does that was suspended so long that another began."""
    with Lock(workdir) as suspended:
        leave_record = {"run": "another", "pid": 9, "host": "moon"}
        (workdir / LOCK).write_text(json.dumps(leave_record))
        suspended._thread.join(5)  # pyright: ignore[reportOptionalMemberAccess]
        with pytest.raises(UserError, match="was taken over by process 9 on moon; this run stops"):
            suspended.check()
    assert json.loads((workdir / LOCK).read_text()) == leave_record


def test_of_two_that_begin_at_once_one_goes_on(workdir, monkeypatch):
    """Both find a stale lock at one moment, and both replace it."""
    leave(workdir, started=1)
    settle = time.sleep

    def other(seconds):
        monkeypatch.setattr(time, "sleep", settle)
        (workdir / LOCK).write_text('{"run": "another", "pid": 9, "host": "moon"}')

    monkeypatch.setattr(time, "sleep", other)
    with pytest.raises(UserError, match="in use by process 9 on moon, which began at the same moment"), Lock(workdir):
        pass
    assert json.loads((workdir / LOCK).read_text())["pid"] == 9


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_where_nothing_can_be_written_is_one_line(place, tmp_path):
    (tmp_path / "file").touch()
    message = rf"cannot write {tmp_path}/file.*: (Not a directory|File exists)"
    with pytest.raises(UserError, match=message), Lock(epath.Path(tmp_path / place)):
        pass


def test_train_takes_it_before_it_computes(make_config, monkeypatch, tmp_path):
    def must_not_be_called(*args):
        raise AssertionError

    monkeypatch.setattr(train, "make_task", tiny_run.make_task)
    monkeypatch.setattr(train, "init_state", must_not_be_called)
    with Lock(epath.Path(tmp_path)), pytest.raises(UserError, match=HERE):
        train.train_and_evaluate(make_config("autoencoder_tiny"), tmp_path)
    assert [path.name for path in Path(tmp_path).iterdir()] == []
