"""TensorBoard files, written by the thread that trains: what cannot be written is an error at once.

tensorboardX's own `SummaryWriter` hands events to a thread; where that one fails, on a full disk, the training thread
would wait for it for ever.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sdjax.core.errors import UserError
from sdjax.training.workdir import is_remote

# The packages with which tensorboardX writes to a bucket.
WRITERS = {"gs": ("google.cloud.storage", "google-cloud-storage"), "s3": ("boto3", "boto3")}
FLUSH_EVERY = 120.0
"""Seconds between two flushes: in a bucket each writes the whole file anew."""


class TensorBoard:
    """An event file in a folder."""

    def __init__(self, folder: epath.Path, start: int):
        """Begins a file; what other files hold of steps after `start` is no longer shown."""
        self._x = _tensorboard_x()
        folder.mkdir(parents=True, exist_ok=True)
        # Its name has seconds and the host: of a run that is started again at once it must not be the same.
        self._file = self._x.event_file_writer.EventsWriter(os.fspath(folder / "events"), f".{start}.{os.getpid()}")
        log = self._x.proto.event_pb2.SessionLog
        self._write(start, session_log=log(status=log.START))
        self._flushed = float("-inf")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Adds numbers by name."""
        for name, value in values.items():
            self._write(step, summary=self._x.summary.scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self._flushed = time.monotonic()
            self._file.flush()

    def image(self, name: str, image: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Adds an image."""
        self._write(step, summary=self._x.summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._x.proto.event_pb2.Event(step=step, wall_time=time.time(), **what))


def _tensorboard_x() -> Any:
    """The package, without torch: it would import that where it is installed, for tensors that no run has."""
    is_loaded = "torch" in sys.modules
    if not is_loaded:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        import tensorboardX
        import tensorboardX.event_file_writer
        import tensorboardX.proto.event_pb2
        import tensorboardX.summary
    finally:
        if not is_loaded:
            del sys.modules["torch"]
    return tensorboardX


def check_tensorboard(workdir: epath.Path) -> None:
    """Raises a UserError unless tensorboardX can write to the file system of `workdir`."""
    if not is_remote(workdir):
        return
    scheme = os.fspath(workdir).partition("://")[0]
    if scheme not in WRITERS:
        raise UserError(f"the workdir {workdir}: TensorBoard files are written to a local folder, gs:// or s3:// only")
    module, package = WRITERS[scheme]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise UserError(f"the workdir {workdir}: TensorBoard files there need pip install {package}")
