"""Captioned images by index, by the name that a config gives them; and sources that are made of others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sdjax.core.errors import unknown
from sdjax.data.sources import openmoji, openmoji_parts
from sdjax.data.sources.array_records import ArrayRecordSource
from sdjax.data.sources.base import Example, Images, Source
from sdjax.data.sources.folder import FolderSource
from sdjax.data.sources.plain_folder import PlainFolder
from sdjax.data.sources.shard_globs import files, split_pattern
from sdjax.data.sources.tfds import TfdsSource, tfds_builder
from sdjax.data.sources.webdataset import WebDatasetSource

KINDS = (
    "openmoji",
    "openmoji_regions",
    "openmoji_scenes",
    "tfds:NAME",
    "folder:PATH",
    "pictures:PATH",
    "webdataset:PATTERN",
    "array_record:PATTERN",
)


def source(name: str, split: str = "train", data_dir: str | os.PathLike | None = None) -> Images:
    """The examples called `name`, prepared on first use.

    Args:
        name: `openmoji` (splits `train`, `held_out`), with the groups of emoji as classes; `openmoji_regions`, with
            label maps; `openmoji_scenes`, with boxes; `tfds:NAME`, e.g. `tfds:oxford_flowers102`; `folder:PATH`,
            Hugging Face's imagefolder: images and a `metadata.jsonl` whose lines hold `file_name` and `text` (or
            `caption`), in PATH/split or in PATH; `pictures:PATH`, all images below a folder, without captions, whose
            only split is `train`; `webdataset:PATTERN`, tar shards as img2dataset writes them;
            `array_record:PATTERN`, what `array_records.write_array_record` writes. A PATTERN is what `patterns.files`
            understands, e.g. `shards/{000..127}.tar`; `{split}` in it stands for the split, and without it there is
            but `train`.
        split: a split's name; for TensorFlow datasets anything their slicing knows (`train[:10]`, `a+b`, `all`).
        data_dir: where TensorFlow datasets are kept; default `openmoji.default_data_dir()`.

    Raises:
        UserError: there is no such data, split or file, or a line of metadata or a shard is wrong.
    """
    kind, _, rest = name.partition(":")
    if name == "openmoji":
        return openmoji_parts.GroupedSource(openmoji.prepared(data_dir), split)
    if name == "openmoji_regions":
        return openmoji_parts.RegionSource(openmoji.prepared(data_dir), split)
    if name == "openmoji_scenes":
        return openmoji_parts.SceneSource(split)
    if kind == "tfds" and rest:
        return TfdsSource(tfds_builder(rest, data_dir), split)
    if kind == "folder" and rest:
        return FolderSource(Path(rest).expanduser(), split)
    if kind == "pictures" and rest:
        return PlainFolder(Path(rest).expanduser())
    if kind == "webdataset" and rest:
        return WebDatasetSource(files(split_pattern(rest, split)))
    if kind == "array_record" and rest:
        return ArrayRecordSource(files(split_pattern(rest, split)))
    raise unknown("data source", name, KINDS)


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
    """Keeps decoded examples, up to `limit` bytes of images, so that a small data set is decoded once.

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
        size = example["image"].nbytes
        if size <= self._free and self._kept.setdefault(index, example) is example:  # several threads read
            self._free -= size
        return example
