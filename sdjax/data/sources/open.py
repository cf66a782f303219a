"""Captioned images by index, by the name that a config gives them; and sources that are made of others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from sdjax.core.errors import UserError, unknown
from sdjax.data.sources import openmoji, openmoji_parts
from sdjax.data.sources.array_records import ArrayRecordSource
from sdjax.data.sources.base import CONDITIONING_IMAGE, Example, Rows, Source, captioned
from sdjax.data.sources.folder import listed_images, plain_images
from sdjax.data.sources.recoloured import RecolouredSource
from sdjax.data.sources.rules import ANY, CAPTIONED, RowRules, UsableRows
from sdjax.data.sources.shard_globs import files, split_pattern
from sdjax.data.sources.tfds import TfdsSource, tfds_builder
from sdjax.data.sources.webdataset import WebDatasetSource

DataDir = str | os.PathLike | None


class SourceKind(NamedTuple):
    """A form of names of data sets: KIND or KIND:REST.

    Attributes:
        rest: what stands after the colon; "" where there is none.
        open: (rest, split, folder of TensorFlow datasets, rules) -> the data set.
        rules: where none are given.
    """

    rest: str
    open: Callable[[str, str, DataDir, RowRules], Rows]
    rules: RowRules = CAPTIONED


KINDS: dict[str, SourceKind] = {
    "openmoji": SourceKind("", lambda _, split, at, rules: openmoji_parts.GroupedSource(openmoji.prepared(at), split)),
    "openmoji_regions": SourceKind(
        "", lambda _, split, at, rules: openmoji_parts.RegionSource(openmoji.prepared(at), split)
    ),
    "openmoji_lines": SourceKind(
        "", lambda _, split, at, rules: openmoji_parts.LineSource(openmoji.prepared(at), split)
    ),
    "openmoji_scenes": SourceKind("", lambda _, split, at, rules: openmoji_parts.SceneSource(split)),
    "openmoji_recoloured": SourceKind("ORDER", lambda order, split, at, rules: RecolouredSource(order, split)),
    "tfds": SourceKind("NAME", lambda name, split, at, rules: TfdsSource(tfds_builder(name, at), split, rules)),
    "folder": SourceKind("PATH", lambda path, split, at, rules: listed_images(_path(path), split, rules)),
    "pictures": SourceKind("PATH", lambda path, split, at, rules: plain_images(_path(path), rules), ANY),
    "webdataset": SourceKind(
        "PATTERN", lambda pattern, split, at, rules: WebDatasetSource(files(split_pattern(pattern, split)), rules)
    ),
    "array_record": SourceKind(
        "PATTERN", lambda pattern, split, at, rules: ArrayRecordSource(files(split_pattern(pattern, split)), rules)
    ),
}
SUFFIXES = {".tar": "webdataset", ".array_record": "array_record"}


def open_rows(name: str, split: str = "train", data_dir: DataDir = None, rules: RowRules | None = None) -> Rows:
    """The data set called `name` as its files list it, prepared on first use; bad rows are in its `problems`.

    Args:
        name: `openmoji` (splits `train`, `held_out`), with the groups of emoji as classes; `openmoji_regions`, with
            label maps; `openmoji_lines`, with conditioning images; `openmoji_scenes`, with boxes;
            `openmoji_recoloured:brg`, drawings with their channels in this order (`recoloured.RecolouredSource`);
            `tfds:NAME`, e.g. `tfds:oxford_flowers102`; `folder:PATH`, images and a list of them with captions
            (`listings.LISTINGS`), in PATH/split or in PATH, or without a list captions in files beside them
            (`image_files`); `pictures:PATH`, all images below a folder, without captions, whose only split is `train`;
            `webdataset:PATTERN`, tar shards as img2dataset writes them; `array_record:PATTERN`, what
            `array_records.write_array_record` writes. A PATTERN is what `shard_globs.files` understands, e.g.
            `shards/{000..127}.tar`; `{split}` in it stands for the split, and without it there is but `train`.
        split: a split's name; for TensorFlow datasets anything their slicing knows (`train[:10]`, `a+b`, `all`).
        data_dir: where TensorFlow datasets are kept; default `openmoji.default_data_dir()`.
        rules: what is read of a row, and what it must have; default a caption, of all but `pictures:PATH`.

    Raises:
        UserError: there is no such data, split or folder.
    """
    kind, rest = _kind(name)
    return kind.open(rest, split, data_dir, rules or kind.rules)


def source(name: str, split: str = "train", data_dir: DataDir = None, rules: RowRules | None = None) -> UsableRows:
    """The rows of a data set that a run can use; arguments and errors as of `open_rows`.

    Raises:
        UserError: a row is bad and shall stop the run, or none is good.
    """
    return UsableRows(open_rows(name, split, data_dir, rules), rules or default_rules(name), name)


def default_rules(name: str) -> RowRules:
    """The rules for a data set where a run has none."""
    return _kind(name)[0].rules


def _kind(name: str) -> tuple[SourceKind, str]:
    kind, colon, rest = name.partition(":")
    if kind not in KINDS or bool(KINDS[kind].rest) != bool(rest) or (colon and not rest):
        raise _unknown(name)
    return KINDS[kind], rest


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _unknown(name: str) -> UserError:
    """An error for a name that is no data set's, with the one that was probably meant."""
    path = _path(name)
    choices = (f"{kind}:{form.rest}" if form.rest else kind for kind, form in KINDS.items())
    error = unknown("data source", name, choices, "config.data.source")
    meant = f"folder:{name}, or pictures:{name} for images without captions" if name and path.is_dir() else ""
    if path.suffix in SUFFIXES:
        meant = f"{SUFFIXES[path.suffix]}:{name}"
    return UserError(f"{error}; did you mean {meant}?") if meant else error


class PromptedRows:
    """The rows of a data set, each with the same captions in place of its own."""

    def __init__(self, rows: UsableRows, captions: Sequence[str]):
        """Wraps rows that need no caption of their own."""
        self._rows, self._captions, self.classes = rows, captions, rows.classes
        self.id, self.size = rows.id, rows.size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return {**self._rows[index], **captioned(self._captions)}  # type: ignore[typeddict-item]


class RepeatedSource:
    """A source several times over, for batches larger than a handful of images."""

    def __init__(self, rows: Source, times: int):
        """Wraps rows that are read anew each time."""
        self._rows, self._times = rows, times

    def __len__(self) -> int:
        return len(self._rows) * self._times

    def __getitem__(self, index: int) -> Any:
        return self._rows[index % len(self._rows)]


class PairedSource:
    """Rows of two sources side by side, as many as the longer one has; the other's come again."""

    def __init__(self, first: Source, second: Source, prefix: str):
        """Wraps them; the names of the second one's entries get the prefix."""
        self._first, self._second, self._prefix = first, second, prefix

    def __len__(self) -> int:
        return max(len(self._first), len(self._second))

    def __getitem__(self, index: int) -> Any:
        second = self._second[index % len(self._second)]
        named = {f"{self._prefix}{name}": value for name, value in second.items()}
        return {**self._first[index % len(self._first)], **named}


class ArraySource:
    """Rows of arrays that are in memory already, e.g. cached latents and tokens."""

    def __init__(self, arrays: Mapping[str, Shaped[np.ndarray, "n ..."] | Sequence[Shaped[np.ndarray, "..."]]]):
        """Wraps arrays, or lists of arrays, of one length.

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
        size = sum(example[name].nbytes for name in ("image", CONDITIONING_IMAGE) if name in example)
        if size <= self._free and self._kept.setdefault(index, example) is example:  # several threads read
            self._free -= size
        return example
