"""From token ids to what a UNet is told of prompts."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.core.tree import Params
from sdjax.models.apply import apply
from sdjax.models.clip import emphasise, layer_states
from sdjax.tasks.latent.system import System, TextEncoder


class Text(NamedTuple):
    """Prompts as a system's text encoders take them, one entry an encoder.

    Attributes:
        ids: n chunks a prompt.
        weights: emphasis of each token; None where all weigh 1.
    """

    ids: tuple[Int[Array | np.ndarray, "b n l"], ...]
    weights: tuple[Float[Array | np.ndarray, "b n l"], ...] | None = None


class Encoded(NamedTuple):
    """What the text encoders say.

    Attributes:
        context: the states of all chunks one after another, the encoders' features joined.
        pooled: the last encoder's summary of the first chunk.
    """

    context: Float[Array, "b m d"]
    pooled: Float[Array, "b p"]


def encode_text(system: System, params: Params, text: Text, clip_skip: int = 0) -> Encoded:
    """Runs every text encoder over every chunk.

    Args:
        system: static.
        params: of the text encoders at least.
        text: the prompts.
        clip_skip: layers to skip beyond the model's own, as diffusers counts.

    Raises:
        UserError: an encoder has no so early a layer.
    """
    weights = text.weights or (None,) * len(text.ids)
    outputs = [
        _encode(encoder, params, ids, weight, clip_skip)
        for encoder, ids, weight in zip(system.text_encoders, text.ids, weights, strict=True)
    ]
    context = jnp.concatenate([output.context for output in outputs], axis=-1)
    return Encoded(context, outputs[-1].pooled)


def _encode(
    encoder: TextEncoder, params: Params, ids: Array | np.ndarray, weights: Array | np.ndarray | None, clip_skip: int
) -> Encoded:
    b, n, length = ids.shape
    own = params[encoder.name]
    output = apply(encoder.module, own, ids.reshape(b * n, length))
    states = layer_states(
        output, encoder.layer, lambda hidden: apply(encoder.module, own, hidden, method="normalise"), clip_skip
    )
    states = states.reshape(b, n, length, -1)
    if weights is not None:
        states = emphasise(states, jnp.asarray(weights))
    return Encoded(states.reshape(b, n * length, -1), output.pooled.reshape(b, n, -1)[:, 0])
