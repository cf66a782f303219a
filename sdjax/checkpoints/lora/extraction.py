"""A LoRA from two models: the difference of each layer's weights by its largest singular values."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sdjax.checkpoints.checkpoint import Checkpoint
from sdjax.checkpoints.lora.names import layers_of
from sdjax.checkpoints.lora.patch import own_leaves, params_of
from sdjax.core.errors import UserError


def extract_lora(
    base: Checkpoint, tuned: Checkpoint, rank: int = 16, energy: float | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Factors of what a model has learned, by the paths of its layers; those that are as they were have none.

    Norms, biases and embeddings are no products of factors, and stay out.

    Args:
        base, tuned: models of the same sizes.
        rank: of each layer, at most.
        energy: share of a difference's squared norm that its factors keep at least, where the rank allows.

    Raises:
        UserError: the models differ in their sizes, or not at all.
    """
    configs = {name: part.config for name, part in base.components.items()}
    layers = layers_of(configs)
    theirs = layers_of({name: part.config for name, part in tuned.components.items()})
    if {n: layer.kernel.shape for n, layer in layers.items()} != {n: layer.kernel.shape for n, layer in theirs.items()}:
        raise UserError("a LoRA is extracted from two models of the same sizes; these differ in theirs")
    before, after, found = params_of(base), params_of(tuned), {}
    for name, layer in layers.items():
        if "kernel" not in layer.leaves:
            continue
        old, new = (np.asarray(own_leaves(params, layer)["kernel"], np.float32) for params in (before, after))
        if not np.array_equal(old, new):
            found[name] = factors_of(new - old, rank, energy)
    if not found:
        raise UserError("the two models have the same weights; there is no LoRA to extract")
    return found


def factors_of(difference: Float[np.ndarray, "*hw i o"], rank: int, energy: float | None) -> dict[str, np.ndarray]:
    """The best factors of a difference (Eckart & Young 1936), which share its singular values."""
    *taps, inputs, outputs = difference.shape
    left, values, right = np.linalg.svd(difference.reshape(-1, outputs), full_matrices=False)
    if energy is not None:
        kept = np.cumsum(values.astype(np.float64) ** 2)
        rank = min(rank, 1 + int(np.searchsorted(kept, energy * kept[-1])))
    rank = min(rank, len(values))
    root = np.sqrt(values[:rank])
    down = (left[:, :rank] * root).reshape(*taps, inputs, rank)
    return {"down": down, "up": root[:, None] * right[:rank], "scale": np.ones((), np.float32)}
