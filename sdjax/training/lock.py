"""One run at a time in a workdir: a file there names the run that has it, and shows that this one is alive.

Kernel locks do not reach buckets and many shared file systems. So the first process of a run makes a file that may not
be there yet, and touches it every few seconds. A process that ended without removing its file is recognised at once on
its own machine; the file of another machine is watched until it was touched, or for `PATIENCE` seconds.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from etils import epath

from sdjax.core.errors import UserError
from sdjax.parallel.distributed import is_first, sync
from sdjax.training.workdir import is_remote, unwritable

LOCK = "lock.json"
BEAT = 10.0
"""Seconds between two touches."""
PATIENCE = 3 * BEAT
SETTLE = 1.0
"""Seconds after which of two runs that took a lock at once both see whose it is."""

logger = logging.getLogger("sdjax")


class Lock:
    """Holds a workdir for this run while it is entered; `check` tells whether it still does."""

    def __init__(self, workdir: epath.Path):
        """The lock of `workdir`, which is taken on entering."""
        self._workdir, self._path = workdir, workdir / LOCK
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._mine |= {"machine": _machine(), "run": uuid.uuid4().hex}
        self._ended, self._lost, self._thread, self._is_new = threading.Event(), "", None, False

    def __enter__(self) -> Lock:
        """Takes the lock, in the first process of a run.

        Raises:
            UserError: another run has it, or nothing can be written there.
        """
        if is_first():
            with unwritable(self._workdir):
                self._take()
            self._thread = threading.Thread(target=self._beat, name="workdir lock", daemon=True)
            self._thread.start()
        sync("lock")
        return self

    def check(self) -> None:
        """Raises a UserError if another run has taken the workdir over, as it may from one that was suspended."""
        if self._lost:
            raise UserError(f"{self._workdir} was taken over by {self._lost}; this run stops and writes nothing more")

    def __exit__(self, *error: object) -> None:
        """Removes the lock, and a folder that was made for it alone."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        if _is(self._read(), self._mine):
            self._path.unlink(missing_ok=True)
            if self._is_new and not any(self._workdir.iterdir()):
                self._workdir.rmdir()

    def _take(self) -> None:
        self._is_new = not is_remote(self._workdir) and not self._workdir.exists()
        self._workdir.mkdir(parents=True, exist_ok=True)
        is_contested = is_remote(self._path)
        while not self._create():
            found = self._read()
            if found is None:
                continue
            if self._is_alive(found):
                hint = "wait until that run ends, or choose another --workdir"
                raise UserError(f"{self._workdir} is in use by {_name(found)}; {hint}")
            logger.warning("%s was left by %s, which is gone", self._path, _name(found))
            self._path.unlink(missing_ok=True)
            is_contested = True
        if is_contested:
            time.sleep(SETTLE)
            if not _is(found := self._read(), self._mine):
                raise UserError(f"{self._workdir} is in use by {_name(found or {})}, which began at the same moment")

    def _create(self) -> bool:
        """Writes the file, unless there is one."""
        text = json.dumps(self._mine) + "\n"
        if is_remote(self._path):
            if self._path.exists():
                return False
            self._path.write_text(text)
            return True
        try:
            with Path(self._path).open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> dict[str, Any] | None:
        """The record in the file, {} if it is damaged, None if there is none."""
        try:
            found = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _is_alive(self, found: dict[str, Any]) -> bool:
        if found.get("machine") == _machine() and isinstance(found.get("pid"), int):
            started = _started(found["pid"])
            return started is not None and started == found.get("started")
        logger.info("%s is of %s: is that run alive? Waiting up to %.0f s", self._path, _name(found), PATIENCE)
        before, deadline = self._sign(), time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(min(1.0, PATIENCE / 10))
            if self._sign() != before:
                return True
        return False

    def _sign(self) -> tuple[str, int]:
        """Something that each touch changes."""
        try:
            return self._path.read_text(), 0 if is_remote(self._path) else os.stat(self._path).st_mtime_ns
        except FileNotFoundError:
            return "", 0

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT):
            count += 1
            try:
                found = self._read()
                if found is None:
                    self._create()
                elif not _is(found, self._mine):
                    self._lost = _name(found)
                    return
                elif is_remote(self._path):
                    self._path.write_text(json.dumps({**self._mine, "beat": count}) + "\n")
                else:
                    os.utime(self._path)  # which needs no space on a full disk
            except OSError as error:
                logger.warning("cannot touch %s: %s", self._path, error.strerror or error)


def _is(found: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
    return found is not None and found.get("run") == mine["run"]


def _name(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', 'an unknown host')}"


def _machine() -> str:
    """The range within which a process id means one process: a boot of a host, and a namespace of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks, for ids are used again; None if there is no such process."""
    try:
        # The name in parentheses may hold anything; state is the third field of the line, and start time the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0
