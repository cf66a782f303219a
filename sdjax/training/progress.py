"""Progress of a run on standard error, by the first process: a bar on a terminal, else lines; and what takes long."""

from __future__ import annotations

import contextlib
import datetime
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sdjax.parallel.distributed import is_first

EVERY = 30.0  # seconds between two signs of life
SHORT = 1.0  # seconds that nobody wonders about
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"

logger = logging.getLogger("sdjax")


def announce(text: str, *values: object) -> None:
    """A line of the log, by the first process."""
    if is_first():
        logger.info(text, *values)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Say that something begins, every half minute that it still goes on, and how long it took."""
    began, is_over = time.monotonic(), threading.Event()

    def wait() -> None:
        while not is_over.wait(EVERY):
            announce("%s: %s so far", what, clock(time.monotonic() - began))

    announce("%s ...", what)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if (seconds := time.monotonic() - began) > SHORT:
        announce("%s took %s", what, clock(seconds))


class Pace:
    """Images a second and the time left.

    Speed is that of steps alone: compilation, samples and checkpoints are not in it. The time left has them as they
    were so far, from the end of the first step on.
    """

    def __init__(self, left: int, batch_size: int):
        """Begins before the first of `left` steps of `batch_size` images."""
        self._left, self._batch_size, self._began, self._taken = left, batch_size, 0.0, 0
        self.seconds, self._timed = 0.0, 0

    def timed(self, seconds: float) -> None:
        """A step took so long."""
        self.seconds, self._timed = self.seconds + seconds, self._timed + 1

    def step(self) -> None:
        """One more step is done."""
        self._left -= 1
        self._began, self._taken = (self._began, self._taken + 1) if self._began else (time.monotonic(), 0)

    @property
    def images_per_second(self) -> float | None:
        """Since the last `restart`; None before a step was timed."""
        return self._timed * self._batch_size / self.seconds if self.seconds else None

    @property
    def time_left(self) -> str | None:
        """Until the last step, as h:mm:ss; None before the second step is done."""
        return clock((time.monotonic() - self._began) / self._taken * self._left) if self._taken else None

    def restart(self) -> None:
        """Begins another stretch of which `images_per_second` and `seconds` speak."""
        self.seconds, self._timed = 0.0, 0


def line(loss: float, rate: float, pace: Pace) -> str:
    """Loss, learning rate, images a second and the time left, the last two as soon as they are known."""
    parts = [f"loss {loss:.4f}", f"rate {rate:.2e}"]
    if pace.images_per_second is not None:
        parts.append(f"{pace.images_per_second:.1f} images/s")
    if pace.time_left is not None:
        parts.append(f"{pace.time_left} left")
    return ", ".join(parts)


class Progress:
    """The bar, or the lines, of a run."""

    def __init__(self, name: str, start: int, steps: int):
        """Shows `steps`, of which `start` were taken before."""
        self._stack = contextlib.ExitStack()
        self._steps, self.is_bar = steps, is_first() and sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=start, desc=name, bar_format=BAR, dynamic_ncols=True, disable=not self.is_bar
        )
        if self.is_bar:  # lines of the log go above the bar
            self._stack.enter_context(logging_redirect_tqdm())
        self._stack.callback(self._bar.close)

    def show(self, step: int, text: str, is_due: bool) -> None:
        """Show the text of a step; where there is no bar, only if a line is due."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        if is_due and not self.is_bar:
            announce("step %s of %s: %s", f"{step:,}", f"{self._steps:,}", text)

    def close(self) -> None:
        """The bar ends."""
        self._stack.close()


def new_shapes() -> Callable[[Any], bool]:
    """A function that says of each batch whether it is the first of its shapes, for which a step is compiled."""
    seen = set()

    def is_new(batch: Any) -> bool:
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        return not (shapes in seen or seen.add(shapes))

    return is_new
