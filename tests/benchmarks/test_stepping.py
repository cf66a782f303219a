"""Where the seconds of training steps go: known times, sources that are slow, and devices that are."""

from __future__ import annotations

import time

import numpy as np
import optax
import pytest

from benchmarks.stepping import Steps, middle_and_worst, split, time_steps
from benchmarks.training import Run, synthetic, time_run
from sdjax.parallel.mesh import make_mesh
from sdjax.training.step import init_state, make_step
from sdjax.training.task import Task


def test_arithmetic_of_known_times():
    """The first batch is early, the second 3 s late, the third 0.5 s; steps end at 12, 20 and 21."""
    steps = split(10.0, got=[9.0, 15.0, 20.5], done=[12.0, 20.0, 21.0])
    assert steps == Steps(waits=[0.0, 3.0, 0.5], computes=[2.0, 5.0, 0.5])
    assert steps.wholes == [2.0, 8.0, 1.0]
    assert steps.speed(22) == 3 * 22 / 11.0
    assert middle_and_worst(steps.wholes) == "2 (8)"


class Device:
    """Works on one thing after another, each for `seconds`, as accelerators do behind the host's back."""

    def __init__(self, seconds: float):
        self.seconds, self.free = seconds, 0.0

    def __call__(self, batch: object) -> Device.Result:
        del batch
        self.free = max(self.free, time.perf_counter()) + self.seconds
        return Device.Result(self.free)

    class Result:
        def __init__(self, ready: float):
            self.ready = ready

        def block_until_ready(self) -> None:
            time.sleep(max(0.0, self.ready - time.perf_counter()))


def slow(seconds: float):
    while True:
        time.sleep(seconds)
        yield None


@pytest.mark.parametrize(
    ("source", "device", "wait", "compute"),
    [(0.2, 0.0, 0.2, 0.0), (0.2, 0.1, 0.1, 0.1), (0.05, 0.2, 0.0, 0.2)],
    ids=["data alone", "data slower", "data hidden"],
)
def test_waiting_is_what_computing_does_not_hide(source, device, wait, compute):
    steps = time_steps(Device(device), slow(source), 4)
    assert np.median(steps.waits) == pytest.approx(wait, abs=0.04)
    assert np.median(steps.computes) == pytest.approx(compute, abs=0.04)
    assert len(steps.waits) == 4


def test_a_real_step_waits_for_a_slow_source():
    task = Task(
        init=lambda key: {"w": np.ones((8, 8), np.float32)},
        loss=lambda params, batch, key, step: (((batch["x"] @ params["w"]) ** 2).mean(), {}),
        preview=None,  # pyright: ignore[reportArgumentType]
        batch=None,  # pyright: ignore[reportArgumentType]
        export=None,  # pyright: ignore[reportArgumentType]
        batch_spec=lambda rows: {"x": np.empty((rows, 8), np.float32), "ids": np.empty((rows,), np.int32)},
    )
    mesh, optimizer = make_mesh({"data": 1}), optax.sgd(1e-3)
    rows = next(synthetic(task, 4, mesh))
    assert rows["x"].std() > 0.5
    assert set(rows["ids"]) <= {0, 1}

    def batches():
        while True:
            time.sleep(0.2)
            yield {"x": rows["x"]}

    state = init_state(task, optimizer, 0, mesh)
    run = Run(make_step(task, optimizer, 0, decay=0.9), state, {}, batches())
    steps = time_run(run, mesh, 3)
    assert 0.15 < np.median(steps.waits) < 0.3
    assert state.params["w"].is_deleted(), "the state is donated"
