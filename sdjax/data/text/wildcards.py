"""Prompts as templates, whose words are drawn: `{red|blue}`, and `__name__` for a line of a text file.

The syntax is that of adieyal/sd-dynamic-prompts (docs/SYNTAX.md): weights `{3::red|blue}`, several without repetition
`{2$$red|green|blue}`, ranges of numbers `{1-2$$...}`, `{-2$$...}`, `{2-$$...}`, a separator `{2$$ and $$...}`, globs
`__colours*__`, all of them nested and in files. Variables and YAML files are not read. Braces with neither `|` nor `$$`
are characters, and so is what a backslash precedes.
"""

from __future__ import annotations

import bisect
import fnmatch
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sdjax.core.errors import UserError, unknown
from sdjax.core.untrusted import read_text
from sdjax.data.text.nesting import Group, Piece, nested

# An escaped character, a wildcard, a mark, words, or what is left.
SYNTAX = re.compile(r"\\.|__(?:[^\W_]|\*)[\w*/. -]{0,200}?__|[{}|\[\]]|\$\$|[^\\{}|\[\]$_]+|.", re.DOTALL)
OPENING, MARKS = {"}": "{", "]": "["}, {"{": ("|", "$$")}
NAME = re.compile(r"__(.+)__")
COUNT = re.compile(r"\s*(?:(\d{1,4})|(\d{0,4})-(\d{0,4}))\s*")
WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d*)?|\.\d+)::")
SEPARATOR = ", "
MOST_BYTES, MOST_TEMPLATES = 2**24, 10_000


class Template(NamedTuple):
    """A template within another, not parsed yet."""

    text: str


Option = tuple[float, list[Piece]]
"""A weight, and what it stands for."""


class Choice(NamedTuple):
    """Options of which some are drawn.

    Attributes:
        options: at least one.
        least, most: to draw; None for all that there are.
        separator: between them.
    """

    options: list[Option]
    least: int = 1
    most: int | None = 1
    separator: Piece = SEPARATOR


class WildcardFolder:
    """Text files below a folder, one value a line, by their paths without the ending; `#` begins a comment line.

    Raises:
        UserError: there is no such folder, or no text file in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"wildcard_dir {str(folder)!r} is no folder")
        files = sorted(self.folder.rglob("*.txt"))
        self.files = {file.relative_to(self.folder).with_suffix("").as_posix(): file for file in files}
        if not files:
            raise UserError(f"wildcard_dir {str(folder)!r} holds no .txt file")
        self.known: dict[str, list[Option]] = {}

    def options(self, name: str) -> list[Option]:
        """Lines of the file of this name, or of all files that match a glob; a UserError where there is none."""
        found = [own for own in self.files if own == name or ("*" in name and fnmatch.fnmatchcase(own, name))]
        if not found:
            raise unknown("wildcard", name, self.files, str(self.folder))
        return [option for own in found for option in self._read(own)]

    def _read(self, name: str) -> list[Option]:
        if name not in self.known:
            lines = [line.strip() for line in read_text(self.files[name], MOST_BYTES).split("\n")]
            self.known[name] = [_line(line) for line in lines if line and not line.startswith("#")]
        if not self.known[name]:
            raise UserError(f"the wildcard {self.files[name]} holds no value: write one a line")
        return self.known[name]


def fill_template(template: str, folder: WildcardFolder | None, seed: str) -> str:
    """A template with its words drawn, the same ones for the same seed; a prompt that is none stays as it is.

    Args:
        template: a prompt.
        folder: of `__name__`; None leaves these as words.
        seed: any text; changing it draws anew.

    Raises:
        UserError: a wildcard is unknown or cannot be read, files refer to each other without end, or weights are all 0.
    """
    draw = random.Random(seed).random  # of which Python promises that it stays the same
    texts: list[str] = []
    pending: list[Piece] = [Template(template)]
    parsed = 0
    while pending:
        match pending.pop():
            case Template(text):
                parsed += 1
                if parsed > MOST_TEMPLATES:
                    raise UserError(f"the wildcards of {template[:40]!r} refer to each other without end")
                pending.append(nested(SYNTAX.findall(text), OPENING, MARKS, _closed))
            case Choice() as choice:
                pending += reversed(_drawn(choice, folder, draw))
            case list() as inner:
                pending += reversed(inner)
            case str() as text if folder is not None and (name := NAME.fullmatch(text)):
                pending.append(Choice(folder.options(name[1])))
            case text:
                texts.append(text)
    return "".join(texts)


def wildcards_of(template: str) -> list[str]:
    """The wildcards that a template itself names, as they are written."""
    return [token for token in SYNTAX.findall(template) if NAME.fullmatch(token)]


def _closed(group: Group) -> Choice | None:
    """A group as options; None for one that has neither several nor a number to draw."""
    count = COUNT.fullmatch(group.word(0)) if group.marks[:1] == ["$$"] else None
    if count is None and "|" not in group.marks:
        return None
    own_separator = count is not None and group.marks[1:2] == ["$$"]
    first = own_separator + (count is not None)  # the number and the separator are parts, too
    ends = [*(i for i, mark in enumerate(group.marks) if mark == "|" and i >= first), len(group.marks)]
    starts = [first, *(end + 1 for end in ends[:-1])]
    options = [_weighted(group, start, end) for start, end in zip(starts, ends, strict=True)]
    if count is None:
        return Choice(options)
    exact, least, most = count.groups()
    bounds = int(exact or least or 1), int(exact or most) if exact or most else None
    return Choice(options, *bounds, group.parts[1] if own_separator else SEPARATOR)


def _weighted(group: Group, start: int, end: int) -> Option:
    """An option of a group, whose weight begins its first text."""
    text = group.parts[start][0] if group.parts[start] else ""
    weight = WEIGHT.match(text) if isinstance(text, str) else None
    if weight is None:
        return 1.0, group.between(start, end)
    group.parts[start][0] = text[weight.end() :]
    return float(weight[1]), group.between(start, end)


def _line(text: str) -> Option:
    weight = WEIGHT.match(text)
    return (1.0, [Template(text)]) if weight is None else (float(weight[1]), [Template(text[weight.end() :])])


def _drawn(choice: Choice, folder: WildcardFolder | None, draw: Callable[[], float]) -> list[Piece]:
    """The options that are drawn, none of them twice, with separators between."""
    match choice.options:
        case [(_, [[str() as text]])] if folder is not None and (name := NAME.fullmatch(text)):
            options = folder.options(name[1])  # of one wildcard alone several lines may be drawn
        case options:
            pass
    options = [option for option in options if option[0] > 0.0]
    if not options:
        raise UserError("all options of a choice in the prompt weigh 0")
    least = min(choice.least, len(options))
    most = len(options) if choice.most is None else max(min(choice.most, len(options)), least)
    pieces: list[Piece] = []
    for _ in range(least if least == most else least + int(draw() * (most - least + 1))):
        ends = list(itertools.accumulate(weight for weight, _ in options))
        place = min(bisect.bisect_right(ends, draw() * ends[-1]), len(options) - 1)
        pieces += [choice.separator, options.pop(place)[1]]
    return pieces[1:]
