"""Runs that are killed at random points, started again by the same command, end as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from launching import finish, run, start, start_together, state_of, steps, wait_until

EVERY = 10


class Scenario(NamedTuple):
    """What is run, and how often it is killed, in which ways."""

    processes: int
    steps: int
    ways: tuple[str, ...]
    seed: int


def launch(scenario: Scenario, workdir: Path, pause: str) -> list[subprocess.Popen]:
    flags = [f"--config.train.steps={scenario.steps}", f"--config.train.checkpoint_every={EVERY}"]
    if scenario.processes == 1:
        return [start(workdir, *flags, TINY_PAUSE=pause)]
    flags.append("--heartbeat_timeout=10")
    return start_together(scenario.processes, workdir, *flags, devices=1, TINY_PAUSE=pause)


def is_writing(workdir: Path) -> Callable[[], bool]:
    return lambda: any(workdir.glob("checkpoints/*tmp*"))


def beyond(workdir: Path, step: int) -> Callable[[], bool]:
    return lambda: max(steps(workdir), default=0) > step


def kill(way: str, workdir: Path, running: list[subprocess.Popen], rng: random.Random) -> str:
    """Waits for progress, then for the moment, and strikes; says where."""
    before = max(steps(workdir), default=0)
    assert wait_until(beyond(workdir, before), running[0]), "the run ended before it was killed"
    victim = rng.randrange(len(running))
    if way == "SIGKILL while writing":
        assert wait_until(is_writing(workdir), running[0]), "the run ended before it was killed"
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 0.4))
    number = signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL
    for process in running if way == "SIGKILL of all" else [running[victim]]:
        process.send_signal(number)
    state = "writing" if is_writing(workdir)() else "computing"
    return f"{way:22s} process {victim} of {len(running)}, after step {max(steps(workdir), default=0):3d}, {state}"


def endure(scenario: Scenario, workdir: Path) -> Iterator[str]:
    """Kills a run once in each way, then lets it end; yields a line a kill."""
    rng = random.Random(scenario.seed)
    for way in scenario.ways:
        running = launch(scenario, workdir, pause="0.02")
        try:
            told = kill(way, workdir, running, rng)
        finally:
            ends = finish(*running, timeout=120)
        for code, errors in ends:
            if way == "SIGTERM":
                assert code == 0, errors
            else:
                assert code != 0, "a process ended well although another one was killed"
        left = len(list(workdir.glob("checkpoints/*tmp*")))
        yield f"{told}, exit codes {[code for code, _ in ends]}, {left} half-written"
    run(*launch(scenario, workdir, pause="0"))


def check(scenario: Scenario, tmp_path: Path) -> int:
    """Kills; compares with an undisturbed run to the bit; returns how many kills there were."""
    kills = 0
    for kills, line in enumerate(endure(scenario, tmp_path / "killed"), 1):
        print(f"\n{kills:2d}  {line}", end="")
    run(*launch(scenario, tmp_path / "quiet", pause="0"))
    killed, quiet = (state_of(tmp_path / name, scenario.steps) for name in ("killed", "quiet"))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), killed, quiet)
    exports = [(tmp_path / name / "export/net.safetensors").read_bytes() for name in ("killed", "quiet")]
    assert exports[0] == exports[1]
    return kills


@pytest.mark.slow
def test_two_kills_of_one_process(tmp_path):
    assert check(Scenario(1, 150, ("SIGTERM", "SIGKILL while writing"), seed=1), tmp_path) == 2


@pytest.mark.slow
def test_fourteen_kills_of_one_process(tmp_path):
    ways = ("SIGKILL", "SIGTERM", "SIGKILL while writing") * 4 + ("SIGKILL while writing",) * 2
    assert check(Scenario(1, 900, ways, seed=2), tmp_path) == 14


@pytest.mark.slow
def test_eight_kills_of_two_processes(tmp_path):
    """One host of two is killed, and the other one ends by itself; or one is asked to stop, and both do."""
    ways = ("SIGKILL", "SIGTERM", "SIGKILL while writing", "SIGKILL of all") * 2
    assert check(Scenario(2, 500, ways, seed=3), tmp_path) == 8
