"""Captioned images in tar shards (WebDataset), by index: nothing is extracted, no shard is read from its start."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdjax.core.errors import UserError
from sdjax.data.images import image_size, read_image
from sdjax.data.sources.base import CAPTION_KEYS, DatasetRow, Example, bad_row, caption_of, read_json
from sdjax.data.sources.shard_globs import named
from sdjax.data.sources.tar_index import IMAGE_SUFFIXES, TarIndex, tar_index


class WebDatasetSource:
    """The examples of tar shards, in the shards' order; `id` is SHARD/KEY, e.g. "00012/000120345".

    An example is an image (jpg, jpeg, png, webp) and a caption: a txt, else a json with `text` or `caption`. About 50
    bytes of memory are needed for each; each is read with two calls of pread.
    """

    def __init__(self, paths: Sequence[Path]):
        """Indexes the shards, or reads their indices from the user's cache.

        Raises:
            UserError: a shard is missing or damaged, or an example lacks its image or its caption.
        """
        self._paths = list(paths)
        with ThreadPoolExecutor() as pool:
            found = pool.map(tar_index, self._paths)
            self._indices = list(tqdm(found, "indexing", len(self._paths), leave=False, disable=len(self._paths) < 8))
        self._refuse_problems()
        self._ends = np.cumsum([len(index.is_json) for index in self._indices])
        if not len(self):
            raise UserError(f"{paths[0]} holds no examples (an image in {', '.join(IMAGE_SUFFIXES)} and its caption)")
        self._names = names(self._paths)

    def _refuse_problems(self) -> None:
        count = sum(len(index.problems) for index in self._indices)
        for path, index in zip(self._paths, self._indices, strict=True):
            for member, reason in index.problems:
                others = f" (and {count - 1} more; a check of the data names all)" if count > 1 else ""
                raise UserError(f"{_place(path, member)} {reason}{others}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        shard, row = self._locate(index)
        path = self._paths[shard]
        return _read(path, self._indices[shard], row, self._names[shard])

    def id(self, index: int) -> str:
        """The shard's name and the key in it."""
        shard, row = self._locate(index)
        return f"{self._names[shard]}/{self._indices[shard].key(row)}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        shard, row = self._locate(index)
        path, found = self._paths[shard], self._indices[shard]
        (image,) = _contents(path, found, row, slice(0, 1))
        return image_size(image, _place(path, found.key(row)))

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard - 1] if shard else 0)


def rows(pattern: str) -> Iterator[DatasetRow]:
    """Every example of the shards, good or bad."""
    paths = named(pattern)
    for path, name in zip(paths, names(paths), strict=True):
        try:
            index = tar_index(path)
        except UserError as error:
            yield bad_row(str(path), str(error))
            continue
        for member, reason in index.problems:
            yield bad_row(_place(path, member), reason)
        for row in range(len(index.is_json)):
            yield DatasetRow(_place(path, index.key(row)), _reader(path, index, row, name))


def names(paths: list[Path]) -> list[str]:
    """Names of the shards in ids: their file names without the suffix, or the whole paths where two agree."""
    stems = [path.name.split(".")[0] for path in paths]
    twice = max(Counter(stems).values()) > 1
    return [str(path) for path in paths] if twice else stems


def _read(path: Path, index: TarIndex, row: int, name: str) -> Example:
    key = index.key(row)
    place = _place(path, key)
    content, caption = _contents(path, index, row, slice(0, 2))
    image = read_image(content, place)
    return Example(image=image, caption=_caption(caption, bool(index.is_json[row]), place), id=f"{name}/{key}")


def _caption(data: bytes, is_json: bool, place: str) -> str:
    if is_json:
        caption = caption_of(read_json(data, f"{place}.json"))
        if caption is None:
            raise UserError(f"{place}.json needs the string {' or '.join(CAPTION_KEYS)}")
        return caption
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}.txt is not UTF-8: {error}") from error


def _contents(path: Path, index: TarIndex, row: int, which: slice) -> list[bytes]:
    """The bytes of the image, of the caption, or of both."""
    spans = index.spans[row].reshape(2, 2)[which].tolist()
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            found = [os.pread(file, size, start) for start, size in spans]
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"cannot read {_place(path, index.key(row))}: {error.strerror}") from error
    if [len(data) for data in found] != [size for _, size in spans]:
        raise UserError(f"{path} was cut after it was indexed")
    return found


def _reader(path: Path, index: TarIndex, row: int, name: str) -> Callable[[], Example]:
    return lambda: _read(path, index, row, name)


def _place(path: Path, member: str) -> str:
    return f"{path} member {member}" if member else str(path)
