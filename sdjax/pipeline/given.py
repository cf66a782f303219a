"""Pictures, masks and depth maps that a call is given, checked against the model and brought to its sizes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError
from sdjax.pipeline.inputs import Pictures, check_mask_sizes, how_many, is_one, load_depth, load_masks, load_pictures
from sdjax.pipeline.request import Shape

# What each kind of model (`System.extra`) cannot do without, and what it makes nothing of.
NEEDED = {"nothing": (), "masked": ("init_image", "mask"), "picture": ("init_image",), "depth": ("depth",)}
UNUSED = {"nothing": ("depth",), "masked": ("depth",), "picture": ("depth", "mask"), "depth": ()}
MODELS = {"nothing": "this model", "masked": "an inpainting model", "picture": "an upscaler", "depth": "a depth model"}


class Given(NamedTuple):
    """What a call was given; None where there is nothing.

    Attributes:
        init_image: to begin from, to keep part of, or to enlarge.
        mask: white where `init_image` is painted anew.
        depth: of the picture that shall be made, near as bright.
    """

    init_image: Pictures | None
    mask: Pictures | None
    depth: Pictures | None


class Inputs(NamedTuple):
    """The same as arrays, one row an image, or one for all or one a prompt until `spread`; None where there is none.

    Attributes:
        pictures: to begin from, [-1, 1].
        mask: 1 where the picture is painted anew, at the picture's size.
        small: an upscaler's low-resolution picture, [-1, 1].
        depth: over the latents, [-1, 1].
    """

    pictures: Float[np.ndarray, "n H W 3"] | None = None
    mask: Float[np.ndarray, "n H W 1"] | None = None
    small: Float[np.ndarray, "n h w 3"] | None = None
    depth: Float[np.ndarray, "n h w 1"] | None = None

    def spread(self, prompts: int, num_images: int) -> Inputs:
        """One row an image: all images of the first prompt come first."""
        index = np.arange(prompts).repeat(num_images)
        return Inputs(*(None if rows is None else rows[index % len(rows)] for rows in self))


def check_given(kind: str, given: Given) -> None:
    """Refuses what a model of this kind lacks or has no use for, and masks that do not fit their picture.

    Raises:
        UserError: naming it.
    """
    for name in NEEDED[kind]:
        if getattr(given, name) is None:
            raise UserError(f"{MODELS[kind]} needs {' and '.join(NEEDED[kind])}; {name} is missing")
    for name in UNUSED[kind]:
        if getattr(given, name) is not None:
            raise UserError(f"{name} is given, of which {MODELS[kind]} makes nothing; leave it out")
    if given.mask is not None:
        if given.init_image is None:
            raise UserError("a mask needs an init_image whose unmasked part is kept")
        check_mask_sizes(given.init_image, given.mask)


def load_inputs(kind: str, given: Given, prompts: int, size: tuple[int, int], shape: Shape) -> Inputs:
    """Arrays of what a call was given.

    Args:
        kind: `System.extra`.
        given: checked.
        prompts: how many there are.
        size: height and width of the pictures to be made.
        shape: of the model.

    Raises:
        UserError: a file cannot be read, an array is no picture, or there are neither one nor as many as prompts.
    """
    latents = shape.latents(*size)[:2]
    pictures = mask = small = None
    if given.init_image is not None and kind == "picture":
        small = load_pictures(given.init_image, prompts, latents)
    elif given.init_image is not None:
        pictures = load_pictures(given.init_image, prompts, size)
    if given.mask is not None:
        mask = load_masks(given.mask, prompts, size)
    depth = None if given.depth is None else load_depth(given.depth, prompts, latents)
    return Inputs(pictures, mask, small, depth)


def count_of(given: Given, prompts: int, last: int) -> int:
    """How many pictures a call that begins with the first image would begin from: none, one for all, or one a prompt.

    Args:
        given: of this call.
        prompts: of this call.
        last: how many prompts there are in all, from the first image's on.
    """
    if given.init_image is None:
        return 0
    return 1 if is_one(given.init_image) or how_many(given.init_image) < prompts else last
