"""From requests of A1111's API to calls of a pipeline, one an image, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdjax.cli.settings.names import A1111
from sdjax.core.errors import UserError, unknown
from sdjax.pipeline.options import check_value
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.seeds import RANDOM, drawn_seed
from sdjax.serve.api.a1111.fields import GenerationFields, TextToImage
from sdjax.serve.api.a1111.samplers import PLACE, noise_of, sampling_of
from sdjax.serve.api.a1111.session import CPU, Override
from sdjax.serve.api.a1111.units import SCRIPT
from sdjax.serve.jobs import Call
from sdjax.serve.limits import Limits

STRENGTH, FACTOR = 0.75, 2.0  # A1111's own
LEAST = 0.001  # strength that leaves one step, as A1111 does at 0
SAME = ("", "none", "use same checkpoint", "use same sampler", "use same scheduler", "automatic")
UPSCALERS = ("", "none", "lanczos")
LATENT = "latent"
# Fields that ask for what is not here, and what that is.
ABSENT = {
    "tiling": "images are not made to tile",
    "restore_faces": "faces are not restored",
    "subseed_strength": "there are no variation seeds",
    "seed_resize_from_h": "seeds are not resized",
    "seed_resize_from_w": "seeds are not resized",
}


class Seeds(NamedTuple):
    """Seeds of a request's images, and the variation seeds that A1111 names beside them."""

    all: list[int]
    sub: list[int]


def check_absent(request: GenerationFields) -> None:
    """Refuse what nothing here does; a UserError names the field."""
    for name, reason in ABSENT.items():
        value = getattr(request, name)
        if value is not None and value > 0:
            raise UserError(f"{name} {value!r}: {reason} here; leave it out")
    if styles := [style for style in request.styles or () if style.casefold() not in ("", "none")]:
        raise unknown("style", styles[0][:80], [])
    if request.script_name and request.script_name.casefold() != "none":
        raise UserError(f"Script {request.script_name[:80]!r} not found")
    for name in request.alwayson_scripts or ():
        if name.casefold() != SCRIPT:
            raise UserError(f"always on script {name[:80]} not found")


def seeds_of(request: GenerationFields, limits: Limits) -> Seeds:
    """A seed for each image, drawn where the request has none; a UserError where there are too many images."""
    count = (request.batch_size or 1) * (request.n_iter or 1)
    if count > limits.max_images:
        product = f"batch_size {request.batch_size or 1} times n_iter {request.n_iter or 1}"
        raise UserError(f"{product} is {count} images; at most {limits.max_images} are made at a time")
    first, second = (_seed(seed) for seed in (request.seed, request.subseed))
    return Seeds([first + i for i in range(count)], [second + i for i in range(count)])


def _seed(seed: int | None) -> int:
    return drawn_seed(RANDOM) if seed is None or seed < 0 else seed


def size_of(request: GenerationFields, pipe: Pipeline, limits: Limits) -> tuple[int, int]:
    """Width and height of the images; a UserError where a side is out of range."""
    height, width = pipe.default_size
    sides = {"width": request.width or width, "height": request.height or height}
    for name, side in sides.items():
        check_value(name, side, PLACE)
        if side > limits.max_side:
            raise UserError(f"{name} {side} in {PLACE}: at most {limits.max_side} pixels are made")
    return sides["width"], sides["height"]


def common_options(
    request: GenerationFields, pipe: Pipeline, size: tuple[int, int], override: Override
) -> tuple[dict[str, Any], list[str]]:
    """Options that all images of a request share, and notes.

    Raises:
        UserError: a field is not what it should be.
    """
    options, notes = sampling_of(request.sampler_name or request.sampler_index, request.scheduler)
    options |= noise_of(options.get("sampler"), request.eta, request.s_noise, request.s_churn)
    options |= {"steps": request.steps, "guidance_scale": request.cfg_scale, "width": size[0], "height": size[1]}
    options |= clip_skip(pipe, override.clip_stop) | refiner(request, pipe)
    if override.noise == CPU:
        options["rng"] = "torch"
    return {name: value for name, value in options.items() if value is not None}, notes


