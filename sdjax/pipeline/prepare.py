"""The host half of sampling: from the options of a call to rows, one an image, that any batch may hold.

Nothing here runs a network, so that whatever is wrong with a request is said before the first image is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError
from sdjax.data.image_inputs import check_mask_size, listed, load_image, load_mask, size_of
from sdjax.data.text.prompt_editing import Pass
from sdjax.diffusion.samplers import (
    SamplerTable,
    network_calls,
    sampler_of,
    schedule_of,
    start_of,
    steps_of,
    strength_of,
    table_for,
)
from sdjax.diffusion_model.conditioners.lora import LORA_SCALE
from sdjax.diffusion_model.conditioners.upscale import NOISE, SMALL
from sdjax.diffusion_model.sampling import ConditionSchedule
from sdjax.pipeline.cascade import STAGES, read_stages, with_later_stages
from sdjax.pipeline.edited_prompts import edit_prompts, needs_null
from sdjax.pipeline.loras import load_named, record_of, with_strengths
from sdjax.pipeline.noise import Draws, TorchNoise, TorchRow
from sdjax.pipeline.options import MAX_SIDE, OPTIONS, check_int, check_options
from sdjax.pipeline.seeds import drawn_seed
from sdjax.pipeline.templates import TEMPLATES, inputs_of_images
from sdjax.pipeline.usable import check_used, required_names

if TYPE_CHECKING:
    from sdjax.pipeline.pipeline import Pipeline

STEPS, PIXEL_STEPS = 50, 250
REFINER_START, HIRES_STRENGTH, TILE = 0.8, 0.5, 1536
# Options that a checkpoint may choose.
SAMPLED = ("steps", "sampler", "schedule", "guidance_scale")
# Options of jobs, which an image's record has resolved.
UNRECORDED = ("num_images", "first_index", "wildcard_dir")
# Factors on the noise that takes the place of latents under a mask.
CONTENTS = {"noise": 1.0, "nothing": 0.0}
# Options of which a list gives one value a prompt.
LISTED = ("init_image", "mask", "depth", "class_label", "layout", "label_map", "neighbours", "resemble")
LISTED += ("control_image", "ip_image", "t2i_image")


class Part(NamedTuple):
    """One model's share of an image: the base model's, then a refiner's.

    Attributes:
        columns: of its conditioner, without the batch axis.
        table: rows of its sampler.
        guided: whether the null condition takes part.
        schedule: of conditions, if the prompt changes from step to step or is composed of several.
        shared: columns that all images of a batch have alike.
    """

    columns: Mapping[str, np.ndarray]
    table: SamplerTable
    guided: bool
    schedule: ConditionSchedule | None = None
    shared: tuple[str, ...] = ()


class Row(NamedTuple):
    """One image, prepared: all that its sampling depends on.

    Attributes:
        parts: of each model in turn.
        seed, index: decide the image's noise.
        guidance: scale and rescale.
        size: height and width in pixels.
        image: in [0, 1], to begin from; None where there is none.
        mask: [H W 1], 1 where `image` is made anew; None without one.
        blend: whether to re-impose the unmasked latents at every step, for models not trained for inpainting.
        fresh: whether sampling begins from pure noise.
        content: factor on the noise from which it begins under the mask, 0 for nothing; None for the image's latents.
        paste: pixels of feather with which `image` is put back outside of the mask; None not to.
        latents: standard normal first noise; None for the image's own.
        torch: PyTorch's noise; None for the image's own.
        tile: pixels of the autoencoder's tiles; 0 for none.
        second: the second pass, whose `image` is what the first pass makes; None without one.
        then: the next stage of a cascade, whose given image is what this row makes; None without one.
        settings: every option that the image depends on, those that the checkpoint chose included.
    """

    parts: tuple[Part, ...]
    seed: int
    guidance: tuple[float, float]
    size: tuple[int, int]
    image: Float[np.ndarray, "H W 3"] | None
    mask: Float[np.ndarray, "H W 1"] | None
    blend: bool
    fresh: bool
    paste: float | None
    tile: int
    settings: Mapping[str, Any]
    index: int = 0
    latents: np.ndarray | None = None
    torch: TorchRow | None = None
    second: Row | None = None
    then: Row | None = None
    content: float | None = None

    @property
    def compile_key(self) -> tuple[Any, ...]:
        """Rows with equal keys may share a batch: they run the same programs."""
        shapes = tuple(
            (tuple(sorted((n, np.shape(v), np.asarray(v).dtype.str) for n, v in p.columns.items())), p.guided)
            for p in self.parts
        )
        lengths = tuple(len(part.table.sigma) for part in self.parts)
        scheduled = tuple(tuple(np.shape(array) for array in part.schedule or ()) for part in self.parts)
        alike = tuple(p.columns[name].tobytes() for p in self.parts for name in p.shared if name in p.columns)
        given = self.image is None, self.latents is None, None if self.torch is None else self.torch.noise
        return self.size, shapes, lengths, scheduled, alike, given, self.tile

    @property
    def following(self) -> Row | None:
        """The second pass, or the next stage."""
        return self.second or self.then

    @property
    def last(self) -> Row:
        """The row of the last pass and stage."""
        return self if self.following is None else self.following.last

    @property
    def compile_keys(self) -> tuple[Any, ...]:
        """Keys of all passes and stages."""
        return self.compile_key, *(() if self.following is None else self.following.compile_keys)

    @property
    def calls(self) -> int:
        """Network calls of all parts, passes and stages."""
        own = sum(network_calls(part.table) for part in self.parts)
        return own + (0 if self.following is None else self.following.calls)


def prepare(
    pipe: Pipeline,
    prompts: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str | None] | None,
    options: Mapping[str, Any],
) -> list[Row]:
    """Rows of a call: `num_images` of the first prompt, then of the next.

    Raises:
        UserError: an option is not what it should be, has no effect for this model, or a needed one is missing.
    """
    given = check_options(options)
    if given.pop("guess_mode", False):
        given.setdefault("control_mode", "guess")
    given["seed"] = drawn_seed(given.get("seed", 0))
    entries = _entries(pipe, prompts, negative_prompt, given)
    total = len(entries) * given.get("num_images", 1)
    first = check_int("first_index", given.get("first_index", 0), 0, 2**31 - 1 - total)
    images = inputs_of_images(pipe, entries, given, first)
    load_named(pipe, images)  # which decides what a call may set
    check_used(pipe, given)
    size = _size(pipe, entries[0], given, total)
    given = _resolved(pipe, given, size)
    tables = [make_rows(pipe, given)] if pipe.refiner is None else hand_over(pipe, given)
    made = {key: _prepare_entry(pipe, entry, given, size, tables) for key, entry in {id(e): e for e in images}.items()}
    rows = [made[id(entry)]._replace(index=first + i) for i, entry in enumerate(images)]
    rows = _with_noise(pipe, rows, given, len(entries))
    stages = read_stages(given.get(STAGES), pipe)
    rows = [_with_second_pass(pipe, row, entry, given) for row, entry in zip(rows, images, strict=True)]
    return [with_later_stages(pipe, row, stages) for row in rows]


def _entries(
    pipe: Pipeline, prompts: str | Sequence[str] | None, negatives: Any, given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Inputs of each prompt, or of each entry of the longest list where there are no prompts."""
    takes_prompt = "prompt" in pipe.inputs
    lists = {name: listed(given[name]) for name in LISTED if name in given and _is_listed(pipe, name, given[name])}
    if takes_prompt:
        if prompts is None:
            raise UserError(f"{pipe.name} needs a prompt")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise UserError("there are no prompts")
        count = len(texts)
    else:
        if prompts:
            raise UserError(f"{pipe.name} takes no prompt; it is conditioned on {required_names(pipe)}")
        texts, count = [None], max(map(len, lists.values()), default=1)
    if negatives is None or isinstance(negatives, str):
        negatives = [negatives] * count
    if len(negatives) != count:
        raise UserError(f"{len(negatives)} negative prompts for {count} prompts; give one, or one for each")
    for name, values in lists.items():
        if len(values) not in (1, count):
            raise UserError(f"{len(values)} entries in {name} for {count} prompts; give one, or one for each")
    return [
        {"syntax": "a1111", **given}
        | {name: values[i % len(values)] for name, values in lists.items()}
        | {"prompt": texts[i % len(texts)], "negative_prompt": negatives[i]}
        for i in range(count)
    ]


