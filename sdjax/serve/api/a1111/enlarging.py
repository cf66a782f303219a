"""Images made larger without a prompt: by Lanczos, nearest pixels, or a model that enlarges by four."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdjax.core.errors import UserError, unknown
from sdjax.data.images import on_white
from sdjax.pipeline.pipeline import Pipeline
from sdjax.serve.api.a1111.fields import ExtrasFields, UpscalerItem
from sdjax.serve.api.a1111.resizing import Size
from sdjax.serve.jobs import Call
from sdjax.serve.limits import Limits
from sdjax.serve.models import Model

NONE = "None"
FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
FACTOR = 4  # of models that enlarge
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
    return own + [UpscalerItem(name=name, model_name=name, scale=FACTOR) for name in enlargers(models)]


def enlargers(models: Iterable[Model]) -> list[str]:
    """Names of loaded models that enlarge an image."""
    pipes = {model.name: model.pipe for model in models}
    return [name for name, pipe in pipes.items() if pipe is not None and enlarges(pipe)]


def enlarges(pipe: Pipeline) -> bool:
    """True of a model whose condition is the small image."""
    return "noise_level" in pipe.inputs


def check_extras(body: ExtrasFields, known: list[str]) -> None:
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


def enlarging_call(image: Image.Image, multiple: int) -> Call:
    """The call of a model that enlarges, of an image whose sides are filled up to what it can make."""
    pixels = np.asarray(on_white(image))
    pads = [(0, -side % multiple) for side in pixels.shape[:2]]
    padded = Image.fromarray(np.pad(pixels, [*pads, (0, 0)], "edge"))
    return Call("", None, {"init_image": padded, "seed": SEED})


def fitted(made: np.ndarray, image: Image.Image, size: Size) -> Image.Image:
    """An enlarged image without what its small one was filled up with, at the size that was wanted."""
    own = Image.fromarray(made[: FACTOR * image.height, : FACTOR * image.width])
    return own if own.size == size else own.resize(size, Image.Resampling.LANCZOS)
