"""Inpainting: the latents of the image without its masked part, and the mask, joined to the noisy latents.

LDM, section 4.5 and CompVis/latent-diffusion scripts/inpaint.py; the nine-channel models of Stable Diffusion
(runwayml/stable-diffusion, ldm/models/diffusion/ddpm.py LatentInpaintDiffusion).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sdjax.core.tree import Params
from sdjax.data.image_inputs import load_image, load_mask, size_of
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, in_unit_range, required
from sdjax.models.conditioning import Cond

IMAGE, MASK, LATENTS = "image", "mask", "masked_latents"


@dataclass(frozen=True)
class InpaintConditioner(Conditioner):
    """`image` [b H W 3], bytes or floats in [0, 1], and `mask` [b H W 1], 1 where the image is made anew.

    Attributes:
        latent_channels: of the autoencoder.
        factor: pixels of a latent along each side.
        stable_diffusion: whether the mask comes first, as 0 and 1, and the masked part is grey; in LDM's own model the
            mask comes last, as -1 and 1, and the masked part is black.
    """

    latent_channels: int = 4
    factor: int = 8
    stable_diffusion: bool = True

    @property
    def traits(self) -> Traits:
        return Traits(
            required=("init_image", "mask"),
            concat_channels=self.latent_channels + 1,
            strength=1.0,
            feather=4.0 if self.stable_diffusion else 0.0,
            draws_latents=self.stable_diffusion,  # LDM conditions on the mode (ddpm.py, get_learned_conditioning)
        )

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        if self.stable_diffusion or inputs.get("init_image") is None:
            return None
        return size_of(inputs["init_image"])

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        image, mask = (required(inputs, name, host.name) for name in ("init_image", "mask"))
        return {IMAGE: load_image(image, host.size), MASK: load_mask(mask, host.size).astype(np.uint8)}

    def images_to_encode(self, columns: Columns) -> dict[str, Float[Array, "b H W 3"]]:
        image, kept = in_unit_range(columns[IMAGE]), 1.0 - jnp.asarray(columns[MASK], jnp.float32)
        return {LATENTS: (image * 2.0 - 1.0) * kept if self.stable_diffusion else image * kept * 2.0 - 1.0}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        # The nearest pixel of a latent is the first of its block (torch's interpolate, "nearest").
        mask = jnp.asarray(columns[MASK], jnp.float32)[:, :: self.factor, :: self.factor]
        latents = jnp.asarray(columns[LATENTS])
        parts = (mask, latents) if self.stable_diffusion else (latents, mask * 2.0 - 1.0)
        return Cond(concat=jax.lax.stop_gradient(jnp.concatenate(parts, axis=-1)))

    def known(self, columns: Columns) -> tuple[Array | np.ndarray, Array | np.ndarray]:
        return in_unit_range(columns[IMAGE]), columns[MASK]
