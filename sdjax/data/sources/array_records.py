"""Captioned images in ArrayRecord shards.

A record is a safetensors file (github.com/huggingface/safetensors) of uint8 vectors: `image`, the bytes of a PNG, JPEG,
WebP, BMP or GIF file; `caption` and, if there is one, `id`, in UTF-8. Nothing in it can be run, and no protocol buffer
is needed to write one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.data.images import image_size, read_image
from sdjax.data.sources.base import DatasetRow, Example, bad_row
from sdjax.data.sources.record_files import RecordFiles, count_records, write_records
from sdjax.data.sources.shard_globs import named
from sdjax.data.sources.tensors import pack, unpack


class ArrayRecordSource:
    """The examples in ArrayRecord files, in the files' order; one without `id` is called FILE/NUMBER."""

    def __init__(self, paths: Sequence[Path]):
        """Opens the files.

        Raises:
            UserError: a file is missing, truncated, or no ArrayRecord file.
        """
        self._names = [path.name for path in paths]
        self._records = RecordFiles(paths, [count_records(path) for path in paths])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        fields, place = self._fields(index), self._records.place(index)
        image = read_image(fields["image"].tobytes(), place)
        return Example(image=image, caption=_text(fields, "caption", place), id=self._id(index, fields))

    def id(self, index: int) -> str:
        """The record's own, else its file and number."""
        return self._id(index, self._fields(index))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return image_size(self._fields(index)["image"].tobytes(), self._records.place(index))

    def _id(self, index: int, fields: Mapping[str, np.ndarray]) -> str:
        if "id" in fields:
            return _text(fields, "id", self._records.place(index))
        file, record = self._records.locate(index)
        return f"{self._names[file]}/{record}"

    def _fields(self, index: int) -> dict[str, np.ndarray]:
        place = self._records.place(index)
        fields = unpack(self._records[index], place)
        for name in ("image", "caption"):
            if name not in fields:
                raise UserError(f"{place} has no {name}, but {', '.join(fields) or 'nothing'}")
        return fields


def rows(pattern: str) -> Iterator[DatasetRow]:
    """Every record of the files, good or bad."""
    for path in named(pattern):
        try:
            source = ArrayRecordSource([path])
        except UserError as error:
            yield bad_row(str(path), str(error))
            continue
        for index in range(len(source)):
            yield DatasetRow(f"{path} record {index}", _reader(source, index))


def write_array_record(path: str | Path, examples: Iterable[Mapping[str, Any]]) -> int:
    """Writes examples of any source as one ArrayRecord file, which appears when it is complete.

    Args:
        path: the file; several files make a data set.
        examples: `image`, the bytes of an image file, kept as they are, or uint8 [h, w, 3], kept as PNG; `caption`;
            `id` if there is one.

    Returns:
        How many were written.

    Raises:
        UserError: the file cannot be written.
    """
    return write_records(Path(path), map(encode, examples))


def encode(example: Mapping[str, Any]) -> bytes:
    """The record of an example."""
    image = example["image"]
    if not isinstance(image, bytes):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        image = file.getvalue()
    texts = {name: example[name].encode() for name in ("caption", "id") if name in example}
    return pack({name: np.frombuffer(data, np.uint8) for name, data in {"image": image, **texts}.items()})


def _reader(source: ArrayRecordSource, index: int) -> Callable[[], Example]:
    return lambda: source[index]


def _text(fields: Mapping[str, np.ndarray], name: str, place: str) -> str:
    try:
        return fields[name].tobytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the {name} is not UTF-8: {error}") from error
