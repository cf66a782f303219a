"""unCLIP's prior, from the text embedding of CLIP to an image embedding (Ramesh et al. 2022, section 2.2): Karlo's."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sdjax.models.clip import CLIPLayer
from sdjax.models.conditioning import Cond
from sdjax.models.layers import EmbeddingMLP, timestep_embedding

ADDED = 4
"""Tokens after those of the text: its embedding, the timestep, the noisy image embedding, and a learned one."""


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of a prior.

    Attributes:
        embedding_dim: of CLIP's embeddings, and of its text encoder's states.
        tokens: of the text, pads included.
    """

    embedding_dim: int = 768
    layers: int = 20
    heads: int = 32
    head_size: int = 64
    tokens: int = 77

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_size

    @property
    def feed_forward(self) -> int:
        """Features within a feed-forward."""
        return 4 * self.width

    @property
    def activation(self) -> str:
        """The feed-forward's, a key of CLIP's `ACTIVATIONS`."""
        return "gelu"

    @property
    def blocks(self) -> int:
        """Layers, each of which has parameters of its own."""
        return self.layers

    def example_inputs(self) -> tuple[Array, Array, Cond]:
        """A noisy embedding, a timestep and a condition, for initialisation."""
        embedding = jnp.zeros((1, self.embedding_dim))
        return embedding, jnp.zeros(1), Cond(jnp.zeros((1, self.tokens, self.embedding_dim)), vector=embedding)


VARIANTS = {
    "karlo": PriorConfig(),  # 1,022,030,080 parameters
}


class PriorTransformer(nn.Module):
    """A causal transformer that predicts the clean image embedding where its last token stands.

    Noisy and predicted embeddings are normalised by the mean and standard deviation of CLIP's, which are parameters.
    """

    config: PriorConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, normal = self.config, nn.initializers.normal(0.01)
        self.encoder_hidden_states_proj = nn.Dense(c.width, dtype=self.dtype)
        self.embedding_proj = nn.Dense(c.width, dtype=self.dtype)
        self.time_embedding = EmbeddingMLP(c.width, dtype=self.dtype)
        self.proj_in = nn.Dense(c.width, dtype=self.dtype)
        self.prd_embedding = self.param("prd_embedding", normal, (1, 1, c.width))
        self.positional_embedding = self.param("positional_embedding", normal, (1, c.tokens + ADDED, c.width))
        self.layers = [CLIPLayer(c, dtype=self.dtype, name=f"layers_{i}") for i in range(c.layers)]
        self.norm_out = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype)
        self.proj_to_clip_embeddings = nn.Dense(c.embedding_dim, dtype=self.dtype)
        self.clip_mean = self.param("clip_mean", nn.initializers.zeros, (1, c.embedding_dim))
        self.clip_std = self.param("clip_std", nn.initializers.ones, (1, c.embedding_dim))

    def __call__(self, x: Float[Array, "b e"], t: Float[Array, " b"], cond: Cond) -> Float[Array, "b e"]:
        """The clean image embedding, normalised.

        Args:
            x: noisy image embeddings, normalised.
            t: timesteps.
            cond: of the text: `context` [b tokens e], CLIP's last states; `vector` [b e], its embedding; `mask`, the
                tokens that are no pads, the first one among them; None means all.
        """
        x = self._tokens(x, t, cond)
        mask = None if cond.mask is None else jnp.pad(cond.mask, ((0, 0), (0, ADDED)), constant_values=True)
        for layer in self.layers:
            x = layer(x, mask)
        return self.proj_to_clip_embeddings(self.norm_out(x[:, -1]))

    def denormalise(self, x: Float[Array, "b e"]) -> Float[Array, "b e"]:
        """Embeddings beside CLIP's own."""
        return x * self.clip_std + self.clip_mean

    def _tokens(self, x: Array, t: Array, cond: Cond) -> Float[Array, "b l d"]:
        assert cond.context is not None, "a prior needs the states of a text"
        assert cond.vector is not None, "a prior needs the embedding of a text"
        time = self.time_embedding(timestep_embedding(t, self.config.width))
        single = jnp.stack([self.embedding_proj(cond.vector), time, self.proj_in(x)], axis=1)
        learned = jnp.broadcast_to(self.prd_embedding, (len(x), 1, self.config.width))
        tokens = jnp.concatenate([self.encoder_hidden_states_proj(cond.context), single, learned], axis=1)
        return (tokens + self.positional_embedding).astype(self.dtype)
