"""Adapters that change weights and are no branch beside a layer: LoHa, LoKr, IA3, whole differences, norms, DoRA.

Their entries stand in a layer's "lora" as the factors of `sdjax.models.lora` do, under the names that LyCORIS gives
them (KohakuBlueleaf/LyCORIS, lycoris/modules), in PyTorch's layout [o, i, *hw]:

| leaves | difference at strength m |
|---|---|
| hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b (hada_t1, hada_t2) | m scale (w1_a w1_b) * (w2_a w2_b), LoHa |
| lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2, or lokr_w2_a, lokr_w2_b (lokr_t2) | m scale kron(w1, w2), LoKr |
| ia3 [o, 1] or [1, i] | m W * ia3 |
| diff, diff_b; w_norm, b_norm | m times themselves, of weight and bias |
| dora_scale [o, 1] or [1, i] beside factors of any kind | m (W' - W), W' = dora_scale (W + D) / norm(W + D) |
| magnitude [o] beside down and up | the same with m D in place of D, and no m outside: peft's rule |

A norm is taken over the axes of which `dora_scale` has one. Differences of several entries are those of the same weight
and are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.core.tree import Tree
from sdjax.models.lora import product

Entry = Mapping[str, Any]
DORA, MAGNITUDE, IA3 = "dora_scale", "magnitude", "ia3"
BIASES = dict.fromkeys(("diff_b", "b_norm"), "bias")
WEIGHTS = ("kernel", "scale")
"""Leaf of a layer that is called weight in PyTorch: of a dense or convolutional layer, and of a norm."""


def is_branch(entry: Entry) -> bool:
    """Tell whether an entry acts beside its layer, and need not change its weights."""
    return "down" in entry and DORA not in entry and MAGNITUDE not in entry


def changed(layer: Tree, entries: Sequence[Entry], strengths: Sequence[Array | float]) -> dict[str, Array]:
    """The leaves of a layer that entries change, in the types that they have; traceable."""
    each = [differences(layer, entry, strength) for entry, strength in zip(entries, strengths, strict=True)]
    sums = {leaf: sum(one[leaf] for one in each if leaf in one) for found in each for leaf in found}
    return {leaf: (layer[leaf].astype(jnp.float32) + added).astype(layer[leaf].dtype) for leaf, added in sums.items()}


def differences(layer: Tree, entry: Entry, strength: Array | float) -> dict[str, Float[Array, "..."]]:
    """Differences in float32 that an entry makes to leaves of its layer, by leaf; branches are read, too."""
    strength = jnp.asarray(strength, jnp.float32)
    entry = {name: leaf.astype(jnp.float32) for name, leaf in entry.items()}
    found = {leaf: strength * entry[name] for name, leaf in BIASES.items() if name in entry}
    leaf = next(name for name in WEIGHTS if name in layer)
    if set(entry) - {*BIASES, "scale"}:
        weight = to_torch(layer[leaf].astype(jnp.float32))
        found[leaf] = from_torch(_difference(weight, entry, strength).reshape(weight.shape))
    return found


def to_torch(weight: Float[Array, "*hw i o"]) -> Float[Array, "o i *hw"]:
    """A kernel in PyTorch's layout; vectors as they are."""
    return weight.transpose(*((3, 2, 0, 1) if weight.ndim == 4 else range(weight.ndim)[::-1]))


def from_torch(weight: Float[Array, "o i *hw"]) -> Float[Array, "*hw i o"]:
    """The inverse of `to_torch`."""
    return weight.transpose(*((2, 3, 1, 0) if weight.ndim == 4 else range(weight.ndim)[::-1]))


def _difference(weight: Array, entry: Entry, strength: Array) -> Array:
    if IA3 in entry:
        return strength * weight * entry[IA3].reshape(*entry[IA3].shape, *[1] * (weight.ndim - 2))
    if whole := [entry[name] for name in ("diff", "w_norm") if name in entry]:
        return strength * whole[0]
    added = (entry["scale"] * _product(entry)).reshape(weight.shape)
    if DORA in entry:
        return strength * (_renormed(weight + added, entry[DORA]) - weight)
    if MAGNITUDE in entry:
        made = _renormed(weight + strength * added, entry[MAGNITUDE].reshape(-1, *[1] * (weight.ndim - 1)))
        return jnp.where(strength == 0.0, 0.0, made - weight)  # where peft leaves the magnitudes in
    return strength * added


def _renormed(weight: Array, magnitude: Array) -> Array:
    """A weight of given norms (DoRA; Liu et al. 2024, eq. 5)."""
    magnitude = magnitude.reshape(*magnitude.shape, *[1] * (weight.ndim - magnitude.ndim))
    axes = tuple(axis for axis, size in enumerate(magnitude.shape) if size == 1)
    return magnitude * weight / jnp.sqrt(jnp.square(weight).sum(axes, keepdims=True))


def _product(entry: Entry) -> Array:
    """Difference of a weight that factors of any kind make, unscaled; its axes may be joined."""
    if "down" in entry:
        return to_torch(product(entry))
    if "hada_w1_a" in entry:
        return _hadamard(entry, 1) * _hadamard(entry, 2)
    first, second = _kronecker(entry, 1), _kronecker(entry, 2)
    return jnp.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)


def _hadamard(entry: Entry, number: int) -> Array:
    a, b = (entry[f"hada_w{number}_{side}"] for side in "ab")
    if f"hada_t{number}" in entry:
        return jnp.einsum("ijhw,io,jk->okhw", entry[f"hada_t{number}"], a, b)
    return a @ b


def _kronecker(entry: Entry, number: int) -> Array:
    name = f"lokr_w{number}"
    if name in entry:
        return entry[name]
    a, b = entry[f"{name}_a"], entry[f"{name}_b"]
    if f"lokr_t{number}" in entry:
        return jnp.einsum("ijhw,ip,jr->prhw", entry[f"lokr_t{number}"], a, b)
    return a @ b
