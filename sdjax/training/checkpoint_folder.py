"""The folder of a run's checkpoints: which are whole, what stands beside their arrays, and where others are left."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any, NamedTuple

from etils import epath

from sdjax.core.errors import UserError
from sdjax.training.workdir import is_remote

COMPLETE = "commit_success.txt"  # the last thing that Orbax writes into a checkpoint
TEMPORARY = ".orbax-checkpoint-tmp"
DELETED, PARTIAL, CORRUPT, SUSPECT = ".deleted", ".partial", ".corrupt", ".suspect"
SEAL = "seal"

logger = logging.getLogger("sdjax")


class Notes(NamedTuple):
    """A checkpoint without its arrays.

    Attributes:
        position: of the data iterator.
        metrics: their means since the checkpoint before.
        metadata: with the sums of the arrays.
    """

    position: dict[str, Any]
    metrics: dict[str, float]
    metadata: dict[str, Any]


def read_notes(checkpoint: epath.Path) -> Notes:
    """The notes of a checkpoint, which are its own and those of its step.

    Raises:
        UserError: a file is missing or is not what was written; the message names it.
    """
    position = _read_json(checkpoint / "data/metadata")
    metadata = _read_json(checkpoint / "metadata/metadata")
    if SEAL in metadata:
        if seal(position, metadata) != metadata[SEAL]:
            raise UserError(f"{checkpoint}: its data position or metadata is not what was saved")
        metrics = metadata["metrics"]
    elif set(metadata) == {"config", "jax", "orbax", "sums"}:  # of version 0.1, whose metrics had a file
        metrics = _read_json(checkpoint / "metrics/metrics")
    else:
        raise UserError(f"{checkpoint / 'metadata/metadata'} is damaged")
    if position.get("step") != int(checkpoint.name):
        raise UserError(f"{checkpoint}: its data position is of step {position.get('step')!r}")
    return Notes(position, metrics, metadata)


def seal(position: dict[str, Any], metadata: dict[str, Any]) -> str:
    """A hash of all notes but itself."""
    notes = json.loads(json.dumps([position, {key: value for key, value in metadata.items() if key != SEAL}]))
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return found


def whole_steps(folder: epath.Path) -> list[int]:
    """Steps of the checkpoints that were written to their end, in order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and is_whole(path))


def is_whole(checkpoint: epath.Path) -> bool:
    """True if it was written to its end."""
    return (checkpoint / COMPLETE).exists()


def tidy(folder: epath.Path) -> None:
    """Removes what a killed run was writing or deleting; what else is not whole is renamed, and the log says so.

    Orbax writes under another name and renames, or, in a bucket, looks for `COMPLETE`. The newest checkpoint is only
    read when it is restored.
    """
    *older, newest = [-1, *whole_steps(folder)]
    for path in sorted(folder.iterdir()):
        step, dot, rest = path.name.partition(".")
        kind = dot + rest
        if not step.isdigit() or (is_whole(path) and not kind.startswith(DELETED)):
            continue
        is_outdated = int(step) < newest and (not kind or kind.startswith(PARTIAL))
        if kind.startswith((TEMPORARY, DELETED)) or is_outdated:
            logger.info("removing %s, which a run that was killed had begun to write or to delete", path)
            _discard(path)
        elif not kind:
            logger.warning("%s is not whole; it is now %s", path, put_aside(path, PARTIAL))
    for step in older[1:]:
        try:
            read_notes(folder / str(step))
        except UserError as error:
            logger.warning("%s; that checkpoint is now %s", error, put_aside(folder / str(step), CORRUPT))


def _discard(path: epath.Path) -> None:
    try:
        path.rmtree()
    except OSError as error:  # such as NFS' names of files that another host has open; nobody needs them
        logger.warning("cannot remove %s: %s", path, error.strerror or error)


def put_aside(path: epath.Path, why: str) -> epath.Path:
    """Renames a checkpoint to a name that no run restores, which is returned."""
    names = (f"{path.name}{why}{number or ''}" for number in range(1000))
    aside = next(path.parent / name for name in names if not (path.parent / name).exists())
    path.rename(aside)
    return aside


def remove(path: epath.Path) -> None:
    """Deletes a checkpoint: at no moment a part of it has its name, or is complete."""
    if is_remote(path):  # where renaming is copying
        (path / COMPLETE).unlink()
    else:
        path = put_aside(path, DELETED)
    path.rmtree()
