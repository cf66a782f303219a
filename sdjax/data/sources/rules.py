"""Conditions that a run sets for its rows, and data sets held to them: bad rows stop the run, or are left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sdjax.core.errors import UserError, unknown
from sdjax.data.sources.base import CAPTION, Example, Rows

STOP, SKIP = "stop", "skip"
# So many in turn are no accident; and so many lines are read by no one.
MOST_IN_TURN, MOST_LINES = 1000, 20
EXTREME = 8

logger = logging.getLogger("sdjax")
T = TypeVar("T")


class RowRules(NamedTuple):
    """Rules of a run.

    Attributes:
        needs: keys that every example must have, such as "label"; captions are read if CAPTION is among them.
        minimum_side: pixels that the shorter side of each image must have; 0 for any.
        size: pixels of the shorter side of training's images; smaller ones are enlarged, and that is said.
        on_bad: STOP at a bad row, or SKIP it.
        links: folders outside of a data folder that links in it may lead to.
    """

    needs: tuple[str, ...] = (CAPTION,)
    minimum_side: int = 0
    size: int = 0
    on_bad: str = STOP
    links: tuple[str, ...] = ()


CAPTIONED, ANY = RowRules(), RowRules(needs=())


def faults(example: Mapping[str, Any], rules: RowRules) -> Iterator[str]:
    """Reasons against an example that could be read."""
    height, width = example["image"].shape[:2]
    if min(height, width) < rules.minimum_side:
        yield f"the image has {width}x{height} pixels, and {rules.minimum_side} are the least for a side"
    for name in rules.needs:
        if name not in example:
            yield f"has no {name}"


def remarks(example: Example, rules: RowRules) -> Iterator[str]:
    """Things worth knowing of an example that is not bad."""
    height, width, _ = example["image"].shape
    if min(height, width) < rules.size:
        yield f"images smaller than {rules.size} pixels, which are enlarged"
    if max(height, width) > EXTREME * min(height, width):
        yield f"images more than {EXTREME} times as long as wide, most of which is cut off"
    if CAPTION in rules.needs and not example["caption"].strip():
        yield "images with an empty caption"


class UsableRows:
    """The rows of a data set that a run can use, by index.

    Rows that are known to be bad when the data set is opened have no index. A row that turns out to be bad when it is
    read stops the run, or the next good one stands in its place: which one is a function of the index alone, so that
    every process, epoch and resumed run has the same rows.

    Attributes:
        classes: names of the classes; () where there are none.
    """

    def __init__(self, rows: Rows, rules: RowRules, name: str):
        """Holds a data set to the rules.

        Raises:
            UserError: a row is bad and shall stop the run, or none is good.
        """
        if rules.on_bad not in (STOP, SKIP):
            raise unknown("rule", rules.on_bad, (STOP, SKIP), "config.data.on_bad")
        self._rows, self._rules, self._name = rows, rules, name
        self.classes: tuple[str, ...] = tuple(getattr(rows, "classes", ()))
        self._refuse_problems()
        # An image that stands N times in an epoch has N indices.
        repeats = getattr(rows, "repeats", None)
        self._indices = None if repeats is None else np.repeat(np.arange(len(rows)), repeats)
        self._firsts = None if repeats is None else np.cumsum(repeats) - repeats
        self._bad: set[int] = set()
        self._remarked: dict[str, set[int]] = {}

    def _refuse_problems(self) -> None:
        problems = self._rows.problems
        if problems and (self._rules.on_bad == STOP or not len(self._rows)):
            more = f" (and {len(problems) - 1} more; --check_data names all)" if len(problems) > 1 else ""
            raise UserError(f"{problems[0].message}{more}")
        for problem in problems[:MOST_LINES]:
            logger.warning("left out: %s", problem.message)
        if problems:
            counts = (self._name, len(problems), len(problems) + len(self._rows))
            logger.warning("%s: %d of %d rows are bad and left out; --check_data names all", *counts)

    def __len__(self) -> int:
        return len(self._rows) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> Example:
        example = self._good(index, self._read)
        return example if self._repetition(index) == 0 else {**example, "id": self._named(example["id"], index)}

    def id(self, index: int) -> str:
        """The row's name; if it is bad, another one's example stands at its index."""
        return self._named(self._rows.id(self._row(index)), index)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return self._good(index, self._rows.size)

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index if self._indices is None else int(self._indices[index])

    def _repetition(self, index: int) -> int:
        return 0 if self._firsts is None else index - int(self._firsts[self._row(index)])

    def _named(self, name: str, index: int) -> str:
        repetition = self._repetition(index)
        return f"{name}#{repetition}" if repetition else name

    def _read(self, row: int) -> Example:
        example = self._rows[row]
        if reasons := "; ".join(faults(example, self._rules)):
            raise UserError(f"{self._rows.place(row)}: {reasons}")
        for remark in remarks(example, self._rules):
            found = self._remarked.setdefault(remark, set())
            if row not in found:
                found.add(row)
                if len(found) in (1, 10, 100) or len(found) % 1000 == 0:
                    logger.warning("%s: %s: %d so far, e.g. %s", self._name, remark, len(found), example["id"])
        return example

    def _good(self, index: int, read: Callable[[int], T]) -> T:
        """Read a row, or the first good one after it."""
        first, count = self._row(index), len(self._rows)
        for row in range(first, first + min(count, MOST_IN_TURN)):
            try:
                return read(row % count)
            except UserError as error:
                if self._rules.on_bad == STOP:
                    raise
                self._warn(row % count, error)
        raise UserError(f"{self._name}: {min(count, MOST_IN_TURN)} rows in turn are bad; --check_data names them")

    def _warn(self, row: int, error: UserError) -> None:
        if row not in self._bad:
            self._bad.add(row)
            logger.warning("left out, the next row in its place: %s (bad row %d of this run)", error, len(self._bad))
