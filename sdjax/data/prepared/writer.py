"""Writing of prepared data, by one process or several, in shards that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from sdjax.core.errors import UserError
from sdjax.core.files import cannot_write, write_bytes
from sdjax.data.loader import Shard
from sdjax.data.prepared.index import (
    CONSTANTS,
    INDEX,
    MAX_SHARDS,
    PLAN,
    Fields,
    PreparedPlan,
    Sidecar,
    read_sidecar,
    shard_name,
    write_json,
)
from sdjax.data.sources.base import read_json
from sdjax.data.sources.record_files import count_records, write_records
from sdjax.data.sources.tensors import pack
from sdjax.data.transforms.buckets import Table


class PreparedRow(NamedTuple):
    """A row to be written: its bucket, an index into the table, the id of its example, and its arrays."""

    bucket: int
    id: str
    arrays: Mapping[str, Shaped[np.ndarray, "..."]]


class Range(NamedTuple):
    """Rows `start` to `stop` - 1 of the source, which one file holds."""

    shard: int
    start: int
    stop: int


class PreparedWriter:
    """Writes the folder that `prepared.PreparedSource` reads.

    for part in writer.pending():
        writer.write(part, (PreparedRow(...) for index in range(part.start, part.stop)))
    writer.finish(constants)  # in process 0, after all processes are here

    Shards are dealt to the processes in turn. A writer that was killed leaves only whole shards; the next one, of any
    number of processes, writes what is missing.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        buckets: Table,
        total: int,
        rows_per_shard: int = 1024,
        shard: Shard = Shard(),  # noqa: B008  (an immutable tuple)
    ):
        """Makes the folder, or goes on in it.

        Args:
            folder: where the set shall be.
            identity: what the rows depend on, as JSON: the source, the fingerprint of the autoencoder, sizes ...
            buckets: the sizes of images.
            total: rows of all processes together.
            rows_per_shard: how much is lost at most when a writer is killed.
            shard: this process among all.

        Raises:
            UserError: the folder holds a set of another identity, table or number of rows, or cannot be written.
        """
        plan = PreparedPlan(json.loads(json.dumps(dict(identity))), tuple(buckets), total, rows_per_shard)
        if total < 1 or rows_per_shard < 1 or plan.shards > MAX_SHARDS:
            raise UserError(f"{total} rows in shards of {rows_per_shard}: there must be 1 to {MAX_SHARDS} shards")
        self._folder, self._plan, self._process = Path(folder).expanduser(), plan, shard
        _agree(self._folder, plan)

    def pending(self) -> Iterator[Range]:
        """This process's shards that are not whole yet, one after the other."""
        for shard in range(self._process.index, self._plan.shards, self._process.count):
            if not self._whole(shard):
                yield Range(shard, *self._plan.range(shard))

    def write(self, part: Range, rows: Iterable[PreparedRow]) -> None:
        """Writes a shard; it appears under its name when all rows are in it.

        Args:
            part: one of `pending`.
            rows: as many as the range has, in the source's order.

        Raises:
            UserError: it cannot be written.
            ValueError: the rows are too few or too many, of a bucket that the table lacks, or not alike in a bucket.
        """
        buckets, ids, fields = [], [], {}

        def records() -> Iterator[bytes]:
            for row in rows:
                self._check(row, fields)
                buckets.append(int(row.bucket))
                ids.append(str(row.id))
                yield pack(row.arrays)
            if len(ids) != part.stop - part.start:
                raise ValueError(f"shard {part.shard} needs {part.stop - part.start} rows, not {len(ids)}")

        path = self._path(part.shard)
        # What is left of a damaged shard goes first, so that a new file never stands beside an old list.
        for old in (path, self._sidecar(part.shard)):
            old.unlink(missing_ok=True)
        write_records(path, records())
        write_json(self._sidecar(part.shard), Sidecar(path.stat().st_size, buckets, ids, fields).to_json())

    def finish(self, constants: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
        """Writes the arrays of the whole set, and last the index, with which the folder can be read.

        Other processes than the first do nothing.

        Raises:
            UserError: shards are missing, or their rows are not alike.
        """
        if self._process.index:
            return
        missing = [shard for shard in range(self._plan.shards) if not self._whole(shard)]
        if missing:
            raise UserError(
                f"{len(missing)} of {self._plan.shards} shards of {self._folder} are missing, e.g. {missing[0]}"
            )
        fields: dict[int, Fields] = {}
        for shard in range(self._plan.shards):
            for bucket, found in read_sidecar(self._folder, self._plan, shard).fields.items():
                if fields.setdefault(bucket, found) != found:
                    raise UserError(f"{self._path(shard)} holds {found}, and an earlier shard {fields[bucket]}")
        write_bytes(self._folder / CONSTANTS, pack(constants))
        described = {str(bucket): found.to_json() for bucket, found in sorted(fields.items())}
        write_json(
            self._folder / INDEX,
            {**self._plan.to_json(), "fields": described, "constants": Fields.of(constants).to_json()},
        )
        for left in self._folder.glob("*.partial"):  # by writers that were killed
            left.unlink(missing_ok=True)

    def _whole(self, shard: int) -> bool:
        path = self._path(shard)
        if not path.is_file():
            return False
        try:
            size = read_sidecar(self._folder, self._plan, shard).size
            start, stop = self._plan.range(shard)
            return path.stat().st_size == size and count_records(path) == stop - start
        except UserError:  # what is damaged is written again
            return False

    def _check(self, row: PreparedRow, fields: dict[int, Fields]) -> None:
        if not 0 <= row.bucket < len(self._plan.table):
            raise ValueError(f"{row.id} is of bucket {row.bucket}, and the table has {len(self._plan.table)}")
        found = Fields.of(row.arrays)
        if fields.setdefault(int(row.bucket), found) != found:
            raise ValueError(f"{row.id} holds {found}, and an earlier row of its bucket {fields[row.bucket]}")

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard_name(shard, self._plan.shards)}.array_record"

    def _sidecar(self, shard: int) -> Path:
        return self._folder / f"{shard_name(shard, self._plan.shards)}.json"


def _agree(folder: Path, plan: PreparedPlan) -> None:
    """Writes the plan, or compares it with the one that is there."""
    path, ours = folder / PLAN, json.loads(json.dumps(plan.to_json()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_json(path, ours)
        theirs = read_json(path.read_bytes(), str(path))
    except OSError as error:
        raise cannot_write(folder, error) from error
    if theirs != ours:
        name, was, now = next(_differences(theirs, ours))
        raise UserError(f"{folder} was begun with {name} {was}, and this run has {now}: choose another folder")


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*theirs, *ours}):
        was, now = theirs.get(name), ours.get(name)
        if was != now and isinstance(was, dict) and isinstance(now, dict):
            yield from ((f"{name}.{inner}", *values) for inner, *values in _differences(was, now))
        elif was != now:
            yield name, was, now
