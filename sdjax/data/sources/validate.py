"""Every bad row of a data set, with its place and what is wrong with it: nothing stops at the first."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from sdjax.core.errors import UserError, printable, unknown
from sdjax.data.sources import array_records, folder, webdataset
from sdjax.data.sources.base import DatasetRow, Example, Source
from sdjax.data.sources.open import KINDS, source
from sdjax.data.sources.shard_globs import split_pattern

CHUNK = 256


class Bad(NamedTuple):
    """A row that training could not use: file and line, tar member or record, and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def check(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    minimum_side: int = 0,
) -> Iterator[Bad]:
    """Reads and decodes the whole data set; yields what is bad, in the data set's order.

    Bad are: what cannot be read or decoded, a missing file, a line that is not JSON, no caption or an empty one, an id
    that an earlier row has, and an image that is too small. Of each row a hash of its id is kept.

    Args:
        name: as `sources.source` takes it.
        split: likewise.
        data_dir: likewise.
        minimum_side: pixels that the shorter side must have; 0 for any.

    Raises:
        UserError: there is no such data set, or it has no list of rows at all.
    """
    return (bad for bad in _judged(name, split, data_dir, minimum_side) if bad is not None)


def report(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    minimum_side: int = 0,
    output: TextIO | None = None,
) -> int:
    """`check`, printed: a line for each bad row, and one with the counts at the end.

    Args:
        name: as `check` takes it.
        split: likewise.
        data_dir: likewise.
        minimum_side: likewise.
        output: default standard output; the progress is on standard error.

    Returns:
        How many rows are bad.
    """
    output = output or sys.stdout
    rows = bad_rows = 0
    with tqdm(_judged(name, split, data_dir, minimum_side), desc=f"checking {name}", unit="row", leave=False) as bar:
        for bad in bar:
            rows += 1
            if bad is not None:
                bad_rows += 1
                bar.write(printable(bad), file=output)
    print(f"{name} ({split}): {rows} rows, {bad_rows} bad", file=output)
    return bad_rows


def _judged(name: str, split: str, data_dir: str | os.PathLike | None, minimum_side: int) -> Iterator[Bad | None]:
    """Fault of each row, None where there is none."""
    judge, rows = _Judge(minimum_side), _rows(name, split, data_dir)
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(rows, CHUNK)):
            read = pool.map(judge.read, chunk)
            yield from (judge.with_id(row, *found) for row, found in zip(chunk, read, strict=True))


class _Judge:
    """Tells what is wrong with a row; decoding runs in threads, ids are compared in the rows' order."""

    def __init__(self, minimum_side: int):
        self._minimum_side = minimum_side
        # Hashes, for the ids of many millions of rows would fill the memory.
        self._seen: set[bytes] = set()

    def read(self, row: DatasetRow) -> tuple[str | None, list[str]]:
        """The row's id, None if it cannot be read, and reasons against it."""
        try:
            example = row.read()
        except UserError as error:
            return None, [str(error).removeprefix(row.place).lstrip(": ")]
        return example["id"], list(self._reasons(example))

    def _reasons(self, example: Example) -> Iterator[str]:
        height, width, _ = example["image"].shape
        if min(height, width) < self._minimum_side:
            yield f"the image has {width}x{height} pixels, and {self._minimum_side} are the least for a side"
        if not example["caption"].strip():
            yield "the caption is empty"

    def with_id(self, row: DatasetRow, key: str | None, reasons: list[str]) -> Bad | None:
        """The verdict, when the rows before are known."""
        if key is not None:
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            if digest in self._seen:
                reasons.append(f"an earlier row has its id, {key!r}")
            self._seen.add(digest)
        return Bad(row.place, "; ".join(reasons)) if reasons else None


def _rows(name: str, split: str, data_dir: str | os.PathLike | None) -> Iterator[DatasetRow]:
    kind, _, rest = name.partition(":")
    if kind == "folder" and rest:
        return folder.rows(Path(rest).expanduser(), split)
    if kind == "webdataset" and rest:
        return webdataset.rows(split_pattern(rest, split))
    if kind == "array_record" and rest:
        return array_records.rows(split_pattern(rest, split))
    if name == "openmoji" or (kind == "tfds" and rest):
        return _by_index(name, split, source(name, split, data_dir))
    raise unknown("data source", name, KINDS)


def _by_index(name: str, split: str, examples: Source) -> Iterator[DatasetRow]:
    for index in range(len(examples)):
        yield DatasetRow(f"{name} {split} record {index}", lambda index=index: examples[index])
