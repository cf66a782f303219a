"""A1111's prompt editing, by which a prompt's words change from step to step, and prompts that AND composes.

`[from:to:when]`, `[to:when]` and `[from::when]` change once, `[a|b]` takes turns at every step, and all of them nest.
`when` is the number of steps before the change or, with a decimal point, their share of all (modules/prompt_parser.py
of AUTOMATIC1111/stable-diffusion-webui). Its sampler counts from 0 where its schedule counts from 1, so that its
images change one network call later (its issue 7279), and counts the calls, not the steps, of samplers with two calls a
step; here `[a:b:3]` says a for three steps, b from the fourth on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sdjax.data.text.nesting import Group, Piece, nested
from sdjax.data.text.prompts import NUMBER

# A tag, an escaped character, a mark, words, or what is left.
SYNTAX = re.compile(r"<\w+:[^<>]+>|\\.|[\[\]():|]|[^\\\[\]():|<]+|.", re.DOTALL)
WHEN = re.compile(rf"\s*({NUMBER}(?:[eE][+-]?\d+)?)\s*")
OPENING, MARKS = {")": "(", "]": "["}, {"[": (":", "|")}
AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(rf"\s*{NUMBER}\s*")


class Edit(NamedTuple):
    """A text up to a step, another one after it."""

    before: list[Piece]
    after: list[Piece]
    when: str


class Alternation(NamedTuple):
    """Texts that take turns."""

    options: list[list[Piece]]


class Pass(NamedTuple):
    """The steps over which a prompt is edited.

    Attributes:
        steps: of the sampler, those included that image to image leaves out; as in A1111 the first one taken is step 1.
        earlier: steps of the pass before this; None for a first pass. Then a number of steps counts on from there, and
            a share from 1: `[a:b:1.5]` changes in the middle of the second pass.
    """

    steps: int
    earlier: int | None = None

    def last_before(self, when: str) -> int:
        """The last step before an edit, 0 to `steps`."""
        is_share, number = "." in when, float(when)
        if self.earlier is not None:
            number -= 1.0 if is_share else self.earlier
        return int(min(max(number * (self.steps if is_share else 1), 0.0), self.steps))


def texts_by_step(prompt: str, over: Pass) -> list[str]:
    """The text of a prompt at each step; brackets that edit nothing stay as they are."""
    pieces = nested(SYNTAX.findall(prompt), OPENING, MARKS, _closed)
    changes, alternates = {0}, False
    pending = [pieces]
    while pending:
        match pending.pop():
            case Edit(before, after, when):
                changes.add(over.last_before(when))
                pending += [before, after]
            case Alternation(options):
                alternates = True
                pending += options
            case list() as inner:
                pending += inner
    texts: list[str] = []
    for step in range(over.steps):
        texts.append(_text(pieces, step, over) if alternates or step in changes else texts[-1])
    return texts


def composed(prompt: str) -> list[tuple[str, float]]:
    """The prompts that AND composes, each with its weight, `a cat :1.2 AND a dog :0.8`; a prompt without AND weighs 1.

    As in A1111, AND divides before brackets are read. Unlike there, a number ends a prompt without AND as words do.
    """
    parts = AND.split(prompt)
    return [(prompt, 1.0)] if len(parts) == 1 else [_weighted(part) for part in parts]


def _weighted(part: str) -> tuple[str, float]:
    text, colon, weight = part.rpartition(":")
    return (text.rstrip(), float(weight)) if colon and WEIGHT.fullmatch(weight) else (part.rstrip(), 1.0)


def _closed(group: Group) -> Edit | Alternation | None:
    """A group as an edit or an alternation; None for one that is neither."""
    last, colons = len(group.marks), [i for i, mark in enumerate(group.marks) if mark == ":"]
    when = WHEN.fullmatch(group.word(-1)) if group.bracket == "[" else None
    if when and colons[-1:] == [last - 1] and len(colons) <= 2:
        first = colons[0] + 1 if len(colons) == 2 else 0
        return Edit(group.between(0, first - 1) if first else [], group.between(first, last - 1), when[1])
    return Alternation(group.parts) if group.marks and not colons else None


def _text(pieces: Sequence[Piece], step: int, over: Pass) -> str:
    """The text at a step, counted from 0."""
    texts: list[str] = []
    pending: list[Piece] = list(reversed(pieces))
    while pending:
        match pending.pop():
            case str() as text:
                texts.append(text)
            case Edit(before, after, when):
                pending.append(before if step < over.last_before(when) else after)
            case Alternation(options):
                pending.append(options[step % len(options)])
            case list() as inner:
                pending += reversed(inner)
    return "".join(texts)
