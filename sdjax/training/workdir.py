"""The folder of a run, on a local disk or in a bucket: whose it is, and that every process sees the same one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

from etils import epath

from sdjax.core.errors import UserError
from sdjax.core.files import cannot_write, recover, write_bytes
from sdjax.parallel.distributed import is_first, sync

OWNER, DATA = "config.json", "data.json"
MOVABLE = ("data.source", "data.prepared")
"""Keys that may change where the identity of the data, in data.json, does not."""
ADDED = {"data.crop": "centre", "data.crop_sides": [1.0, 1.0], "train.trainable": []}
ADDED |= {"data.minimum_side": 0, "data.links": []}
"""Keys that configs of earlier versions lack, with what those did."""
RENAMED = {
    "noisy_classifier": "classifier",
    **dict.fromkeys(
        (
            *("class_conditional", "inpainting", "layout", "pixels", "retrieval", "semantic_synthesis"),
            *("stable_diffusion", "super_resolution", "text_bert", "text_to_image", "unconditional"),
        ),
        "diffusion",
    ),
}
"""Tasks of version 0.1, which had other settings, with their names of today."""
CHECKPOINTS, SAMPLES = "checkpoints", "samples"

logger = logging.getLogger("sdjax")


def open_workdir(name: str | os.PathLike) -> epath.Path:
    """The folder called `name`: a path, or gs://BUCKET/FOLDER and whatever else etils.epath knows.

    Raises:
        UserError: what that file system needs is not installed, or it does not answer.
    """
    folder = epath.Path(name)
    try:
        folder.exists()
    except Exception as error:  # each file system's library has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        needed = "; gs:// needs pip install gcsfs google-cloud-storage" if isinstance(error, ImportError) else ""
        raise UserError(f"cannot open the workdir {folder}: {reason}{needed}") from error
    return folder


class Unwritable(UserError):
    """A place in a workdir that cannot be written."""


@contextlib.contextmanager
def unwritable(folder: epath.Path, step: int | None = None) -> Iterator[None]:
    """Makes an error of the file system, of what is written below `folder`, an Unwritable with the place and step."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if not isinstance(cause, OSError):
            raise
        at, place = "" if step is None else f"step {step}: ", str(cause.filename)
        # Names within folders that are being deleted are relative.
        place = place if place.startswith(os.fspath(folder)) else folder
        raise Unwritable(f"{at}{cannot_write(place, cause)}") from cause


def is_remote(folder: epath.Path) -> bool:
    """True if ordinary system calls cannot reach it."""
    return "://" in os.fspath(folder)


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a small file that is there with all its data, or not at all; in a bucket they all are."""
    if is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    else:
        write_bytes(os.fspath(path), data)


def check_owner(workdir: epath.Path, config: dict[str, Any], free: tuple[str, ...]) -> None:
    """Checks that a workdir is new, or this config's own.

    Args:
        workdir: the folder; config.json in it says whose it is, or, if that is damaged, its checkpoints do.
        config: plain data.
        free: dotted keys that may change between runs, such as "train.steps"; a section's name frees all of it.

    Raises:
        UserError: the folder belongs to another config; the message names the first key that differs. Or an earlier
            version began it.
    """
    if (found := _owner(workdir)) is None:
        return
    owner = _dotted(found)
    task = owner.get("task.name")
    if task in RENAMED:
        raise UserError(
            f"{workdir} was begun by an earlier version, whose task {task!r} this one calls {RENAMED[task]!r}, with "
            "other settings; finish it with sdjax 0.1, or begin a new --workdir"
        )
    mine = _dotted(json.loads(json.dumps(config)))
    owner = {key: value for key, value in ADDED.items() if key in mine} | owner
    for key in sorted(owner.keys() | mine.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in free)
        allowed = allowed or (key in MOVABLE and _read(workdir / DATA) is not None)
        if not allowed and owner.get(key) != mine.get(key):
            raise UserError(
                f"{workdir} belongs to another config: {key} is {owner.get(key)!r} there and {mine.get(key)!r} here; "
                "choose another --workdir"
            )


def check_moved(workdir: epath.Path, config: dict[str, Any], identity: dict[str, Any]) -> None:
    """Holds data that a `MOVABLE` key names anew to be the same; under the same name it may be mended, as the log says.

    Raises:
        UserError: the workdir belongs to other data.
    """
    known = _read(workdir / DATA)
    if known is None:
        return
    there, here = (_dotted(json.loads(json.dumps(found))) for found in (_owner(workdir) or {}, config))
    moved = [key for key in MOVABLE if there.get(key) != here.get(key)]
    for key in moved:
        where = f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
        if known != identity:
            reason = f"{where}, and {_difference(known, identity)}"
            raise UserError(f"{workdir} belongs to other data: {reason}; choose another --workdir")
        logger.info("%s: the same data", where)
    if known != identity:
        logger.warning("the data has changed since this run began: %s", _difference(known, identity))


def claim(workdir: epath.Path, config: dict[str, Any], identity: dict[str, Any]) -> None:
    """Makes a new workdir this config's own, and that of the data with this identity.

    Files that a killed run had not finished are removed.

    Raises:
        UserError: another process of this run does not see what the first one wrote.
    """
    path = workdir / OWNER
    for folder in (workdir, workdir / SAMPLES) if is_first() and not is_remote(workdir) else ():
        recover(os.fspath(folder))
    for place, content in ((path, config), (workdir / DATA, identity)):
        if is_first() and content and _read(place) is None:
            with unwritable(workdir):
                if place.exists():
                    damaged = place.replace(place.parent / f"{place.name}.corrupt")
                    logger.warning("%s is damaged; it is now %s, and written anew", place, damaged)
                write_whole(place, (json.dumps(content, indent=2) + "\n").encode())
    sync("claim")
    if not path.exists():
        raise UserError(f"process 0 wrote {path} and this process does not see it; all of them need one file system")


def _difference(known: dict[str, Any], identity: dict[str, Any]) -> str:
    name = next(name for name in (*identity, *known) if known.get(name) != identity.get(name))
    return f"{name} were {known.get(name)} and are {identity.get(name)}".replace("_", " ")


def _owner(workdir: epath.Path) -> dict[str, Any] | None:
    """The config that a workdir belongs to; None of a new one.

    Raises:
        UserError: there are checkpoints, and neither config.json nor the newest of them says whose they are.
    """
    if (found := _read(workdir / OWNER)) is not None:
        return found
    checkpoints = workdir / CHECKPOINTS
    steps = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.exists() else []
    if not steps:
        return None
    notes = _read(checkpoints / str(max(steps)) / "metadata/metadata") or {}
    if not isinstance(notes.get("config"), dict):
        raise UserError(f"{workdir} has checkpoints but no {OWNER} that says whose they are")
    return notes["config"]


def _read(path: epath.Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file, or one that holds none."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return found if isinstance(found, dict) else None


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_dotted(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies every file below `source`, between file systems too."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir():
            copy_tree(entry, target / entry.name)
        else:
            with entry.open("rb") as read, (target / entry.name).open("wb") as write:
                shutil.copyfileobj(read, write)
