"""Any TensorFlow dataset that has images and texts, or names of classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from sdjax.core.errors import UserError
from sdjax.data.images import image_size, read_image
from sdjax.data.sources import openmoji
from sdjax.data.sources.base import CAPTION, Example, Problem, captioned
from sdjax.data.sources.rules import CAPTIONED, RowRules
from sdjax.data.sources.tfds_annotations import annotated


class TfdsSource:
    """A prepared TensorFlow dataset with an image feature; the caption is a text, or else the name of the class."""

    problems: Sequence[Problem] = ()

    def __init__(self, builder: Any, split: str, rules: RowRules = CAPTIONED):
        """Opens `split`.

        Raises:
            UserError: no such split, no image among the features or no caption that is needed, or records without
                random access.
        """
        features: Any = builder.info.features
        self._place = f"{builder.name} {split} record"
        self._image = _first(features, tfds.features.Image, "image", builder.name)
        self._caption = _caption(features, builder.name) if CAPTION in rules.needs else None
        label = features[self._caption] if self._caption else None
        self._class_name = label.int2str if isinstance(label, tfds.features.ClassLabel) else None
        self._annotated = annotated(features, self._image)
        self.classes = self._annotated.classes
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
        image, captions = read_image(record[self._image], self.place(index)), captioned(self._captions(record))
        return Example(image=image, id=_id(record, index), **captions, **self._annotated.read(record))

    def id(self, index: int) -> str:
        """The record's own `id`, else its index."""
        return _id(self._records[index], index)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return image_size(self._records[index][self._image], self.place(index))

    def place(self, index: int) -> str:
        """The data set, the split and the record's number in it."""
        return f"{self._place} {index}"

    def _captions(self, record: Any) -> tuple[str, ...]:
        if self._caption is None:
            return ()
        value = record[self._caption]
        if self._class_name:
            return (self._class_name(value).replace("_", " "),)
        return (_text(value),) if isinstance(value, bytes | str) else tuple(map(_text, value))


def tfds_builder(name: str, data_dir: str | os.PathLike | None) -> tfds.core.DatasetBuilder:
    """The builder of a data set, which is prepared if it is not yet.

    Raises:
        UserError: there is none of that name, or a package that prepares it is missing.
    """
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


def _caption(features: Any, name: str) -> str:
    kinds = (tfds.features.Text, tfds.features.ClassLabel)
    found = next((key for key in ("caption", "text", "prompt") if key in features), None)
    return found or _first(features, kinds, "text or label", name)


def _first(features: Any, kinds: Any, wanted: str, name: str) -> str:
    for key, feature in features.items():
        if isinstance(feature, kinds):
            return key
    raise UserError(f"data set {name} has no {wanted} among its features: {', '.join(features)}")


def _id(record: Any, index: int) -> str:
    return _text(record.get("id", str(index)))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
