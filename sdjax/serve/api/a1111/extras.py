"""Settings inside images, and images made larger (modules/postprocessing.py, scripts/postprocessing_upscale.py)."""

from __future__ import annotations

import html
import io

import numpy as np
from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image

from sdjax.cli.records import parameters
from sdjax.cli.settings.a1111 import split
from sdjax.cli.settings.containers import read_texts
from sdjax.cli.settings.read import WRITERS, find_settings
from sdjax.core.errors import UserError
from sdjax.data.images import on_white
from sdjax.serve.api.a1111.coding import decoded, encoded, file_of
from sdjax.serve.api.a1111.enlarging import (
    FILTERS,
    NONE,
    check_extras,
    enlargers,
    enlarging_call,
    filtered,
    fitted,
    target_of,
)
from sdjax.serve.api.a1111.fields import (
    BatchImages,
    EnlargedImage,
    EnlargedImages,
    ExtrasFields,
    ImageSettings,
    ImageWithSettings,
    SingleImage,
)
from sdjax.serve.api.a1111.session import ORIGIN
from sdjax.serve.engine import Engine
from sdjax.serve.requests import wait_for

PARAMETERS = "parameters"


def router(engine: Engine) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

    @routes.post("/png-info")
    async def png_info(body: ImageWithSettings) -> ImageSettings:
        """Settings inside an image, of any program that is known here, as A1111 writes them."""
        data = file_of(body.image, "image", engine.limits)
        return await run_in_threadpool(settings_of, data)

    @routes.post("/extra-single-image")
    async def single(body: SingleImage, request: Request) -> EnlargedImage:
        """An image made larger."""
        (made,) = await enlarged(body, [body.image], request)
        return EnlargedImage(image=made if body.show_extras_results is not False else None, html_info=said(body))

    @routes.post("/extra-batch-images")
    async def batch(body: BatchImages, request: Request) -> EnlargedImages:
        """Images made larger."""
        most = engine.limits.max_images
        if len(body.imageList) > most:
            raise UserError(f"imageList: {len(body.imageList)} images; at most {most} are read at a time")
        made = await enlarged(body, [image.data for image in body.imageList], request)
        return EnlargedImages(images=made, html_info=said(body))

    async def enlarged(body: ExtrasFields, texts: list[str], request: Request) -> list[str]:
        known = enlargers(engine.models.all.values())
        check_extras(body, known)
        made = []
        for number, text in enumerate(texts):
            image = on_white(await run_in_threadpool(decoded, text, f"image {number}", engine.limits))
            target = target_of(body, image, engine.limits)
            first = await by(body.upscaler_1, image, target.size, request)
            share = body.extras_upscaler_2_visibility
            if share and body.upscaler_2 not in ("", NONE):
                second = await by(body.upscaler_2, image, target.size, request)
                first = Image.blend(first.resize(second.size), second, share)
            is_enlarged = body.upscaler_1 not in ("", NONE)
            made.append(await run_in_threadpool(encoded, np.asarray(target.cut(first) if is_enlarged else first)))
        return made

    async def by(name: str, image: Image.Image, size: tuple[int, int], request: Request) -> Image.Image:
        if name in ("", NONE):
            return image
        if name in FILTERS:
            return await run_in_threadpool(filtered, image, name, size)
        job = await engine.submit(name, [enlarging_call(image)], ORIGIN)
        (result,) = (await wait_for(engine, job, request)).results
        if result is None:
            raise HTTPException(422, "the job was interrupted")
        return await run_in_threadpool(fitted, result.pixels, size)

    return routes


def said(body: ExtrasFields) -> str:
    """A line about what was done, as HTML."""
    by = f"{body.upscaling_resize_w}x{body.upscaling_resize_h}" if body.resize_mode else f"{body.upscaling_resize:g}"
    return f"<p>Postprocess upscale by: {by}, Postprocess upscaler: {html.escape(body.upscaler_1)}</p>"


def settings_of(data: bytes) -> ImageSettings:
    """Settings of an image as A1111's text, its parts, and the other texts; empty where there are none.

    Raises:
        HTTPException: 422, the image cannot be read.
    """
    try:
        texts = read_texts(io.BytesIO(data), {writer.text for writer in WRITERS}, "the image")
    except UserError as error:
        raise HTTPException(422, "Invalid encoded image") from error
    info = texts.get(PARAMETERS, "")
    parts = split(info)
    if not parts.settings and texts:
        info = _translated(texts)
        parts = split(info)
    others = {name: text for name, text in texts.items() if name != PARAMETERS}
    if not info:
        return ImageSettings(info="", items=others, parameters={})
    said = {"Prompt": parts.prompt, "Negative prompt": parts.negative, **parts.settings}
    width, times, height = said.pop("Size", "").partition("x")
    if times:
        said |= {"Size-1": width, "Size-2": height}
    return ImageSettings(info=info, items=others, parameters=said)


def _translated(texts: dict[str, str]) -> str:
    """A1111's text of another program's settings; "" where they are not known."""
    try:
        found = find_settings(texts, "the image").values
    except UserError:
        return texts.get(PARAMETERS, "")
    return parameters({"prompt": "", **found})
