"""The identity of a data set, wherever it lies: the number of its examples, and names and sizes of some of them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from sdjax.core.errors import UserError

SAMPLED = 256  # examples, evenly spread: of millions on a slow disk, each costs a seek


def identity_of(source: Any) -> dict[str, Any]:
    """Number of examples, and a hash of the sampled ones' names and, where the source knows them, sizes.

    Args:
        source: of a length, with `id(index)`, and perhaps `size(index)`.
    """
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)).tolist():
        digest.update(f"{source.id(index)}\0{_size(source, index)}\n".encode())
    return {"examples": len(source), "names_and_sizes": digest.hexdigest()[:16]}


def _size(source: Any, index: int) -> str:
    try:
        return "x".join(map(str, source.size(index))) if hasattr(source, "size") else ""
    except UserError:
        return "unreadable"  # here as in a copy; it is an error when it is its turn
