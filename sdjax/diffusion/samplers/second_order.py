"""Two network calls a step, the last but Euler's: Heun and DPM-Solver-2, and the ancestral and SDE samplers.

The anchor holds x from the first call. Ancestral steps go down to an inner point, over to sigma_down, and noise leads
back up. All of k-diffusion's sampling.py; the levels are those of Euler and its kin.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers.euler import ancestral_split, churn
from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import Levels, first_noise_scale, sigma_levels
from sdjax.diffusion.samplers.table import KEEP_X, SamplerPlan, SamplerStep, weights
from sdjax.diffusion.schedule import Schedule, sigma_to_timestep

Pair = tuple[np.ndarray, float, np.ndarray, np.ndarray]
"""A step's weights: x after the first call, the level of the second, the anchor after the first, x after the second."""


def heun(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Heun's method (Karras et al. 2022, algorithm 2; k-diffusion's sample_heun)."""
    levels = sigma_levels(schedule, steps, options)
    churned = churn(schedule, levels, options, start)
    rows = []
    for i, (sigma, target) in enumerate(zip(churned.sigmas, churned.targets, strict=True)):
        if target == 0.0:
            rows.append(_euler_row(sigma, churned.timesteps[i], target, churned.noise[i]))
            continue
        half = (target - sigma) / 2.0
        # x' = anchor + half ((anchor - first x0) / sigma + (x - second x0) / target)
        near, far = half / target, half / sigma
        corrected = weights(x=near, anchor=1.0 + far, predictions=[-near, -far], noise=churned.noise[i])
        rows.append(_euler_row(sigma, churned.timesteps[i], target))
        timestep = levels.timesteps[start + i + 1] if start + i + 1 < len(levels.timesteps) else 0.0
        rows.append(SamplerStep(target, float(timestep), corrected, begins=False))
    return SamplerPlan(rows, churned.first_scale)


def dpm2(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """DPM-Solver-2 with its midpoint in log sigma (k-diffusion's sample_dpm_2)."""
    levels = sigma_levels(schedule, steps, options, round_karras=True)
    churned = churn(schedule, levels, options, start)
    rows = []
    for i, (sigma, target) in enumerate(zip(churned.sigmas, churned.targets, strict=True)):
        if target == 0.0:
            rows.append(_euler_row(sigma, churned.timesteps[i], target, churned.noise[i]))
            continue
        middle = float(np.sqrt(sigma * target))
        slope = (target - sigma) / middle
        full = weights(x=slope, anchor=1.0, predictions=[-slope], noise=churned.noise[i])
        rows.append(_euler_row(sigma, churned.timesteps[i], middle))
        rows.append(_middle_row(schedule, middle, full))
    return SamplerPlan(rows, churned.first_scale)


def _euler_row(sigma: float, timestep: float, target: float, noise: float = 0.0) -> SamplerStep:
    """An Euler step to `target` that leaves x in the anchor."""
    ratio = target / sigma
    return SamplerStep(sigma, timestep, weights(x=ratio, predictions=[1.0 - ratio], noise=noise), KEEP_X)


def _middle_row(schedule: Schedule, middle: float, full: np.ndarray) -> SamplerStep:
    """A step's second call, between its ends."""
    return SamplerStep(middle, float(sigma_to_timestep(np.array(middle), schedule.sigmas)), full, begins=False)


def dpm2_a(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Ancestral DPM-Solver-2 (k-diffusion's sample_dpm_2_ancestral; diffusers' KDPM2AncestralDiscrete)."""

    def pair(sigma: float, target: float) -> Pair:
        down, up = ancestral_split(sigma, target, options.eta)
        middle = float(np.sqrt(sigma * down))
        slope = (down - sigma) / middle
        full = weights(x=slope, anchor=1.0, predictions=[-slope], noise=up * options.s_noise)
        return _toward(sigma, middle), middle, KEEP_X, full

    levels = sigma_levels(schedule, steps, options, round_karras=True)
    return _plan(schedule, levels, options, start, pair)


def dpmpp_2s_a(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Ancestral DPM-Solver++ (2S) (k-diffusion's sample_dpmpp_2s_ancestral)."""

    def pair(sigma: float, target: float) -> Pair:
        down, up = ancestral_split(sigma, target, options.eta)
        middle = float(np.sqrt(sigma * down))
        ratio = down / sigma
        full = weights(anchor=ratio, predictions=[1.0 - ratio], noise=up * options.s_noise)
        return _toward(sigma, middle), middle, KEEP_X, full

    return _plan(schedule, sigma_levels(schedule, steps, options), options, start, pair)


def dpmpp_sde(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """DPM-Solver++ (stochastic) with r = 1/2 (k-diffusion's sample_dpmpp_sde; diffusers' DPMSolverSDE).

    The whole step's noise is the Brownian increment from sigma to its target, the half step's the first part of the
    same increment: what they share is laid in the anchor by the first call, the second adds the rest.

    Raises:
        UserError: eta above 1, where nothing of x would be left to carry the noise.
    """
    if not 0.0 <= options.eta <= 1.0:
        raise UserError(f"eta {options.eta:g}: dpmpp_sde needs 0 to 1")

    def pair(sigma: float, target: float) -> Pair:
        middle = float(np.sqrt(sigma * target))
        half_down, half_up = ancestral_split(sigma, middle, options.eta)
        down, up = ancestral_split(sigma, target, options.eta)
        half, full, up = half_down / sigma, down / sigma, up * options.s_noise
        shared = float(np.sqrt((sigma - middle) / (sigma - target)))
        toward = weights(x=half, predictions=[1.0 - half], noise=half_up * options.s_noise)
        anchor = weights(x=1.0, noise=up * shared / full)
        rest = up * float(np.sqrt(1.0 - shared**2))
        return toward, middle, anchor, weights(anchor=full, predictions=[1.0 - full], noise=rest)

    return _plan(schedule, sigma_levels(schedule, steps, options), options, start, pair)


def _toward(sigma: float, target: float) -> np.ndarray:
    return weights(x=target / sigma, predictions=[1.0 - target / sigma])


def _plan(
    schedule: Schedule, levels: Levels, options: SamplerOptions, start: int, pair: Callable[[float, float], Pair]
) -> SamplerPlan:
    sigmas, timesteps = levels.sigmas[start:].tolist(), levels.timesteps[start:].tolist()
    rows = []
    for sigma, target, timestep in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
        if target == 0.0:
            rows.append(_euler_row(sigma, timestep, target))
            continue
        toward, middle, anchor, full = pair(sigma, target)
        rows.append(SamplerStep(sigma, timestep, toward, anchor))
        rows.append(_middle_row(schedule, middle, full))
    return SamplerPlan(rows, first_noise_scale(sigmas[0], options))
