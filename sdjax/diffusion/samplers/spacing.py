"""At which timesteps and noise levels a sampler calls the network: PyTorch diffusers' definitions, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.samplers.noise_levels import sigma_schedule
from sdjax.diffusion.samplers.options import TIMESTEP_SPACINGS, SamplerOptions
from sdjax.diffusion.schedule import Schedule, sigma_to_timestep, timestep_to_sigma

# Schedules whose timesteps diffusers' DPM-Solver family cuts to whole numbers, and those that it rounds before.
_ROUNDED = ("karras", "lu")
_TRUNCATED = (*_ROUNDED, "exponential", "beta")


class Levels(NamedTuple):
    """Descending noise levels sigmas [n + 1], the last where sampling ends, and the timesteps [n] of all but that."""

    sigmas: np.ndarray
    timesteps: np.ndarray


def spaced_timesteps(spacing: str, steps: int, num_timesteps: int, steps_offset: int = 0) -> np.ndarray:
    """`steps` descending timesteps, fractional for linspace (Lin et al. 2024, table 2; diffusers' set_timesteps).

    Raises:
        UserError: an unknown spacing, not 1 <= steps <= num_timesteps, or an offset of more than a step.
    """
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps {steps}: choose 1 to {num_timesteps}, the number of training timesteps")
    if spacing == "linspace":
        return np.linspace(0, num_timesteps - 1, steps)[::-1]
    if spacing == "leading":
        if not 0 <= steps_offset <= num_timesteps // steps:
            raise UserError(f"steps_offset {steps_offset}: choose 0 to {num_timesteps // steps} for {steps} steps")
        timesteps = (np.arange(steps) * (num_timesteps // steps))[::-1] + float(steps_offset)
        return np.clip(timesteps, 0, num_timesteps - 1)
    if spacing == "trailing":
        return np.round(np.arange(num_timesteps, 0, -num_timesteps / steps)) - 1.0
    raise unknown("timestep spacing", spacing, TIMESTEP_SPACINGS)


def given_timesteps(timesteps: Sequence[int], steps: int, num_timesteps: int) -> np.ndarray:
    """[steps] timesteps that a caller chose; a UserError unless they descend within the training's."""
    given = np.array(timesteps)
    if len(given) != steps or np.any(np.diff(given) >= 0) or given.min() < 0 or given.max() >= num_timesteps:
        raise UserError(f"timesteps {list(timesteps)}: give {steps} descending integers of 0 to {num_timesteps - 1}")
    return given


def integer_timesteps(schedule: Schedule, steps: int, options: SamplerOptions) -> np.ndarray:
    """[steps] descending integers for DDPM, DDIM and PLMS.

    Raises:
        UserError: see `spaced_timesteps`; or a schedule was asked for whose levels lie between timesteps.
    """
    if options.sigma_schedule is not None:
        raise UserError(
            f"schedule {options.sigma_schedule!r}: this sampler steps on timesteps; "
            f"choose one of: {', '.join(TIMESTEP_SPACINGS)}"
        )
    timesteps = spaced_timesteps(options.timestep_spacing, steps, schedule.num_timesteps, options.steps_offset)
    return np.minimum(np.round(timesteps).astype(np.int64), schedule.num_timesteps - 1)


def sigma_levels(schedule: Schedule, steps: int, options: SamplerOptions, round_karras: bool = False) -> Levels:
    """Levels of Euler, Heun, LMS, DPM2 and their kin: sigmas between timesteps, or a schedule between their ends.

    Args:
        schedule, steps, options: of which spacing, offset, sigma schedule and final level count.
        round_karras: tell the network whole timesteps under Karras (diffusers' KDPM2 schedulers do).

    Raises:
        UserError: see `spaced_timesteps` and `sigma_schedule`.
    """
    timesteps = spaced_timesteps(options.timestep_spacing, steps, schedule.num_timesteps, options.steps_offset)
    # Timesteps condition the network in float32: the levels that belong to them are those of the rounded values.
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    sigmas = timestep_to_sigma(timesteps, schedule.sigmas)
    if options.sigma_schedule is not None:
        ends = (options.sigma_min or float(sigmas[-1]), options.sigma_max or float(sigmas[0]))
        sigmas = sigma_schedule(options.sigma_schedule, schedule.sigmas, steps, ends)
        timesteps = sigma_to_timestep(sigmas, schedule.sigmas)
        if round_karras and options.sigma_schedule == "karras":
            timesteps = np.round(timesteps)
    return Levels(np.append(sigmas, final_sigma(schedule, options)), timesteps)


def solver_levels(schedule: Schedule, steps: int, options: SamplerOptions, repeat_last: bool = False) -> Levels:
    """Levels of the DPM-Solver family: whole timesteps, one more is spaced than used; others over the whole schedule.

    Args:
        schedule, steps, options: as in `sigma_levels`, with lambda_min_clipped.
        repeat_last: under a sigma schedule, to end at sigma_min is to end at the last level (UniPC and DEIS).

    Raises:
        UserError: see `spaced_timesteps` and `sigma_schedule`.
    """
    # Signal-to-noise below lambda_min_clipped is left out: the cosine schedule's end is beyond float32 (DPM-Solver++).
    clipped = int(np.sum(-np.log(schedule.sigmas) < options.lambda_min_clipped))
    last = schedule.num_timesteps - clipped
    if not 1 <= steps < last:
        raise UserError(f"steps {steps}: choose 1 to {last - 1}, below the number of training timesteps")
    final = final_sigma(schedule, options)
    if options.sigma_schedule is not None:
        ends = (options.sigma_min or float(schedule.sigmas[0]), options.sigma_max or float(schedule.sigmas[-1]))
        sigmas = sigma_schedule(options.sigma_schedule, schedule.sigmas, steps, ends)
        final = float(sigmas[-1]) if repeat_last and final else final
        return Levels(
            np.append(sigmas, min(final, float(sigmas[-1]))), conditioned_timesteps(schedule, sigmas, options)
        )
    if options.timestep_spacing == "trailing":
        timesteps = np.round(np.arange(last, 0, -schedule.num_timesteps / steps)) - 1.0
    else:
        timesteps = np.round(spaced_timesteps(options.timestep_spacing, steps + 1, last, options.steps_offset))[:-1]
    return Levels(np.append(timestep_to_sigma(timesteps, schedule.sigmas), final), timesteps)


def conditioned_timesteps(schedule: Schedule, sigmas: np.ndarray, options: SamplerOptions) -> np.ndarray:
    """Timesteps that the DPM-Solver family conditions the network on, at levels of a sigma schedule."""
    timesteps = sigma_to_timestep(sigmas, schedule.sigmas)
    if options.sigma_schedule in _ROUNDED and options.beta_schedule != "squaredcos_cap_v2":
        timesteps = np.round(timesteps)
    # What rounding has put just below a whole number is that number.
    return np.floor(timesteps + 1e-6) if options.sigma_schedule in _TRUNCATED else timesteps


def final_sigma(schedule: Schedule, options: SamplerOptions) -> float:
    """Final sigma: 0, or the schedule's least level."""
    return float(schedule.sigmas[0]) if options.final_sigmas_type == "sigma_min" else 0.0


def first_noise_scale(sigma: float, options: SamplerOptions) -> float:
    """init_noise_sigma of Euler, Heun, LMS and DPM2: sigma, or sqrt(sigma^2 + 1) with leading spacing."""
    return variance_preserving_scale(sigma) if options.timestep_spacing == "leading" else float(sigma)


def variance_preserving_scale(sigma: float) -> float:
    """sqrt(sigma^2 + 1): the first noise of the samplers whose init_noise_sigma is 1 in diffusers."""
    return float(np.sqrt(sigma**2 + 1.0))
