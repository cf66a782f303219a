"""Sums over all bits of a state, and which of its arrays hold a number that is none."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from sdjax.parallel.trees import path_name
from sdjax.training.step import TrainState


class Fingerprint(NamedTuple):
    """Facts of a state, the same on every mesh.

    Attributes:
        sums: the sum of the bits of every array, as numbers modulo 2^32, by path. The file format checks its indices
            and not its numbers: a changed byte would become a changed parameter.
        ruined: paths of arrays with an infinity or a NaN.
    """

    sums: dict[str, int]
    ruined: list[str]


def fingerprint(state: TrainState) -> Fingerprint:
    """Reads every array once, where it is."""
    leaves = jax.tree_util.tree_leaves_with_path(state._asdict())
    sharding = leaves[0][1].sharding
    everywhere = jax.NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, jax.NamedSharding) else sharding
    sums, finite = _read(everywhere)([leaf for _, leaf in leaves])
    names = [path_name(path) for path, _ in leaves]
    ruined = [name for name, is_finite in zip(names, np.asarray(finite), strict=True) if not is_finite]
    return Fingerprint(dict(zip(names, np.asarray(sums).tolist(), strict=True)), ruined)


@functools.cache
def _read(sharding: Any) -> Any:
    def read(leaves: list[Array]) -> tuple[Array, Array]:
        return jnp.stack([_sum_of_bits(leaf) for leaf in leaves]), jnp.stack([_is_finite(leaf) for leaf in leaves])

    return jax.jit(read, out_shardings=sharding)


def _sum_of_bits(array: Array) -> UInt32[Array, ""]:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.uint32).sum(dtype=jnp.uint32)
    bits = jnp.uint16 if array.dtype.itemsize == 2 else jnp.uint32
    return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32).sum(dtype=jnp.uint32)


def _is_finite(array: Array) -> Bool[Array, ""]:
    return jnp.isfinite(array).all()
