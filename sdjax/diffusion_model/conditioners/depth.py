"""Depth maps (stabilityai/stable-diffusion-2-depth): one channel joined to the noisy latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from sdjax.core.tree import Params
from sdjax.data.image_inputs import load_depth
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, required
from sdjax.models.conditioning import Cond

DEPTH = "depth"


@dataclass(frozen=True)
class DepthConditioner(Conditioner):
    """`depth`, float32 [b h w 1] in [-1, 1], as large as the latents."""

    @property
    def traits(self) -> Traits:
        return Traits((DEPTH,), concat_channels=1)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        return {DEPTH: load_depth(required(inputs, DEPTH, host.name), host.latents)}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        del params, keys
        return Cond(concat=jnp.asarray(columns[DEPTH]))
