"""A wish to end a run early, granted between two steps, at the same step by all processes."""

from __future__ import annotations

import itertools
import os
import signal
from types import FrameType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from sdjax.core.signals import SIGNALS, as_sigterm
from sdjax.training.progress import announce

STDERR = 2
INTERRUPTED = 130  # the exit code after Ctrl-C, by which shells end a loop

# Counts the steps of a process over all its runs, such as a first stage and what follows: JAX's agreement is on the
# next number that no process has reached, so numbers must never go back.
_STEPS = itertools.count(1)


class Preemption:
    """While it is entered, SIGTERM, SIGUSR1 (which SLURM's `--signal` may send) and Ctrl-C are wishes to stop.

    A second Ctrl-C ends the process at once, and so does the first one before any step was taken: nothing is lost.

    One process alone notes the signal. Among several, JAX's coordination service takes SIGTERM itself, tells all
    processes in the background, and they agree on the next step that none has passed; asking whether this is the step
    compares two numbers on the host and waits for no device (`multihost_utils.reached_preemption_sync_point`).
    """

    def __enter__(self) -> Preemption:
        """Takes the signals over."""
        self._asked, self._stepped, self._text, self._code = False, False, "", 0
        self._together = jax.distributed.is_initialized()
        handlers: dict[int, Any] = {signal.SIGUSR1: as_sigterm} if self._together else dict.fromkeys(SIGNALS, self._ask)
        handlers[signal.SIGINT] = self._interrupt
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def reached(self) -> bool:
        """True if the run shall stop after this step; to be called by all processes, once a step."""
        self._stepped = True
        step = next(_STEPS)
        return multihost_utils.reached_preemption_sync_point(step) if self._together else self._asked

    def stop(self, text: str) -> NoReturn:
        """Ends the run; the log has `text` when all that was opened inside is closed, and checkpoints are on disk."""
        self._text = text
        raise SystemExit(self._code)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Gives the signals back; one that came after the last step ends the process here, as after any other.

        A run that was asked to stop stops: schedulers repeat themselves.
        """
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._asked and number != signal.SIGINT else handler)
        if self._text and kind is SystemExit:
            announce(self._text)
        if self._asked and kind is None:
            raise SystemExit(self._code)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._stepped:
            raise KeyboardInterrupt
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not by the log, whose lock the interrupted code may hold.
        os.write(STDERR, b"\nCtrl-C: keeping a checkpoint after this step; another Ctrl-C ends at once\n")
        if self._together:
            return as_sigterm(number, frame)
        self._code = INTERRUPTED
        self._ask(number, frame)
