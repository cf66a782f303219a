"""Signals: before the first step, between steps, and again while the run stops."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdjax.core.signals import SIGNALS, end_well_before
from sdjax.training.preemption import Preemption


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_the_process_ends_well(number, caplog):
    end_well_before("the first step")
    with caplog.at_level(logging.WARNING, "sdjax"), pytest.raises(SystemExit) as stopped:
        os.kill(os.getpid(), number)
    assert stopped.value.code == 0
    assert f"{number.name} before the first step" in caplog.text


def handles(pid: int, number: signal.Signals) -> bool:
    """True if a process has a handler of a signal (proc(5), SigCgt)."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_a_process_that_still_imports_ends_well():
    command = [sys.executable, "train.py", "--config=configs/openmoji.py:tiny", "--workdir=never/made"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    while not handles(process.pid, signal.SIGTERM):
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 0
    assert "SIGTERM before the first step: there is nothing to save" in process.stderr.read()


def test_a_run_that_stops_is_not_killed_by_a_second_signal():
    """Schedulers repeat themselves: while a checkpoint is written, and while the process ends."""

    def run() -> None:
        with Preemption() as preemption:
            assert not preemption.reached()
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.reached()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)

    end_well_before("the first step")
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 0
    os.kill(os.getpid(), signal.SIGTERM)


def test_signals_are_given_back():
    end_well_before("the first step")
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.reached()
    assert signal.getsignal(signal.SIGTERM) is before
