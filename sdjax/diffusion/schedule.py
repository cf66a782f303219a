"""Noise schedules: which share of the signal is left at each training timestep, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sdjax.core.errors import UserError, unknown

TERMINAL_ABAR = 2.0**-24
"""Stands for a terminal abar of zero where sigma must be finite (diffusers, scheduling_euler_discrete.py)."""

LEAST_SIGNAL = 1e-15
"""Below it (sigma of 3e7) differences of noise levels are lost to rounding."""


class Schedule(NamedTuple):
    """The variances of the forward process, one entry a training timestep.

    Attributes:
        betas: [T] float64, variance added at each step.
        alphas_cumprod: [T] float64, abar: the share of the signal's variance that is left. With zero terminal SNR
            its last entry is 0.
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

    @property
    def snr(self) -> np.ndarray:
        """[T] signal-to-noise ratio abar / (1 - abar)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @property
    def sigmas(self) -> np.ndarray:
        """[T] ascending noise levels sqrt((1 - abar) / abar) of k-diffusion; finite even with zero terminal SNR."""
        return abar_to_sigma(np.where(self.alphas_cumprod > 0.0, self.alphas_cumprod, TERMINAL_ABAR))


def make_schedule(
    name: str = "scaled_linear",
    num_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """The schedule called `name`, under the names that diffusers gives them.

    Args:
        name: "linear" (DDPM), "scaled_linear" (latent diffusion: linear in sqrt(beta); LDM's code calls it "linear"),
            "cosine" or "squaredcos_cap_v2" (iDDPM, eq. 17; ignores beta_start and beta_end).
        zero_terminal_snr: rescale so that the last step is pure noise (Lin et al. 2024, algorithm 1).

    Raises:
        UserError: unknown name, betas that are not in (0, 1), or noise levels that leave no signal or are none.
    """
    if name not in _BETAS:
        raise unknown("noise schedule", name, _BETAS)
    if num_timesteps < 1 or not 0.0 < beta_start <= beta_end < 1.0:
        raise UserError(
            f"noise schedule {name!r}: needs num_timesteps >= 1 and 0 < beta_start <= beta_end < 1, "
            f"got {num_timesteps}, {beta_start}, {beta_end}"
        )
    betas = _BETAS[name](num_timesteps, beta_start, beta_end)
    schedule = Schedule(betas, np.cumprod(1.0 - betas))
    if not schedule.alphas_cumprod[-1] > LEAST_SIGNAL or not schedule.alphas_cumprod[0] < 1.0:
        raise UserError(
            f"noise schedule {name!r} of {num_timesteps} timesteps, {beta_start} to {beta_end}: its noise levels "
            "are beyond what can be computed"
        )
    return rescale_zero_terminal_snr(schedule) if zero_terminal_snr else schedule


def rescale_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shifts and scales sqrt(abar) so that it ends at 0 and begins where it did (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(schedule.alphas_cumprod)
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    betas = 1.0 - abar / np.concatenate([[1.0], abar[:-1]])
    return Schedule(betas, abar)


def abar_to_sigma(abar: np.ndarray | float) -> np.ndarray:
    """sqrt((1 - abar) / abar)."""
    return np.asarray(np.sqrt((1.0 - np.asarray(abar)) / abar))


def timestep_to_sigma(timesteps: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Noise levels at fractional timesteps, linear in sigma (diffusers' interpolation_type "linear").

    Args:
        timesteps: any shape, in [0, T - 1]; beyond it the end values are taken.
        sigmas: [T] ascending levels of the schedule.
    """
    return np.asarray(np.interp(timesteps, np.arange(len(sigmas)), sigmas))


def sigma_to_timestep(levels: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Fractional timesteps of noise levels, linear in log sigma (k-diffusion; diffusers' `_sigma_to_t`).

    Args:
        levels: any shape, positive; beyond the schedule the end timesteps are taken.
        sigmas: [T] ascending levels of the schedule.
    """
    return np.asarray(np.interp(np.log(np.maximum(levels, 1e-10)), np.log(sigmas), np.arange(len(sigmas))))


def _cosine(num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    u = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - f[1:] / f[:-1], 0.999)


_BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda n, start, end: np.linspace(start, end, n),
    "scaled_linear": lambda n, start, end: np.linspace(start**0.5, end**0.5, n) ** 2,
    "cosine": _cosine,
    "squaredcos_cap_v2": _cosine,
}
