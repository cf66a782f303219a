"""Bits per dimension of images under a model of pixels, with its learned variance and with the fixed ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.core.errors import UserError
from sdjax.core.prng import stream
from sdjax.core.untrusted import read_json
from sdjax.data.sources.base import Images
from sdjax.data.transforms.images import adm_square
from sdjax.diffusion.bound import VARIANCES, bits_per_dimension
from sdjax.diffusion.samplers import schedule_of
from sdjax.models.conditioning import apply
from sdjax.models.unet2d import UNet2D, UNet2DConfig


def bits(folder: Path, images: Images, steps: int, batch_size: int) -> dict[str, float]:
    """Means over all images, one for each variance that the model has.

    Args:
        folder: what a run of the task "pixels" exports.
        pictures: of any size; they are made as large as the model's.
        steps: of the respaced process.
        batch_size: images at a time.

    Raises:
        UserError: the model cannot be read, or is conditioned on classes.
    """
    unet, scheduler = read_component(folder / "unet", "unet"), read_json(folder / "scheduler" / "scheduler_config.json")
    if not isinstance(unet.config, UNet2DConfig) or unet.config.classes is not None:
        raise UserError(f"{folder} is no model of pixels without classes")
    learned = unet.config.out_channels == 2 * unet.config.in_channels
    side, variances = int(unet.extra["sample_size"]), VARIANCES if learned else VARIANCES[1:]
    fixed = (UNet2D(unet.config), steps, variances, scheduler["prediction_type"], _hashable(scheduler))
    made = []
    for start in tqdm(range(0, len(images), batch_size), "bits", leave=False):
        rows = range(start, min(start + batch_size, len(images)))
        batch = np.stack([adm_square(images[i]["image"], side) for i in rows])
        padded = np.pad(batch, [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)])
        made.append(np.stack(_totals(fixed, unet.params, padded, start))[:, : len(batch)])
    means = np.concatenate(made, axis=1).mean(axis=1)
    return {f"bits_per_dimension_{name}_{steps}": float(value) for name, value in zip(variances, means, strict=True)}


@partial(jax.jit, static_argnums=0)
def _totals(fixed: Any, params: Any, images: UInt8[np.ndarray, "b h w 3"], start: int) -> list[Float[Array, " b"]]:
    unet, steps, variances, prediction, scheduler = fixed
    x0 = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    key = stream(0, "bits", start)
    schedule = schedule_of(dict(scheduler))
    found = bits_per_dimension(lambda x, t: apply(unet, params, x, t), x0, key, schedule, steps, variances, prediction)
    return [found[name].total for name in variances]


def _hashable(scheduler: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Hashable settings of the schedule; lists are not hashable."""
    return tuple(sorted((key, value) for key, value in scheduler.items() if not isinstance(value, list | dict)))
