"""Records of several ArrayRecord files by one index, each error with the name of its file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from sdjax.core.errors import UserError
from sdjax.core.files import ADVICE, atomic_write, cannot_write

# One record a chunk makes each a single read; what is stored here is compressed already, or noise.
WRITING = "group_size:1,uncompressed"
READING = {"max_parallelism": "0"}
FAILURES = (RuntimeError, ValueError, IndexError, MemoryError)


@dataclasses.dataclass
class RecordFile:
    """A file and how many records it has; the names are those that ArrayRecordDataSource reads."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RecordFiles:
    """The records of several files as one sequence; a file is opened when it is first read from."""

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        """The files and how many records each has."""
        self._paths, self._ends = list(paths), np.cumsum(np.array(counts, np.int64))
        parts = [RecordFile(os.fspath(path), 0, count, count) for path, count in zip(paths, counts, strict=True)]
        self._records = ArrayRecordDataSource(parts, READING) if parts else ()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._ends.size else 0

    def __getitem__(self, index: int) -> bytes:
        """The bytes of a record.

        Raises:
            UserError: the file is missing or damaged there.
        """
        try:
            return self._records[index]
        except FAILURES as error:
            raise UserError(f"cannot read {self.place(index)}: {_first_line(error)}") from error

    def locate(self, index: int) -> tuple[int, int]:
        """File of a record, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - int(self._ends[file - 1] if file else 0)

    def place(self, index: int) -> str:
        """The file and the record's number in it, from 0."""
        file, record = self.locate(index)
        return f"{self._paths[file]} record {record}"


def count_records(path: Path) -> int:
    """Number of records in a file.

    Raises:
        UserError: it is missing, truncated, or no ArrayRecord file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        reader = ArrayRecordReader(os.fspath(path), "readahead_buffer_size:0,max_parallelism:0")
        count, whole = reader.num_records(), reader.ok()
        reader.close()
    except FAILURES as error:
        raise UserError(f"{path} is truncated or no ArrayRecord file: {_first_line(error)}") from error
    if not whole:
        raise UserError(f"{path} is truncated or no ArrayRecord file")
    return count


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Writes a whole file, under a temporary name until it is complete.

    Returns:
        How many records were written.

    Raises:
        UserError: the file cannot be written.
    """
    count = 0
    with atomic_write(path) as partial:
        try:
            writer = ArrayRecordWriter(os.fspath(partial), WRITING)
            for record in records:
                writer.write(record)
                count += 1
            writer.close()
        except RuntimeError as error:  # which has the system's reason in its text
            number = next((number for number in ADVICE if os.strerror(number) in str(error)), 0)
            reason = os.strerror(number) if number else _first_line(error)
            raise cannot_write(path, OSError(number, reason)) from error
    return count


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
