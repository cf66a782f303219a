"""Lists of a folder's images with their annotations: lines of JSON, a JSON array, CSV, Parquet.

Each gives a row as a line of JSON would say it, with `file_name`, captions and what `annotations.parse_annotations`
reads (Hugging Face's imagefolder, datasets documentation, "image_dataset").
"""

from __future__ import annotations

import csv
import io
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from sdjax.core.errors import UserError
from sdjax.data.sources.annotations import LABEL
from sdjax.data.sources.base import CONDITIONING_IMAGE, keys_of, lacks, read_json

FILE_NAME = "file_name"
Parser = Callable[[bytes, str], Mapping[str, Any]]
MARK = b"\xef\xbb\xbf"


class Listing(Protocol):
    """Annotations of images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """A row; a UserError where it cannot be read."""
        ...

    def place(self, index: int) -> str:
        """The file and the row's number in it."""
        ...

    def lacks(self, entry: Mapping[str, Any], key: str) -> str:
        """A reason against a row that has no `key`."""
        ...


class TextSpan(NamedTuple):
    """Part of a file that is a row: the number that a message gives it, its first byte, and how many it has."""

    number: int
    start: int
    size: int


class TextListing:
    """Rows of a text file, each read when it is asked for; 16 bytes of a row are kept."""

    lacks = staticmethod(lacks)

    def __init__(self, path: Path, spans: Iterator[TextSpan], parse: Parser, unit: str):
        """Finds the rows.

        Raises:
            UserError: the file cannot be read.
        """
        self._path, self._parse, self._unit = path, parse, unit
        numbers, starts, sizes = array("i"), array("q"), array("i")
        for number, start, size in spans:
            numbers.append(number)
            starts.append(start)
            sizes.append(size)
        self._numbers, self._starts, self._sizes = np.array(numbers), np.array(starts), np.array(sizes)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with opened(self._path) as file:
            data = os.pread(file.fileno(), int(self._sizes[index]), int(self._starts[index]))
        return self._parse(data, self.place(index))

    def place(self, index: int) -> str:
        """The file, and the number of the line or row."""
        return f"{self._path} {self._unit} {self._numbers[index]}"


class ParquetListing:
    """Rows of a Parquet file, in memory as Arrow has them."""

    lacks = staticmethod(lacks)

    def __init__(self, path: Path):
        """Reads the columns that are not images.

        Raises:
            UserError: it is no Parquet file, or has no column of names.
        """
        # Its import takes longer than that of all readers together.
        import pyarrow
        import pyarrow.parquet

        self._path = path
        try:
            file = pyarrow.parquet.ParquetFile(path)
            names = file.schema_arrow.names
            if FILE_NAME not in names:
                raise UserError(f"{path} has no column {FILE_NAME}; its columns are {keys_of(dict.fromkeys(names))}")
            self._table = file.read([name for name in names if name != "image"])
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            return self._table.slice(index, 1).to_pylist()[0]
        except (ArithmeticError, ValueError) as error:  # texts that are not UTF-8, dates beyond Python's
            raise UserError(f"{self.place(index)} cannot be read: {error}") from error

    def place(self, index: int) -> str:
        """The file and the row's number, from 1."""
        return f"{self._path} row {index + 1}"


def json_lines(path: Path) -> TextListing:
    """Objects of JSON, one a line; or one array of them."""
    with opened(path) as file:
        if file.read(4096).removeprefix(MARK).lstrip().startswith(b"["):
            return json_array(path)
    return TextListing(path, _lines(path), read_json, "line")


def json_array(path: Path) -> TextListing:
    """An array of JSON objects."""
    return TextListing(path, _elements(path), read_json, "row")


