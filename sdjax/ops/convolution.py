"""Convolution of pictures: by fewer products on one CPU, and of rows that are split over devices.

XLA can split the rows of a convolution by itself. Its gradients of the kernel are then wrong without a word: multiplied
by the devices along any axis of the mesh that holds copies, or off by a part where a device has a single row (jax
0.10.2, CPU). Here each device gets the rows that it lacks from its neighbours by an exchange that is written out, so
that its gradient is the transposed exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sdjax.ops import winograd
from sdjax.ops.partition import SPATIAL, mesh_sizes

Edges: TypeAlias = tuple[int, int]
"""How many rows above and below an image, or a part of it, are seen with it."""
PLAIN: dict[str, Any] = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, "precision": None}
"""The further arguments of a convolution that does nothing else."""


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "r s c f"],
    strides: Sequence[int],
    padding: str | Sequence[Edges],
    **options: Any,
) -> Float[Array, "b h2 w2 f"]:
    """`jax.lax.conv_general_dilated` without dilation of rows: for `nn.Conv(..., conv_general_dilated=convolve)`."""
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    plain = all(PLAIN.get(name, value) == value for name, value in options.items())
    if plain and winograd.suits(x, kernel, strides, padding) and not mesh_sizes():
        return winograd.convolve(x, kernel)
    rows, columns = padding

    def part(x: Array, kernel: Array, edges: Edges) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, (edges, columns), **options)

    # Parts fit together where each `stride` rows make one: those of a whole image of `stride` rows do.
    stride = strides[0]
    fits = 0 <= stride + sum(rows) - kernel.shape[0] < stride
    return over_rows(part, x, kernel, rows, stride if fits else None)


def over_rows(
    part: Callable[[Array, Array, Edges], Array],
    x: Float[Array, "b h w c"],
    kernel: Array,
    edges: Edges,
    stride: int | None = 1,
) -> Array:
    """`part` of an image, by every device of its own rows where the mesh splits them.

    Args:
        part: (rows of x, kernel, how many rows of zeros to add above and below) -> the rows that they make.
        kernel: whole on every device along the spatial axis.
        edges: the rows above and below that `part` needs. Beyond the image they are zeros.
        stride: a device's rows are a multiple of it; None where parts do not fit together. An image that cannot be
            split so is gathered.
    """
    devices = mesh_sizes().get(SPATIAL, 1)
    if devices == 1:
        return part(x, kernel, edges)
    rows, rest = divmod(x.shape[1], devices)
    if rest or stride is None or rows % stride or rows < max(edges):
        return _whole_rows(part(_whole_rows(x), kernel, edges))

    def mine(x: Array, kernel: Array) -> Array:
        return part(_with_edges(x, edges, devices), kernel, (0, 0))

    split = P(None, SPATIAL)
    by_rows = partial(jax.shard_map, axis_names={SPATIAL}, check_vma=False)  # the other axes stay the compiler's
    return by_rows(mine, in_specs=(split, P()), out_specs=split)(x, kernel)


def _with_edges(x: Array, edges: Edges, devices: int) -> Array:
    """A device's rows between the last ones of the device before it and the first ones of that after it."""
    (above, below), parts = edges, [x]
    if above:
        parts.insert(0, jax.lax.ppermute(x[:, -above:], SPATIAL, [(i, i + 1) for i in range(devices - 1)]))
    if below:
        parts.append(jax.lax.ppermute(x[:, :below], SPATIAL, [(i + 1, i) for i in range(devices - 1)]))
    return jnp.concatenate(parts, axis=1)


def _whole_rows(x: Array) -> Array:
    free = P.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, P(free, None, free, free))
