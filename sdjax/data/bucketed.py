"""Endless batches, each of one bucket, so that a training step is compiled for a fixed set of shapes.

The rows of a bucket are an endless stream, one permutation after another, and each batch of the bucket takes the next
rows of it. Nothing is ever left out: rows that do not fill a batch at the end of an epoch begin the bucket's first
batch of the next, so any `n` consecutive rows of a bucket of `n`, counted from the beginning, are all of it once.
Epoch `e` holds floor((e + 1) n / batch) - floor(e n / batch) batches of each bucket, in a shuffled order of its own.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from sdjax.core.errors import UserError
from sdjax.data.loader import KEY, Loader, Prefetch, Shard, Transform, rows_of_each, transformed
from sdjax.data.sources.base import Source


def bucketed(
    source: Source,
    buckets: Int[np.ndarray, " n"],
    batch_size: int,
    seed: int,
    transforms: Sequence[Transform] = (),
    shard: Shard = Shard(),  # noqa: B008  (an immutable tuple)
    reading: Prefetch = Prefetch(),  # noqa: B008
) -> Loader:
    """Endless shuffled batches of `source`, each of rows of one bucket; else as `loader.loader`.

    Global batch i is a pure function of (source, buckets, batch_size, seed, i).

    Args:
        source: anything with a length and dictionaries by index.
        buckets: of each row; those of a negative bucket are never read.
        batch_size: rows in a batch of all processes together; each gets its `shard.index`-th part of them.
        seed: of the order, a new one each epoch, and of the random transforms.
        transforms: applied to each example in turn; afterwards the rows of a bucket must have one shape.
        shard: this process among all.
        reading: threads and worker processes.

    Raises:
        UserError: the processes do not divide the batch, or a bucket has rows, but fewer than a batch.
    """
    if len(buckets) != len(source):
        raise ValueError(f"{len(source)} rows have {len(buckets)} buckets")
    rows, order = rows_of_each(batch_size, shard), Order(np.asarray(buckets), batch_size, seed)
    # Grain gives a map with index the index before it was repeated, which is the place in the endless order.
    examples = grain.MapDataset.range(1).seed(seed).repeat()
    examples = transformed(examples.map_with_index(_Read(source, order)), transforms)
    identity = {"examples": len(source), "batch_size": batch_size, "seed": seed, "buckets": order.digest}
    return Loader(examples.batch(rows, drop_remainder=True), shard, reading, identity)


class _Read(grain.transforms.MapWithIndex):
    """The example at a place in the order."""

    def __init__(self, source: Source, order: Order):
        self._source, self._order = source, order

    def map_with_index(self, index: int, element: Any) -> Any:
        return self._source[self._order.row(index)]


class Batch(NamedTuple):
    """A batch of the order: its bucket, among those that have rows, and its first row in that bucket's stream."""

    bucket: int
    start: int


class BatchOrder(NamedTuple):
    """The batches of an epoch, in order: the bucket of each, and how many of that bucket the epoch has before it."""

    buckets: Int[np.ndarray, " batches"]
    ranks: Int[np.ndarray, " batches"]


class Order:
    """Order of the source's rows, without end."""

    def __init__(self, buckets: Int[np.ndarray, " n"], batch_size: int, seed: int):
        """Eight bytes a row are kept: the rows sorted by bucket.

        Raises:
            UserError: a bucket has rows, but fewer than a batch; all such buckets are named.
        """
        self._batch, self._seed = batch_size, seed
        used = np.flatnonzero(buckets >= 0)
        if not len(used):
            raise UserError("no row of the data set is in a bucket")
        self.digest = zlib.crc32(np.ascontiguousarray(buckets, np.int64).data.cast("B"))
        self.names, self._counts = np.unique(buckets[used], return_counts=True)
        _refuse_small(self.names, self._counts, batch_size)
        self._rows = used[np.argsort(buckets[used], kind="stable")]
        self._starts = np.cumsum(self._counts) - self._counts
        # Grain's shuffle of a range is a permutation that needs no memory, another one in each epoch.
        self._streams = [
            grain.MapDataset.range(int(count)).shuffle(seed=self._derived(bucket)).repeat()
            for bucket, count in enumerate(self._counts)
        ]

    def row(self, place: int) -> int:
        """The source's index of the row at a place, batch after batch."""
        batch, offset = divmod(place, self._batch)
        bucket, start = self.batch(batch)
        return int(self._rows[self._starts[bucket] + self._streams[bucket][start + offset]])

    def batch(self, index: int) -> Batch:
        """Rows of global batch `index`."""
        epoch = self._epoch(index)
        first = self._passed(epoch)
        schedule, position = self._schedule(epoch), index - int(first.sum())
        bucket = int(schedule.buckets[position])
        return Batch(bucket, (int(first[bucket]) + int(schedule.ranks[position])) * self._batch)

    @functools.cached_property
    def _schedule(self) -> Callable[[int], BatchOrder]:
        return functools.lru_cache(maxsize=2)(self._scheduled)

    def _scheduled(self, epoch: int) -> BatchOrder:
        sizes = self._passed(epoch + 1) - self._passed(epoch)
        # Bit generators promise their numbers for ever; NumPy's shuffles do not.
        keys = np.random.Philox(self._derived(-1, epoch)).random_raw(int(sizes.sum()))
        buckets = np.repeat(np.arange(len(sizes)), sizes)[np.argsort(keys, kind="stable")]
        ranks = np.empty_like(buckets)
        ranks[np.argsort(buckets, kind="stable")] = np.concatenate([np.arange(size) for size in sizes])
        return BatchOrder(buckets, ranks)

    def _passed(self, epoch: int) -> Int[np.ndarray, " buckets"]:
        """Batches of each bucket before an epoch."""
        return epoch * self._counts // self._batch

    def _epoch(self, index: int) -> int:
        # The batches before epoch e are e rows / batch at most, and less than one a bucket fewer.
        epoch = index * self._batch // len(self._rows)
        while self._passed(epoch + 1).sum() <= index:
            epoch += 1
        return epoch

    def _derived(self, *path: int) -> int:
        """A seed of its own for each stream and epoch, 32 bits."""
        entropy = (self._seed, *(part + 1 for part in path))
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_schedule"}


def _refuse_small(names: Int[np.ndarray, " buckets"], counts: Int[np.ndarray, " buckets"], batch_size: int) -> None:
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < batch_size]
    if small:
        raise UserError(
            f"{KEY}={batch_size} is more than the rows of bucket {', '.join(small)}; choose a smaller one, "
            "prepare the data with fewer buckets, or leave such rows out"
        )
