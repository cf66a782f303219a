"""What a call asks for, checked, with the checkpoint's own choices where the caller made none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.samplers import SamplerOptions, Table, make_table, sampler_of, schedule_of, start_of
from sdjax.tasks.latent.system import AESTHETICS, SIZES

STEPS, GUIDANCE_SCALE = 50, 7.5
STRENGTH = 0.75
REFINER_START = 0.8
TILE = 1536
FEATHER = 4.0
NOISE_LEVEL = 20
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
GENERATORS = ("jax", "torch")
SYNTAXES = ("a1111", "plain")
Pair = tuple[int, int]
MAX_SEED = 2**32 - 1
MAX_SIDE = 2**14
Number = int | float
# What a sampler that takes the place of the checkpoint's own is told of latents, where their config says nothing: they
# are not within [-1, 1], and "plms" means no Runge-Kutta steps.
FOR_LATENTS = {"clip_sample": False, "skip_prk_steps": True}


@dataclass(frozen=True)
class Settings:
    """What a picture depends on besides prompts, given pictures, a refiner and its index; all of it resolved.

    Attributes:
        schedule: None for the spacing that the checkpoint's scheduler config asks for.
        guidance_scale: of classifier-free guidance; 1 or less is none, as in diffusers.
        guidance_rescale: phi of Lin et al. 2024.
        eta: None for the sampler's own.
        strength: share of the steps that a given picture goes through, at least one of them; None without one.
        syntax: how prompts are read: "a1111", or "plain" without any.
        clip_skip: layers of the text encoders to skip, as diffusers counts.
        rng: whose random numbers: "jax", or "torch" for those of PyTorch on a CPU.
        original_size, crop, target_size: what SDXL is told of its picture's making, (height, width) and (top, left).
        aesthetic_score, negative_aesthetic_score: what SDXL's refiner is told instead of a target size.
        noise_level: of the low-resolution picture of an upscaler, a timestep of its own schedule.
        tile: pixels along a side beyond which the autoencoder works in tiles of as many; 0 for never.
    """

    steps: int
    sampler: str
    schedule: str | None
    guidance_scale: float
    guidance_rescale: float
    eta: float | None
    seed: int
    width: int
    height: int
    strength: float | None
    syntax: str
    clip_skip: int
    rng: str
    original_size: Pair
    crop: Pair
    target_size: Pair
    aesthetic_score: float
    negative_aesthetic_score: float
    noise_level: int
    tile: int

    def numbers(self, count: int, negative: bool) -> list[float] | None:
        """What SDXL is told of a picture beside its prompt (diffusers, `_get_add_time_ids`).

        Args:
            count: `System.numbers`.
            negative: for the negative prompt.
        """
        if count == SIZES:
            return [*self.original_size, *self.crop, *self.target_size]
        if count == AESTHETICS:
            score = self.negative_aesthetic_score if negative else self.aesthetic_score
            return [*self.original_size, *self.crop, score]
        return None

    def table(self, scheduler_config: Mapping[str, Any], start: int | None = None) -> Table:
        """The sampler's rows.

        Args:
            scheduler_config: of the model.
            start: the step to begin at; None for where a given picture of this strength begins.

        Raises:
            UserError: an unknown sampler or schedule, or steps or strength out of range.
        """
        own = self.sampler == sampler_of(scheduler_config)
        config = scheduler_config if own else {**FOR_LATENTS, **scheduler_config}
        if start is None:
            start = 0 if self.strength is None else start_of(self.steps, self.strength)
        return make_table(
            self.sampler,
            schedule_of(scheduler_config),
            self.steps,
            SamplerOptions.from_scheduler_config(config, self.sampler),
            spacing=self.schedule,
            start=start,
            **({} if self.eta is None else {"eta": self.eta}),
        )


@dataclass(frozen=True)
class Shape:
    """What sizes a model can make.

    Attributes:
        factor: pixels a latent stands for along each side; widths and heights are multiples of it.
        channels: of the latents.
        default: height and width in pixels of the pictures it was trained on.
    """

    factor: int
    channels: int
    default: tuple[int, int]

    def latents(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, z) of a picture's latents."""
        return height // self.factor, width // self.factor, self.channels


def hand_over(settings: Settings, base: Mapping[str, Any], share: Number) -> tuple[Table, Table]:
    """The rows of a base model and those of the refiner that takes over (SDXL, section 2.5; diffusers' denoising_end).

    The refiner begins with the first step whose timestep lies below (1 - share) of all; no noise is added there, and
    the levels of both are those of one table.

    Args:
        settings: of the call.
        base: scheduler config of the base model.
        share: of the noise levels that are the base's.

    Raises:
        UserError: the share leaves one of the two without a step.
    """
    share = real("refiner_start", share, 0.0, 1.0)
    whole_table, table = settings.table(base, 0), settings.table(base)
    rows = int(whole_table.active.sum())
    stride = 2 if settings.steps > 1 and rows >= 2 * settings.steps - 1 else 1
    timesteps = whole_table.timestep[:rows:stride][: settings.steps]
    total = schedule_of(base).num_timesteps
    step = int(np.sum(timesteps >= round(total - share * total)))
    first = 0 if settings.strength is None else start_of(settings.steps, settings.strength)
    if not first < step < settings.steps:
        raise UserError(
            f"refiner_start {share:g} gives the base {max(step - first, 0)} of {settings.steps - first} steps; "
            "both models need at least one"
        )
    left = int(settings.table(base, step).active.sum())
    active = table.active & (np.arange(len(table.active)) < int(table.active.sum()) - left)
    return table._replace(active=active), settings.table(base, step)


