"""Files and folders that are there whole or not at all: written beside their name, which they take at the end."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from sdjax.core.errors import UserError

T = TypeVar("T")

# Name, process and host of what is being written, and what an old folder is called while the new one takes its name.
PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)@(?P<host>[^@]+)\.partial(?P<old>\.old)?")
_FULL = "make room and run the same command again"
_DENIED = "choose a place that you may write"
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _DENIED),
}


def cannot_write(path: str | os.PathLike, error: OSError) -> UserError:
    """The error for a file or folder that cannot be written, with what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    advice = ADVICE.get(error.errno or 0, "choose another place")
    return UserError(f"cannot write {os.fspath(path)}: {reason}; {advice}")


def cached_by_stat(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """Keep what a function reads of a file for as long as the file's time and size stay."""

    @functools.lru_cache(4096)
    def kept(path: Path, time: int, size: int) -> T:
        del time, size
        return read(path)

    @functools.wraps(read)
    def current(path: Path) -> T:
        try:
            found = path.stat()
        except OSError:
            return read(path)  # which says what is wrong
        return kept(path, found.st_mtime_ns, found.st_size)

    return current


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A name beside `path` for a file or a folder to write, which replaces `path` when the block ends.

    What fails or is killed leaves `path` as it was. Of an old folder, what the new one has no entry for (a model card,
    images) is moved into it.

    Raises:
        UserError: it cannot be written, e.g. for want of room.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if partial.is_dir():
            _replace_folder(partial, path)
        else:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        _remove(partial)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a small file by `atomic_write`, whose errors it raises."""
    with atomic_write(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file in UTF-8 by `atomic_write`, whose errors it raises."""
    write_bytes(path, text.encode())


def check_writable(folder: str | Path) -> None:
    """Make a folder and hold it to taking files, before the work whose results it shall take.

    Raises:
        UserError: it cannot be made, or takes no file.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise cannot_write(folder, error) from error


def check_target(path: str | Path) -> None:
    """Hold the name of a file that shall be written later to a place that takes it; a UserError otherwise."""
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    check_writable(Path(path).parent)


def recover(folder: str | Path, names: Collection[str] | None = None) -> None:
    """Clear what killed processes of this machine left of `atomic_write` in a folder: unfinished writes are removed,
    a folder that was being replaced has its name again.

    Args:
        names: of what they wrote; None for all.
    """
    for path in sorted(Path(folder).glob(".*.partial*"), reverse=True):  # an old folder comes before the new one
        match = PARTIAL.fullmatch(path.name)
        if not match or match["host"] != socket.gethostname() or _runs(int(match["pid"])):
            continue
        if names is not None and match["name"] not in names:
            continue
        target = path.with_name(match["name"])
        if match["old"] and not target.exists():
            path.rename(target)
        elif match["old"]:
            _keep_rest(path, target)
        else:
            _remove(path)


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = new.with_name(f"{new.name}.old")
    path.rename(old)
    new.rename(path)
    _keep_rest(old, path)


def _keep_rest(old: Path, path: Path) -> None:
    for entry in old.iterdir():
        if not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # most often it is not there
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
