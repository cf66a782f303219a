"""Captioned images in ArrayRecord shards.

A record is a safetensors file (github.com/huggingface/safetensors) of uint8 vectors: `image`, the bytes of a PNG, JPEG,
WebP, BMP or GIF file; `caption`, where there are several `captions`, a JSON list, and, if there is one, `id`, in UTF-8.
Nothing in it can be run, and no protocol buffer is needed to write one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdjax.core.errors import UserError
from sdjax.core.untrusted import parse_json
from sdjax.data.images import image_size, read_image
from sdjax.data.sources.base import CAPTION, Example, Problem, captioned, captions_of
from sdjax.data.sources.record_files import RecordFiles, count_records, write_records
from sdjax.data.sources.rules import RowRules
from sdjax.data.sources.tensors import pack, unpack


class ArrayRecordSource:
    """The examples in ArrayRecord files, in the files' order; one without `id` is called FILE/NUMBER.

    Attributes:
        problems: files that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], rules: RowRules):
        """Opens the files."""
        problems, counts, total = [], {}, 0
        for path in paths:
            try:
                counts[path] = count_records(path)
                total += counts[path]
            except UserError as error:
                problems.append(Problem(str(path), str(error), total))
        self._captioned, self.problems = CAPTION in rules.needs, tuple(problems)
        self._names = [path.name for path in counts]
        self._records = RecordFiles(list(counts), list(counts.values()))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        fields, place = self._fields(index), self.place(index)
        image = read_image(fields["image"].tobytes(), place)
        captions = _captions(fields, place) if self._captioned else ()
        return Example(image=image, id=self._id(index, fields), **captioned(captions))

    def id(self, index: int) -> str:
        """The record's own, else its file and number."""
        return self._id(index, self._fields(index))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return image_size(self._fields(index)["image"].tobytes(), self.place(index))

    def place(self, index: int) -> str:
        """The file and the record's number in it, from 0."""
        return self._records.place(index)

    def _id(self, index: int, fields: Mapping[str, np.ndarray]) -> str:
        if "id" in fields:
            return _text(fields, "id", self.place(index))
        file, record = self._records.locate(index)
        return f"{self._names[file]}/{record}"

    def _fields(self, index: int) -> dict[str, np.ndarray]:
        place = self.place(index)
        fields = unpack(self._records[index], place)
        for name in ("image", *["caption"] * self._captioned):
            if name not in fields:
                raise UserError(f"{place} has no {name}, but {', '.join(fields) or 'nothing'}")
        return fields


def write_array_record(path: str | Path, examples: Iterable[Mapping[str, Any]]) -> int:
    """Writes examples of any source as one ArrayRecord file, which appears when it is complete.

    Args:
        path: the file; several files make a data set.
        examples: `image`, the bytes of an image file, kept as they are, or uint8 [h, w, 3], kept as PNG; `caption`, or
            several `captions`; `id` if there is one.

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
    if "captions" in example:
        texts["captions"] = json.dumps(list(example["captions"])).encode()
    return pack({name: np.frombuffer(data, np.uint8) for name, data in {"image": image, **texts}.items()})


def _captions(fields: Mapping[str, np.ndarray], place: str) -> tuple[str, ...]:
    if "captions" not in fields:
        return (_text(fields, "caption", place),)
    return captions_of({"text": parse_json(fields["captions"].tobytes(), f"{place}: captions")}, place)


def _text(fields: Mapping[str, np.ndarray], name: str, place: str) -> str:
    try:
        return fields[name].tobytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the {name} is not UTF-8: {error}") from error
