"""Folders of the user's cache. What is read from them is believed, compiled programs are run: nobody else may write."""

from __future__ import annotations

import functools
import grp
import logging
import os
import pwd
import stat
import threading
from pathlib import Path

logger = logging.getLogger("sdjax")
_ONCE = threading.Lock()


def cache_folder(name: str) -> Path:
    """`sdjax/NAME` in the user's cache folder, which XDG_CACHE_HOME names, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdjax" / name


def own_folder(folder: Path, what: str) -> Path | None:
    """A folder of this user's alone, made where it is not there; None if others could put files into it.

    Args:
        what: is kept there, for the log, which says once why not.
    """
    with _ONCE:  # a cache alone lets two threads look, and speak, at the same time
        return _own_folder(folder, what)


@functools.cache
def _own_folder(folder: Path, what: str) -> Path | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = exposed(folder)
    except OSError as error:
        logger.warning("%s are not kept: %s: %s", what, folder, error.strerror)
        return None
    if place is not None:
        logger.warning("%s are not kept in %s: others than you can write %s", what, folder, place)
        return None
    return folder


def exposed(folder: Path) -> Path | None:
    """The part of a path, from the folder up, through which somebody else could put files into it; None without one.

    Both the path as it is written and what its links lead to are looked at, as OpenSSH does for its files.
    """
    folder = folder.absolute()
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or _is_open(found, stat.S_IWGRP | stat.S_IWOTH):
        return folder
    for path in (*folder.parents, *folder.resolve().parents):
        found = path.lstat()
        shared = 0 if stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX else stat.S_IWGRP | stat.S_IWOTH
        if found.st_uid not in (os.getuid(), 0) or _is_open(found, shared):
            return path
    return None


def _is_open(found: os.stat_result, bits: int) -> bool:
    own = stat.S_IWGRP if found.st_mode & stat.S_IWGRP and _is_own_group(found.st_gid) else 0
    return bool(found.st_mode & bits & ~own)


@functools.cache
def _is_own_group(number: int) -> bool:
    """Tell whether a group is the user's private one, as many systems make for each user."""
    try:
        group, name = grp.getgrgid(number), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}
