"""Captioned images in tar shards (WebDataset), by index: nothing is extracted, no shard is read from its start."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sdjax.core.errors import UserError
from sdjax.data.images import image_size, read_image
from sdjax.data.sources.annotations import LABEL
from sdjax.data.sources.base import CAPTION, Example, Problem, captioned, captions_of, lacks, read_json, read_text
from sdjax.data.sources.rules import RowRules
from sdjax.data.sources.tar_index import CAPTIONS, CLASS, IMAGE_SUFFIXES, NO_LABEL, TarIndex, tar_index

logger = logging.getLogger("sdjax")


class WebDatasetSource:
    """The examples of tar shards, in the shards' order; `id` is SHARD/KEY, e.g. "00012/000120345".

    An example is an image (jpg, jpeg, png, webp), a caption, a txt, else a json with a key of `CAPTION_KEYS`, and a
    class, the number in a cls. About 50 bytes of memory are needed for each; each is read with two calls of pread.

    Attributes:
        classes: their numbers; () where there are none.
        problems: what is no example, or lacks what it needs.
    """

    def __init__(self, paths: Sequence[Path], rules: RowRules):
        """Indexes the shards, or reads their indices from the user's cache.

        Raises:
            UserError: there is nothing in them.
        """
        self._captioned = CAPTION in rules.needs
        with ThreadPoolExecutor() as pool:
            found = pool.map(functools.partial(_shard, rules), paths, names(paths))
            self._shards = list(tqdm(found, "indexing", len(paths), leave=False, disable=len(paths) < 8))
        self._ends = np.cumsum([len(shard.rows) for shard in self._shards])
        most = max(int(shard.index.labels.max(initial=NO_LABEL)) for shard in self._shards)
        self.classes = tuple(map(str, range(most + 1)))
        self.problems: Sequence[Problem] = [
            Problem(shard.place(member), f"{shard.place(member)} {reason}", before)
            for shard, before in zip(self._shards, [0, *self._ends.tolist()], strict=False)
            for member, reason in shard.problems
        ]
        if not len(self) and not self.problems:
            raise UserError(f"{paths[0]} holds no examples (an image in {', '.join(IMAGE_SUFFIXES)} and its caption)")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        shard, row = self._locate(index)
        place, (content, text) = self.place(index), _contents(shard, row, slice(0, 2))
        captions = _captions(text, bool(shard.index.is_json[row]), place) if self._captioned else ()
        label = int(shard.index.labels[row])
        classes: dict[str, Any] = {} if label == NO_LABEL else {LABEL: np.int32(label)}
        return {"image": read_image(content, place), "id": self.id(index), **captioned(captions), **classes}  # type: ignore[return-value]

    def id(self, index: int) -> str:
        """The shard's name and the key in it."""
        shard, row = self._locate(index)
        return f"{shard.name}/{shard.index.key(row)}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        (image,) = _contents(*self._locate(index), slice(0, 1))
        return image_size(image, self.place(index))

    def place(self, index: int) -> str:
        """The shard and the key in it."""
        shard, row = self._locate(index)
        return shard.place(shard.index.key(row))

    def _locate(self, index: int) -> tuple[TarShard, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard, int(shard.rows[index - int(self._ends[number - 1] if number else 0)])


class TarShard(NamedTuple):
    """A tar file.

    Attributes:
        name: in ids.
        rows: of the index, those that can be used.
        problems: (member, reason) of the others.
    """

    path: Path
    name: str
    index: TarIndex
    rows: Sequence[int] | np.ndarray
    problems: Sequence[tuple[str, str]]

    def place(self, member: str) -> str:
        """The file, and the member if it is not ""."""
        return f"{self.path} member {member}" if member else str(self.path)


def _shard(rules: RowRules, path: Path, name: str) -> TarShard:
    index = tar_index(path)
    for note in index.notes:
        logger.warning("%s: %s", path, note)
    lacks = {
        f"has no caption ({', '.join(CAPTIONS)})": (index.spans[:, 2] == 0) & (CAPTION in rules.needs),
        f"has no class ({CLASS})": (index.labels == NO_LABEL) & (LABEL in rules.needs),
    }
    missing = [(index.key(row), reason) for reason, found in lacks.items() for row in np.flatnonzero(found).tolist()]
    bad = np.any(list(lacks.values()), axis=0)
    rows = np.flatnonzero(~bad).astype(np.int32) if missing else range(len(bad))
    return TarShard(path, name, index, rows, [*index.problems, *missing])


def names(paths: Sequence[Path]) -> list[str]:
    """Names of the shards in ids: their file names without the suffix, or the whole paths where two agree."""
    stems = [path.name.split(".")[0] for path in paths]
    twice = max(Counter(stems).values()) > 1
    return [str(path) for path in paths] if twice else stems


def _captions(data: bytes, is_json: bool, place: str) -> tuple[str, ...]:
    if not is_json:
        return (read_text(data, f"{place}.txt"),)
    entry = read_json(data, f"{place}.json")
    if captions := captions_of(entry, f"{place}.json"):
        return captions
    raise UserError(f"{place}.json {lacks(entry, CAPTION)}")


def _contents(shard: TarShard, row: int, which: slice) -> list[bytes]:
    """The bytes of the image, of the caption, or of both."""
    spans = shard.index.spans[row].reshape(2, 2)[which].tolist()
    try:
        file = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            found = [os.pread(file, size, start) for start, size in spans]
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"cannot read {shard.place(shard.index.key(row))}: {error.strerror}") from error
    if [len(data) for data in found] != [size for _, size in spans]:
        raise UserError(f"{shard.path} was cut after it was indexed")
    return found