def csv_rows(path: Path) -> TextListing:
    """Values between commas; the first row names the columns."""
    spans = _records(path)
    try:
        _, start, size = next(spans)
    except StopIteration:
        raise UserError(f"{path} is empty; its first line should name columns, {FILE_NAME} among them") from None
    with opened(path) as file:
        file.seek(start)
        names = _values(file.read(size), f"{path} line 1")
    if FILE_NAME not in names:
        raise UserError(f"{path} has no column {FILE_NAME}; its columns are {keys_of(dict.fromkeys(names))}")

    return TextListing(path, spans, CsvParser(tuple(names)), "line")


class CsvParser(NamedTuple):
    """Reads a row of CSV as a line of JSON would say it; an empty value is none."""

    names: tuple[str, ...]

    def __call__(self, data: bytes, place: str) -> Mapping[str, Any]:
        values = _values(data, place)
        if len(values) != len(self.names):
            raise UserError(f"{place} has {len(values)} values, and the first line names {len(self.names)} columns")
        row: dict[str, Any] = {name: value or None for name, value in zip(self.names, values, strict=True)}
        if (label := row.get(LABEL) or "").isdecimal() and label.isascii():
            row[LABEL] = int(label)
        return row


def pair_lines(path: Path) -> TextListing:
    """Fill50k's lines (lllyasviel/ControlNet, docs/train.md): {"source": hint, "target": image, "prompt": caption}."""
    return TextListing(path, _lines(path), _pair, "line")


def _pair(data: bytes, place: str) -> Mapping[str, Any]:
    row = read_json(data, place)
    return {{"source": CONDITIONING_IMAGE, "target": FILE_NAME}.get(key, key): value for key, value in row.items()}


LISTINGS: dict[str, Callable[[Path], Listing]] = {
    "metadata.jsonl": json_lines,
    "metadata.csv": csv_rows,
    "metadata.parquet": ParquetListing,
    "metadata.json": json_array,
    "prompt.json": pair_lines,
}


def find_listing(folder: Path) -> Path | None:
    """The first of `LISTINGS` that is in a folder."""
    return next((folder / name for name in LISTINGS if (folder / name).is_file()), None)


def opened(path: str | Path) -> BinaryIO:
    """The file, to be read; a UserError where that cannot be."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _lines(path: Path) -> Iterator[TextSpan]:
    """The lines that are not blank."""
    start = 0
    with opened(path) as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield TextSpan(number, start, len(text))
            start += len(text)


def _elements(path: Path) -> Iterator[TextSpan]:
    """The elements of a JSON array; bytes are taken for characters, so that places are bytes."""
    with opened(path) as file:
        text = file.read().decode("latin-1")
    decoder, at = json.JSONDecoder(), len(MARK) if text.startswith(MARK.decode("latin-1")) else 0
    try:
        at, number = _expect(text, at, "["), 0
        while text[at : at + 1] != "]":
            start, number = at, number + 1
            _, end = decoder.raw_decode(text, start)
            yield TextSpan(number, start, end - start)
            at = _skip(text, end)
            if text[at : at + 1] != "]":
                at = _expect(text, at, ",")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON array of objects: {error}") from error


def _expect(text: str, at: int, wanted: str) -> int:
    """The place of what follows a character and the blanks around it."""
    at = _skip(text, at)
    if text[at : at + 1] != wanted:
        raise ValueError(f"byte {at} should be {wanted}")
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    """The first place from `at` on that is not blank."""
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _records(path: Path) -> Iterator[TextSpan]:
    """The rows of a CSV file, the first among them; a row may have several lines."""
    position = 0

    def lines(file: BinaryIO) -> Iterator[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode("latin-1")  # what is between the commas is read later

    with opened(path) as file:
        start = len(MARK) if file.read(len(MARK)) == MARK else 0
        file.seek(start)
        position, number = start, 1
        reader = csv.reader(lines(file), strict=True)
        try:
            for values in reader:
                if values:
                    yield TextSpan(number, start, position - start)
                start, number = position, reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num} is not CSV: {error}") from error


def _values(data: bytes, place: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{place} is not CSV in UTF-8: {error}") from error
