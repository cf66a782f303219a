"""The part of a parameter or a batch that each device holds, decided from outside the models.

A parameter's name says which dimension is split over the tensor axis; FSDP takes another one, by size. Megatron's pairs
(Shoeybi et al. 2019): what makes heads, hidden features or channels is split by its outputs, what takes them back by
its inputs, so that between the two nothing is communicated. The autoencoders' attention has one head, which cannot be
split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.core.errors import UserError
from sdjax.ops.partition import BATCH, FSDP, TENSOR

# Gathering a small array costs more than keeping a copy of it.
SMALLEST_SHARDED = 2**12
OUTPUTS, INPUTS = -1, -2
TENSOR_DIMENSIONS = (
    (r"(attn\d|self_attn)/to_[qkv]", OUTPUTS),
    (r"(attn\d|self_attn)/to_out", INPUTS),
    (r"(ff/proj_in|fc1|ff/wi(_[01])?)", OUTPUTS),
    (r"(ff/proj_out|fc2|ff/wo)", INPUTS),
    (r"attentions_\d+/(to_[qkv]|add_[kv]_proj)", OUTPUTS),
    (r"attentions_\d+/to_out", INPUTS),
    (r"(resnets|(down|up)samplers)_\d+/(conv1|time_emb_proj)", OUTPUTS),
    (r"(resnets|(down|up)samplers)_\d+/conv2", INPUTS),
)
# Of LoRA's factors that which has the split dimension is split, too.
_FACTORS = {OUTPUTS: "up", INPUTS: "down"}
_PATTERNS = [
    (re.compile(rf"(^|[/_]){pattern}/(kernel|lora/\d+/{_FACTORS[dimension]})$"), dimension)
    for pattern, dimension in TENSOR_DIMENSIONS
]


def spec_of(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """Sharding of a parameter.

    Args:
        name: its path, or one that ends with it, such as that of its moments in an optimiser.
        sizes: devices along each axis of the mesh.

    Returns:
        FSDP splits the largest remaining dimension that it divides, the last of equals; small arrays stay whole.
    """
    axes: list[str | None] = [None] * len(shape)
    if np.prod(shape) < SMALLEST_SHARDED:
        return P()
    tensor, fsdp = sizes.get(TENSOR, 1), sizes.get(FSDP, 1)
    dimension = next((d for pattern, d in _PATTERNS if pattern.search(name)), None)
    if dimension is not None and len(shape) >= 2 and tensor > 1 and shape[dimension] % tensor == 0:
        axes[dimension] = TENSOR
    left = [d for d, size in enumerate(shape) if axes[d] is None and size % fsdp == 0]
    if fsdp > 1 and left:
        axes[max(left, key=lambda d: (shape[d], d))] = FSDP
    return P(*axes) if any(axes) else P()


def sharded_put(mesh: Mesh) -> Callable[[np.ndarray, str], jax.Array]:
    """A function that gives every device of all processes its part of an array, which each process holds whole."""

    def place(array: np.ndarray, name: str) -> jax.Array:
        sharding = NamedSharding(mesh, spec_of(name, array.shape, dict(mesh.shape)))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return place


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh, place: str) -> None:
    """Raises a UserError unless the devices of the batch axes divide the batch, which has a row at least."""
    if batch_size < 1:
        raise UserError(f"{place}={batch_size}: a batch has at least one row")
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH]))
    if batch_size % shards:
        nearest = sorted({max(shards, batch_size // shards * shards), -(-batch_size // shards) * shards})
        raise UserError(
            f"{place}={batch_size} is not divisible by the {shards} devices of data x fsdp; "
            f"nearest: {', '.join(map(str, nearest))}"
        )
