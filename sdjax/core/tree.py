"""Parameter trees as flat dictionaries of slash-joined names, and what can be counted about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Tree = Mapping[str, Any]

Params = dict[str, Any]
"""Parameters by component: {"unet": ..., "vae": ..., "text_encoder": ...}."""


def numbered(stem: str, number: int) -> str:
    """The name of one of several, e.g. of components of one kind: the first has no number."""
    return f"{stem}_{number}" if number else stem


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} becomes {"a/b": x}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def merge(first: Tree, second: Tree) -> dict[str, Any]:
    """Leaves of both trees; where both have one, the second's."""
    merged = dict(first)
    for name, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def size(tree: Any) -> int:
    """The number of elements in all leaves, arrays or shapes alike."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """The number of bytes in all leaves, arrays or shapes alike."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
