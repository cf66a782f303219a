"""OpenAI's image API: generations and edits, with partial images, and the list of models.

Fields and events are those of OpenAI's API reference (images/generate, images/edit, images streaming events).
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import StreamingResponse
from PIL import Image
from pydantic import BaseModel, Field

from sdjax.core.errors import UserError
from sdjax.serve.engine import Engine
from sdjax.serve.images import encode_png, in_base64, png_of, read_upload
from sdjax.serve.jobs import Call, Job
from sdjax.serve.requests import server_sent, wait_for

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
ORIGIN = "openai"
# Names of OpenAI's models, which clients send where their users chose none.
THEIRS = re.compile(r"dall-e-\d|gpt-image-.*|chatgpt-image-.*")


class Generation(BaseModel):
    """A request for images of a prompt; fields of OpenAI's that mean nothing here are ignored."""

    prompt: str
    model: str | None = None
    n: int = Field(1, ge=1)
    size: str | None = None
    response_format: str | None = None
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)


def router(engine: Engine) -> APIRouter:
    """Routes below /v1/images, and /v1/models."""
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """All checkpoints."""
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "sdjax", "loaded": model.pipe is not None}
            for name, model in engine.models.all.items()
        ]
        return {"object": "list", "data": rows}

    @routes.post("/images/generations")
    async def generations(wanted: Generation, request: Request) -> Any:
        """Make images of a prompt, at once or as server-sent events."""
        if wanted.response_format == "url":
            raise UserError("response_format 'url': images are sent as b64_json")
        call = Call(wanted.prompt, None, _common(wanted.n, wanted.size))
        job = await engine.submit(_model(wanted.model), [call], ORIGIN)
        if wanted.stream:
            events = _events(engine, job, wanted.partial_images, "image_generation")
            return StreamingResponse(events, media_type="text/event-stream")
        return _answer(await wait_for(engine, job, request))

    @routes.post("/images/edits")
    async def edits(
        request: Request,
        image: Annotated[list[UploadFile] | None, File()] = None,
        images: Annotated[list[UploadFile] | None, File(alias="image[]")] = None,
        prompt: Annotated[str, Form()] = "",
        mask: Annotated[UploadFile | None, File()] = None,
        model: Annotated[str | None, Form()] = None,
        n: Annotated[int, Form(ge=1)] = 1,
        size: Annotated[str | None, Form()] = None,
        stream: Annotated[bool, Form()] = False,
        partial_images: Annotated[int, Form(ge=0, le=3)] = 0,
    ) -> Any:
        """Make images from a given one; where the mask, or without one the image itself, is transparent, anew."""
        given = [*(image or ()), *(images or ())]
        if len(given) != 1:
            raise UserError(f"image: {len(given)} images; give one")
        start = read_upload(await given[0].read(), "image", engine.limits)
        where = None if mask is None else read_upload(await mask.read(), "mask", engine.limits)
        options = {**_common(n, size), "init_image": start.convert("RGB"), "strength": 1.0}
        hole = _transparent(where or start)
        if hole is not None:
            options["mask"] = hole
        elif where is not None:
            raise UserError("mask: it has no transparent pixel, where the image would be made anew")
        else:
            del options["strength"]  # the model's own, for another image like this one
        job = await engine.submit(_model(model), [Call(prompt, None, options)], ORIGIN)
        if stream:
            events = _events(engine, job, partial_images, "image_edit")
            return StreamingResponse(events, media_type="text/event-stream")
        return _answer(await wait_for(engine, job, request))

    def _model(name: str | None) -> str | None:
        return None if name is None or (name not in engine.models.all and THEIRS.fullmatch(name)) else name

    return routes


def _common(images: int, size: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"seed": -1, "num_images": images}
    if size not in (None, "auto"):
        found = SIZE.fullmatch(size)
        if not found:
            raise UserError(f"size {size!r}: choose auto or WIDTHxHEIGHT")
        options["width"], options["height"] = map(int, found.groups())
    return options


def _transparent(image: Image.Image) -> Image.Image | None:
    """A mask that is white where an image is transparent; None where it is so nowhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    low, _ = alpha.getextrema()
    return alpha.point(lambda value: 255 if value < 128 else 0) if low < 128 else None  # pyright: ignore[reportOperatorIssue]


def _answer(job: Job) -> dict[str, Any]:
    data = [{"b64_json": in_base64(encode_png(result))} for result in job.results if result is not None]
    return {"created": int(time.time()), "data": data, "output_format": "png"}


async def _events(engine: Engine, job: Job, partial: int, kind: str) -> AsyncIterator[str]:
    """Partial images at even shares of the work, then every image."""
    shown, sent = 0, 0
    try:
        async for _ in job.changes():
            if shown < partial and job.preview is not None and job.done * (partial + 1) >= job.total * (shown + 1):
                yield _event(f"{kind}.partial_image", png_of(job.preview), partial_image_index=shown)
                shown += 1
            for result in job.results[sent:]:
                if result is None:
                    break
                sent += 1
                yield _event(f"{kind}.completed", encode_png(result))
        if job.state == "failed":
            yield server_sent("error", json.dumps({"type": "error", "error": {"message": job.error}}))
    finally:
        engine.cancel(job)


def _event(kind: str, png: bytes, **more: Any) -> str:
    with Image.open(io.BytesIO(png)) as image:
        size = f"{image.width}x{image.height}"
    about = {"type": kind, "b64_json": in_base64(png), "created_at": int(time.time()), "size": size}
    return server_sent(kind, json.dumps({**about, "output_format": "png", **more}))
