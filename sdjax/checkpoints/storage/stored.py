"""A tensor within a file, whose bytes are read when they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sdjax.core.errors import UserError

MAX_RANK, MAX_SIZE = 32, 2**48  # more than any tensor has of axes and of elements, and less than makes arithmetic slow
FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
DTYPES = {name: np.dtype(getattr(jnp, name)) for name in (*FLOATS, *INTEGERS, "bool")}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `np.asarray` reads it, and it alone.

    Attributes:
        start: its first element, in bytes from the file's beginning.
        strides: elements from one entry of each axis to the next; None where it lies in its axes' order.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Elements that are read."""
        return math.prod(self.shape) if self.strides is None else span(self.shape, self.strides)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        count = self.count
        try:
            array = np.fromfile(self.path, self.dtype, count, offset=self.start)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from error
        if array.size != count:
            raise UserError(f"{self.path} was cut while it was being read")
        if self.strides is None:
            return array.reshape(self.shape).astype(dtype or self.dtype, copy=False)
        steps = [step * array.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(array, self.shape, steps).astype(dtype or self.dtype)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if math.prod(shape) else 0


def is_size(value: object) -> bool:
    """Tell whether a value that a file says is an integer that a size or a place can be."""
    return type(value) is int and 0 <= value < MAX_SIZE
