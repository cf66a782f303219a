"""Random keys are derived, never carried: the same (seed, name, index) is the same noise on every mesh."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PRNGKeyArray


def stream(seed: int | Int[Array, ""], *path: str | int | Int[Array, ""]) -> PRNGKeyArray:
    """The key at `path` below `seed`, e.g. stream(0, "train", step).

    Strings are hashed with CRC-32, whose value is the same in every process; integers may be traced.
    """
    key = jax.random.key(seed)
    for part in path:
        key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
    return key


def image_keys(seeds: int | Int[Array, ""] | Int[Array, " b"], indices: Int[Array, " b"]) -> Key[Array, " b"]:
    """One key an image, [b], from its seed and its index: neither batch size nor device count enters it."""
    return jax.vmap(lambda seed, index: stream(seed, "image", index))(jnp.broadcast_to(seeds, indices.shape), indices)
