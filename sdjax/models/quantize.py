"""Usage of a codebook."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Usage(NamedTuple):
    """Usage of a codebook by some latents.

    Attributes:
        share: of its vectors, those that are used at all.
        perplexity: exp of the entropy of their frequencies: as many vectors used equally would have it.
    """

    share: Float[Array, ""]
    perplexity: Float[Array, ""]


def usage(counts: Float[Array, " n"]) -> Usage:
    """Args: `counts`, how often each vector of the codebook is used."""
    frequency = counts / counts.sum()
    entropy = -(frequency * jnp.log(jnp.where(frequency > 0, frequency, 1.0))).sum()
    return Usage((counts > 0).mean(), jnp.exp(entropy))


def counts(codes: Int[Array, "..."], size: int) -> Float[Array, " n"]:
    """Counts of each of `size` vectors."""
    return jnp.zeros(size).at[codes.reshape(-1)].add(1.0)
