"""Few-step samplers of distilled models: latent consistency (LCM) and trajectory consistency (TCD)."""

from __future__ import annotations

import numpy as np

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers.ddpm import abar_at
from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import given_timesteps
from sdjax.diffusion.samplers.table import SamplerPlan, SamplerStep, weights
from sdjax.diffusion.schedule import Schedule, abar_to_sigma

SIGMA_DATA = 0.5


def lcm(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3; diffusers' LCMScheduler): x0, then fresh noise."""
    timesteps = distilled_timesteps(schedule, steps, options)[start:]
    abar = abar_at(schedule, timesteps)
    sigmas = abar_to_sigma(abar)
    rows = []
    for t, share, sigma, target in zip(timesteps, abar, sigmas, [*sigmas[1:], 0.0], strict=True):
        # The boundary condition f(x, 0) = x (Song et al. 2023, eq. 5), on the scaled timestep.
        scaled = float(t) * options.timestep_scaling
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
        next_x = weights(x=skip * np.sqrt(share), predictions=[out], noise=target)
        rows.append(SamplerStep(float(sigma), float(t), next_x))
    return SamplerPlan(rows, float(np.sqrt(1.0 / abar[0])))


def tcd(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Strategic stochastic sampling (Zheng et al. 2024, algorithm 4; diffusers' TCDScheduler), eta its gamma.

    Down to s = (1 - gamma) times the next timestep, then noise back up; the last step ends at timestep 0's own level.

    Raises:
        UserError: eta is not in [0, 1].
    """
    if not 0.0 <= options.eta <= 1.0:
        raise UserError(f"eta {options.eta:g}: tcd needs 0 to 1")
    timesteps = distilled_timesteps(schedule, steps, options)[start:]
    # In float32, as diffusers multiplies: a whole product must not fall to the integer below.
    inner = np.floor(np.float32(1.0 - options.eta) * np.append(timesteps[1:], 0).astype(np.float32)).astype(int)
    sigmas, ends = (abar_to_sigma(abar_at(schedule, chosen)) for chosen in (timesteps, inner))
    rows = []
    for i, (t, sigma, end) in enumerate(zip(timesteps, sigmas, ends, strict=True)):
        last = i == len(timesteps) - 1
        noise = 0.0 if last else float(np.sqrt(max(sigmas[i + 1] ** 2 - end**2, 0.0)))
        scale = 1.0 / np.sqrt(1.0 + end**2) if last else 1.0  # the result is in the network's coordinates
        next_x = scale * weights(x=end / sigma, predictions=[1.0 - end / sigma], noise=noise)
        rows.append(SamplerStep(float(sigma), float(t), next_x))
    return SamplerPlan(rows, float(np.sqrt(1.0 + sigmas[0] ** 2)))


def distilled_timesteps(schedule: Schedule, steps: int, options: SamplerOptions) -> np.ndarray:
    """[steps] descending timesteps, an even choice among those the model was distilled on, or the options' own.

    Raises:
        UserError: more steps than original_inference_steps; timesteps that are not `steps` descending ones in range.
    """
    total, original = schedule.num_timesteps, options.original_inference_steps
    if options.timesteps is not None:
        return given_timesteps(options.timesteps, steps, total)
    if not 1 <= original <= total:
        raise UserError(f"original_inference_steps {original}: choose 1 to {total}, the number of training timesteps")
    if not 1 <= steps <= original:
        raise UserError(f"steps {steps}: choose 1 to {original}, the steps this model was distilled on")
    distilled = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    return distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
