"""Vector quantisation: latents rounded to a learned codebook (van den Oord et al. 2017; taming-transformers)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BETA = 0.25


class Quantized(NamedTuple):
    """Rounded latents.

    Attributes:
        z: vectors of the codebook; their gradient goes to the latents as if nothing had been rounded.
        codes: which vectors, [0, codes).
        loss: mean squared distance, whose gradient draws latents to their vectors and, `BETA` times as strongly,
            vectors to their latents. (The published models were trained so; their code's "legacy" form puts the weight
            on the codebook's term, not on the commitment.)
    """

    z: Float[Array, "b h w z"]
    codes: Int[Array, "b h w"]
    loss: Float[Array, ""]


class VectorQuantizer(nn.Module):
    """A codebook.

    Attributes:
        codes: how many vectors it has.
        width: of each.
    """

    codes: int
    width: int

    def setup(self) -> None:
        def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            return jax.random.uniform(key, shape, dtype, -1.0 / self.codes, 1.0 / self.codes)

        self.embedding = nn.Embed(self.codes, self.width, embedding_init=uniform)

    def __call__(self, z: Float[Array, "b h w z"]) -> Quantized:
        """The nearest vectors in Euclidean distance, the first of equals."""
        z = z.astype(jnp.float32)
        vectors = self.embedding.embedding
        # |z|^2 is the same for all vectors, and so does not matter for the nearest.
        distances = jnp.square(vectors).sum(-1) - 2.0 * jnp.einsum("...z,nz->...n", z, vectors)
        codes = jnp.argmin(distances, axis=-1)
        nearest = self.embedding(codes)
        fixed, moved = jax.lax.stop_gradient((nearest, z))
        loss = jnp.square(fixed - z).mean() + BETA * jnp.square(nearest - moved).mean()
        return Quantized(z + jax.lax.stop_gradient(nearest - z), codes, loss)


class Usage(NamedTuple):
    """How much of a codebook some latents use.

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
    """How often each of `size` vectors is used."""
    return jnp.zeros(size).at[codes.reshape(-1)].add(1.0)
