"""At which timesteps and noise levels a sampler calls the network: PyTorch diffusers' definitions, class by class."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sdjax.core.errors import UserError, unknown
from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.schedule import Schedule, sigma_to_timestep, timestep_to_sigma

RHO = 7.0


class Levels(NamedTuple):
    """Descending noise levels sigmas [n + 1], the last where sampling ends, and the timesteps [n] of all but that."""

    sigmas: np.ndarray
    timesteps: np.ndarray


def spaced_timesteps(spacing: str, steps: int, num_timesteps: int, steps_offset: int = 0) -> np.ndarray:
    """`steps` descending timesteps, fractional for linspace (Lin et al. 2024, table 2; diffusers' set_timesteps).

    Raises:
        UserError: an unknown spacing, or not 1 <= steps <= num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps {steps}: choose 1 to {num_timesteps}, the number of training timesteps")
    if spacing == "linspace":
        return np.linspace(0, num_timesteps - 1, steps)[::-1]
    if spacing == "leading":
        return (np.arange(steps) * (num_timesteps // steps))[::-1] + float(steps_offset)
    if spacing == "trailing":
        return np.round(np.arange(num_timesteps, 0, -num_timesteps / steps)) - 1.0
    raise unknown("timestep spacing", spacing, ("leading", "linspace", "trailing"))


def integer_timesteps(schedule: Schedule, steps: int, options: SamplerOptions) -> np.ndarray:
    """[steps] descending integers for DDPM, DDIM and PLMS.

    Raises:
        UserError: see `spaced_timesteps`; or Karras levels were asked for, which lie between timesteps.
    """
    if options.use_karras_sigmas:
        raise UserError(
            "schedule 'karras': this sampler steps on timesteps; choose one of: leading, linspace, trailing"
        )
    timesteps = spaced_timesteps(options.timestep_spacing, steps, schedule.num_timesteps, options.steps_offset)
    return np.minimum(np.round(timesteps).astype(np.int64), schedule.num_timesteps - 1)


def sigma_levels(schedule: Schedule, steps: int, options: SamplerOptions, round_karras: bool = False) -> Levels:
    """Levels of Euler, Heun, LMS and DPM2: sigmas between timesteps, Karras between the ends of the chosen ones.

    Args:
        schedule: of the training.
        steps: n.
        options: spacing, offset, Karras, final level.
        round_karras: tell the network whole timesteps under Karras (diffusers' KDPM2DiscreteScheduler does).

    Raises:
        UserError: see `spaced_timesteps`.
    """
    timesteps = spaced_timesteps(options.timestep_spacing, steps, schedule.num_timesteps, options.steps_offset)
    # The network is told timesteps in float32: the levels that belong to them are those of the rounded values.
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    sigmas = timestep_to_sigma(timesteps, schedule.sigmas)
    if options.use_karras_sigmas:
        sigmas = karras(options.sigma_min or sigmas[-1], options.sigma_max or sigmas[0], steps)
        timesteps = sigma_to_timestep(sigmas, schedule.sigmas)
        timesteps = np.round(timesteps) if round_karras else timesteps
    return Levels(np.append(sigmas, final_sigma(schedule, options)), timesteps)


def solver_levels(schedule: Schedule, steps: int, options: SamplerOptions) -> Levels:
    """Levels of the DPM-Solver family: whole timesteps, one more is spaced than used, Karras over the whole schedule.

    Raises:
        UserError: see `spaced_timesteps`.
    """
    # Signal-to-noise below lambda_min_clipped is left out: the cosine schedule's end is beyond float32 (DPM-Solver++).
    clipped = int(np.sum(-np.log(schedule.sigmas) < options.lambda_min_clipped))
    last = schedule.num_timesteps - clipped
    if not 1 <= steps < last:
        raise UserError(f"steps {steps}: choose 1 to {last - 1}, below the number of training timesteps")
    if options.timestep_spacing == "trailing":
        timesteps = np.round(np.arange(last, 0, -schedule.num_timesteps / steps)) - 1.0
    else:
        timesteps = np.round(spaced_timesteps(options.timestep_spacing, steps + 1, last, options.steps_offset))[:-1]
    if options.use_karras_sigmas:
        sigmas = karras(schedule.sigmas[0], schedule.sigmas[-1], steps)
        timesteps = sigma_to_timestep(sigmas, schedule.sigmas)
        timesteps = timesteps if options.beta_schedule == "squaredcos_cap_v2" else np.round(timesteps)
    else:
        sigmas = timestep_to_sigma(timesteps, schedule.sigmas)
    return Levels(np.append(sigmas, final_sigma(schedule, options)), np.floor(timesteps))


def final_sigma(schedule: Schedule, options: SamplerOptions) -> float:
    """Where sampling ends: 0, or the schedule's least level."""
    return float(schedule.sigmas[0]) if options.final_sigmas_type == "sigma_min" else 0.0


def karras(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """[steps] descending levels, evenly spaced in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0.0, 1.0, steps)
    low, high = sigma_min ** (1.0 / RHO), sigma_max ** (1.0 / RHO)
    return (high + ramp * (low - high)) ** RHO


def first_noise_scale(sigma: float, options: SamplerOptions) -> float:
    """init_noise_sigma of Euler, Heun, LMS and DPM2: sigma, or sqrt(sigma^2 + 1) with leading spacing."""
    return float(np.sqrt(sigma**2 + 1.0)) if options.timestep_spacing == "leading" else float(sigma)
