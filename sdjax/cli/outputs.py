"""The folder that images of a command go to: which of them an earlier, killed run of the same command left there."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdjax.cli.records import CHUNK, write_png, write_record
from sdjax.core.errors import UserError
from sdjax.core.files import cannot_write, check_writable, recover
from sdjax.data.images import UNREADABLE

GRID = "grid.png"
# The text chunk by which a sheet is known for that of the images beside it.
GRID_CHUNK = "sdjax_grid"
SIGNATURE, END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
ADVICE = "choose another --outdir"

Record = Mapping[str, Any]
logger = logging.getLogger("sdjax")


class Found(NamedTuple):
    """Files that a folder has of a command's.

    Attributes:
        images: whole ones, by number.
        damaged: those that are not, e.g. cut.
        grid: whether the sheet is there.
    """

    images: Mapping[int, UInt8[np.ndarray, "h w 3"]] = {}
    damaged: Sequence[Path] = ()
    grid: bool = False


def image_path(folder: Path, number: int) -> Path:
    """The name of an image."""
    return folder / f"{number:05d}.png"


def find_outputs(folder: Path, records: Mapping[int, Record]) -> Found:
    """Look in a folder for images of these records by number, and for their sheet; nothing is changed.

    Raises:
        UserError: a file has the name of one of them, and is another command's or none of a command.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; {ADVICE}")
    images: dict[int, np.ndarray] = {}
    damaged: list[Path] = []
    for number, record in records.items():
        path, record = image_path(folder, number), _as_read(record)
        image = _read(path, CHUNK, record, damaged)
        if image is not None:
            images[number] = image
        _check_json(path.with_suffix(".json"), record, damaged)
    grid = _read(folder / GRID, GRID_CHUNK, _digest(records), damaged) if len(records) > 1 else None
    return Found(images, damaged, grid is not None)


def open_folder(folder: Path, records: Mapping[int, Record], found: Found) -> None:
    """Make the folder, move what is damaged in it aside, and write what is missing beside whole images.

    Raises:
        UserError: it cannot be written.
    """
    check_writable(folder)
    paths = [image_path(folder, number) for number in records]
    recover(folder, {GRID, *(name for path in paths for name in (path.name, path.with_suffix(".json").name))})
    for path in found.damaged:
        logger.warning("%s is damaged; it is %s now, and is made anew", path, _set_aside(path).name)
    for number in found.images:
        beside = image_path(folder, number).with_suffix(".json")
        if not beside.exists():
            write_record(beside, records[number])


def new_folder(parent: Path) -> Path:
    """Make a folder in `parent`, 0000, 0001, ..., that was not there; a UserError where it cannot be."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = len(list(parent.iterdir()))
        while True:
            try:
                (parent / f"{number:04d}").mkdir()
            except FileExistsError:
                number += 1
            else:
                return parent / f"{number:04d}"
    except OSError as error:
        raise cannot_write(parent, error) from error


def write_grid(folder: Path, image: UInt8[np.ndarray, "h w 3"], records: Mapping[int, Record]) -> None:
    """Write the sheet of the images of these records; a UserError where one exists or cannot be written."""
    write_png(folder / GRID, image, {GRID_CHUNK: json.dumps(_digest(records))})


def _as_read(record: Record) -> dict[str, Any]:
    return json.loads(json.dumps(record))


def _digest(records: Mapping[int, Record]) -> dict[str, str]:
    text = json.dumps(sorted(records.items()), sort_keys=True)
    return {"images": hashlib.sha256(text.encode()).hexdigest()}


def _read(path: Path, chunk: str, record: Record, damaged: list[Path]) -> UInt8[np.ndarray, "h w 3"] | None:
    """The image in a file, if it is there, whole, and has this record in a text chunk."""
    if not path.exists():
        return None
    data = _bytes_of(path)
    pixels = theirs = None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            theirs = json.loads(str(image.info.get(chunk, "{}")))
            pixels = np.asarray(image)
    except UNREADABLE:
        pass  # what `theirs` then is says how far it could be read
    if theirs is None and SIGNATURE.startswith(data[: len(SIGNATURE)]):
        theirs = record
    if theirs != record:
        raise _taken(path, theirs, record)
    if pixels is None or not data.endswith(END):
        damaged.append(path)
        return None
    return pixels


def _check_json(path: Path, record: Record, damaged: list[Path]) -> None:
    if not path.exists():
        return
    try:
        theirs = json.loads(_bytes_of(path))
    except (ValueError, RecursionError):
        damaged.append(path)
        return
    if theirs != record:
        raise _taken(path, theirs, record)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {ADVICE}") from error


def _taken(path: Path, theirs: Any, record: Record) -> UserError:
    if not isinstance(theirs, dict) or "prompt" not in theirs:
        return UserError(f"{path} exists and is left as it is; {ADVICE}")
    name = next(name for name in (*record, *theirs) if theirs.get(name) != record.get(name))
    return UserError(
        f"{path} exists, with {name} {theirs.get(name)!r} where this command has {record.get(name)!r}; {ADVICE}"
    )


def _set_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    try:
        return path.rename(next(name for name in names if not name.exists()))
    except OSError as error:
        raise cannot_write(path, error) from error
