"""Requests in the queue and on the devices, as clients see them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sdjax.pipeline.prepare import Row

State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")


class Call(NamedTuple):
    """One call of a pipeline.

    Attributes:
        prompt: None for models that take none.
        negative_prompt: None for the model's own.
        options: rows of the table of options; images are in memory, never names of files.
    """

    prompt: str | None
    negative_prompt: str | None
    options: dict[str, Any]


class Result(NamedTuple):
    """A finished image.

    Attributes:
        pixels: of the image.
        record: every setting that it depends on, as a file has them.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    record: dict[str, Any]


class QueueFullError(Exception):
    """No place in the queue is free.

    Attributes:
        retry_after: seconds after which one may be.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def record_of(row: Row, about: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an image as a file has them; images in memory have no name, and are left out."""
    named = {name: value for name, value in row.settings.items() if is_json(value)}
    return {**named, **about, "index": row.index}


def is_json(value: Any) -> bool:
    """True for what JSON has: texts, numbers, and lists of these."""
    if isinstance(value, list | tuple):
        return all(map(is_json, value))
    return value is None or isinstance(value, str | int | float | Mapping)


class Job:
    """A request: the engine's thread writes its progress, any thread reads it.

    Attributes:
        id: unguessable.
        model: name of the checkpoint.
        origin: the API that it came by.
        rows, records: prepared, and their settings, one an image.
        state: where it stands.
        done, total: network calls.
        results: one an image, None until it is made.
        error: one line; "" while there is none.
        place: jobs before it in the queue; 0 when it runs.
        eta: seconds that are left; None while that is unknown.
        preview: of the image that is furthest; None until there is one.
        created, started, ended: seconds since 1970; None until then.
    """

    def __init__(self, model: str, rows: Sequence[Row], origin: str, about: Mapping[str, Any]) -> None:
        """Wait in the queue.

        Args:
            model, rows, origin: see the attributes.
            about: settings of the model, for every record.
        """
        self.id = secrets.token_hex(8)
        self.model, self.rows, self.origin = model, list(rows), origin
        self.records = [record_of(row, about) for row in rows]
        self.state: State = "queued"
        self.done, self.total = 0, sum(row.calls for row in rows)
        self.results: list[Result | None] = [None] * len(rows)
        self.error, self.place = "", 0
        self.eta: float | None = None
        self.preview: np.ndarray | None = None
        self.previews = 0  # number of the last one
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def has_ended(self) -> bool:
        """True if nothing more will happen."""
        return self.state in ENDED

    def begin(self) -> None:
        """Leave the queue for the devices; a job that was cancelled meanwhile stays as it is."""
        with self._lock:
            if self.state == "queued":
                self.state, self.place, self.started = "running", 0, time.time()

    def show(self, preview: np.ndarray) -> None:
        """Take another preview, unless the job has ended."""
        with self._lock:
            if not self.has_ended:
                self.preview, self.previews = preview, self.previews + 1

    def end(self, state: State, error: str = "") -> None:
        """Leave the engine; a job that has ended stays as it is."""
        with self._lock:
            if self.has_ended:
                return
            self.state, self.error, self.ended, self.eta, self.place = state, error, time.time(), None, 0
            self.rows, self.preview = [], None  # which may hold images
        self.notify()

    def notify(self) -> None:
        """Tell every listener that something changed."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    async def changes(self, interval: float = 0.0) -> AsyncIterator[None]:
        """Yield at once and after every change, at most once in `interval` seconds; end with the job."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listen() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens any more
                loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._listeners.append(listen)
        try:
            while True:
                ended = self.has_ended  # read before the yield, so that the last change is not lost
                yield
                if ended:
                    return
                await changed.wait()
                changed.clear()
                if interval and not self.has_ended:
                    await asyncio.sleep(interval)
        finally:
            with self._lock:
                self._listeners.remove(listen)

    async def finished(self) -> None:
        """Wait until the job has ended."""
        async for _ in self.changes():
            pass
