"""Cascades: each model goes on from the image that another made (Ho et al. 2022, cascaded diffusion models)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError, unknown
from sdjax.data.image_inputs import load_image
from sdjax.pipeline.options import OPTIONS, parse_value

if TYPE_CHECKING:
    from sdjax.pipeline.pipeline import Pipeline
    from sdjax.pipeline.prepare import Row

STAGES, GIVEN = "stages", "init_image"
# Of a call, and so not a later stage's own.
FIXED = ("seed", "first_index", "num_images", "rng", "torch_batch", GIVEN, STAGES, "negative_prompt")
SETTINGS = tuple(
    name for name, option in OPTIONS.items() if option.scope == "image" and not option.file and name not in FIXED
)


def check_follows(pipe: Pipeline, then: Pipeline) -> None:
    """Hold a stage to one that reads the image of the stage before.

    Raises:
        UserError: it reads no image, or makes smaller ones than that.
    """
    own, theirs = pipe.default_size, then.default_size
    if GIVEN not in then.inputs and not then.begins_from_images:
        raise UserError(f"then {then.name}: it reads no image, and so cannot go on with what {pipe.name} makes")
    if then.model.autoencoder is None and theirs <= own:
        sizes = f"makes images of {theirs[1]}x{theirs[0]} pixels, {pipe.name} those of {own[1]}x{own[0]}"
        raise UserError(f"then {then.name}: it {sizes}; give the stages in their order")


def read_stages(given: Any, pipe: Pipeline) -> list[dict[str, Any]]:
    """Settings of each later stage, from mappings or from texts such as "steps=30,guidance_scale=4".

    Raises:
        UserError: there are more than stages, or one names an option that is not a stage's own.
    """
    several = [] if given is None else [given] if isinstance(given, str | Mapping) else list(given)
    if len(several) > len(pipe.later):
        raise UserError(f"stages: settings of {len(several)} later stages are given; {pipe.name} has {len(pipe.later)}")
    read = [parse_stage(one) if isinstance(one, str) else dict(one) for one in several]
    for stage in read:
        for name in stage:
            if name not in SETTINGS:
                raise unknown("option", name, SETTINGS, STAGES)
    return read


def parse_stage(text: str) -> dict[str, Any]:
    """Settings that are written as "steps=30,guidance_scale=4"; a UserError where they are not."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"stages {text!r}: write steps=30,guidance_scale=4")
        if name not in SETTINGS:
            raise unknown("option", name, SETTINGS, STAGES)
        found[name] = parse_value(name, value, STAGES)
    return found


def with_later_stages(pipe: Pipeline, row: Row, stages: Sequence[Mapping[str, Any]]) -> Row:
    """The row with those of the later stages, whose image is yet to be made.

    Raises:
        UserError: a setting of a stage is not what it should be.
    """
    then = pipe.then
    if then is None:
        return row
    own, *rest = stages or [{}]
    last = row.second or row
    options: dict[str, Any] = {"seed": row.seed, "first_index": row.index, "rng": row.settings["rng"], **own}
    if row.torch is not None:  # PyTorch draws for as many images together at every stage
        options["torch_batch"] = row.torch.noise.batch
    options[GIVEN] = np.zeros((*last.size, 3), np.float32)  # stands for what is to be made
    if rest:
        options[STAGES] = rest
    prompts = ()
    if "prompt" in then.inputs:
        prompts = row.settings["prompt"], row.settings.get("negative_prompt")
    try:
        (following,) = then.prepare(*prompts, **options)
    except UserError as error:
        raise UserError(f"{then.name}, which goes on with what {pipe.name} makes: {error}") from error
    last = last._replace(then=following)
    return last if row.second is None else row._replace(second=last)


def next_stage(pipe: Pipeline, row: Row, image: Float[np.ndarray, "H W 3"]) -> tuple[Pipeline, Row] | None:
    """The model that goes on with an image, and its row; None where there is none."""
    then, following = pipe.then, row.then
    if then is None or following is None:
        return None
    image = np.clip(image, 0.0, 1.0)
    if following.image is not None:
        return then, following._replace(image=load_image(image, following.size))
    part, conditioner = following.parts[0], then.model.conditioner
    columns = conditioner.with_image(part.columns, image, then.host(following.size, part.table))
    return then, following._replace(parts=(part._replace(columns=columns), *following.parts[1:]))
