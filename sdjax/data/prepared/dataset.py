"""Latents and text embeddings that were computed once, as a folder that training reads by index.

`index.json` describes the set; `shard-00012-of-00345.array_record` holds the rows of one contiguous range of the
source, each a safetensors dictionary of arrays, and the `.json` beside it their buckets and ids; what belongs to the
whole set, such as the embedding of the empty caption, is in `constants.safetensors`. `prepared_writer` writes it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Shaped

from sdjax.core.errors import UserError
from sdjax.data.prepared.index import CONSTANTS, INDEX, VERSION, Fields, PreparedPlan, read_sidecar, shard_name
from sdjax.data.sources.base import read_json
from sdjax.data.sources.record_files import RecordFiles, count_records
from sdjax.data.sources.tensors import unpack
from sdjax.data.transforms.buckets import Table


class PreparedSource:
    """The rows of a prepared folder, each a dictionary of arrays, in the source's order.

    Four bytes a row are kept in memory.
    """

    problems = ()

    def __init__(self, folder: str | Path):
        """Reads the index and the shards' lists; the shards are opened when they are read.

        Raises:
            UserError: the folder is not whole, or a file is truncated or is not what the index says.
        """
        self._folder = Path(folder).expanduser()
        index = _read_index(self._folder)
        self._plan, self._fields = _plan(index, self._folder), _fields(index, self._folder)
        self._sidecar = functools.lru_cache(maxsize=4)(functools.partial(read_sidecar, self._folder, self._plan))
        self._buckets = np.concatenate([self._checked(shard) for shard in range(self._plan.shards)])
        if not set(np.unique(self._buckets).tolist()) <= set(self._fields):
            raise UserError(
                f"{self._folder / INDEX} does not describe all buckets that have rows: prepare the data again"
            )
        ranges = [self._plan.range(shard) for shard in range(self._plan.shards)]
        self._paths = [self._path(shard) for shard in range(self._plan.shards)]
        self._records = RecordFiles(self._paths, [stop - start for start, stop in ranges])
        self._opened: set[int] = set()
        self.constants = _read_constants(self._folder, index)

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard_name(shard, self._plan.shards)}.array_record"

    def _checked(self, shard: int) -> Int32[np.ndarray, " rows"]:
        """The buckets of a shard's rows, when its file has the size that was written."""
        found = read_sidecar(self._folder, self._plan, shard)
        path = self._path(shard)
        size = path.stat().st_size if path.is_file() else None
        if size != found.size:
            raise UserError(f"{path} has {size or 'no'} bytes, and {found.size} were written: prepare the data again")
        return np.array(found.buckets, np.int32)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Shaped[np.ndarray, "..."]]:
        self._open(index)
        place = self._records.place(index)
        row = unpack(self._records[index], place)
        wanted = self._fields[int(self._buckets[index])]
        found = Fields.of(row)
        if found != wanted:
            raise UserError(f"{place} holds {found}, and {self._folder / INDEX} says {wanted}")
        for name, values in row.items():
            if values.dtype.kind not in "iub" and not np.isfinite(values.astype(np.float32)).all():
                raise UserError(f"{place}: the {name} are not all finite; prepare the data again")
        return row

    def _open(self, index: int) -> None:
        """The library itself would read another number of records without a word."""
        shard, _ = self._records.locate(index)
        if shard not in self._opened:
            start, stop = self._plan.range(shard)
            if count_records(self._paths[shard]) != stop - start:
                raise UserError(f"{self._paths[shard]} has not the {stop - start} rows that were written")
            self._opened.add(shard)

    def place(self, index: int) -> str:
        """The shard and the record's number in it."""
        return self._records.place(index)

    def id(self, index: int) -> str:
        """The id of the example that a row was made of."""
        shard, row = self._records.locate(index)
        return self._sidecar(shard).ids[row]

    @property
    def buckets(self) -> Int32[np.ndarray, " n"]:
        """The bucket of each row, an index into `table`."""
        return self._buckets

    @property
    def table(self) -> Table:
        """The buckets' sizes, in pixels of the images."""
        return self._plan.table

    @property
    def identity(self) -> Mapping[str, Any]:
        """The writer's record of where the rows come from."""
        return self._plan.identity

    @property
    def fields(self) -> Mapping[int, Fields]:
        """Shape and type of each array of a row, for each bucket that has rows."""
        return self._fields

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sidecar"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sidecar = functools.lru_cache(maxsize=4)(functools.partial(read_sidecar, self._folder, self._plan))


def _read_index(folder: Path) -> Mapping[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        reason = "its preparation has not finished" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder} is no prepared data set: {reason} ({INDEX} is missing)")
    index = read_json(path.read_bytes(), str(path))
    if index.get("version") != VERSION:
        raise UserError(f"{path} has version {index.get('version')!r}; this program reads {VERSION}")
    return index


def _plan(index: Mapping[str, Any], folder: Path) -> PreparedPlan:
    try:
        return PreparedPlan.from_json(index)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder / INDEX} is damaged: {error!r}") from error


def _fields(index: Mapping[str, Any], folder: Path) -> dict[int, Fields]:
    try:
        return {int(bucket): Fields.from_json(fields) for bucket, fields in index["fields"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{folder / INDEX} is damaged: {error!r}") from error


def _read_constants(folder: Path, index: Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, "..."]]:
    path = folder / CONSTANTS
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data again")
    constants = unpack(path.read_bytes(), str(path))
    if Fields.of(constants).to_json() != index.get("constants"):
        raise UserError(f"{path} holds {Fields.of(constants)}, which is not what {folder / INDEX} says")
    return constants
