"""Batches for ever: shuffled anew each epoch, prefetched, split between processes, and resumable at any step.

Global batch i is a pure function of (source, seed, i): neither the number of processes nor that of threads enters it.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
from absl import flags

from sdjax.core.errors import UserError
from sdjax.data.sources.base import Source

KEY = "config.train.batch_size"
Transform = grain.transforms.Map | grain.transforms.RandomMap

KILLED = re.compile(r"[Ww]orker process was terminated unexpectedly with exit code (-?\d+)")
"""Grain's words, in an error that has no type of its own."""
FEWER = "choose fewer config.data.workers or config.data.threads"

logger = logging.getLogger("sdjax")


class Shard(NamedTuple):
    """This process's share of the rows: its index among `count` processes."""

    index: int = 0
    count: int = 1


class Prefetch(NamedTuple):
    """Prefetching: each batch is made by one thread, of this process or, where there are any, of a worker."""

    threads: int = 1
    ahead: int = 2
    workers: int = 0


class Loader(Iterator[dict[str, Any]]):
    """An endless iterator over this process's rows of the batches; made by `loader`."""

    def __init__(self, batches: grain.MapDataset, shard: Shard, reading: Prefetch, identity: dict[str, int]):
        """Starts at step 0. `batches` are those of all processes, in turn."""
        self._batches, self._shard, self._reading, self._identity = batches, shard, reading, identity
        self._restarted = -1
        self._start(0)

    @property
    def step(self) -> int:
        """Batches taken since the beginning of the run."""
        return self._step

    def __next__(self) -> dict[str, Any]:
        """The next batch. Where a worker was killed all are started anew, once a batch: no batch depends on them.

        Raises:
            UserError: an example cannot be read, memory is short, or workers are killed again and again.
        """
        try:
            batch = next(self._iterator)
        except MemoryError as error:
            raise UserError(f"batch {self._step + 1}: not enough memory to read data; {FEWER}") from error
        except RuntimeError as error:
            if not (killed := KILLED.search(str(error))):
                raise
            reason = f"batch {self._step + 1}: a worker that reads data ended with exit code {killed[1]}"
            if self._step == self._restarted:
                raise UserError(f"{reason}, as one did before; if memory is short, {FEWER}") from error
            logger.warning("%s; its work is done again", reason)
            self._restarted = self._step
            self._iterator.close()
            self._start(self._step)
            return next(self)
        self._step += 1
        return batch

    def get_state(self) -> bytes:
        """The position as JSON. It is the same in every process, and holds for any number of processes."""
        return json.dumps({"step": self._step, **self._identity}).encode()

    def set_state(self, state: bytes) -> None:
        """Goes to where `get_state` was called: the next batch is the one that came next then.

        Raises:
            UserError: the state is that of another data set, batch size or seed.
        """
        saved = json.loads(state)
        step = saved.pop("step")
        if saved != self._identity:
            raise UserError(f"the saved data position is for {saved}, and this run has {self._identity}")
        self._start(step)

    def _start(self, step: int) -> None:
        threads, ahead, workers = self._reading
        first = step * self._shard.count + self._shard.index
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        batches = self._batches[first :: self._shard.count].to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, which are not on this command line
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
            batches = batches.mp_prefetch(options, worker_init_fn=_follow_parent)
        self._step, self._iterator = step, iter(batches)


def loader(
    source: Source,
    batch_size: int,
    seed: int,
    transforms: Sequence[Transform] = (),
    shard: Shard = Shard(),  # noqa: B008  (an immutable tuple)
    reading: Prefetch = Prefetch(),  # noqa: B008
) -> Loader:
    """Endless shuffled batches of `source`.

    Args:
        source: anything with a length and dictionaries by index.
        batch_size: rows in a batch of all processes together; each gets its `shard.index`-th part of them.
        seed: of the order, a new one each epoch, and of the random transforms.
        transforms: applied to each example in turn.
        shard: this process among all.
        reading: threads and worker processes.

    Raises:
        UserError: the processes do not divide the batch, or the batch is larger than the data.
    """
    rows = rows_of_each(batch_size, shard)
    if batch_size > len(source):
        raise UserError(f"{KEY}={batch_size} is more than the {len(source)} examples of the data set")
    # Grain's own order of things: repeating after the shuffle makes each epoch a permutation of its own.
    examples = transformed(grain.MapDataset.source(source).seed(seed).shuffle().repeat(), transforms)
    identity = {"examples": len(source), "batch_size": batch_size, "seed": seed}
    return Loader(examples.batch(rows, drop_remainder=True), shard, reading, identity)


def _follow_parent(index: int, count: int) -> None:
    """Let a worker end when the training process does, and no sooner.

    Schedulers signal every process, but only the training process may decide when loading stops; and one that was
    killed cannot tell its workers.
    """
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()  # the kernel closes a pipe
        os._exit(1)


def rows_of_each(batch_size: int, shard: Shard) -> int:
    """Rows of a batch for each process.

    Raises:
        UserError: the processes do not divide the batch.
    """
    rows, rest = divmod(batch_size, shard.count)
    if rest or rows < 1:
        raise UserError(f"{KEY}={batch_size} cannot be divided between {shard.count} processes")
    return rows


def transformed(examples: grain.MapDataset, transforms: Sequence[Transform]) -> grain.MapDataset:
    """The examples after each of the transforms in turn."""
    for transform in transforms:
        if isinstance(transform, grain.transforms.RandomMap):
            examples = examples.random_map(transform)
        else:
            examples = examples.map(transform)
    return examples
