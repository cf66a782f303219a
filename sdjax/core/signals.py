"""Signals before there is anything to save; this file imports nothing that takes time to import."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

logger = logging.getLogger("sdjax")


def end_well_before(what: str) -> None:
    """Let the signals end this process with exit code 0, until others handle them: there is nothing to save.

    Once several processes have met, they stop together, after their first step.
    """

    def end(number: int, frame: FrameType | None) -> None:
        distributed = getattr(sys.modules.get("jax"), "distributed", None)  # jax may not be imported yet
        if distributed is not None and distributed.is_initialized():
            return as_sigterm(number, frame)
        logger.warning("%s before %s: there is nothing to save", signal.Signals(number).name, what)
        raise SystemExit(0)

    for number in SIGNALS:
        signal.signal(number, end)


def as_sigterm(number: int, frame: FrameType | None) -> None:
    """Handle another signal as SIGTERM, which JAX's coordination service takes."""
    del number, frame
    os.kill(os.getpid(), signal.SIGTERM)
