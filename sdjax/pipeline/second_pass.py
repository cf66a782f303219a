"""Pictures larger than a model was trained on: made at its own size, enlarged, and painted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import start_of
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.request import Number, real

STRENGTH = 0.5
# What belongs to the first pass: its size, its noise and another model's part.
FIRST_ONLY = ("latents", "refiner", "refiner_start", "width", "height", "batch_size")


def repaint(
    pipe: Pipeline,
    images: Float[np.ndarray, "n H W 3"],
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str | None] | None = None,
    *,
    scale: Number,
    strength: Number = STRENGTH,
    **options: Any,
) -> Float[np.ndarray, "n H2 W2 3"]:
    """The high-resolution second pass that A1111's web UI calls hires fix, with Lanczos as its upscaler.

    Args:
        pipe: that made the pictures.
        images: in [0, 1].
        prompts: one a picture.
        negative_prompt: one, or one a picture.
        scale: how many times as wide and high; sides are rounded to what the model can make.
        strength: in (0, 1], how much is painted anew.
        options: of the call that made the pictures; its refiner plays no part.

    Raises:
        UserError: as `check_second_pass`, or as the call raises.
    """
    check_second_pass(pipe, scale, strength, options)
    height, width = (round(side * scale / pipe.shape.factor) * pipe.shape.factor for side in images.shape[1:3])
    rest = {name: value for name, value in options.items() if name not in FIRST_ONLY}
    return pipe(
        prompts, negative_prompt, init_image=list(images), strength=strength, width=width, height=height, **rest
    )


def check_second_pass(pipe: Pipeline, scale: Number, strength: Number, options: Mapping[str, Any]) -> None:
    """Refuses what `repaint` would, before there are pictures.

    Raises:
        UserError: the scale is less than 1, the strength not in (0, 1], or the pictures are made from given ones.
    """
    real("hires", scale, 1.0)
    start_of(1, real("hires_strength", strength, 0.0))
    if pipe.system.extra in ("masked", "picture") or options.get("init_image") is not None:
        raise UserError(f"hires {scale:g} is for pictures from a prompt alone; set --width and --height instead")
