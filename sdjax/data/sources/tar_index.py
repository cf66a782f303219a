"""Offsets of the members of tar shards, so that any example can be read without those before it.

Members whose paths agree up to the last dot are one example, and what follows the dot is the kind: KEY.jpg, KEY.txt and
KEY.json, as img2dataset writes them, and KEY.cls, the number of a class. WebDataset (github.com/webdataset/webdataset)
takes the first dot, so that KEY may have no dot, but what it calls a further kind of KEY, such as KEY.seg.png beside
KEY.jpg, is left out here, too.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from sdjax.core.caches import cache_folder, own_folder
from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write
from sdjax.data.sources.annotations import MAX_CLASSES
from sdjax.data.sources.image_files import is_hidden

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
CLASS = "cls"
KINDS = (*IMAGE_SUFFIXES, *CAPTIONS, CLASS)
VERSION = 2
NO_LABEL = -1
# What tarfile raises for headers that are wrong; a chain of extended headers is read by recursion.
BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError, EOFError)
NOT_ZERO = re.compile(rb"[^\0]")
DTYPES = "BllBi"  # of a TarIndex's arrays
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)

logger = logging.getLogger("sdjax")


class TarIndex(NamedTuple):
    """The examples of a tar file, in its order, and what is wrong with it."""

    keys: UInt8[np.ndarray, " bytes"]
    """All keys in UTF-8, one after the other."""
    key_ends: Int64[np.ndarray, " n"]
    spans: Int64[np.ndarray, "n 4"]
    """Start and size of the image, start and size of the caption, in bytes; without caption its size is 0."""
    is_json: UInt8[np.ndarray, " n"]
    """Whether the caption is JSON, rather than text."""
    labels: Int32[np.ndarray, " n"]
    """Class of the image, or NO_LABEL."""
    problems: tuple[tuple[str, str], ...]
    """(member, reason) of what is no example; the member "" is the file itself."""
    notes: tuple[str, ...]
    """Things worth knowing of the file."""

    def key(self, index: int) -> str:
        """The path in the tar, up to the first dot of its last part."""
        return self.keys[self.key_ends[index - 1] if index else 0 : self.key_ends[index]].tobytes().decode()


class Member(NamedTuple):
    """A file in the tar."""

    key: str
    kind: str
    start: int
    size: int


class TarRow(NamedTuple):
    """An example, as the index keeps it."""

    key: bytes
    spans: tuple[int, int, int, int]
    is_json: bool
    label: int


def tar_index(path: Path) -> TarIndex:
    """The index of a tar file, from the user's cache if the file's size and time of change are those of then.

    A file that cannot be read has no examples, and says so in `problems`.
    """
    try:
        found = path.stat()
        stamp = np.array([VERSION, found.st_size, found.st_mtime_ns], np.int64)
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
        folder = own_folder(cache_folder("tar_index"), "indices of tar files")
        if folder is None:
            return build(path)
        cached = folder / f"{name}.npz"
        index = _load(cached, stamp)
        if index is None:
            index = build(path)
            _save(cached, stamp, index)
        return index
    except OSError as error:
        return _index([], [("", f"cannot be read: {error.strerror or error}")], ())


def build(path: Path) -> TarIndex:
    """Reads the headers of a tar file."""
    examples: dict[str, dict[str, Member]] = {}
    problems: list[tuple[str, str]] = []
    try:
        for item in _members(path):
            if not isinstance(item, Member):
                problems.append(item)
            elif item.kind in examples.setdefault(item.key, {}):
                problems.append((f"{item.key}.{item.kind}", "is in the file twice"))
            else:
                examples[item.key][item.kind] = item
    except BROKEN as error:
        problems.append(("", _reason(path, error)))
    rows, further = [], []
    with path.open("rb") as file:
        for key, kinds in examples.items():
            if _is_further(key, examples):
                further.append(key)
            elif isinstance(row := _row(file, key, kinds), str):
                problems.append((key, row))
            else:
                rows.append(row)
    note = f"{len(further)} further kinds of other examples are left out, e.g. {further[0]}" if further else ""
    return _index(rows, problems, (note,) if note else ())


def _index(rows: Sequence[TarRow], problems: Sequence[tuple[str, str]], notes: tuple[str, ...]) -> TarIndex:
    keys, spans, is_json, labels = zip(*rows, strict=True) if rows else ((), (), (), ())
    return TarIndex(
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        spans=np.array(spans, np.int64).reshape(-1, 4),
        is_json=np.array(is_json, np.uint8),
        labels=np.array(labels, np.int32),
        problems=tuple(problems),
        notes=notes,
    )


def _is_further(key: str, examples: Mapping[str, Mapping[str, Member]]) -> bool:
    """True for KEY.seg, of KEY.seg.png beside KEY.jpg, unless it is a whole example itself."""
    folder, slash, name = key.rpartition("/")
    first = f"{folder}{slash}{name.partition('.')[0]}"
    whole = _first(examples[key], IMAGE_SUFFIXES) and _first(examples[key], (*CAPTIONS, CLASS))
    return first != key and not whole and _first(examples.get(first, {}), IMAGE_SUFFIXES) is not None


def _first(kinds: Mapping[str, Member], wanted: Sequence[str]) -> Member | None:
    return next((kinds[kind] for kind in wanted if kind in kinds), None)


def _row(file: BinaryIO, key: str, kinds: Mapping[str, Member]) -> TarRow | str:
    """An example, or why it is none."""
    image, caption, label = _first(kinds, IMAGE_SUFFIXES), _first(kinds, CAPTIONS), NO_LABEL
    if image is None:
        return f"has no image ({', '.join(IMAGE_SUFFIXES)})"
    if CLASS in kinds:
        file.seek(kinds[CLASS].start)
        text = file.read(min(kinds[CLASS].size, 32)).strip()
        if not text.isdigit() or int(text) >= MAX_CLASSES:
            return f"has a {CLASS} that is no number from 0 to {MAX_CLASSES - 1}"
        label = int(text)
    start, size, kind = (caption.start, caption.size, caption.kind) if caption else (0, 0, "")
    return TarRow(key.encode(), (image.start, image.size, start, size), kind == "json", label)


def _members(path: Path) -> Iterator[Member | tuple[str, str]]:
    """The files of the kinds of a tar file, and (name, reason) of members that cannot be read as they are."""
    # A map answers no read with more than the file has, whatever size a header claims.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 0
        while start < len(content):
            content.seek(start)
            with tarfile.open(fileobj=content, mode="r:") as tar:  # type: ignore[arg-type]
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  (it would keep them all)
                    yield from _member(info, len(content))
                end = tar.offset
            # tarfile takes whatever is no header for the end.
            if content[end : end + tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"there is no member and no end of the archive at byte {end}")
            # Archives that were joined (cat a.tar b.tar) each have their end, and zeros after it.
            following = NOT_ZERO.search(content, end)
            start = following.start() // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE if following else len(content)


def _member(info: tarfile.TarInfo, total: int) -> Iterator[Member | tuple[str, str]]:
    stem, _, kind = info.name.rpartition(".")
    hidden = any(is_hidden(part) for part in info.name.split("/") if part not in (".", ".."))
    if info.isdir() or kind.lower() not in KINDS or hidden:
        return
    if info.type not in PLAIN or info.sparse:
        yield info.name, "is a link or a special file"
    elif info.size < 0 or info.offset_data + info.size > total:
        yield info.name, f"should have {info.size} bytes, but the tar file ends before"
    elif not info.name.isprintable():
        yield repr(info.name), "is a name that cannot be printed"
    else:
        yield Member(stem, kind.lower(), info.offset_data, info.size)


def _reason(path: Path, error: BaseException) -> str:
    with path.open("rb") as file:
        start = file.read(6)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\x00":
        return "is compressed; examples can be found only in plain tar files"
    return f"is truncated or no tar file: {str(error) or type(error).__name__}"


def _load(cached: Path, stamp: Int64[np.ndarray, " 3"]) -> TarIndex | None:
    """The index in a cache file; None if it is that of another state of the tar file, or damaged."""
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["stamp"], stamp):
                return None
            problems = tuple((str(member), str(reason)) for member, reason in arrays["problems"])
            notes = tuple(map(str, arrays["notes"]))
            index = TarIndex(*(arrays[name] for name in TarIndex._fields[:-2]), problems=problems, notes=notes)
            return index if _is_whole(index, int(stamp[1])) else None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _is_whole(index: TarIndex, size: int) -> bool:
    """Tell whether an index is one of a file of `size` bytes; a ValueError where its keys are no text."""
    count, ends = len(index.key_ends), np.concatenate([[0], index.key_ends])
    arrays: Any = index[: len(DTYPES)]
    if [array.dtype.char for array in arrays] != list(DTYPES) or index.spans.shape != (count, 4):
        return False
    for number in range(count):
        index.key(number)
    inside = (index.spans >= 0).all() and (index.spans <= size).all()
    inside = inside and (index.spans[:, 0::2] + index.spans[:, 1::2] <= size).all()
    in_order = (np.diff(ends) >= 0).all() and ends[-1] == len(index.keys)
    flat = index.is_json.shape == index.labels.shape == (count,) and index.keys.ndim == index.key_ends.ndim == 1
    return bool(inside and in_order and flat)


def _save(cached: Path, stamp: Int64[np.ndarray, " 3"], index: TarIndex) -> None:
    texts = {"problems": np.array(index.problems, str).reshape(-1, 2), "notes": np.array(index.notes, str)}
    arrays = index._asdict() | texts
    try:
        with atomic_write(cached) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, stamp=stamp, **arrays)
    except UserError as error:
        logger.warning("the index of a tar file is not kept: %s", error)
