"""txt2img and img2img."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from sdjax.core.errors import UserError
from sdjax.pipeline.pipeline import Pipeline
from sdjax.serve.api.a1111.answers import About, answer
from sdjax.serve.api.a1111.calls import (
    calls_of,
    check_absent,
    common_options,
    denoising,
    second_pass,
    seeds_of,
    size_of,
)
from sdjax.serve.api.a1111.coding import decoded
from sdjax.serve.api.a1111.fields import Generated, GenerationFields, ImageToImage, TextToImage
from sdjax.serve.api.a1111.inpainting import Given, blurred_mask, cut_mask, given_image
from sdjax.serve.api.a1111.session import CHECKPOINT, ORIGIN, Override, Session, check_vae
from sdjax.serve.api.a1111.units import SCRIPT, Placed, control_options, read_units
from sdjax.serve.engine import Engine
from sdjax.serve.jobs import Call, Job, Result
from sdjax.serve.limits import Limits
from sdjax.serve.requests import wait_for

# Latents under the mask to begin from; the others are the image's, filled by colours or as it is.
CONTENTS = {2: "noise", 3: "nothing"}
FILLINGS = ("fill", "original", "latent noise", "latent nothing")


class PlannedRequest(NamedTuple):
    """A request in the engine's terms.

    Attributes:
        calls: one an image.
        given: images to begin from, which the made ones are put under; taken again from the first for further images.
        about: see `About`.
    """

    calls: list[Call]
    given: Sequence[Given]
    about: About


def router(engine: Engine, session: Session) -> APIRouter:
    """Both routes."""
    routes = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

    @routes.post("/txt2img")
    async def txt2img(body: TextToImage, request: Request) -> Generated:
        """Images from a prompt."""
        return await generate(body, request, text_plan)

    @routes.post("/img2img")
    async def img2img(body: ImageToImage, request: Request) -> Generated:
        """Images from a prompt and images, or parts of these made anew."""
        if not body.init_images:
            raise HTTPException(404, "Init image not found")
        return await generate(body, request, image_plan)

    async def generate(body: Any, request: Request, make_plan: Callable[..., PlannedRequest]) -> Generated:
        check_absent(body)
        settings = body.override_settings or {}
        model = session.model_of(settings.get(CHECKPOINT)) or engine.models.current
        override = session.usual.changed(settings)
        pipe = await engine.pipeline(model)
        plan = await run_in_threadpool(make_plan, body, pipe, engine.limits, override)
        job = await engine.submit(model, plan.calls, ORIGIN)
        session.begin(job, body.force_task_id)
        if body.override_settings_restore_afterwards is False:
            await session.change(settings)
        await wait_for(engine, job, request)
        return await run_in_threadpool(_answer, body, job, plan, check_vae(settings))

    return routes


def _answer(body: GenerationFields, job: Job, plan: PlannedRequest, notes: list[str]) -> Generated:
    results = []
    for i, result in enumerate(job.results):
        if result is not None:
            pixels = plan.given[i % len(plan.given)].restored(result.pixels) if plan.given else result.pixels
            results.append(Result(pixels, result.record))
    about = plan.about._replace(notes=[*plan.about.notes, *notes])
    return answer(body, job, results, about)


def text_plan(body: TextToImage, pipe: Pipeline, limits: Limits, override: Override) -> PlannedRequest:
    """A plan of txt2img; errors are those of `common_options` and `second_pass`."""
    seeds, size = seeds_of(body, limits), size_of(body, pipe, limits)
    options, notes = common_options(body, pipe, size, override)
    options |= second_pass(body, size)
    units = _units(body, pipe, limits)
    options |= control_options(units, len(pipe.controlnets), None, size)
    about = About(seeds, size, _said(units), notes)
    return PlannedRequest(calls_of(body, pipe, seeds.all, [options]), [], about)


def image_plan(body: ImageToImage, pipe: Pipeline, limits: Limits, override: Override) -> PlannedRequest:
    """A plan of img2img.

    Raises:
        HTTPException: 422, an image cannot be read.
        UserError: a field is not what it should be.
    """
    seeds, size = seeds_of(body, limits), size_of(body, pipe, limits)
    if body.initial_noise_multiplier not in (None, 1.0):
        raise UserError(f"initial_noise_multiplier {body.initial_noise_multiplier:g}: noise is not scaled here")
    options, notes = common_options(body, pipe, size, override)
    options |= denoising(body, pipe)
    units = _units(body, pipe, limits)
    given = _given_images(body, len(seeds.all), limits, size)
    content = CONTENTS.get(body.inpainting_fill or 0)
    each = [options | _begin(one, pipe, content) | _controls(units, pipe, one, size) for one in given]
    about = About(seeds, size, {**_said(units), **_masking(body, given)}, notes)
    return PlannedRequest(calls_of(body, pipe, seeds.all, each), given, about)


def _given_images(body: ImageToImage, count: int, limits: Limits, size: tuple[int, int]) -> list[Given]:
    texts = body.init_images or []
    if len(texts) > max(count, 1) or (len(texts) > 1 and count % len(texts)):
        raise UserError(f"init_images: {len(texts)} images for {count}; give one, or one for each")
    mask = blurred_mask(decoded(body.mask, "mask", limits), body) if body.mask else None
    return [given_image(decoded(text, f"init_images {i}", limits), mask, body, size) for i, text in enumerate(texts)]


def _begin(given: Given, pipe: Pipeline, content: str | None) -> dict[str, Any]:
    """Options of an image to begin from; what is outside of the mask comes back with `Given.restored`."""
    if given.mask is None:
        return {"init_image": given.image}
    factor = 1 if "mask" in pipe.inputs else pipe.model.factor
    options = {"init_image": given.image, "mask": cut_mask(given.mask, factor), "paste": False}
    return options | ({"masked_content": content} if content is not None else {})


def _units(body: GenerationFields, pipe: Pipeline, limits: Limits) -> list[Placed]:
    for name, script in (body.alwayson_scripts or {}).items():
        if name.casefold() == SCRIPT:
            args = script.get("args") if isinstance(script, dict) else None
            return read_units(args, pipe.controlnets, lambda text, place: decoded(text, place, limits))
    return []


def _controls(units: Sequence[Placed], pipe: Pipeline, given: Given, size: tuple[int, int]) -> dict[str, Any]:
    """Options of ControlNets; of a region of the image, hints are of the same region."""
    if given.region is not None and given.original is not None:
        units = [one.cropped(given.original.size, given.region) for one in units]
    return control_options(units, len(pipe.controlnets), given.image, size)


def _said(units: Sequence[Placed]) -> dict[str, str]:
    return {f"ControlNet {i}": one.described for i, one in enumerate(units)}


def _masking(body: ImageToImage, given: Sequence[Given]) -> dict[str, Any]:
    if all(one.mask is None for one in given):
        return {}
    area = "Whole picture" if given[0].region is None else "Only masked"
    blur = body.mask_blur if body.mask_blur is not None else body.mask_blur_x
    said = {"Mask blur": blur, "Inpaint area": area, "Masked content": FILLINGS[body.inpainting_fill or 0]}
    return said if given[0].region is None else {**said, "Masked area padding": body.inpaint_full_res_padding or 0}
