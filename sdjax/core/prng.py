"""Random keys are derived, never carried: the same (seed, name, index) is the same noise on every mesh."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PRNGKeyArray


def stream(seed: int | Int[Array, ""], *path: str | int | Int[Array, ""]) -> PRNGKeyArray:
    """The key at `path` below `seed`, e.g. stream(0, "train", step).

    Strings are hashed with CRC-32, whose value is the same in every process; integers may be traced.
    """
    return stream_below(jax.random.key(seed), *path)


def stream_below(key: PRNGKeyArray, *path: str | int | Int[Array, ""]) -> PRNGKeyArray:
    """The key at `path` below another one, as `stream`."""
    for part in path:
        key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
    return key


def image_keys(
    seeds: int | Int[Array, ""] | Int[Array, " b"], indices: Int[Array, " b"], high: int | Int[Array, " b"] = 0
) -> Key[Array, " b"]:
    """One key an image, [b], from its seed and its index: neither batch size nor device count enters it.

    Args:
        seeds: lower 32 bits.
        indices: of the images.
        high: upper 32 bits, which are folded in; 0 for none.
    """

    def key(seed: Array, index: Array, word: Array) -> PRNGKeyArray:
        own = stream(seed, "image", index)
        return jnp.where(word == 0, own, jax.random.fold_in(own, word))

    seeds, high = (jnp.broadcast_to(words, indices.shape) for words in (seeds, high))
    return jax.vmap(key)(seeds, indices, high)


def seed_words(seeds: Sequence[int]) -> Int[np.ndarray, "b 2"]:
    """Lower and upper 32 bits of seeds of up to 64, as int32: JAX has no 64-bit integers by default."""
    return np.array(seeds, "<u8").view("<i4").reshape(-1, 2)
