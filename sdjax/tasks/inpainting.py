"""Holes filled (LDM, section 4.5): the encoded picture without its hole, and the hole's mask, joined to the latents.

Reads what `sdjax.tasks.ldm.training` reads, and config.data.holes, the least and the largest share of a picture that a
hole may have. CompVis/latent-diffusion, scripts/inpaint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sdjax.core.config import Config
from sdjax.core.tree import Params
from sdjax.data.masks import RandomMask
from sdjax.models.apply import apply
from sdjax.models.autoencoder import AutoencoderConfig, autoencoder_of
from sdjax.models.conditioning import Cond
from sdjax.tasks.latent.networks import VAE
from sdjax.tasks.ldm.conditioner import Columns, Conditioner, Told
from sdjax.tasks.ldm.training import first_stage_of, make_latent_task
from sdjax.training.task import Task

IMAGE, MASK = "image", "mask"


@dataclass(frozen=True)
class HoleConditioner(Conditioner):
    """`image`, uint8 [b H W 3], and `mask`, uint8 [b H W 1], 1 in the hole.

    Attributes:
        first_stage: sizes of the autoencoder, which encodes what is around the hole.
    """

    first_stage: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    @property
    def concat_channels(self) -> int:
        return self.first_stage.latent_channels + 1

    def cond(self, params: Params, columns: Columns) -> Cond:
        mask = jnp.asarray(columns[MASK], jnp.float32)
        x = (jnp.asarray(columns[IMAGE], jnp.float32) / 255.0 * (1.0 - mask)) * 2.0 - 1.0
        seen = apply(autoencoder_of(self.first_stage), params[VAE], x, method="encode").mean
        factor = self.first_stage.factor
        # The nearest pixel of a latent is the first of its block (torch's interpolate, "nearest").
        small = mask[:, ::factor, ::factor] * 2.0 - 1.0
        return Cond(concat=jax.lax.stop_gradient(jnp.concatenate([seen * self.first_stage.scaling_factor, small], -1)))

    def finished(self, images: Float[Array, "b H W 3"], columns: Columns) -> Float[Array, "b H W 3"]:
        """Outside of the hole every pixel is the given one."""
        hole = jnp.asarray(columns[MASK]) > 0
        return jnp.where(hole, images, jnp.asarray(columns[IMAGE], jnp.float32) / 255.0)

    def size(self, columns: Columns) -> tuple[int, int]:
        _, height, width, _ = columns[IMAGE].shape
        return height, width


def conditioner_of(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> HoleConditioner:
    """Of a stored model."""
    del settings
    return HoleConditioner(sizes[VAE])


def told_by(config: Config) -> Told:
    """A picture and a random mask."""
    least, most = config.data.holes
    side = config.data.size
    return Told(
        HoleConditioner(first_stage_of(config)),
        (RandomMask(least, most),),
        {MASK: jax.ShapeDtypeStruct((side, side, 1), np.uint8)},
    )


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "inpainting"."""
    return make_latent_task(config, mesh, told_by(config))