def _is_listed(pipe: Pipeline, name: str, value: Any) -> bool:
    """A layout is itself a list, as are images of a repeated flag; those of several prompts are a list of lists."""
    if name == "layout" or OPTIONS[name].many:
        return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], list | tuple)
    if name == "neighbours":
        return isinstance(value, list | tuple)
    return True


def _size(pipe: Pipeline, entry: Mapping[str, Any], given: Mapping[str, Any], total: int) -> tuple[int, int]:
    """Height and width of a call's images."""
    model = pipe.model
    decided = model.conditioner.image_size(entry, model.factor)
    width, height = given.get("width"), given.get("height")
    fixed = decided if model.conditioner.traits.keeps_size else None
    if fixed is not None and (height not in (None, fixed[0]) or width not in (None, fixed[1])):
        raise UserError(f"width and height have no effect: the condition of {pipe.name} asks for {fixed[1]}x{fixed[0]}")
    if decided is None and entry.get("init_image") is not None and (width, height) == (None, None):
        decided = _size_like(pipe, size_of(entry["init_image"]))
    latents = given.get("latents")
    if latents is not None and np.ndim(latents) == 4:
        decided = np.shape(latents)[1] * model.factor, np.shape(latents)[2] * model.factor
    default = decided or pipe.default_size
    size = height or default[0], width or default[1]
    for name, side in zip(("height", "width"), size, strict=True):
        if side % model.multiple:
            below = side - side % model.multiple
            near = ", ".join(map(str, sorted({max(model.multiple, below), below + model.multiple})))
            whole = f"a multiple of {model.multiple}, which this model needs"
            raise UserError(f"{name} {side} is not {whole}; nearest: {near}")
    if latents is not None:
        wanted = (total, *model.latent_shape(size))
        if np.shape(latents) != wanted:
            raise UserError(f"latents have the shape {list(np.shape(latents))}; it must be {list(wanted)}, NHWC")
        if not np.isfinite(latents).all():
            raise UserError("latents hold values that are not finite")
    return size