def resolve(
    given: Mapping[str, Any], defaults: Mapping[str, Any], scheduler_config: Mapping[str, Any], shape: Shape
) -> Settings:
    """The settings of a call.

    Args:
        given: fields of `Settings`; None is as good as absent.
        defaults: the checkpoint's own, for steps and guidance_scale.
        scheduler_config: names the sampler.
        shape: of the model.

    Raises:
        UserError: a value is of the wrong type or out of range.
    """
    chosen = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    schedule, sampler, eta = chosen.get("schedule"), chosen.get("sampler"), chosen.get("eta")
    strength = chosen.get("strength")
    width = _side("width", chosen.get("width", shape.default[1]), shape.factor)
    height = _side("height", chosen.get("height", shape.default[0]), shape.factor)
    score, negative_score = "aesthetic_score", "negative_aesthetic_score"
    return Settings(
        steps=whole("steps", chosen.get("steps", STEPS)),
        sampler=sampler_of(scheduler_config) if sampler is None else sampler,
        schedule=schedule,
        guidance_scale=real("guidance_scale", chosen.get("guidance_scale", GUIDANCE_SCALE), 0.0),
        guidance_rescale=real("guidance_rescale", chosen.get("guidance_rescale", 0.0), 0.0, 1.0),
        eta=None if eta is None else real("eta", eta, 0.0, 1.0),
        seed=whole("seed", chosen.get("seed", 0), 0, MAX_SEED),
        width=width,
        height=height,
        strength=None if strength is None else real("strength", strength, 0.0, 1.0),
        syntax=one_of("syntax", chosen.get("syntax", SYNTAXES[0]), SYNTAXES),
        clip_skip=whole("clip_skip", chosen.get("clip_skip", 0), 0),
        rng=one_of("rng", chosen.get("rng", GENERATORS[0]), GENERATORS),
        original_size=_pair("original_size", chosen.get("original_size", (height, width)), 1),
        crop=_pair("crop", chosen.get("crop", (0, 0)), 0),
        target_size=_pair("target_size", chosen.get("target_size", (height, width)), 1),
        aesthetic_score=real(score, chosen.get(score, AESTHETIC_SCORE), 0.0),
        negative_aesthetic_score=real(negative_score, chosen.get(negative_score, NEGATIVE_AESTHETIC_SCORE), 0.0),
        noise_level=whole("noise_level", chosen.get("noise_level", NOISE_LEVEL), 0, 999),
        tile=whole("tile", chosen.get("tile", TILE), 0),
    )


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of several names.

    Raises:
        UserError: it is not.
    """
    if value not in choices:
        raise unknown(name, value, choices)
    return value


def _pair(name: str, value: Any, least: int) -> Pair:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f"{name} {value!r}: choose two integers of {_range(least, math.inf)}, vertical first")
    return whole(name, value[0], least), whole(name, value[1], least)


def whole(name: str, value: Any, least: int = 1, most: Number = math.inf) -> int:
    """An integer in a range.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise UserError(f"{name} {value!r}: choose an integer of {_range(least, most)}")
    return int(value)


def real(name: str, value: Any, least: Number, most: Number = math.inf) -> float:
    """A finite number in a range.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, Number) or not math.isfinite(value) or not least <= value <= most:
        raise UserError(f"{name} {value!r}: choose a number of {_range(least, most)}")
    return float(value)


def _range(least: Number, most: Number) -> str:
    return f"at least {least}" if math.isinf(most) else f"{least} to {most}"


def _side(name: str, value: Any, multiple: int) -> int:
    side = whole(name, value, 1, MAX_SIDE)
    if side % multiple:
        near = sorted({max(multiple, side // multiple * multiple), -(-side // multiple) * multiple})
        raise UserError(
            f"{name} {side} is not a multiple of {multiple}, which this model needs; "
            f"nearest: {', '.join(map(str, near))}"
        )
    return side


def texts(
    prompts: str | Sequence[str], negative_prompt: str | Sequence[str | None] | None, num_images: int
) -> tuple[list[str], list[str | None]]:
    """Prompt and negative prompt, or None, of every image: all images of the first prompt come first.

    Raises:
        UserError: no prompts, or another number of negative prompts than of prompts.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    negatives: list[str | None]
    if negative_prompt is None or isinstance(negative_prompt, str):
        negatives = [negative_prompt] * len(prompts)
    else:
        negatives = list(negative_prompt)
    if not prompts:
        raise UserError("there are no prompts")
    if len(negatives) != len(prompts):
        raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    whole("num_images", num_images)
    return [text for text in prompts for _ in range(num_images)], [
        text for text in negatives for _ in range(num_images)
    ]
