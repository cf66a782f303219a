"""Breakdown of the seconds of training steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import jax

Clock = Callable[[], float]


class Steps(NamedTuple):
    """Seconds of each step.

    Attributes:
        waits: that the devices had nothing to do because the batch was not there yet.
        computes: the rest: handing the batch over, and computing.
    """

    waits: list[float]
    computes: list[float]

    @property
    def wholes(self) -> list[float]:
        """From the end of one step to the end of the next."""
        return [wait + compute for wait, compute in zip(self.waits, self.computes, strict=True)]

    def speed(self, rows: int) -> float:
        """Rows a second over all of the steps, `rows` in each."""
        return rows * len(self.waits) / sum(self.wholes)


def split(begin: float, got: Sequence[float], done: Sequence[float]) -> Steps:
    """Steps of a loop that asks for the next batch while the devices still compute.

    A step begins when the one before it is done. Its batch kept it waiting as long after that as the batch came.

    Args:
        begin: when the step before the first was done.
        got: when each step's batch was there.
        done: when each step was.
    """
    starts = [begin, *done[:-1]]
    waits = [max(0.0, there - start) for start, there in zip(starts, got, strict=True)]
    return Steps(waits, [end - start - wait for start, end, wait in zip(starts, done, waits, strict=True)])


def time_steps(
    step: Callable[[Any], Any], batches: Iterator[Any], count: int, clock: Clock = time.perf_counter
) -> Steps:
    """Times `count` steps, the host one step ahead of the devices as in train.py.

    Args:
        step: (batch) -> arrays that it does not wait for.
        batches: of the host.
        count: after one more, which is not counted, so that the first does not begin with idle devices.
        clock: seconds.
    """

    def done(arrays: Any) -> float:
        jax.block_until_ready(arrays)
        return clock()

    got: list[float] = []
    ends: list[Future[float]] = []
    # A thread sees when a step is done, even while this one still waits for the next batch.
    with ThreadPoolExecutor(1) as watcher:
        for _ in range(count + 1):
            batch = next(batches)
            got.append(clock())
            ends.append(watcher.submit(done, step(batch)))
            if len(ends) > 1:
                ends[-2].result()
        times = [end.result() for end in ends]
    return split(times[0], got[1:], times[1:])


def middle_and_worst(seconds: Sequence[float]) -> str:
    """The median, and the slowest."""
    return f"{median(seconds):.3g} ({max(seconds):.3g})"