def _size_like(pipe: Pipeline, given: tuple[int, int]) -> tuple[int, ...]:
    """Height and width for a given image: the largest part of it that the model can make.

    Models of pixels know one size: the shorter side is theirs (diffusers, DeepFloyd IF's `resize`).
    """
    multiple = pipe.model.multiple
    if pipe.model.autoencoder is not None:
        return tuple(max(side // multiple, 1) * multiple for side in given)
    scale = min(pipe.default_size) / min(given)
    return tuple(max(round(side * scale / multiple), 1) * multiple for side in given)


def defaults(pipe: Pipeline) -> dict[str, Any]:
    """Options as they are where a call names none."""
    return _resolved(pipe, {}, pipe.default_size)


def _resolved(pipe: Pipeline, given: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Options with the checkpoint's own choices where the call made none."""
    sampler, traits = sampler_of(pipe.scheduler), pipe.model.conditioner.traits
    chosen: dict[str, Any] = {
        "steps": traits.steps or (PIXEL_STEPS if pipe.model.autoencoder is None and sampler == "ddpm" else STEPS),
        "sampler": sampler,
        "guidance_scale": traits.guidance_scale,
        "guidance_rescale": 0.0,
        "rng": "jax",
        "tile": TILE,
        **{name: pipe.settings[name] for name in SAMPLED if name in pipe.settings},
        **given,
        "height": size[0],
        "width": size[1],
    }
    if "steps" not in given:
        chosen["steps"] = steps_of(chosen.get("schedule")) or chosen["steps"]
    if chosen.get("schedule") == "ays" and pipe.text.numbers:
        chosen["schedule"] = "ays_sdxl"  # SDXL has levels of its own (Sabour et al. 2024)
    if "init_image" in given and pipe.begins_from_images:
        chosen.setdefault("strength", 1.0 if traits.keeps_clean and "mask" in given else traits.strength)
    if given.get("guidance_scale", 0.0) > 1.0 and not pipe.is_distilled and not pipe.model.has_null:
        raise UserError(
            f"guidance_scale {given['guidance_scale']:g}: {pipe.name} was trained without condition dropout, so it has "
            "no guidance; leave it out"
        )
    return chosen


def make_rows(pipe: Pipeline, given: Mapping[str, Any], start: int | None = None) -> SamplerTable:
    """A sampler's rows.

    Args:
        pipe, given: whose scheduler config says how it was trained, and resolved options.
        start: step to begin at; None for where a given image of this strength begins.

    Raises:
        UserError: an unknown sampler or schedule, or steps or strength out of range.
    """
    if start is None:
        strength = given.get("strength")
        start = 0 if strength is None else start_of(given["steps"], strength)
    return table_for(
        pipe.scheduler,
        given["sampler"],
        given["steps"],
        spacing=given.get("schedule"),
        start=start,
        latents=pipe.model.autoencoder is not None,
        **{name: given[name] for name, option in OPTIONS.items() if option.table and name in given},
    )


def hand_over(pipe: Pipeline, given: Mapping[str, Any]) -> list[SamplerTable]:
    """The rows of a base model and those of the refiner that takes over (SDXL, section 2.5; diffusers' denoising_end).

    The refiner begins with the first step whose timestep lies below (1 - refiner_start) of all; no noise is added
    there, and the levels of both are those of one table.

    Raises:
        UserError: the share leaves one of the two without a step.
    """
    steps, share = given["steps"], given.get("refiner_start", REFINER_START)
    whole, table = make_rows(pipe, given, 0), make_rows(pipe, given)
    rows = network_calls(whole)
    # Samplers of second order call the network twice a step but for the last.
    stride = 2 if steps > 1 and rows >= 2 * steps - 1 else 1
    timesteps = whole.timestep[:rows:stride][:steps]
    trained = schedule_of(pipe.scheduler).num_timesteps
    step = int(np.sum(timesteps >= round(trained - share * trained)))
    first = 0 if given.get("strength") is None else start_of(steps, given["strength"])
    if not first < step < steps:
        raise UserError(
            f"refiner_start {share:g} gives the base {max(step - first, 0)} of {steps - first} steps; both models need "
            "at least one"
        )
    rest = make_rows(pipe, given, step)
    # The base stops where the refiner's rows begin: as many rows before the end as those are.
    last = network_calls(table) - network_calls(rest)
    return [table._replace(active=table.active & (np.arange(len(table.active)) < last)), rest]


def _prepare_entry(
    pipe: Pipeline,
    entry: Mapping[str, Any],
    given: Mapping[str, Any],
    size: tuple[int, int],
    tables: Sequence[SamplerTable],
    over: Pass | None = None,
) -> Row:
    guidance = float(given["guidance_scale"])
    image = mask = None
    inputs = dict(entry)  # with what was read here, so that conditioners do not read it again
    if entry.get("mask") is not None:
        check_mask_size(entry["init_image"], entry["mask"])
        mask = inputs["mask"] = load_mask(entry["mask"], size)
    if entry.get("init_image") is not None and pipe.begins_from_images:
        image = inputs["init_image"] = load_image(entry["init_image"], size)
    first = 0 if given.get("strength") is None else start_of(given["steps"], given["strength"])
    parts, used, total = [], {}, sum(map(network_calls, tables))
    if pipe.loras:
        inputs = with_strengths(pipe, inputs, tables[0])
        used = record_of(pipe, entry, inputs[LORA_SCALE])
    for one, table in zip([pipe, pipe.refiner], tables, strict=False):
        assert one is not None, "a second table is a refiner's"
        # 1 or less is none, as in diffusers; so is 0 for models distilled to need none.
        guided = guidance > 1.0 and not one.is_distilled and one.model.has_null
        own, schedule = inputs, None
        if "syntax" in one.inputs and entry["syntax"] == "a1111":
            guided = guided or needs_null(one, inputs["prompt"])
            own, schedule = edit_prompts(inputs, table, over or Pass(given["steps"]), first, guided)
        conditioner = one.model.conditioner
        columns = conditioner.encode(own, one.host(size, table, total))
        parts.append(Part(columns, table, guided, schedule, conditioner.traits.shared_columns))
    traits = pipe.model.conditioner.traits
    feather = given.get("feather", traits.feather)
    return Row(
        parts=tuple(parts),
        seed=given["seed"],
        guidance=(max(guidance, 1.0), float(given["guidance_rescale"])),
        size=size,
        image=image,
        mask=mask,
        blend=mask is not None and "mask" not in pipe.inputs,
        # At strength 1, inpainting starts from pure noise, not from the noised init_image (as in diffusers), but for
        # models that keep the rest clean.
        fresh=image is None or (mask is not None and given["strength"] == 1.0 and not traits.keeps_clean),
        paste=feather if mask is not None and given.get("paste", True) else None,
        tile=given["tile"],
        content=None if mask is None else CONTENTS.get(given.get("masked_content", "image")),
        settings={**_record(pipe, entry, given), **used},
    )


def _record(pipe: Pipeline, entry: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that make the image again: resolved options, and the entry's own inputs."""
    kept = {n: v for n, v in given.items() if OPTIONS[n].scope == "image" and n not in UNRECORDED}
    kept |= {name: entry[name] for name in LISTED if name in given}
    kept |= {name: entry[name] for name in TEMPLATES.values() if name in entry}
    if "hires" in given:
        kept.setdefault("hires_strength", HIRES_STRENGTH)
    negative = {"negative_prompt": entry["negative_prompt"]} if "prompt" in pipe.inputs else {}
    return {"prompt": entry["prompt"] or "", **kept, **negative}


def _with_noise(pipe: Pipeline, rows: list[Row], given: Mapping[str, Any], entries: int) -> list[Row]:
    """The rows with noise from outside: given first noise, or PyTorch's."""
    if given.get("latents") is not None:
        latents = np.asarray(given["latents"], np.float32)
        rows = [row._replace(latents=latents[i]) for i, row in enumerate(rows)]
    if given["rng"] != "torch":
        return rows
    first, last = rows[0].index, rows[-1].index + 1
    total = check_int("torch_batch", given.get("torch_batch", last), last)
    # diffusers encodes an image once however many are made of it.
    several = "init_image" in given and len(listed(given["init_image"])) > 1
    each = (last - first) // entries if several else total
    return [_with_torch_noise(pipe, row, total, each) for row in rows]


def _with_torch_noise(pipe: Pipeline, row: Row, total: int, each: int) -> Row:
    """The row with PyTorch's noise for `total` images, of which `each` are made of one given image."""
    images, in_pixels = -(-total // each), pipe.model.autoencoder is None
    # An inpainting model's given image is not encoded where nothing of it is left.
    unseen = row.mask is not None and row.fresh and "mask" in pipe.inputs
    small = row.parts[0].columns.get(SMALL)
    draws = Draws(
        small=None if small is None else small.shape,
        given=0 if row.image is None or unseen or in_pixels else images,
        masked=images if row.mask is not None and not in_pixels else 0,
        small_last=in_pixels,
    )
    adds = [part.table.active & np.any(part.table.weights[..., -1] != 0.0, axis=-1) for part in row.parts]
    noisy = tuple(tuple(map(bool, rows)) for rows in adds)
    noise = TorchNoise(row.seed, total, pipe.model.latent_shape(row.size), noisy, draws)
    torch = TorchRow(noise, row.index, row.index // each)
    row = row._replace(torch=torch, settings={**row.settings, "torch_batch": total})
    if small is None:
        return row
    columns = {**row.parts[0].columns, NOISE: torch.small()}
    return row._replace(parts=(row.parts[0]._replace(columns=columns), *row.parts[1:]))


def _with_second_pass(pipe: Pipeline, row: Row, entry: Mapping[str, Any], given: Mapping[str, Any]) -> Row:
    """The row with a pass over its enlarged image: A1111's hires fix, with Lanczos as its upscaler."""
    scale = given.get("hires")
    if scale is None:
        return row
    if row.image is not None or not pipe.begins_from_images:
        raise UserError(f"hires {scale:g} is for images from a prompt alone; set width and height instead")
    if max(row.size) * scale > MAX_SIDE:
        raise UserError(f"hires {scale:g} of {row.size[1]}x{row.size[0]}: at most {MAX_SIDE} pixels a side are made")
    multiple = pipe.model.multiple
    size = tuple(round(side * scale / multiple) * multiple for side in row.size)
    again = {**given, **_second_steps(pipe, given), "height": size[0], "width": size[1]}
    blank = np.zeros((*size, 3), np.float32)  # stands for what the first pass makes
    over = Pass(given.get("hires_steps", given["steps"]), given["steps"])
    second = _prepare_entry(pipe, entry, again, size, [make_rows(pipe, again)], over)
    second = second._replace(index=row.index, image=blank, fresh=False)
    if row.torch is not None:
        second = _with_torch_noise(pipe, second, row.torch.noise.batch, 1)
    return row._replace(second=second)


def _second_steps(pipe: Pipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and strength of the second pass; A1111 has it run a number of steps, whatever the strength.

    The steps are then the last ones of as many as the strength is their share of (modules/sd_samplers_common.py,
    setup_img2img_steps).
    """
    strength, run = given.get("hires_strength", HIRES_STRENGTH), given.get("hires_steps")
    start_of(given["steps"], strength)  # which refuses a strength of 0
    if run is None:
        return {"strength": strength}
    whole, most = run / min(strength, 0.999), schedule_of(pipe.scheduler).num_timesteps
    if whole > most:
        raise UserError(
            f"hires_steps {run} are {strength:g} of {whole:g} steps, and the model was trained on {most}; "
            "lower hires_steps or raise hires_strength"
        )
    return {"steps": int(whole), "strength": strength_of(run, int(whole))}
