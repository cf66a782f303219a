"""Files of NumPy's arrays that anybody may have written: a header is held to what there is before anything is made."""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.untrusted import check_ordinary

MAX_BYTES = 2**26  # of an array in an .npz file, which may be compressed
MAX_HEADER = 10_000  # as NumPy's own limit, which it looks at when it has read the header
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What NumPy raises for headers that are none; it reads them as Python's literals.
BROKEN = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, RecursionError, MemoryError, OverflowError),
    *(NotImplementedError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def read_npy(path: str | Path, place: str) -> np.ndarray:
    """The array of a .npy file, mapped, so that its header can promise no more than the file holds.

    Args:
        place: that names the file, for messages.

    Raises:
        UserError: it is missing, or is no array of numbers.
    """
    try:
        size = check_ordinary(path)
        with open(path, "rb") as file:
            if _size(file) + file.tell() > size:
                raise ValueError("it is truncated")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except BROKEN as error:
        raise UserError(f"{place}: cannot read {path}: {_reason(error)}") from error


def read_npz(path: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz file holds.

    Raises:
        UserError: it is missing, is no such file, or holds an array of more than MAX_BYTES.
    """
    check_ordinary(path)
    try:
        with zipfile.ZipFile(path) as archive:
            held = set(archive.namelist())
            return {name: _member(archive, f"{name}.npy") for name in names if f"{name}.npy" in held}
    except BROKEN as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from error


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        if _size(file) > MAX_BYTES:
            raise ValueError(f"{name} would be too large")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _size(file: IO[bytes]) -> int:
    """Bytes of an array that a file's header promises; the file's place is then where they begin."""
    start = file.read(12)
    if start[6:7] != b"\1" and int.from_bytes(start[8:], "little") > MAX_HEADER:
        raise ValueError("its header is too long")
    file.seek(0)
    shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or any(side < 0 for side in shape):
        raise ValueError("it holds no numbers")
    return math.prod(shape) * dtype.itemsize


def _reason(error: BaseException) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else "it is not an array of numbers"
