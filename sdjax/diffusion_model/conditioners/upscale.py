"""Enlarging: a small image, as large as the latents, joined to the noisy latents.

LDM's super-resolution (section 4.4), and Stable Diffusion's upscaler (stabilityai/stable-diffusion-x4-upscaler), whose
small image has noise of a level: the class label of the backbone, and a timestep of a schedule of its own (Ho et al.
2022, noise conditioning augmentation). Models of pixels, as DeepFloyd IF's stage II, have it enlarged first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.image_inputs import ImageInput, load_image, resize_bilinear, rgb, size_of
from sdjax.diffusion.denoise import q_sample
from sdjax.diffusion.samplers import first_noise, schedule_of
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, in_unit_range, required
from sdjax.models.conditioning import Cond

LOW = "low_res"
SMALL, LEVEL, SIGNAL, NOISE = "small", "noise_level", "signal", "small_noise"
STREAM = 1  # an image's key is folded with it for the noise of its small image
# How the published model noises its small image, for single files, which do not say it.
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
STRETCH = 1.1  # of a small image along one side more than along the other: sides are rounded to what a network takes


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
    usual_level: ClassVar[int] = 20
    usual_schedule: ClassVar[Mapping[str, Any]] = SCHEDULE

    @property
    def traits(self) -> Traits:
        return Traits(("init_image",), (LEVEL,), concat_channels=3, strength=None)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        level = min(self.usual_level, self.levels - 1) if inputs.get(LEVEL) is None else inputs[LEVEL]
        if not 0 <= level < self.levels:
            raise UserError(f"noise_level {level}: {host.name} knows the levels 0 to {self.levels - 1}")
        schedule = schedule_of(host.settings.get("low_res_scheduler") or self.usual_schedule)
        small = self._small(required(inputs, "init_image", host.name), host)
        signal = np.float32(schedule.alphas_cumprod[level])
        return {SMALL: small, LEVEL: np.int32(level), SIGNAL: signal}

    def with_image(self, columns: Mapping[str, np.ndarray], image: Any, host: Host) -> Mapping[str, np.ndarray]:
        return {**columns, SMALL: self._small(image, host)}

    def _small(self, given: ImageInput, host: Host) -> Float[np.ndarray, "h w 3"]:
        """The small image in [-1, 1]."""
        return (load_image(given, host.latents) * 2.0 - 1.0).astype(np.float32)

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
class PixelUpscaleConditioner(UpscaleConditioner):
    """`small` [b H W 3], enlarged to the images' size before noise is added (DeepFloyd IF), and the base's others."""

    usual_level: ClassVar[int] = 250
    usual_schedule: ClassVar[Mapping[str, Any]] = {"beta_schedule": "squaredcos_cap_v2"}

    @property
    def traits(self) -> Traits:
        return super().traits._replace(guidance_scale=4.0, steps=50)

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> None:
        """The images have the model's size, whatever the small one's."""

    def _small(self, given: ImageInput, host: Host) -> Float[np.ndarray, "H W 3"]:
        pixels = rgb(given, "init_image")
        (height, width), (rows, columns) = pixels.shape[:2], host.size
        stretch = (rows / height) / (columns / width)
        if height > rows or width > columns or not 1 / STRETCH <= stretch <= STRETCH:
            raise UserError(
                f"init_image is {width}x{height} pixels; {host.name} enlarges it to {columns}x{rows}: give one that is "
                "no larger and of the same proportions, or another width and height"
            )
        return (resize_bilinear(pixels, host.size) * 2.0 - 1.0).astype(np.float32)


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
