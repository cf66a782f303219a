"""DDPM and DDIM: ancestral steps between integer timesteps."""

from __future__ import annotations

import numpy as np

from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import given_timesteps, integer_timesteps
from sdjax.diffusion.samplers.table import SamplerPlan, SamplerStep, weights
from sdjax.diffusion.schedule import Schedule, abar_to_sigma

LEAST_ABAR = 2.0**-40
"""A terminal abar of zero: sigma is 2^20, where x0 from v is exact to 1e-6."""


def abar_at(schedule: Schedule, timesteps: np.ndarray | list[int]) -> np.ndarray:
    """abar at integer timesteps, above zero."""
    return np.maximum(schedule.alphas_cumprod[timesteps], LEAST_ABAR)


def ddpm(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """DDPM (algorithm 2, eq. 7), also between timesteps that are not neighbours (iDDPM, section 4)."""
    if options.timesteps is None:
        timesteps = integer_timesteps(schedule, steps, options)[start:]
    else:
        timesteps = given_timesteps(options.timesteps, steps, schedule.num_timesteps)[start:]
    abar = abar_at(schedule, timesteps)
    before = np.append(abar[1:], 1.0)
    rows = []
    for t, now, then, least in zip(timesteps, abar, before, _variances(timesteps, abar, before), strict=True):
        shrink = (1.0 - then) / (1.0 - now) * now / then  # (sigma_next / sigma)^2
        deviation, bounds = _noise(least, 1.0 - now / then, then, options.variance_type)
        next_x = weights(x=shrink, predictions=[1.0 - shrink], noise=deviation if t > 0 else 0.0)
        drift = float(deviation**2 * np.sqrt(then))
        rows.append(SamplerStep(float(abar_to_sigma(now)), float(t), next_x, log_variance=bounds, drift=drift))
    return SamplerPlan(rows, float(np.sqrt(1.0 / abar[0])))


def _variances(timesteps: np.ndarray, abar: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The posterior's of each step; of the one at 0, where there is none, that of the step before (iDDPM, ADM)."""
    found = (1.0 - before) / (1.0 - abar) * (1.0 - abar / before)
    if timesteps[-1] == 0 and len(found) > 1:
        found[-1] = found[-2]
    return np.maximum(found, 1e-20)


def _noise(variance: float, beta: float, then: float, kind: str) -> tuple[float, tuple[float, float]]:
    """The weight on the noise, and a learned variance's bounds, at a step that ends at abar = then."""
    if kind == "learned_range":
        return 1.0, (float(np.log(variance / then)), float(np.log(beta / then)))
    chosen = beta if kind in ("fixed_large", "fixed_large_log") else variance
    return float(np.sqrt(chosen / then)), (0.0, 0.0)


def ddim(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """DDIM (eq. 12 and 16), any eta.

    As in diffusers the previous level is the one num_timesteps // steps earlier, which with linspace and trailing
    spacing need not be where the next call is; and the direction keeps the noise from before x0 was clipped.
    """
    timesteps = integer_timesteps(schedule, steps, options)[start:]
    abar = abar_at(schedule, timesteps)
    ends = np.append(abar[1:], 1.0)  # the state's scale at the next call; the result is in the network's coordinates
    stride = schedule.num_timesteps // steps
    rows = []
    for t, now, end in zip(timesteps, abar, ends, strict=True):
        then = previous_abar(schedule, int(t) - stride, options)
        deviation = options.eta * np.sqrt((1.0 - then) / (1.0 - now) * (1.0 - now / then))
        sigma = float(abar_to_sigma(now))
        direction = np.sqrt(max(1.0 - then - deviation**2, 0.0)) / sigma
        next_x = weights(x=direction / np.sqrt(end), predictions=[np.sqrt(then / end)], noise=deviation / np.sqrt(end))
        record = (0.0, 1.0, -float(direction / np.sqrt(then)))
        rows.append(SamplerStep(sigma, float(t), next_x, record=record))
    return SamplerPlan(rows, float(np.sqrt(1.0 / abar[0])))


def previous_abar(schedule: Schedule, timestep: int, options: SamplerOptions) -> float:
    """abar at a timestep; below 0 it is 1, or the first timestep's own unless set_alpha_to_one."""
    if timestep >= 0:
        return float(abar_at(schedule, [min(timestep, schedule.num_timesteps - 1)])[0])
    return 1.0 if options.set_alpha_to_one else float(schedule.alphas_cumprod[0])
