"""Images made larger without a prompt: by Lanczos, nearest pixels, or a model that enlarges."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdjax.core.errors import UserError, unknown
from sdjax.pipeline.pipeline import Pipeline
from sdjax.serve.api.a1111.fields import ExtrasFields, UpscalerItem
from sdjax.serve.api.a1111.resizing import Size
from sdjax.serve.jobs import Call
from sdjax.serve.limits import Limits
from sdjax.serve.models import Model

NONE = "None"
FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
FACTOR = 4  # that A1111 names beside its filters, which know any
SEED = 0


class EnlargedSize(NamedTuple):
    """The size of an enlarged image, as width and height.

    Attributes:
        size: to enlarge to.
        crop: to cut that to, or to fill it up to with black; None not to.
    """

    size: Size
    crop: Size | None = None

    def cut(self, image: Image.Image) -> Image.Image:
        """An enlarged image as it is answered."""
        if self.crop is None:
            return image
        left, top = (have // 2 - want // 2 for have, want in zip(image.size, self.crop, strict=True))
        return image.crop((left, top, left + self.crop[0], top + self.crop[1]))


def upscalers(models: Iterable[Model]) -> list[UpscalerItem]:
    """Names of upscalers: A1111's two filters, and loaded models that enlarge."""
    own = [UpscalerItem(name=name, scale=FACTOR) for name in (NONE, *FILTERS)]
    pipes = enlargers(models).items()
    return own + [UpscalerItem(name=name, model_name=name, scale=pipe.model.factor) for name, pipe in pipes]


def enlargers(models: Iterable[Model]) -> dict[str, Pipeline]:
    """Loaded models whose condition is a small image, by name."""
    pipes = {model.name: model.pipe for model in models}
    return {name: pipe for name, pipe in pipes.items() if pipe is not None and "noise_level" in pipe.inputs}


def check_extras(body: ExtrasFields, known: Iterable[str]) -> None:
    """Hold a request to what is here; a UserError names the field."""
    for name in ("gfpgan_visibility", "codeformer_visibility"):
        if getattr(body, name) > 0.0:
            raise UserError(f"{name} {getattr(body, name):g}: faces are not restored here; leave it out")
    for name in (body.upscaler_1, body.upscaler_2):
        if name not in ("", NONE, *FILTERS, *known):
            raise unknown("upscaler", name[:80], [NONE, *FILTERS, *known])


def target_of(body: ExtrasFields, image: Image.Image, limits: Limits) -> EnlargedSize:
    """The size that a request asks for; a UserError where it is out of range."""
    width, height = image.size
    wanted = body.upscaling_resize_w, body.upscaling_resize_h
    to_size = body.resize_mode == 1
    factor = max(wanted[0] / width, wanted[1] / height) if to_size else body.upscaling_resize
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    crop = wanted if to_size and body.upscaling_crop else None
    for sides in (size, crop or size):
        if sides[0] * sides[1] > limits.max_pixels:
            raise UserError(f"an image of {sides[0]}x{sides[1]} pixels: at most {limits.max_pixels} pixels are made")
    return EnlargedSize(size, crop)


def filtered(image: Image.Image, name: str, size: Size) -> Image.Image:
    """An image at another size by a filter's name."""
    return image.resize(size, FILTERS[name])


def enlarging_call(image: Image.Image) -> Call:
    """The call of a model that enlarges."""
    return Call("", None, {"init_image": image, "seed": SEED})


def fitted(made: UInt8[np.ndarray, "h w 3"], size: Size) -> Image.Image:
    """An image that a model enlarged at the size that was wanted."""
    image = Image.fromarray(made)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
