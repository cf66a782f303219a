"""The original layout (CompVis, Stability AI, OpenAI) beside diffusers' own: where a tensor is, and how it is stored.

Each network's module says its pieces, and finds its sizes in `OriginalSizes`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from sdjax.checkpoints.config_fields import MAX_SIZE
from sdjax.checkpoints.mapping import SAME, Kind, Shapes, Writable
from sdjax.core.errors import UserError

TRANSPOSED = Kind(lambda w: w.T, lambda w: w.T)
SQUEEZED = Kind(lambda w: w[:, :, 0, 0], lambda w: w[:, :, None, None])
CONV_1D = Kind(lambda w: w[:, :, 0], lambda w: w[:, :, None])
GROUPS = 32


class Piece(NamedTuple):
    """The place of one of diffusers' tensors in an original file.

    Attributes:
        key: the original key, without the network's prefix.
        kind: how the original is stored; `inward` makes diffusers' array of it.
        third: which third of the original's rows this is, of queries, keys and values; None for all of them.
        heads: the original's rows are thirds of each of so many heads in turn.
    """

    key: str
    kind: Kind = SAME
    third: int | None = None
    heads: int = 1


@dataclass(frozen=True)
class SplitTensor:
    """One of diffusers' tensors in an original one, read when it becomes an array."""

    stored: Writable
    piece: Piece

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._taken(np.broadcast_to(np.float32(0), tuple(self.stored.shape))).shape

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._taken(np.asarray(self.stored)).astype(dtype or self.dtype, copy=False)

    def _taken(self, array: np.ndarray) -> np.ndarray:
        if self.piece.third is not None:
            rest = array.shape[1:]
            array = array.reshape(self.piece.heads, 3, -1, *rest)[:, self.piece.third].reshape(-1, *rest)
        return self.piece.kind.inward(array)


@dataclass(frozen=True)
class FusedTensor:
    """An original tensor made of one or three of diffusers' ones, joined when it becomes an array."""

    parts: tuple[np.ndarray, ...]
    piece: Piece

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.piece.kind.outward(self.parts[0]).shape
        return (len(self.parts) * first[0], *first[1:]) if len(self.parts) > 1 else first

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.parts[0]
        if len(self.parts) > 1:
            by_head = [part.reshape(self.piece.heads, -1, *part.shape[1:]) for part in self.parts]
            array = np.stack(by_head, axis=1).reshape(-1, *array.shape[1:])
        return self.piece.kind.outward(array).astype(dtype or self.dtype, copy=False)


def inward(pieces: Mapping[str, Piece], originals: Mapping[str, Writable]) -> dict[str, SplitTensor]:
    """Tensors under diffusers' keys; all original keys must be there."""
    return {key: SplitTensor(originals[piece.key], piece) for key, piece in pieces.items()}


def outward(pieces: Mapping[str, Piece], arrays: Mapping[str, np.ndarray]) -> dict[str, FusedTensor]:
    """The inverse of `inward`, for arrays under diffusers' keys."""
    parts: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    by_key = {piece.key: piece for piece in pieces.values()}
    for key, piece in pieces.items():
        parts[piece.key][piece.third or 0] = arrays[key]
    return {
        key: FusedTensor(tuple(array for _, array in sorted(found.items())), by_key[key])
        for key, found in parts.items()
    }


class Heads(NamedTuple):
    """Attention heads of each level, which no shape says: `number`, or as many of `width` channels as fit."""

    number: int | None = None
    width: int = 64

    def of(self, channels: int) -> int:
        """The heads of a level."""
        return self.number or max(channels // self.width, 1)


class OriginalSizes:
    """Shapes by key, from which sizes are read; a key that is not there, or has fewer axes, is the file's fault."""

    def __init__(self, shapes: Shapes, place: object) -> None:
        self._shapes, self.place = shapes, place
        self._numbers: dict[str, set[int]] = defaultdict(set)
        for key in shapes:
            parts = key.split(".")
            for i, part in enumerate(parts):
                if part.isdecimal() and len(part) < 4:
                    self._numbers[".".join(parts[:i])].add(int(part))

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def axis(self, key: str, axis: int) -> int:
        """The length of one axis of the tensor `key`.

        Raises:
            UserError: there is no such tensor or axis, or it has a length that no network has.
        """
        shape = self._shapes.get(key)
        if shape is None or not -len(shape) <= axis < len(shape) or not 0 < shape[axis] <= MAX_SIZE:
            found = "lacks it" if shape is None else f"has it with shape {list(shape)}"
            raise UserError(f"the sizes of {self.place} follow from {key}, and it {found}")
        return shape[axis]

    def rank(self, key: str) -> int:
        """The number of axes of the tensor `key`."""
        self.axis(key, 0)
        return len(self._shapes[key])

    def count(self, stem: str) -> int:
        """The count of numbers that follow one another below `stem`, from 0."""
        numbers = self._numbers.get(stem, set())
        return next(n for n in range(len(numbers) + 1) if n not in numbers)


T = TypeVar("T")


def without_prefix(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The part that belongs to one network, by its keys without the prefix."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
