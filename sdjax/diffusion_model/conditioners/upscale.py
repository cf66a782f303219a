"""Enlarging: a small image, as large as the latents, joined to the noisy latents.

LDM's super-resolution (section 4.4), and Stable Diffusion's upscaler (stabilityai/stable-diffusion-x4-upscaler), whose
small image has noise of a level: the class label of the backbone, and a timestep of a schedule of its own (Ho et al.
2022, noise conditioning augmentation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.image_inputs import load_image, rgb, size_of
from sdjax.diffusion.denoise import q_sample
from sdjax.diffusion.samplers import first_noise, schedule_of
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, in_unit_range, required
from sdjax.models.conditioning import Cond

LOW = "low_res"
SMALL, LEVEL, SIGNAL, NOISE = "small", "noise_level", "signal", "small_noise"
NOISE_LEVEL = 20
STREAM = 1  # an image's key is folded with it for the noise of its small image
# How the published model noises its small image, for single files, which do not say it.
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}


@dataclass(frozen=True)
class _Enlarging(Conditioner):
    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        if inputs.get("init_image") is None:
            return None
        height, width = size_of(inputs["init_image"])
        return height * factor, width * factor


@dataclass(frozen=True)
class UpscaleConditioner(_Enlarging):
    """`small` [b h w 3] in [-1, 1], `noise_level` int32 [b], `signal` [b]: the level's share abar of the image.

    `small_noise` [b h w 3], where it is there, takes the place of the images' own noise.

    Attributes:
        levels: of noise that the backbone knows.
    """

    levels: int = 1000

    @property
    def traits(self) -> Traits:
        return Traits(("init_image",), (LEVEL,), concat_channels=3, strength=None)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        level = min(NOISE_LEVEL, self.levels - 1) if inputs.get(LEVEL) is None else inputs[LEVEL]
        if not 0 <= level < self.levels:
            raise UserError(f"noise_level {level}: {host.name} knows the levels 0 to {self.levels - 1}")
        schedule = schedule_of(host.settings.get("low_res_scheduler") or SCHEDULE)
        small = load_image(required(inputs, "init_image", host.name), host.latents) * 2.0 - 1.0
        signal = np.float32(schedule.alphas_cumprod[level])
        return {SMALL: small.astype(np.float32), LEVEL: np.int32(level), SIGNAL: signal}

    def with_image(self, columns: Mapping[str, np.ndarray], image: Any, host: Host) -> Mapping[str, np.ndarray]:
        return {**columns, SMALL: (load_image(image, host.latents) * 2.0 - 1.0).astype(np.float32)}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        small = jnp.asarray(columns[SMALL])
        if NOISE in columns:
            noise = jnp.asarray(columns[NOISE])
        else:
            assert keys is not None, "the noise of a small image is its own"
            noise = first_noise(jax.vmap(lambda key: jax.random.fold_in(key, STREAM))(keys), small.shape[1:])
        noisy = q_sample(small, noise, jnp.asarray(columns[SIGNAL]))
        return Cond(concat=noisy, label=jnp.asarray(columns[LEVEL]))


@dataclass(frozen=True)
class LowResolutionConditioner(_Enlarging):
    """`low_res`, uint8 [b h w 3], as large as the latents."""

    @property
    def traits(self) -> Traits:
        return Traits(("init_image",), concat_channels=3, keeps_size=True, strength=None)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        small = rgb(required(inputs, "init_image", host.name), "init_image")
        return dict(self.with_image({}, small, host))

    def with_image(self, columns: Mapping[str, np.ndarray], image: Any, host: Host) -> Mapping[str, np.ndarray]:
        return {**columns, LOW: np.rint(image * 255.0).astype(np.uint8)}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        return Cond(concat=in_unit_range(columns[LOW]) * 2.0 - 1.0)
