"""Heun and DPM-Solver-2: two network calls a step, the anchor holding x from the first; the last step is Euler's."""

from __future__ import annotations

import numpy as np

from sdjax.diffusion.samplers.euler import churn
from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import sigma_levels
from sdjax.diffusion.samplers.table import KEEP_X, Plan, Row, weights
from sdjax.diffusion.schedule import Schedule, sigma_to_timestep


def heun(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> Plan:
    """Heun's method (Karras et al. 2022, algorithm 2; k-diffusion's sample_heun)."""
    levels = sigma_levels(schedule, steps, options)
    churned = churn(schedule, levels, options, start)
    rows = []
    for i, (sigma, target) in enumerate(zip(churned.sigmas, churned.targets, strict=True)):
        if target == 0.0:
            rows.append(euler_row(sigma, churned.timesteps[i], target, churned.noise[i]))
            continue
        half = (target - sigma) / 2.0
        # x' = anchor + half ((anchor - first x0) / sigma + (x - second x0) / target)
        corrected = weights(
            x=half / target,
            anchor=1.0 + half / sigma,
            predictions=[-half / target, -half / sigma],
            noise=churned.noise[i],
        )
        rows.append(euler_row(sigma, churned.timesteps[i], target))
        told = levels.timesteps[start + i + 1] if start + i + 1 < len(levels.timesteps) else 0.0
        rows.append(Row(target, float(told), corrected))
    return Plan(rows, churned.first_scale)


def dpm2(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> Plan:
    """DPM-Solver-2 with its midpoint in log sigma (k-diffusion's sample_dpm_2)."""
    levels = sigma_levels(schedule, steps, options, round_karras=True)
    churned = churn(schedule, levels, options, start)
    rows = []
    for i, (sigma, target) in enumerate(zip(churned.sigmas, churned.targets, strict=True)):
        if target == 0.0:
            rows.append(euler_row(sigma, churned.timesteps[i], target, churned.noise[i]))
            continue
        middle = float(np.sqrt(sigma * target))
        slope = (target - sigma) / middle
        full = weights(x=slope, anchor=1.0, predictions=[-slope], noise=churned.noise[i])
        rows.append(euler_row(sigma, churned.timesteps[i], middle))
        rows.append(Row(middle, float(sigma_to_timestep(np.array(middle), schedule.sigmas)), full))
    return Plan(rows, churned.first_scale)


def euler_row(sigma: float, timestep: float, target: float, noise: float = 0.0) -> Row:
    """An Euler step to `target` that leaves x in the anchor."""
    ratio = target / sigma
    return Row(sigma, timestep, weights(x=ratio, predictions=[1.0 - ratio], noise=noise), KEEP_X)
