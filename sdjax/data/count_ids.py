"""Counts example ids over simulated processes: python -m sdjax.data.count_ids --source folder:PATH --processes 4

Proves of a data set, a batch size and a number of processes that each epoch holds each example exactly once.

--source NAME       as in config.data.source; images are not decoded
--split NAME        default train
--processes N       how many processes read; default 1
--resume_with M     so many go on after half of the steps, from the saved position; default N
--epochs E          default 1
--batch_size B      of all processes together; default 64
--buckets SIDE      batches of one aspect-ratio bucket each, of about SIDE x SIDE pixels; default 0, no buckets
--seed S            default 0
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Int64
from tqdm import tqdm

from sdjax.core.errors import UserError, run_or_exit
from sdjax.core.flags import parse_flags
from sdjax.data.bucketed import bucketed
from sdjax.data.loader import Loader, Shard, loader
from sdjax.data.sources.base import Images
from sdjax.data.sources.open import source
from sdjax.data.sources.rules import ANY
from sdjax.data.transforms.buckets import assign, table, without_small


class Counts(NamedTuple):
    """Counts of ids."""

    seen: list[int]
    """Rows that each process read; those of a resumed run's processes come after those of its first ones."""
    steps: int
    repeated: int
    """Rows that an epoch held before."""
    lost: int
    """Rows that a whole epoch did not hold."""


class Ids:
    """The ids of a source, as the loaders read examples."""

    def __init__(self, images: Images):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"id": self._images.id(index)}


NAMES = ("source", "split", "processes", "resume_with", "epochs", "batch_size", "buckets", "seed")
Make = Callable[[Shard], Loader]


def main() -> None:
    """Reads the command line, counts, and prints a table."""
    values = flags.FlagValues()
    flags.DEFINE_string("source", None, "data set", flag_values=values)
    flags.DEFINE_string("split", "train", "split", flag_values=values)
    for name, default, lowest in (("processes", 1, 1), ("epochs", 1, 1), ("batch_size", 64, 1), ("seed", 0, 0)):
        flags.DEFINE_integer(name, default, name, lower_bound=lowest, flag_values=values)
    flags.DEFINE_integer("resume_with", None, "processes of the second half", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("buckets", 0, "side", lower_bound=0, flag_values=values)
    parse_flags(values, sys.argv, __doc__)
    given: dict[str, Any] = {name: values[name].value for name in NAMES}
    if given["source"] is None:
        raise UserError("--source is required")
    images = source(given["source"], given["split"], rules=ANY)
    groups, make = _prepare(images, given["batch_size"], given["seed"], given["buckets"])
    processes = (given["processes"], given["resume_with"] or given["processes"])
    counts = count(make, [images.id(i) for i in range(len(images))], groups, processes, given["epochs"])
    print(f"{given['source']}: {len(images)} ids, {given['epochs']} epochs in {counts.steps} steps")
    print("\n".join(_table(counts, processes)))
    if counts.repeated or counts.lost:
        raise UserError(f"{counts.repeated} ids were repeated within an epoch and {counts.lost} were lost")


def _prepare(images: Images, batch_size: int, seed: int, buckets: int) -> tuple[Int64[np.ndarray, " n"], Make]:
    """The group of each image within which an epoch is counted (-1: not read), and the loader of a process."""
    if not buckets:
        make = functools.partial(loader, Ids(images), batch_size, seed, ())
        return np.zeros(len(images), np.int64), make
    assigned = without_small(assign(images, table(buckets)), batch_size)
    if left := int((assigned < 0).sum()):
        print(f"{left} ids are in buckets that do not fill a batch, and are left out")
    return assigned, functools.partial(bucketed, Ids(images), assigned, batch_size, seed, ())


def count(
    make: Make, ids: list[str], groups: Int64[np.ndarray, " n"], processes: tuple[int, int], epochs: int
) -> Counts:
    """Reads until every group had its epochs, and counts what each held.

    Args:
        make: the loader of a process, whose batches hold `id`.
        ids: of all rows, by index.
        groups: of each row, e.g. its bucket; each group has epochs of its own. Rows of -1 are not to be read.
        processes: how many read before the middle of the run, and after it.
        epochs: how many shall be whole.

    Raises:
        UserError: ids are not all distinct, or one was read that is not there.
    """
    row_of = {key: row for row, key in enumerate(ids)}
    if len(row_of) != len(ids):
        raise UserError(f"{len(ids) - len(row_of)} ids of the data set stand for more than one row; check the data")
    sizes = {int(group): int((groups == group).sum()) for group in np.unique(groups[groups >= 0])}
    read, goal = dict.fromkeys(sizes, 0), {group: epochs * size for group, size in sizes.items()}
    # How often each row was seen in its group's present epoch is all that must be kept.
    seen, repeated, lost = np.zeros(len(ids), bool), 0, 0
    run, steps = _Run(make, processes, sum(goal.values())), 0
    while any(read[group] < goal[group] for group in sizes):
        for row in (row_of[key] for key in next(run)):
            group = int(groups[row])
            if group < 0:
                raise UserError(f"{ids[row]!r} was read, and should have been left out")
            repeated += bool(seen[row])
            seen[row] = True
            read[group] += 1
            if read[group] % sizes[group] == 0:
                lost += sizes[group] - int(seen[groups == group].sum())
                seen[groups == group] = False
        steps += 1
    run.close()
    return Counts(run.seen, steps, repeated, lost)


class _Run(Iterator[list[str]]):
    """The ids of each global batch, from as many loaders as there are processes."""

    def __init__(self, make: Make, processes: tuple[int, int], rows: int):
        """Changes the number of processes when half of `rows` were read."""
        self._make, self._processes, self._half = make, processes, rows // 2
        self._loaders = [make(Shard(index, processes[0])) for index in range(processes[0])]
        self.seen, self._offset, self._bar = [0] * sum(processes), 0, tqdm(total=rows, unit="id", leave=False, delay=2)

    def __next__(self) -> list[str]:
        if not self._offset and sum(self.seen) >= self._half:
            state, self._offset = self._loaders[0].get_state(), self._processes[0]
            self._loaders = [self._make(Shard(index, self._processes[1])) for index in range(self._processes[1])]
            for each in self._loaders:
                each.set_state(state)
        parts = [next(each)["id"].tolist() for each in self._loaders]
        for process, part in enumerate(parts, self._offset):
            self.seen[process] += len(part)
        self._bar.update(sum(map(len, parts)))
        return list(itertools.chain(*parts))

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()


def _table(counts: Counts, processes: tuple[int, int]) -> Iterator[str]:
    yield "| half | process | ids seen |"
    yield "|---|---|---|"
    for place, seen in enumerate(counts.seen):
        half, process = (1, place) if place < processes[0] else (2, place - processes[0])
        yield f"| {half} | {process} of {processes[half - 1]} | {seen} |"
    yield ""
    yield "| ids seen by all | repeated within an epoch | lost |"
    yield "|---|---|---|"
    yield f"| {sum(counts.seen)} | {counts.repeated} | {counts.lost} |"


if __name__ == "__main__":
    run_or_exit(main)
