"""Offsets of the members of tar shards, so that any example can be read without those before it.

WebDataset's rule (github.com/webdataset/webdataset): members whose paths agree up to the first dot of the last part are
one example; what follows the dot is the kind. img2dataset writes such shards, as KEY.jpg, KEY.txt and KEY.json.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from sdjax.core.caches import cache_folder, own_folder
from sdjax.core.errors import UserError
from sdjax.core.files import atomic_write

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
VERSION = 1
# What tarfile raises for headers that are wrong; a chain of extended headers is read by recursion.
BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, MemoryError, EOFError)
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)

logger = logging.getLogger("sdjax")


class TarIndex(NamedTuple):
    """The examples of a tar file, in its order, and what is wrong with it."""

    keys: UInt8[np.ndarray, " bytes"]
    """All keys in UTF-8, one after the other."""
    key_ends: Int64[np.ndarray, " n"]
    spans: Int64[np.ndarray, "n 4"]
    """Start and size of the image, start and size of the caption, in bytes."""
    is_json: UInt8[np.ndarray, " n"]
    """Whether the caption is JSON, rather than text."""
    problems: tuple[tuple[str, str], ...]
    """(member, reason) of what is no whole example; the member "" is the file itself."""

    def key(self, index: int) -> str:
        """The path in the tar, up to the first dot of its last part."""
        return self.keys[self.key_ends[index - 1] if index else 0 : self.key_ends[index]].tobytes().decode()


class Member(NamedTuple):
    """A file in the tar."""

    key: str
    kind: str
    start: int
    size: int


def tar_index(path: Path) -> TarIndex:
    """The index of a tar file, from the user's cache if the file's size and time of change are those of then.

    Raises:
        UserError: the file cannot be read at all; what is wrong within it is in `problems`.
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
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return index


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
    keys, spans, is_json = [], [], []
    for key, kinds in examples.items():
        image, caption = (next((k for k in wanted if k in kinds), None) for wanted in (IMAGE_SUFFIXES, CAPTIONS))
        if image is None or caption is None:
            lacks = f"image ({', '.join(IMAGE_SUFFIXES)})" if image is None else f"caption ({', '.join(CAPTIONS)})"
            problems.append((key, f"has no {lacks}"))
            continue
        keys.append(key.encode())
        spans.append((*kinds[image][2:], *kinds[caption][2:]))
        is_json.append(caption == "json")
    return TarIndex(
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        spans=np.array(spans, np.int64).reshape(-1, 4),
        is_json=np.array(is_json, np.uint8),
        problems=tuple(problems),
    )


def _members(path: Path) -> Iterator[Member | tuple[str, str]]:
    """The images and captions of a tar file, and (name, reason) of members that cannot be read as they are."""
    # A map answers no read with more than the file has, whatever size a header claims.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with tarfile.open(fileobj=content, mode="r:") as tar:  # type: ignore[arg-type]
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  (it would keep them all)
                yield from _member(info, len(content))
            end = tar.offset
        # tarfile takes whatever is no header for the end.
        if content[end : end + tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"there is no member and no end of the archive at byte {end}")


def _member(info: tarfile.TarInfo, total: int) -> Iterator[Member | tuple[str, str]]:
    folder, slash, name = info.name.rpartition("/")
    stem, _, kind = name.partition(".")
    if info.isdir() or kind.lower() not in (*IMAGE_SUFFIXES, *CAPTIONS) or not stem:
        return
    if info.type not in PLAIN or info.sparse:
        yield info.name, "is a link or a special file"
    elif info.size < 0 or info.offset_data + info.size > total:
        yield info.name, f"should have {info.size} bytes, but the tar file ends before"
    elif not info.name.isprintable():
        yield repr(info.name), "is a name that cannot be printed"
    else:
        yield Member(f"{folder}{slash}{stem}", kind.lower(), info.offset_data, info.size)


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
            index = TarIndex(*(arrays[name] for name in TarIndex._fields[:-1]), problems=problems)
            return index if _is_whole(index, int(stamp[1])) else None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _is_whole(index: TarIndex, size: int) -> bool:
    """Tell whether an index is one of a file of `size` bytes; a ValueError where its keys are no text."""
    count, ends = len(index.key_ends), np.concatenate([[0], index.key_ends])
    if [array.dtype.char for array in index[:4]] != ["B", "l", "l", "B"] or index.spans.shape != (count, 4):
        return False
    for number in range(count):
        index.key(number)
    inside = (index.spans >= 0).all() and (index.spans <= size).all()
    inside = inside and (index.spans[:, 0::2] + index.spans[:, 1::2] <= size).all()
    in_order = (np.diff(ends) >= 0).all() and ends[-1] == len(index.keys)
    return bool(inside and in_order and index.is_json.shape == (count,) and index.keys.ndim == index.key_ends.ndim == 1)


def _save(cached: Path, stamp: Int64[np.ndarray, " 3"], index: TarIndex) -> None:
    arrays = index._asdict() | {"problems": np.array(index.problems, str).reshape(-1, 2)}
    try:
        with atomic_write(cached) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, stamp=stamp, **arrays)
    except UserError as error:
        logger.warning("the index of a tar file is not kept: %s", error)