def clip_skip(pipe: Pipeline, stop: int) -> dict[str, Any]:
    """The option of the layer at which to stop: 1 skips none, and in A1111 only Stable Diffusion 1 stops elsewhere."""
    encoders = pipe.text.encoders
    is_first = len(encoders) == 1 and encoders[0].config.activation == "quick_gelu"
    return {"clip_skip": stop - 1} if stop > 1 and is_first else {}


def refiner(request: GenerationFields, pipe: Pipeline) -> dict[str, Any]:
    """The option of the model's own refiner; a UserError where the request names another."""
    name = request.refiner_checkpoint
    if not name or name.casefold() == "none":
        return {}
    if pipe.refiner is None or name.casefold() != pipe.refiner.name.casefold():
        raise unknown("refiner", name[:80], [] if pipe.refiner is None else [pipe.refiner.name], "refiner_checkpoint")
    return {"refiner_start": request.refiner_switch_at}


def second_pass(request: TextToImage, size: tuple[int, int]) -> dict[str, Any]:
    """Options of A1111's hires fix.

    Raises:
        UserError: it is to differ from the first pass in what both share here.
    """
    if not request.enable_hr:
        return {}
    firsts = {
        "hr_checkpoint_name": None,
        "hr_sampler_name": request.sampler_name or request.sampler_index,
        "hr_scheduler": request.scheduler,
        "hr_prompt": request.prompt,
        "hr_negative_prompt": request.negative_prompt,
    }
    for name, given in firsts.items():
        value, first = getattr(request, name) or "", given or ""
        if value.casefold() not in (*SAME, first.casefold()):
            raise UserError(f"{name} {value[:80]!r}: the second pass has that of the first here; leave it out")
    upscaler = (request.hr_upscaler or "").casefold()
    if upscaler not in UPSCALERS and not upscaler.startswith(LATENT):
        raise unknown("upscaler", (request.hr_upscaler or "")[:80], ["Lanczos"], "hr_upscaler")
    strength = STRENGTH if request.denoising_strength is None else request.denoising_strength
    check_value("hires_strength", strength, PLACE)
    options = {"hires": _factor(request, size), "hires_strength": strength or LEAST}
    steps = request.hr_second_pass_steps or request.steps
    return options if steps is None or not strength else {**options, "hires_steps": steps}


def _factor(request: TextToImage, size: tuple[int, int]) -> float:
    wanted = request.hr_resize_x or 0, request.hr_resize_y or 0
    factors = [side / own for side, own in zip(wanted, size, strict=True) if side > 0]
    if not factors:
        return FACTOR if request.hr_scale is None else request.hr_scale
    if max(factors) - min(factors) > 0.01 * max(factors):
        proportions = f"{wanted[0]}x{wanted[1]} has other proportions than {size[0]}x{size[1]}"
        raise UserError(f"hr_resize_x and hr_resize_y: {proportions}, which the second pass keeps; leave one out")
    return max(factors)


def denoising(request: GenerationFields, pipe: Pipeline) -> dict[str, Any]:
    """Options `steps` and `strength` that run as many steps of an image to begin from as A1111 does."""
    strength = STRENGTH if request.denoising_strength is None else request.denoising_strength
    check_value("strength", strength, PLACE)
    steps = request.steps or pipe.settings.get("steps")
    if steps is None:
        return {"strength": strength}
    steps, strength = A1111.img2img(check_value("steps", steps, PLACE), strength)
    return {"steps": steps, "strength": strength}


def calls_of(
    request: GenerationFields, pipe: Pipeline, seeds: Sequence[int], options: Sequence[Mapping[str, Any]]
) -> list[Call]:
    """A call for each image.

    Args:
        request: whose prompts all images have.
        pipe: that may take none.
        seeds: one an image.
        options: one an image, taken again from the first where there are fewer.
    """
    takes_prompt = "prompt" in pipe.inputs
    prompt = request.prompt or ("" if takes_prompt else None)
    # No negative prompt is the null condition, whatever that is for a model, as in A1111.
    negative = request.negative_prompt or None
    return [Call(prompt, negative, {**options[i % len(options)], "seed": seed}) for i, seed in enumerate(seeds)]
