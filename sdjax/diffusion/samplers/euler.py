"""Euler's method on the probability flow, plain, with churn, and ancestral."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import Levels, first_noise_scale, sigma_levels
from sdjax.diffusion.samplers.table import SamplerPlan, SamplerStep, weights
from sdjax.diffusion.schedule import Schedule, sigma_to_timestep


def euler(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Euler (Karras et al. 2022, algorithm 2 without its correction; k-diffusion's sample_euler)."""
    churned = churn(schedule, sigma_levels(schedule, steps, options), options, start)
    rows = []
    for i, (sigma, t) in enumerate(zip(churned.sigmas, churned.timesteps, strict=True)):
        ratio = churned.targets[i] / sigma
        next_x = weights(x=ratio, predictions=[1.0 - ratio], noise=churned.noise[i])
        rows.append(SamplerStep(sigma, t, next_x))
    return SamplerPlan(rows, churned.first_scale)


def euler_a(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Ancestral Euler: down to sigma_down, then fresh noise back up (k-diffusion's sample_euler_ancestral)."""
    levels = sigma_levels(schedule, steps, options)
    sigmas, timesteps = levels.sigmas[start:], levels.timesteps[start:]
    rows = []
    for sigma, target, t in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
        down, up = ancestral_split(sigma, target, options.eta)
        next_x = weights(x=down / sigma, predictions=[1.0 - down / sigma], noise=up * options.s_noise)
        rows.append(SamplerStep(float(sigma), float(t), next_x))
    return SamplerPlan(rows, first_noise_scale(sigmas[0], options))


def ancestral_split(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """sigma_down, where a deterministic step from sigma ends, and sigma_up, the fresh noise that leads on to target."""
    # Not by down^2 = target^2 - up^2, which cancels after a long step.
    kept = max(1.0 - eta**2 + (eta * target / sigma) ** 2, 0.0)
    return float(target * np.sqrt(kept)), float(target * np.sqrt(max(1.0 - kept, 0.0)))


class Churned(NamedTuple):
    """Levels at which the network is called once churn has raised them, and the noise that raises them.

    The noise that lifts step i + 1 is added by step i, whose own step is deterministic; that of the first step is part
    of the first noise's scale.

    Attributes:
        sigmas, timesteps: [n] raised levels and the timesteps there.
        targets: [n] where each step ends, before the next one's noise.
        noise: [n] deviation of the noise that each step adds at its end.
        first_scale: of the noise at the beginning.
    """

    sigmas: list[float]
    timesteps: list[float]
    targets: list[float]
    noise: list[float]
    first_scale: float


def churn(schedule: Schedule, levels: Levels, options: SamplerOptions, start: int) -> Churned:
    """Raises levels in [s_tmin, s_tmax] by the factor 1 + min(s_churn / n, sqrt(2) - 1) (Karras et al., alg. 2)."""
    gamma = min(options.s_churn / len(levels.timesteps), np.sqrt(2.0) - 1.0)
    sigmas, targets, timesteps = levels.sigmas[start:-1], levels.sigmas[start + 1 :], levels.timesteps[start:]
    chosen = (sigmas >= options.s_tmin) & (sigmas <= options.s_tmax) & (gamma > 0.0)
    raised = np.where(chosen, sigmas * (1.0 + gamma), sigmas)
    timesteps = np.where(chosen, sigma_to_timestep(raised, schedule.sigmas), timesteps)
    extra = options.s_noise * np.sqrt(np.maximum(raised**2 - sigmas**2, 0.0))
    first_scale = float(np.hypot(first_noise_scale(sigmas[0], options), extra[0]))
    return Churned(raised.tolist(), timesteps.tolist(), targets.tolist(), [*extra[1:].tolist(), 0.0], first_scale)
