"""Samplers as tables of coefficients, chosen by the names that users know, and the one scan that runs them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.samplers.consistency import lcm, tcd
from sdjax.diffusion.samplers.ddpm import ddim, ddpm
from sdjax.diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m_sde
from sdjax.diffusion.samplers.euler import euler, euler_a
from sdjax.diffusion.samplers.multistep import deis, lms
from sdjax.diffusion.samplers.noise_levels import SIGMA_SCHEDULES
from sdjax.diffusion.samplers.options import TIMESTEP_SPACINGS, SamplerOptions, sampler_of, schedule_of
from sdjax.diffusion.samplers.plms import plms
from sdjax.diffusion.samplers.scan import first_noise, sample
from sdjax.diffusion.samplers.second_order import dpm2, dpm2_a, dpmpp_2s_a, dpmpp_sde, heun
from sdjax.diffusion.samplers.sections import SECTIONS, section_timesteps, steps_of
from sdjax.diffusion.samplers.table import SamplerPlan, SamplerTable, batched, network_calls, stack
from sdjax.diffusion.samplers.unipc import unipc
from sdjax.diffusion.schedule import Schedule

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "SamplerOptions",
    "SamplerTable",
    "batched",
    "first_noise",
    "make_table",
    "network_calls",
    "sample",
    "sampler_of",
    "schedule_of",
    "start_of",
    "steps_of",
    "strength_of",
    "table_for",
]

SAMPLERS: dict[str, Callable[[Schedule, int, SamplerOptions, int], SamplerPlan]] = {
    sampler.__name__: sampler
    for sampler in (
        *(ddpm, ddim, plms, euler, euler_a, heun, dpm2, dpm2_a, lms, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde),
        *(dpmpp_2s, dpmpp_2s_a, dpmpp_sde, unipc, deis, lcm, tcd),
    )
}
SPACINGS = (*TIMESTEP_SPACINGS, *SIGMA_SCHEDULES, *SECTIONS)

# Their timesteps are those of the distillation, whatever the spacing.
_OWN_TIMESTEPS = ("lcm", "tcd")

# Samplers of k-diffusion that add noise, whose factor s_noise is.
_NOISY = ("euler_a", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler", "heun", "dpm2")

# Where a latent model's own scheduler config departs from the defaults of the classes.
_LATENT = {"clip_sample": False, "skip_prk_steps": True}


def make_table(
    sampler: str,
    schedule: Schedule,
    steps: int,
    options: SamplerOptions | None = None,
    *,
    spacing: str | None = None,
    start: int = 0,
    **changes: object,
) -> SamplerTable:
    """The table of a sampler, float64 on the host.

    Args:
        sampler, schedule: a key of SAMPLERS, and that of the training.
        steps: Heun, DPM2, DPM2 a, DPM++ 2S a and DPM++ SDE call the network 2 steps - 1 times, PLMS steps + 1.
        options: None for the defaults of the sampler's class in diffusers, without clipping.
        spacing: one of SPACINGS in place of what the options say.
        start: steps to leave out at the beginning (image to image); solvers warm up anew from there.
        **changes: fields of SamplerOptions, e.g. eta=1.0, in place of what `options` says.

    Raises:
        UserError: an unknown sampler, spacing or option, a spacing or s_noise that does not suit the sampler, a start
            or a number of steps out of range.
    """
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    if options is None:
        options = SamplerOptions.from_scheduler_config(_LATENT, sampler)
    if spacing is not None:
        changes |= _spacing(spacing, sampler)
        if spacing in SECTIONS:
            changes["timesteps"] = _sections(spacing, sampler, steps, schedule)
    for name in changes:
        if name not in SamplerOptions.__dataclass_fields__:
            raise unknown("sampler option", name, SamplerOptions.__dataclass_fields__)
    options = dataclasses.replace(options, **changes)  # pyright: ignore[reportArgumentType]
    if not 0 <= start < steps:
        raise UserError(f"start {start}: choose 0 to {steps - 1}, below the number of steps")
    if "s_noise" in changes and sampler not in _NOISY:
        raise UserError(
            f"s_noise {options.s_noise:g} changes nothing for {sampler}; choose one of: {', '.join(_NOISY)}"
        )
    plan = SAMPLERS[sampler](schedule, steps, options, start)
    from_scratch = SAMPLERS[sampler](schedule, steps, options, 0) if start else plan
    return stack(plan, options.limits, len(from_scratch.rows), start)


def table_for(
    scheduler: Mapping[str, Any],
    sampler: str | None = None,
    steps: int = 50,
    *,
    spacing: str | None = None,
    start: int = 0,
    latents: bool = True,
    **changes: object,
) -> SamplerTable:
    """The table of a model's sampler, by its scheduler_config.json.

    Args:
        scheduler, sampler: the config, and a key of SAMPLERS; None for the config's own.
        steps, spacing, start, changes: as in `make_table`.
        latents: whether latents are diffused. They are not within [-1, 1], so another sampler than the config's own
            does not clip them where the config says nothing.

    Raises:
        UserError: as `make_table`.
    """
    own = sampler_of(scheduler)
    sampler = own if sampler is None else sampler
    known = scheduler if sampler == own or not latents else {**_LATENT, **scheduler}
    options = SamplerOptions.from_scheduler_config(known, sampler)
    return make_table(sampler, schedule_of(scheduler), steps, options, spacing=spacing, start=start, **changes)


def start_of(steps: int, strength: float) -> int:
    """The step at which image to image begins: int(strength steps) of them are left, but at least one (SDEdit).

    Raises:
        UserError: strength is not in (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength {strength}: choose more than 0, at most 1")
    return steps - min(max(int(steps * strength), 1), steps)


def strength_of(part: int, steps: int) -> float:
    """A strength that leaves so many of all steps: the inverse of `start_of`."""
    strength = part / steps
    return strength if int(strength * steps) >= part else math.nextafter(strength, 2.0)


def _spacing(name: str, sampler: str) -> dict[str, object]:
    if name not in SPACINGS:
        raise unknown("schedule", name, SPACINGS)
    if sampler in _OWN_TIMESTEPS:
        raise UserError(f"schedule {name!r}: {sampler} has the timesteps of its distillation; leave the schedule out")
    if name in TIMESTEP_SPACINGS:
        return {"timestep_spacing": name, "sigma_schedule": None}
    return {"sigma_schedule": None if name in SECTIONS else name}


def _sections(name: str, sampler: str, steps: int, schedule: Schedule) -> tuple[int, ...]:
    """Timesteps of a choice of SECTIONS, which DDPM alone steps between (deep-floyd/IF)."""
    if sampler != "ddpm":
        raise UserError(f"schedule {name!r}: its uneven timesteps are for ddpm, not {sampler}")
    if steps != steps_of(name):
        raise UserError(f"steps {steps}: schedule {name!r} has {steps_of(name)}; leave the steps out")
    return tuple(section_timesteps(SECTIONS[name], schedule.num_timesteps).tolist())
