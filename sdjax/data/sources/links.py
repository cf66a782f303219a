"""Files of a data folder: those in it, whatever links it holds, and of a Hub snapshot also those that it links to."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from sdjax.core.errors import UserError

# models--ORGANISATION--NAME/snapshots/REVISION/FILE is a link to models--ORGANISATION--NAME/blobs/HASH
SNAPSHOTS, BLOBS = "snapshots", "blobs"


class DataFolder:
    """A folder, and the places that links in it may lead to.

    These are the folder itself, the blobs of the Hub snapshot that it belongs to, and what the user names. A data set
    that somebody else made can so make no other file of this machine a part of itself.
    """

    def __init__(self, path: Path, links: Sequence[str] = ()):
        """Finds the places.

        Raises:
            UserError: there is no such folder.
        """
        if not path.is_dir():
            exists = "is a file, and no folder" if path.exists() else "does not exist"
            raise UserError(f"the data folder {path} {exists}")
        self.path, self._folder = path, os.fspath(path)
        real = os.path.realpath(path)
        self._places = [real, *_blobs(Path(real)), *(os.path.realpath(Path(link).expanduser()) for link in links)]

    def file(self, name: str, place: str) -> str:
        """The file of that name below the folder; `place` is what names it.

        Raises:
            UserError: it does not exist, or is not in one of the places.
        """
        parent, base = os.path.split(os.path.join(self._places[0], name))
        target = os.path.join(_real(parent), base)
        if os.path.islink(target) or base in ("", ".", ".."):
            target = os.path.realpath(target)
        self.check(target, place, name)
        if not os.path.isfile(target):
            raise UserError(f"{place} names {self.path / name}, which does not exist")
        return os.path.join(self._folder, name)

    def check(self, target: str, place: str, name: str) -> None:
        """Refuse a path without links that is in none of the places, and that `place` calls `name`."""
        if not self.holds(target):
            raise UserError(
                f"{place} names {name!r}, which is outside the folder; config.data.links is for folders that links in "
                "it may lead to"
            )

    def holds(self, target: str) -> bool:
        """True for a path without links that is in one of the places."""
        return any(target == place or target.startswith(os.path.join(place, "")) for place in self._places)


def _blobs(real: Path) -> list[str]:
    """The blobs of a Hub snapshot, unless they are a link themselves."""
    for parent in (real, *real.parents):
        if parent.parent.name == SNAPSHOTS:
            blobs = parent.parent.parent / BLOBS
            return [os.fspath(blobs)] if blobs.is_dir() and not blobs.is_symlink() else []
    return []


# A link to a folder is followed once, not for every image in it.
_real = functools.lru_cache(maxsize=1024)(os.path.realpath)
