"""Latents and embeddings that are computed of every image once, before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.diffusion_model.conditioners.text import TextConditioner
from sdjax.diffusion_model.model import AUTOENCODER, DiffusionModel
from sdjax.models.conditioning import apply
from sdjax.tasks.pretrained import frozen_source

STORED = jnp.float16
"""Type of stored moments and embeddings: their values are in its range, and it has more digits than bfloat16."""


def text_conditioner(model: DiffusionModel) -> TextConditioner:
    """The conditioner of a model of prompts."""
    assert isinstance(model.conditioner, TextConditioner), "embeddings are those of prompts"
    return model.conditioner


def encode_moments(model: DiffusionModel, params: Params, images: Array) -> Float[Array, "b h w 2*z"]:
    """Mean and log-variance of the unscaled latents of uint8 images."""
    assert model.autoencoder is not None, "pixels have no latents"
    x = images.astype(jnp.float32) / 127.5 - 1.0
    latent = apply(model.autoencoder, params[AUTOENCODER], x, method="encode")
    return jnp.concatenate([latent.mean, latent.logvar], axis=-1)


def encode_captions(
    model: DiffusionModel, params: Params, tokens: Int[Array | np.ndarray, "b e l"]
) -> dict[str, Array]:
    """Embeddings of captions, under the names of the prepared columns."""
    conditioner = text_conditioner(model)
    columns = {"ids": jnp.asarray(tokens)[:, :, None], "keep": jnp.ones(len(tokens))}
    text = conditioner.embeddings(params, columns)
    return {"context": text.context} | ({"pooled": text.pooled} if conditioner.numbers else {})


def null_embeddings(model: DiffusionModel, params: Params, empty: Int[np.ndarray, "e l"]) -> dict[str, np.ndarray]:
    """Embeddings of the null condition: zeros for SDXL, whose training dropped embeddings; else the empty caption's."""
    encoded = {name: np.asarray(value[0]) for name, value in encode_captions(model, params, empty[None]).items()}
    zeros = not text_conditioner(model).null_ids
    return {name: np.zeros_like(value) if zeros else value for name, value in encoded.items()}


def identity_of(config: Config, model: DiffusionModel) -> dict[str, Any]:
    """Facts that prepared data must have in common with the run that reads it, as plain data."""
    sizes = model.configs()
    encoders = [repr(sizes[encoder.name]) for encoder in text_conditioner(model).encoders]
    return {
        "components": frozen_source(config.task)[1],
        "autoencoder": repr(sizes[AUTOENCODER]),
        "text_encoders": encoders if config.task.text == "prepared" else [],
        "text": config.task.text,
    }


def check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], place: str) -> None:
    """Refuse prepared data of other networks.

    Raises:
        UserError: naming the first entry that differs.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(f"{place} was prepared with {name} {found.get(name)!r}, this config has {value!r}")
