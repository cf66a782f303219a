"""Captioned pictures by index: OpenMoji, any TensorFlow dataset, or a folder with `metadata.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Shaped, UInt8

from sdjax.core.errors import UserError, unknown
from sdjax.data import openmoji
from sdjax.data.pictures import read_picture

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption")
KINDS = ("openmoji", "tfds:NAME", "folder:PATH")


class Example(TypedDict):
    """One captioned picture; `id` names it within its data set."""

    image: UInt8[np.ndarray, "h w 3"]
    caption: str
    id: str


@runtime_checkable
class Source(Protocol):
    """What the loader reads: a length, and an example for each index below it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def source(name: str, split: str = "train", data_dir: str | os.PathLike | None = None) -> Source:
    """The examples called `name`, prepared on first use.

    Args:
        name: `openmoji` (splits `train`, `held_out`); `tfds:NAME`, e.g. `tfds:oxford_flowers102`; or `folder:PATH`,
            Hugging Face's imagefolder: pictures and a `metadata.jsonl` whose lines hold `file_name` and `text` (or
            `caption`), in PATH/split or in PATH.
        split: a split's name; for TensorFlow datasets anything their slicing knows (`train[:10]`, `a+b`, `all`).
        data_dir: where TensorFlow datasets are kept; default `openmoji.default_data_dir()`.

    Raises:
        UserError: there is no such data, split or file, or a line of metadata is wrong.
    """
    kind, _, rest = name.partition(":")
    if name == "openmoji":
        return TfdsSource(openmoji.prepared(data_dir), split)
    if kind == "tfds" and rest:
        return TfdsSource(_tfds_builder(rest, data_dir), split)
    if kind == "folder" and rest:
        return FolderSource(Path(rest).expanduser(), split)
    raise unknown("data source", name, KINDS)


class TfdsSource:
    """A prepared TensorFlow dataset with an image feature; the caption is a text, or else the name of the class."""

    def __init__(self, builder: Any, split: str):
        """Opens `split`.

        Raises:
            UserError: no such split, no picture or no caption among the features, or records without random access.
        """
        features: Any = builder.info.features
        self._image = _first(features, tfds.features.Image, "image", builder.name)
        kinds = (tfds.features.Text, tfds.features.ClassLabel)
        caption = next((key for key in ("caption", "text") if key in features), None)
        self._caption = caption or _first(features, kinds, "text or label", builder.name)
        label = features[self._caption]
        self._class_name = label.int2str if isinstance(label, tfds.features.ClassLabel) else None
        decoders = {self._image: tfds.decode.SkipDecoding()}
        try:
            self._records: Any = builder.as_data_source(split, decoders=decoders)
        except (ValueError, KeyError, NotImplementedError) as error:
            splits = ", ".join(builder.info.splits) or "none"
            raise UserError(f"cannot read split {split!r} of {builder.name} (splits: {splits}): {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        caption, key = record[self._caption], record.get("id", str(index))
        text = self._class_name(caption).replace("_", " ") if self._class_name else _text(caption)
        return Example(image=read_picture(record[self._image], f"index {index}"), caption=text, id=_text(key))


class FolderSource:
    """The pictures that a folder's `metadata.jsonl` lists, in its order; `id` is the file's name there."""

    def __init__(self, folder: Path, split: str = "train"):
        """Reads and checks the list; the pictures are opened when they are asked for.

        Raises:
            UserError: no list, a line that is not JSON or lacks a key, a missing file, or one outside the folder.
        """
        self._folder = folder / split if (folder / split / METADATA).is_file() else folder
        if self._folder == folder and split != "train":
            raise UserError(f"no split {split!r} in {folder}: {folder / split / METADATA} does not exist")
        self._rows = [self._row(number, line) for number, line in _lines(self._folder / METADATA)]
        if not self._rows:
            raise UserError(f"{self._folder / METADATA} lists no pictures")

    def _row(self, number: int, line: str) -> tuple[int, str, str]:
        place = f"{self._folder / METADATA} line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place} is not JSON: {error}") from error
        entry = entry if isinstance(entry, dict) else {}
        file, caption = entry.get("file_name"), next((entry[key] for key in CAPTION_KEYS if key in entry), None)
        if not isinstance(file, str) or not isinstance(caption, str):
            raise UserError(f"{place} needs the strings file_name and {' or '.join(CAPTION_KEYS)}")
        path = self._folder / file
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise UserError(f"{place} names {file!r}, which is outside the folder")
        if not path.is_file():
            raise UserError(f"{place} names {path}, which does not exist")
        return number, file, caption

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        number, file, caption = self._rows[index]
        return Example(image=read_picture(self._folder / file, f"{METADATA} line {number}"), caption=caption, id=file)


class ArraySource:
    """Rows of arrays that are in memory already, e.g. cached latents and tokens."""

    def __init__(self, arrays: Mapping[str, Shaped[np.ndarray, "n ..."]]):
        """Wraps arrays of one length.

        Raises:
            ValueError: their lengths differ.
        """
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays must have one length, not {lengths}")
        self._arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self._arrays.items()}


class CachedSource:
    """Keeps decoded examples, up to `limit` bytes of pictures, so that a small data set is decoded once.

    `CachedSource(grain.MapDataset.source(examples).map(Square(64)))` keeps them resampled.
    """

    def __init__(self, examples: Source, limit: int = 1 << 30):
        """Caches `examples`, which must give the same example for the same index always."""
        self._examples, self._kept, self._free = examples, {}, limit

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        if index in self._kept:
            return self._kept[index]
        example = self._examples[index]
        if example["image"].nbytes <= self._free:
            self._free -= example["image"].nbytes
            self._kept[index] = example
        return example


def _tfds_builder(name: str, data_dir: str | os.PathLike | None) -> tfds.core.DatasetBuilder:
    try:
        folder = os.fspath(data_dir or openmoji.default_data_dir())
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
        if not builder.data_path.exists():
            builder = tfds.builder(name, data_dir=folder, try_gcs=False, file_format="array_record")
            builder.download_and_prepare()
        return builder
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f"TensorFlow Datasets knows no {name!r}, and {folder} holds none of that name") from error
    except ImportError as error:  # some builders need TensorFlow, or a package of their own, to write their records
        raise UserError(f"preparing tfds:{name} needs a package that is not installed: {error}") from error


def _first(features: Any, kinds: Any, wanted: str, name: str) -> str:
    for key, feature in features.items():
        if isinstance(feature, kinds):
            return key
    raise UserError(f"data set {name} has no {wanted} among its features: {', '.join(features)}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
