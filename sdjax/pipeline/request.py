"""What a call asks for, checked, with the checkpoint's own choices where the caller made none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SamplerOptions, Table, make_table, sampler_of, schedule_of, start_of

STEPS, GUIDANCE_SCALE = 50, 7.5
MAX_SEED = 2**32 - 1
Number = int | float
# What a sampler that takes the place of the checkpoint's own is told of latents, where their config says nothing: they
# are not within [-1, 1], and "plms" means no Runge-Kutta steps.
FOR_LATENTS = {"clip_sample": False, "skip_prk_steps": True}


@dataclass(frozen=True)
class Settings:
    """Everything that a picture depends on besides prompts, given pictures and its index; all of it resolved.

    Attributes:
        schedule: None for the spacing that the checkpoint's scheduler config asks for.
        guidance_scale: of classifier-free guidance; 1 or less is none, as in diffusers.
        guidance_rescale: phi of Lin et al. 2024.
        eta: None for the sampler's own.
        strength: share of the steps that a given picture goes through; None without one.
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

    def table(self, scheduler_config: Mapping[str, Any]) -> Table:
        """The sampler's rows, from where a given picture of this strength begins.

        Raises:
            UserError: an unknown sampler or schedule, or steps or strength out of range.
        """
        own = self.sampler == sampler_of(scheduler_config)
        config = scheduler_config if own else {**FOR_LATENTS, **scheduler_config}
        return make_table(
            self.sampler,
            schedule_of(scheduler_config),
            self.steps,
            SamplerOptions.from_scheduler_config(config, self.sampler),
            spacing=self.schedule,
            start=0 if self.strength is None else start_of(self.steps, self.strength),
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
    return Settings(
        steps=whole("steps", chosen.get("steps", STEPS)),
        sampler=sampler_of(scheduler_config) if sampler is None else sampler,
        schedule=schedule,
        guidance_scale=real("guidance_scale", chosen.get("guidance_scale", GUIDANCE_SCALE), 0.0),
        guidance_rescale=real("guidance_rescale", chosen.get("guidance_rescale", 0.0), 0.0, 1.0),
        eta=None if eta is None else real("eta", eta, 0.0, 1.0),
        seed=whole("seed", chosen.get("seed", 0), 0, MAX_SEED),
        width=_side("width", chosen.get("width", shape.default[1]), shape.factor),
        height=_side("height", chosen.get("height", shape.default[0]), shape.factor),
        strength=None if strength is None else real("strength", strength, 0.0, 1.0),
    )


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
    side = whole(name, value)
    if side % multiple:
        near = sorted({max(multiple, side // multiple * multiple), -(-side // multiple) * multiple})
        raise UserError(
            f"{name} {side} is not a multiple of {multiple}, which this model needs; "
            f"nearest: {', '.join(map(str, near))}"
        )
    return side


def texts(
    prompts: str | Sequence[str], negative_prompt: str | Sequence[str] | None, num_images: int
) -> tuple[list[str], list[str]]:
    """Prompt and negative prompt of every image: all images of the first prompt come first.

    Raises:
        UserError: no prompts, or another number of negative prompts than of prompts.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    negatives = "" if negative_prompt is None else negative_prompt
    negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
    if not prompts:
        raise UserError("there are no prompts")
    if len(negatives) != len(prompts):
        raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    whole("num_images", num_images)
    return [text for text in prompts for _ in range(num_images)], [
        text for text in negatives for _ in range(num_images)
    ]
