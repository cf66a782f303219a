"""Image embeddings with noise of a level, which Stable unCLIP is conditioned on (Stability-AI/stablediffusion)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sdjax.diffusion.denoise import q_sample
from sdjax.models.layers import timestep_embedding


class EmbeddingStatistics(NamedTuple):
    """Mean and standard deviation of CLIP's image embeddings, feature by feature."""

    mean: Float[Array, " d"]
    std: Float[Array, " d"]


def noised_embedding(
    embedding: Float[Array, "b d"],
    noise: Float[Array, "b d"],
    level: Int[Array, " b"],
    abar: Float[Array, " b"],
    statistics: EmbeddingStatistics,
) -> Float[Array, "b 2*d"]:
    """The embedding with noise, then the level's sinusoids (CLIPEmbeddingNoiseAugmentation; diffusers).

    Args:
        embedding, noise: CLIP's, projected; and standard normal noise, which is added to normalised features.
        level: a timestep of the schedule of noise.
        abar: that schedule's at the level.
        statistics: that normalise the features.
    """
    mean, std = statistics
    noised = q_sample((embedding - mean) / std, noise, abar) * std + mean
    sinusoids = timestep_embedding(level.astype(jnp.float32), embedding.shape[-1])
    return jnp.concatenate([noised, sinusoids], axis=-1)
