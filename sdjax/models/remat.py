"""Gradient checkpointing: what a block keeps for its backward pass, and what it computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from sdjax.core.errors import unknown


def _products(primitive: Any, *args: Any, **params: Any) -> bool:
    """True for a product with weights: dense ones have no batch dimensions, attention's have."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # everything is kept
    "products": _products,  # convolutions and dense layers are kept; norms, activations and attention computed again
    "blocks": jax.checkpoint_policies.nothing_saveable,  # only what goes into a block is kept; a third more arithmetic
    "scanned": jax.checkpoint_policies.nothing_saveable,  # as "blocks", and equal blocks in a row are one loop
}


def is_scanned(policy: str) -> bool:
    """True where equal blocks in a row are one loop: a program of a few blocks, which compiles in a part of the time
    and memory. Their parameters are copied into one array each call, so it suits training that splits them (FSDP)."""
    return policy == "scanned"


def scan_blocks(block: nn.Module, params: Sequence[Mapping[str, Any]], x: Array, *rest: Any) -> Array:
    """The same blocks, one after the other, as one loop over their stacked parameters.

    Args:
        block: unbound; called with x and `rest`.
        params: of each block.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    @functools.partial(jax.checkpoint, policy=POLICIES["scanned"])
    def body(x: Array, own: Mapping[str, Any]) -> tuple[Array, None]:
        return cast(Array, block.apply({"params": own}, x, *rest)), None

    return jax.lax.scan(body, x, stacked)[0]


def recomputed(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module class, under a policy of POLICIES (Chen et al. 2016); a UserError where there is none."""
    if policy not in POLICIES:
        raise unknown("remat policy", policy, POLICIES, "train.remat")
    return block if POLICIES[policy] is None else nn.remat(block, policy=POLICIES[policy])
