"""Gradient checkpointing: what a block keeps for its backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from sdjax.core.errors import unknown


def _products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Whether an operation is a product with weights: dense ones have no batch dimensions, attention's have."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # everything is kept
    "products": _products,  # convolutions and dense layers are kept; norms, activations and attention computed again
    "blocks": jax.checkpoint_policies.nothing_saveable,  # only what goes into a block is kept; a third more arithmetic
}


def recomputed(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module class, under a policy called "none", "products" or "blocks" (Chen et al. 2016).

    Raises:
        UserError: there is no such policy.
    """
    if policy not in POLICIES:
        raise unknown("remat policy", policy, POLICIES, "train.remat")
    return block if POLICIES[policy] is None else nn.remat(block, policy=POLICIES[policy])
