"""Brackets that nest, with marks between their parts: the common part of prompt editing and wildcards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Piece = Any
"""A text, a list of pieces, or what a syntax makes of a group."""


class Group:
    """A bracket that is open: its parts, and the marks between them."""

    def __init__(self, bracket: str) -> None:
        self.bracket = bracket
        self.parts: list[list[Piece]] = [[]]
        self.marks: list[str] = []

    def between(self, first: int, last: int) -> list[Piece]:
        """Parts `first` to `last`, with the marks between them as characters."""
        pieces: list[Piece] = [self.parts[first]]
        for mark, part in zip(self.marks[first:last], self.parts[first + 1 : last + 1], strict=True):
            pieces += [mark, part]
        return pieces

    def characters(self) -> list[Piece]:
        """The group as characters, without the bracket that closes it."""
        return [self.bracket, *self.between(0, len(self.marks))]

    def word(self, part: int) -> str:
        """A part that is one text; "" for any other."""
        return self.parts[part][0] if len(self.parts[part]) == 1 and isinstance(self.parts[part][0], str) else ""


def nested(
    tokens: Iterable[str],
    opening: Mapping[str, str],
    marks: Mapping[str, tuple[str, ...]],
    close: Callable[[Group], Piece | None],
) -> list[Piece]:
    """Pieces of a text, in linear time. Brackets that do not match are characters, and so is all that is open there.

    Args:
        tokens: of the text.
        opening: by each closing bracket the one that it closes.
        marks: that divide the parts of a group, by its opening bracket.
        close: what a group is; None for its characters.
    """
    groups, openers = [Group("")], set(opening.values())
    for token in tokens:
        inner = groups[-1]
        if token in openers:
            groups.append(Group(token))
        elif token in opening and inner.bracket == opening[token]:
            groups.pop()
            made = close(inner)
            groups[-1].parts[-1].append([*inner.characters(), token] if made is None else made)
        elif token in opening:
            _unfold(groups).append(token)
        elif token in marks.get(inner.bracket, ()):
            inner.marks.append(token)
            inner.parts.append([])
        else:
            inner.parts[-1].append(token)
    return _unfold(groups)


def _unfold(groups: list[Group]) -> list[Piece]:
    """Turn the open groups into characters; the pieces of the first."""
    while len(groups) > 1:
        inner = groups.pop()
        groups[-1].parts[-1].append(inner.characters())
    return groups[0].parts[-1]
