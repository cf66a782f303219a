"""Pictures larger than a model was trained on: made at its own size, enlarged, and painted again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.request import Number, real

STRENGTH = 0.5
# Of given pictures and of another model's part: these belong to the first pass.
FIRST_ONLY = ("init_image", "mask", "feather", "latents", "strength", "refiner", "refiner_start", "width", "height")


def repaint(
    pipe: Pipeline,
    images: Float[np.ndarray, "n H W 3"],
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
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
        options: of the call that made the pictures; those of its own given picture and of its refiner play no part.

    Raises:
        UserError: the scale is not more than 1, or as the call raises.
    """
    scale = real("hires", scale, 1.0)
    if pipe.system.extra in ("masked", "picture"):
        raise UserError(f"hires {scale:g}: the model of {pipe.name} paints no second time; leave it out")
    height, width = (round(side * scale / pipe.shape.factor) * pipe.shape.factor for side in images.shape[1:3])
    rest = {name: value for name, value in options.items() if name not in FIRST_ONLY}
    return pipe(
        prompts, negative_prompt, init_image=list(images), strength=strength, width=width, height=height, **rest
    )
