"""Noise levels that are chosen by sigma, not by timestep: the schedules of k-diffusion, ComfyUI and diffusers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import betaincinv

from sdjax.core.errors import UserError, unknown

RHO = 7.0

# Align Your Steps (Sabour et al. 2024): the ten-step schedules of https://research.nvidia.com/labs/toronto-ai/
# AlignYourSteps/howto.html, which diffusers keeps as AysSchedules (schedulers/scheduling_utils.py).
AYS = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}

Levels = Callable[[np.ndarray, int, float, float], np.ndarray]
"""levels(sigmas [T] ascending, n, sigma_min, sigma_max) -> [n] descending levels above where sampling ends."""


def sigma_schedule(name: str, sigmas: np.ndarray, steps: int, ends: tuple[float, float]) -> np.ndarray:
    """[steps] descending noise levels by a schedule of SIGMA_SCHEDULES.

    Args:
        name: of the schedule.
        sigmas: [T] ascending levels of the training.
        steps: at least 1.
        ends: least and greatest level, for the schedules that are drawn between two ends.

    Raises:
        UserError: an unknown name, or tabulated levels that are not those of this noise schedule.
    """
    if name not in SIGMA_SCHEDULES:
        raise unknown("schedule", name, SIGMA_SCHEDULES)
    return SIGMA_SCHEDULES[name](sigmas, steps, *ends)


def karras(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Evenly spaced in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0.0, 1.0, steps)
    low, high = sigma_min ** (1.0 / RHO), sigma_max ** (1.0 / RHO)
    return (high + ramp * (low - high)) ** RHO


def exponential(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Evenly spaced in log sigma (k-diffusion's get_sigmas_exponential)."""
    return np.exp(np.linspace(np.log(sigma_max), np.log(sigma_min), steps))


def lu(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Evenly spaced in log-SNR over the whole noise schedule (DPM-Solver, Lu et al. 2022, section 4; diffusers'
    use_lu_lambdas)."""
    return exponential(sigmas, steps, float(sigmas[0]), float(sigmas[-1]))


def beta(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6) between the ends (Lee et al. 2024, "Beta Sampling is All You Need"; diffusers)."""
    return sigma_min + betaincinv(0.6, 0.6, 1.0 - np.linspace(0.0, 1.0, steps)) * (sigma_max - sigma_min)


def kl_optimal(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Evenly spaced in arctan sigma over the whole noise schedule (Sabour et al. 2024, theorem 3.1; ComfyUI)."""
    return np.tan(np.linspace(np.arctan(sigmas[-1]), np.arctan(sigmas[0]), steps))


def simple(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Every T / n-th level of the noise schedule, counted from its end (ComfyUI, comfy/samplers.py)."""
    return sigmas[len(sigmas) - 1 - (np.arange(steps) * (len(sigmas) / steps)).astype(int)]


def sgm_uniform(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """n of n + 1 even timesteps, log sigma linear between them (ComfyUI and A1111; as Stability's sampler does)."""
    last = len(sigmas) - 1
    return np.exp(np.interp(np.linspace(last, 0.0, steps + 1)[:-1], np.arange(last + 1), np.log(sigmas)))


def _align_your_steps(name: str) -> Levels:
    table = np.array(AYS[name])

    def levels(sigmas: np.ndarray, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
        if not np.allclose([sigmas[-1], sigmas[0]], [table[0], table[-1]], rtol=0.02):
            raise UserError(
                f"schedule {name!r} is made for noise levels of {table[-1]:g} to {table[0]:g}, this checkpoint's are "
                f"{sigmas[0]:.3g} to {sigmas[-1]:.3g}; choose another"
            )
        # n + 1 levels, log-linear between the eleven published; the last is where sampling ends.
        places = np.linspace(0.0, len(table) - 1.0, steps + 1)[:-1]
        return np.exp(np.interp(places, np.arange(len(table)), np.log(table)))

    return levels


SIGMA_SCHEDULES: dict[str, Levels] = {
    "karras": karras,
    "exponential": exponential,
    "lu": lu,
    "beta": beta,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    **{name: _align_your_steps(name) for name in AYS},
    "kl_optimal": kl_optimal,
}
