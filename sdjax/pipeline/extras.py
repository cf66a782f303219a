"""What inpainting and upscaling models are given beside the noisy latents, checked and brought to size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError
from sdjax.pipeline.inputs import Pictures, load_masks, load_pictures
from sdjax.pipeline.request import Shape

NEEDED = {
    "nothing": (),
    "masked": ("init_image", "mask"),
    "picture": ("init_image",),
}


class Given(NamedTuple):
    """Pictures that a call was given; None where there is none.

    Attributes:
        init_image: to begin from, to keep part of, or to enlarge.
        mask: white where `init_image` is painted anew.
    """

    init_image: Pictures | None
    mask: Pictures | None


class Extras(NamedTuple):
    """Arrays for a model's further input channels, one row an image; None where its kind has none.

    Attributes:
        channels: joined as they are: the mask of an inpainting model.
        masked: the picture whose masked part is grey, [-1, 1]; its latents are joined after the mask.
        picture: a low-resolution picture, [-1, 1]; joined after it was noised.
    """

    channels: Float[np.ndarray, "n h w c"] | None = None
    masked: Float[np.ndarray, "n H W 3"] | None = None
    picture: Float[np.ndarray, "n h w 3"] | None = None


def check_given(kind: str, given: Given) -> None:
    """Refuses what a model of this kind lacks or has no use for.

    Raises:
        UserError: naming it.
    """
    for name in NEEDED[kind]:
        if getattr(given, name) is None:
            raise UserError(f"this model needs {' and '.join(NEEDED[kind])}; {name} is missing")
    if given.mask is not None and given.init_image is None:
        raise UserError("a mask needs an init_image whose unmasked part is kept")
    if given.mask is not None and kind == "picture":
        raise UserError("a mask is given, but an upscaler paints no part anew; leave it out")


def load_extras(kind: str, given: Given, count: int, size: tuple[int, int], shape: Shape) -> Extras:
    """The further input of a model of this kind, from checked pictures.

    Raises:
        UserError: a picture cannot be read or has the wrong shape.
    """
    latents = shape.latents(*size)[:2]
    if kind == "masked":
        assert given.init_image is not None
        assert given.mask is not None
        pictures = load_pictures(given.init_image, count, size)
        whole = load_masks(given.mask, count, size, size)
        return Extras(channels=load_masks(given.mask, count, size, latents), masked=pictures * (whole < 0.5))
    if kind == "picture":
        assert given.init_image is not None
        return Extras(picture=load_pictures(given.init_image, count, latents))
    return Extras()
