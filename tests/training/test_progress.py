"""Lines that a run writes about itself: times that are true, and no bar where nobody looks at it."""

from __future__ import annotations

import logging
import os
import re
import signal
import types

import jax
import numpy as np
import pytest
import tiny_run
from etils import epath

import train
from sdjax.core.signals import SIGNALS
from sdjax.training import metrics, progress
from sdjax.training.preemption import Preemption
from sdjax.training.progress import announced


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


@pytest.fixture
def run(clock, monkeypatch, make_config, tmp_path):
    """run(finished): the lines of steps of 8 images that take 2 s each.

    The first one compiles for 100 s besides, and samples take 50 s after the fourth. `finished` says when the host sees
    that a step is done: "at once", as on a CPU that works when it is called, or "later", when its loss is read.
    """
    monkeypatch.setattr(metrics, "time", progress.time)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: result[0].wait() and result)

    class Loss:
        """A loss that is there 2 s after the device began to compute it."""

        def __init__(self, ready: float):
            self.ready = ready

        def wait(self) -> bool:
            clock.now = max(clock.now, self.ready)
            return True

        def __float__(self) -> float:
            return float(self.wait())

    def make(finished: str) -> list[str]:
        options, lines = make_config("autoencoder_tiny", 9).train, []
        options.log_every = 1
        free = clock.now

        def step(state, frozen, batch):
            nonlocal free
            clock.now += 100.0 if state == 1 else 0.0
            free = max(free, clock.now) + 2.0
            loss = Loss(free)
            if finished == "at once":
                loss.wait()
            return loss, {"loss": loss}

        with metrics.Metrics(epath.Path(tmp_path), 0, options, {"learning_rate": lambda count: 0.1}) as log:
            monkeypatch.setattr(log._progress, "show", lambda number, text, due: lines.append(text))
            for number in range(1, 10):
                batch = log.next_batch(iter([{"x": np.zeros(8)}]))
                _, values = log.take(step, number, {}, batch)
                log.report(number, values)
                if number == 4:
                    log.means()
                    clock.now += 50.0
        return lines

    return make


@pytest.mark.parametrize(("finished", "unknown"), [("at once", [1, 5]), ("later", [1, 2, 5])])
def test_the_speed_is_that_of_steps_alone_and_the_time_left_that_of_the_run(run, finished, unknown):
    """4 images a second wherever a speed is known; after six of nine steps 60 s went into five: 36 s are left."""
    lines = run(finished)
    speeds = [re.search(r"([\d.]+) images/s", line) for line in lines]
    assert [number for number, found in enumerate(speeds, 1) if not found] == unknown
    assert {found[1] for found in speeds if found} == {"4.0"}
    assert [line.rpartition(", ")[2] for line in lines[5::3]] == ["0:00:36 left", "0:00:00 left"]


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
    form = r"step (\d) of 6: loss \d+\.\d{4}, rate 3\.00e-02,( \d+\.\d images/s,)? \d:\d\d:\d\d left"
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
