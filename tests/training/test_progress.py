"""Lines that a run writes about itself: times that are true, and no bar where nobody looks at it."""

from __future__ import annotations

import logging
import os
import re
import signal
import types

import pytest
import tiny_run

import train
from sdjax.training import progress
from sdjax.training.preemption import SIGNALS, Preemption
from sdjax.training.progress import Pace, announced


@pytest.fixture(autouse=True)
def handlers():
    """Those of pytest, after each test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_pace_is_that_of_steps_and_the_time_left_that_of_the_run(clock):
    """The first of 21 steps compiles for 100 s; the others take 2 s of 8 images, with 50 s of samples after the fourth:
    4 images a second throughout, and 15 steps of (6 + 50 + 4) / 5 s are left after the sixth."""
    pace = Pace(21, 8)
    pace.mark()
    pace.compiled()
    clock.now += 100.0
    pace.step()
    assert (pace.images_per_second, pace.time_left) == (None, None)
    for step in range(2, 7):
        if step == 5:
            clock.now += 50.0
            pace.mark()
        clock.now += 2.0
        pace.step()
        assert pace.images_per_second == pytest.approx(4.0)
    assert pace.seconds == pytest.approx(10.0)
    assert pace.time_left == "0:03:00"
    pace.restart()
    assert pace.images_per_second is None


def test_a_step_that_is_compiled_later_is_in_no_speed(clock):
    pace = Pace(4, 8)
    for seconds, compiled in ((60.0, True), (2.0, False), (60.0, True), (2.0, False)):
        if compiled:
            pace.compiled()
        clock.now += seconds
        pace.step()
    assert pace.images_per_second == pytest.approx(4.0)


def test_what_goes_on_for_long_is_said_again_and_again(monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "SHORT", 0.0)
    with caplog.at_level("INFO", "sdjax"), announced("compiling"):
        while "so far" not in caplog.text:
            pass
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "compiling ..."
    assert lines[1] == "compiling: 0:00:00 so far"
    assert lines[-1] == "compiling took 0:00:00"


@pytest.fixture
def two_layers(monkeypatch):
    monkeypatch.setattr(train, "make_task", tiny_run.make_task)


def test_a_run_says_what_it_does(make_config, two_layers, tmp_path, caplog, capfd):
    """A line for every `log_every` steps, without a terminal; before them the data, after them the results."""
    config, run = make_config("autoencoder_tiny", 6), tmp_path / "run"
    config.train.update(log_every=2, sample_every=6, checkpoint_every=6)
    with caplog.at_level(logging.INFO, "sdjax"):
        train.train_and_evaluate(config, run)
        train.train_and_evaluate(config, run)
    lines = [record.getMessage() for record in caplog.records if record.name == "sdjax"]
    steps = [line for line in lines if line.startswith("step ")]
    form = r"step (\d) of 6: loss \d+\.\d{4}, rate 3\.00e-02, \d+\.\d images/s, \d:\d\d:\d\d left"
    assert [re.fullmatch(form, line)[1] for line in steps] == ["2", "4", "6"]
    for part in (
        f"data {config.data.source} ...",
        "data: 32 images, 4 steps an epoch",
        "steps 1 to 6 of 8 images on 1 x cpu",
        f"{run}: checkpoints/, samples/ (images while training), tensorboard/ (pip install tensorboard; ",
        "compiling the training step ...",
        f"writing {run}/export ...",
        f"finished: {run}/export is the model, {run}/samples has its images while training",
    ):
        assert any(line.startswith(part) for line in lines), part
    assert lines[-1] == f"{run} is finished: {run}/export"
    assert "\r" not in capfd.readouterr().err


def interrupt_at(monkeypatch, number: int, sent: int) -> None:
    """Ctrl-C before a batch."""
    make = tiny_run.slow

    def slow(batches):
        batches = make(batches)
        plain = type(batches).__next__

        def interrupted(self):
            if self.step == number:
                os.kill(os.getpid(), sent)
            return plain(self)

        batches.__class__ = type("Interrupted", (type(batches),), {"__next__": interrupted})
        return batches

    monkeypatch.setattr(tiny_run, "slow", slow)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_keeps_a_checkpoint_as_sigterm_does(sent, code, make_config, two_layers, monkeypatch, tmp_path, caplog):
    """The log says which, when it is on disk; the same command goes on from there, and Ctrl-C is as before."""
    config, before = make_config("autoencoder_tiny", 6), signal.getsignal(signal.SIGINT)
    config.train.checkpoint_every = 100
    with monkeypatch.context() as patch, caplog.at_level("INFO", "sdjax"):
        interrupt_at(patch, 2, sent)
        with pytest.raises(SystemExit) as error:
            train.train_and_evaluate(config, tmp_path)
    assert error.value.code == code
    assert caplog.messages[-1] == (
        f"stopped after step 3 of 6; kept {tmp_path}/checkpoints/3; the same command goes on from there"
    )
    assert (tmp_path / "checkpoints/3").is_dir()
    assert signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "export").exists()
    train.train_and_evaluate(config, tmp_path)
    assert (tmp_path / "checkpoints/6").is_dir()


def test_ctrl_c_before_the_first_step_ends_at_once():
    """There is nothing to keep."""
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_ends_at_once():
    """After the first one the system's own handler is back, and the run is told at its next step."""
    preemption = Preemption().__enter__()
    assert not preemption.reached()
    os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert preemption.reached()
    with pytest.raises(SystemExit):
        preemption.__exit__(None)
