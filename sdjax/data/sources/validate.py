"""Every bad row of a data set, with its place and what is wrong with it: nothing stops at the first."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from sdjax.core.errors import UserError, printable
from sdjax.data.prepared.dataset import PreparedSource
from sdjax.data.sources.base import CAPTION, Example, Listed, Problem, Rows
from sdjax.data.sources.open import default_rules, open_rows
from sdjax.data.sources.rules import RowRules, faults, remarks

CHUNK = 256


class Bad(NamedTuple):
    """A row that training could not use: file and line, tar member or record, and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def check(
    name: str, split: str = "train", data_dir: str | os.PathLike | None = None, rules: RowRules | None = None
) -> Iterator[Bad]:
    """Reads and decodes the whole data set as training does; yields what is bad, in the data set's order.

    Bad are: what cannot be read or decoded, what is not there, a row that cannot be parsed or lacks what the rules
    need, an empty caption, an id that an earlier row has, and an image that is too small. Of each row a hash of its id
    is kept.

    Args:
        name, split, data_dir: as `open.source` takes them.
        rules: of the run; default as there.

    Raises:
        UserError: there is no such data set, or it has no list of rows at all.
    """
    return (row.bad for row in _judged(*_opened(name, split, data_dir, rules)) if row.bad is not None)


def report(
    name: str,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    rules: RowRules | None = None,
    output: TextIO | None = None,
) -> int:
    """`check`, printed: a line for each bad row, and the counts at the end.

    Args:
        name, split, data_dir, rules: as `check` takes them.
        output: default standard output; the progress is on standard error.

    Returns:
        How many rows are bad.
    """
    return _report(f"{name} ({split})", _judged(*_opened(name, split, data_dir, rules)), output or sys.stdout)


def report_prepared(folder: str, output: TextIO | None = None) -> int:
    """`report` of a folder of precomputed latents."""
    rows = PreparedSource(folder)

    def read(index: int) -> Reading:
        return _attempt(rows, index, lambda _: Reading(rows.id(index), []))

    return _report(folder, _judged(rows, read), output or sys.stdout)


def _report(title: str, judged: Iterator[Judged], output: TextIO) -> int:
    rows = bad_rows = 0
    remarked: Counter[str] = Counter()
    with tqdm(judged, desc=f"checking {title}", unit="row", leave=False) as bar:
        for row in bar:
            rows += 1
            remarked.update(row.remarks)
            if row.bad is not None:
                bad_rows += 1
                bar.write(printable(str(row.bad)), file=output)
    for remark, count in sorted(remarked.items()):
        print(f"{title}: {remark}: {count}", file=output)
    print(f"{title}: {rows} rows, {bad_rows} bad", file=output)
    return bad_rows


class Judged(NamedTuple):
    """A row, read.

    Attributes:
        bad: why it cannot be used, or None.
        remarks: what is worth knowing of it.
    """

    bad: Bad | None
    remarks: tuple[str, ...] = ()


class Reading(NamedTuple):
    """Outcome of reading a row: its id, None if it could not be read, reasons against it, and remarks."""

    id: str | None
    reasons: list[str]
    remarks: tuple[str, ...] = ()


def _opened(
    name: str, split: str, data_dir: str | os.PathLike | None, rules: RowRules | None
) -> tuple[Rows, Callable[[int], Reading]]:
    """A data set and the reading of its rows."""
    rows, rules = open_rows(name, split, data_dir, rules), rules or default_rules(name)
    return rows, functools.partial(_attempt, rows, judge=functools.partial(_judge, rules))


def _judged(rows: Listed, read: Callable[[int], Reading]) -> Iterator[Judged]:
    """All rows of a data set in its order; decoding runs in threads, ids are compared in the rows' order."""
    # Hashes, for the ids of many millions of rows would fill the memory.
    seen: set[bytes] = set()
    problems = deque(rows.problems)
    with ThreadPoolExecutor() as pool:
        for start in range(0, max(len(rows), 1), CHUNK):
            chunk = range(start, min(start + CHUNK, len(rows)))
            for index, reading in zip(chunk, pool.map(read, chunk), strict=True):
                while problems and problems[0].before <= index:
                    yield Judged(_known(problems.popleft()))
                yield _verdict(rows.place(index), reading, seen)
    yield from (Judged(_known(problem)) for problem in problems)


def _attempt(rows: Listed, index: int, judge: Callable[[Any], Reading]) -> Reading:
    try:
        row = rows[index]
    except UserError as error:
        return Reading(None, [_reason(str(error), rows.place(index))])
    return judge(row)


def _judge(rules: RowRules, example: Example) -> Reading:
    empty = CAPTION in rules.needs and not example["caption"].strip()
    reasons = [*faults(example, rules), *["the caption is empty"] * empty]
    return Reading(example["id"], reasons, tuple(remarks(example, rules)))


def _verdict(place: str, reading: Reading, seen: set[bytes]) -> Judged:
    reasons = list(reading.reasons)
    if reading.id is not None:
        digest = hashlib.blake2b(reading.id.encode(errors="surrogatepass"), digest_size=8).digest()
        if digest in seen:
            reasons.append(f"an earlier row has its id, {reading.id!r}")
        seen.add(digest)
    return Judged(Bad(place, "; ".join(reasons)) if reasons else None, reading.remarks)


def _known(problem: Problem) -> Bad:
    return Bad(problem.place, _reason(problem.message, problem.place))


def _reason(message: str, place: str) -> str:
    return message.removeprefix(place).lstrip(": ")
