"""The files of a prepared data set that describe it: what the writer and the reader both know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from sdjax.core.errors import UserError
from sdjax.core.files import write_bytes
from sdjax.data.sources.base import read_json
from sdjax.data.transforms.buckets import Size, Table

VERSION = 1
INDEX, PLAN, CONSTANTS = "index.json", "plan.json", "constants.safetensors"
MAX_SHARDS = 1_000_000


class PreparedPlan(NamedTuple):
    """The plan that all processes agree upon that write a set."""

    identity: Mapping[str, Any]
    table: Table
    total: int
    rows_per_shard: int

    @property
    def shards(self) -> int:
        """Number of files of rows."""
        return -(-self.total // self.rows_per_shard)

    def range(self, shard: int) -> tuple[int, int]:
        """The rows of a shard: the first, and the one after the last."""
        return shard * self.rows_per_shard, min(self.total, (shard + 1) * self.rows_per_shard)

    def to_json(self) -> dict[str, Any]:
        """Contents of `plan.json` and `index.json`."""
        return {"version": VERSION, **self._asdict(), "table": [list(size) for size in self.table]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreparedPlan:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: `data` is not from `to_json`.
        """
        table = tuple(Size(int(height), int(width)) for height, width in data["table"])
        plan = cls(dict(data["identity"]), table, int(data["total"]), int(data["rows_per_shard"]))
        if plan.total < 1 or plan.rows_per_shard < 1 or plan.shards > MAX_SHARDS:
            raise ValueError(f"{plan.total} rows in shards of {plan.rows_per_shard}")
        return plan


class Fields(dict[str, tuple[str, tuple[int, ...]]]):
    """Type and shape of each array of a row, by name; two are equal when all of these are."""

    @classmethod
    def of(cls, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> Fields:
        """Those of arrays."""
        return cls({name: (array.dtype.name, array.shape) for name, array in arrays.items()})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fields:
        """The inverse of `to_json`."""
        return cls({name: (str(dtype), tuple(map(int, shape))) for name, (dtype, shape) in data.items()})

    def to_json(self) -> dict[str, Any]:
        """Lists of type and shape, by name."""
        return {name: [dtype, list(shape)] for name, (dtype, shape) in sorted(self.items())}

    def __str__(self) -> str:
        return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in sorted(self.items())) or "nothing"


class Sidecar(NamedTuple):
    """Sidecar of a file of rows."""

    size: int
    """Bytes of the file."""
    buckets: list[int]
    ids: list[str]
    fields: dict[int, Fields]
    """Of each bucket that has rows here."""

    def to_json(self) -> dict[str, Any]:
        """Contents of the file."""
        return {**self._asdict(), "fields": {bucket: fields.to_json() for bucket, fields in self.fields.items()}}


def shard_name(shard: int, shards: int) -> str:
    """Without the suffix."""
    return f"shard-{shard:05d}-of-{shards:05d}"


def read_sidecar(folder: Path, plan: PreparedPlan, shard: int) -> Sidecar:
    """The list beside a file of rows.

    Raises:
        UserError: it is missing, or it is not one of this plan's.
    """
    path = folder / f"{shard_name(shard, plan.shards)}.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data again")
    data = read_json(path.read_bytes(), str(path))
    start, stop = plan.range(shard)
    try:
        fields = {int(bucket): Fields.from_json(fields) for bucket, fields in data["fields"].items()}
        found = Sidecar(int(data["size"]), [int(bucket) for bucket in data["buckets"]], list(data["ids"]), fields)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error
    whole = len(found.buckets) == len(found.ids) == stop - start and all(isinstance(key, str) for key in found.ids)
    if not whole or not set(found.buckets) <= set(fields) or not all(0 <= b < len(plan.table) for b in fields):
        raise UserError(f"{path} does not describe the {stop - start} rows that belong there: prepare the data again")
    return found


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a file that is there whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_bytes(path, json.dumps(data).encode())
