"""What is computed of every picture once, before training: the moments of its latents, and what its caption says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.models.apply import apply
from sdjax.tasks.latent.networks import VAE, configs_of
from sdjax.tasks.latent.system import SIZES, System
from sdjax.tasks.latent.text import Text, encode_text

BLANK = "blank"
STORED = jnp.float16
"""Of moments and embeddings: their values are within its range, and it has more digits than bfloat16."""


def fields_of(system: System, text: str, latent: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one training example.

    Args:
        system: the networks.
        text: "prepared" where the embeddings are stored, else the tokens are.
        latent: height and width of the latents.
    """
    shapes: dict[str, Any] = {"moments": ((*latent, 2 * system.autoencoder.config.latent_channels), STORED)}
    if text == "prepared":
        shapes |= {name: (shape.shape, STORED) for name, shape in blank_shapes(system, text).items()}
    else:
        shapes |= {name: (shape.shape, jnp.int32) for name, shape in blank_shapes(system, text).items()}
    if system.numbers:
        shapes["sizes"] = ((SIZES,), jnp.float32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def blank_shapes(system: System, text: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what stands for no caption, which are those of a caption."""
    length = system.text_encoders[0].module.config.max_length
    if text != "prepared":
        return {"tokens": jax.ShapeDtypeStruct((len(system.text_encoders), length), jnp.int32)}
    shapes: dict[str, tuple[int, ...]] = {"context": (length, system.context_width)}
    if system.numbers:
        shapes["pooled"] = (system.pooled_width,)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def encode_moments(system: System, params: Params, images: Array) -> Float[Array, "b h w 2*z"]:
    """Mean and log-variance of the unscaled latents of uint8 pictures."""
    latent = apply(system.autoencoder, params[VAE], images.astype(jnp.float32) / 127.5 - 1.0, method="encode")
    return jnp.concatenate([latent.mean, latent.logvar], axis=-1)


def encode_captions(system: System, params: Params, tokens: Int[Array | np.ndarray, "b e l"]) -> dict[str, Array]:
    """What the UNet is told of captions, under the names of `blank_shapes`."""
    encoded = encode_text(system, params, Text(tuple(jnp.swapaxes(jnp.asarray(tokens), 0, 1)[:, :, None])))
    return {"context": encoded.context} | ({"pooled": encoded.pooled} if system.numbers else {})


def blank_of(system: System, params: Params, empty: Int[np.ndarray, "e l"]) -> dict[str, np.ndarray]:
    """What stands for no caption: zeros for SDXL, whose training dropped embeddings; else those of the empty one."""
    encoded = {name: np.asarray(value[0]) for name, value in encode_captions(system, params, empty[None]).items()}
    return {name: np.zeros_like(value) if system.numbers else value for name, value in encoded.items()}


def identity_of(config: Config, system: System) -> dict[str, Any]:
    """What prepared data must have in common with the run that reads it, as plain data."""
    sizes = configs_of(system)
    encoders = [repr(sizes[encoder.name]) for encoder in system.text_encoders]
    return {
        "components": config.task.components,
        "autoencoder": repr(sizes[VAE]),
        "text_encoders": encoders if config.task.text == "prepared" else [],
        "text": "prepared" if config.task.text == "prepared" else "tokens",
    }


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], place: str) -> None:
    """Refuses prepared data of other networks.

    Raises:
        UserError: naming the first entry that differs.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(f"{place} was prepared with {name} {found.get(name)!r}, this config has {value!r}")
