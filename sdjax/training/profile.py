"""A trace of some steps of a run, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from sdjax.core.errors import UserError
from sdjax.parallel.distributed import is_first
from sdjax.training.workdir import copy_tree, is_remote

FOLDER = "profile"
KEY = "config.train.profile"


def parse_steps(text: str, steps: int) -> range:
    """The steps of "START:STOP", both included and counted from 1; none of "".

    Raises:
        UserError: it is written otherwise, the steps are in the wrong order, or the run ends before them.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise UserError(f"{KEY}={text!r} is not START:STOP, such as 10:12")
    start, stop = int(match[1]), int(match[2])
    if not 1 <= start <= stop:
        raise UserError(f"{KEY}={text!r}: the first step is 1, and STOP is not before START")
    if start > steps:
        raise UserError(f"{KEY}={text!r}: the run ends at step {steps} (config.train.steps)")
    return range(start, min(stop, steps) + 1)


class Profile:
    """Traces what the first process does during the steps that are asked for, into workdir/profile."""

    def __init__(self, workdir: epath.Path, text: str, steps: int):
        """`text` is "START:STOP", or "" for no trace; `steps` are those of the run.

        Raises:
            UserError: as `parse_steps`.
        """
        self._steps, self._folder = parse_steps(text, steps), workdir / FOLDER
        self._running = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds the work of a step, and names it in the trace."""
        if is_first() and number in self._steps and not self._running:
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def stepped(self, number: int, result: Any) -> None:
        """Ends the trace after its last step; `result` is waited for, so that all of the step is in it."""
        if self._running and number >= self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _start(self) -> None:
        # The profiler writes with ordinary system calls.
        self._scratch = tempfile.TemporaryDirectory() if is_remote(self._folder) else None
        jax.profiler.start_trace(self._scratch.name if self._scratch else str(self._folder))
        self._running = True

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        if self._scratch:
            copy_tree(epath.Path(self._scratch.name), self._folder)
            self._scratch.cleanup()

    def __enter__(self) -> Profile:
        """For `with`."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends a trace that the run did not reach the end of."""
        if self._running:
            self._stop()
