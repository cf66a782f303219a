"""What a UNet is told of a picture, of the prompt and of the negative prompt."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.core.tree import Params
from sdjax.diffusion.denoise import per_image
from sdjax.models.conditioning import Cond
from sdjax.models.layers import timestep_embedding
from sdjax.tasks.latent.system import System
from sdjax.tasks.latent.text import Encoded, Text, encode_text


class Asked(NamedTuple):
    """A prompt and its negative, and what SDXL is told besides.

    Attributes:
        text, negative: with the same number of chunks.
        negative_share: of each image, 0 where the unconditional embeddings are zeros, as SDXL's base was trained, 1
            where they are those of the negative prompt.
        numbers, negative_numbers: micro-conditioning; None for models without.
        lengths: how many tokens of each pair count; the rest fills it up to the batch's longest. None for all.
    """

    text: Text
    negative: Text
    negative_share: Float[Array | np.ndarray, " b"]
    numbers: Float[Array | np.ndarray, "b k"] | None = None
    negative_numbers: Float[Array | np.ndarray, "b k"] | None = None
    lengths: Int[Array | np.ndarray, " b"] | None = None


def conditions(system: System, params: Params, asked: Asked, clip_skip: int = 0) -> tuple[Cond, Cond]:
    """Of the prompts and of the negative prompts, whose texts go through the encoders as one batch.

    Raises:
        UserError: as `encode_text`.
    """
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), asked.text, asked.negative)
    encoded = encode_text(system, params, both, clip_skip)
    count = len(asked.text.ids[0])
    prompt = jax.tree.map(lambda x: x[:count], encoded)
    share = jnp.asarray(asked.negative_share)
    negative = jax.tree.map(lambda x: x[count:] * per_image(share, x).astype(x.dtype), encoded)
    pair = cond(system, prompt, asked.numbers), cond(system, negative, asked.negative_numbers)
    if asked.lengths is None:
        return pair
    seen = jnp.arange(encoded.context.shape[1]) < jnp.asarray(asked.lengths)[:, None]
    return pair[0]._replace(mask=seen), pair[1]._replace(mask=seen)


def cond(system: System, encoded: Encoded, numbers: Float[Array | np.ndarray, "b k"] | None) -> Cond:
    """The tokens to attend to, and SDXL's vector: the pooled prompt, then a sinusoid of each number."""
    if numbers is None:
        return Cond(context=encoded.context)
    sinusoids = timestep_embedding(jnp.asarray(numbers).reshape(-1), system.number_width).reshape(len(numbers), -1)
    return Cond(context=encoded.context, vector=jnp.concatenate([encoded.pooled.astype(jnp.float32), sinusoids], -1))
