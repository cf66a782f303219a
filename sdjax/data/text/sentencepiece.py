"""SentencePiece's model files: the pieces of a vocabulary and how a text is normalised, without SentencePiece itself.

A file is a protocol buffer (google/sentencepiece, src/sentencepiece_model.proto) of which three fields are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.untrusted import read_bytes
from sdjax.data.text.added_tokens import MAX_TOKENS

PIECES, NORMALIZER = 1, 3  # fields of a model
PIECE, SCORE = 1, 2  # fields of a piece
CHARSMAP = 2  # field of a normaliser
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # kinds of fields
CHILDREN, LEAF, LONG, IS_VALUE = 2**8, 2**8, 2**9, 2**31  # of a unit of a double array


class Unigrams(NamedTuple):
    """A vocabulary of pieces, each with the logarithm of its probability.

    Attributes:
        pieces: in the order of their ids.
        charsmap: the table of characters that are replaced, compiled by SentencePiece; b"" for none.
    """

    pieces: list[tuple[str, float]]
    charsmap: bytes


def read_sentencepiece(path: Path) -> Unigrams:
    """The pieces of a model file, not yet checked.

    Raises:
        UserError: the file cannot be read, or is none of SentencePiece's.
    """
    data = read_bytes(path)
    try:
        found = list(_fields(data))
        pieces = [_piece(value) for number, value in found if number == PIECES]
        normalizers = [dict(_fields(value)) for number, value in found if number == NORMALIZER]
        return Unigrams(pieces, normalizers[-1].get(CHARSMAP, b"") if normalizers else b"")
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise UserError(f"cannot read {path}: it is no model of SentencePiece's") from error


def _piece(data: bytes) -> tuple[str, float]:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", fields.get(SCORE, bytes(4)))
    return fields[PIECE].decode(), score


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The number and content of each field of a message; of integers the content is not needed, and b""."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        size, kind = 0, tag % 8
        if kind in (VARINT, BYTES):
            size, place = _varint(data, place)
        size = {VARINT: 0, EIGHT_BYTES: 8, FOUR_BYTES: 4, BYTES: size}[kind]
        if place + size > len(data):
            raise ValueError("a field ends after the file")
        yield tag // 8, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer in groups of seven bits, the lowest first, and the place after it."""
    value = shift = 0
    while data[place] >= 128:
        value += (data[place] - 128) << shift
        place, shift = place + 1, shift + 7
        if shift > 63:
            raise ValueError("an integer has more than 64 bits")
    return value + (data[place] << shift), place + 1


def check_unigrams(found: Unigrams, place: object) -> Unigrams:
    """Hold a vocabulary to what the tokenizers library, which stops the process otherwise, can take.

    Raises:
        UserError: a piece is empty or has no finite score, there are too many, or the table leads out of itself.
    """
    if len(found.pieces) > MAX_TOKENS:
        raise UserError(f"{place} has {len(found.pieces)} tokens; at most {MAX_TOKENS} are read")
    for i, (piece, score) in enumerate(found.pieces):
        if not piece or not math.isfinite(score):
            raise UserError(f"{place} has a token {i} without a text or a finite score")
    if found.charsmap and not _is_charsmap(found.charsmap):
        raise UserError(f"{place} has a table of characters that is not SentencePiece's")
    return found


def _is_charsmap(charsmap: bytes) -> bool:
    """Tell whether every walk through the table stays in it.

    It is the size of a trie, the trie as a double array (s-yata/darts-clone, include/darts.h), whose values are places
    in the texts, each ended by a zero, that follow it.
    """
    end = 4 + int.from_bytes(charsmap[:4], "little")
    if not 4 < end <= len(charsmap) or end % 4:
        return False
    units, texts = np.frombuffer(charsmap[4:end], "<u4").astype(np.int64), charsmap[end:]
    walked = units < IS_VALUE
    walked[0] = True  # the root
    bases = np.arange(len(units)) ^ ((units >> 10) << ((units & LONG) >> 6))
    if (bases[walked] | (CHILDREN - 1)).max() >= len(units):
        return False
    starts = units[bases[walked & (units & LEAF > 0)]] % IS_VALUE
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    return all(start < len(texts) and texts[start] & 0xC0 != 0x80 for start in starts)
