"""Linear multistep (LMS): one network call a step, earlier predictions used again."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import polynomial

from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import first_noise_scale, sigma_levels
from sdjax.diffusion.samplers.table import HISTORY, Plan, Row, record_epsilon, weights
from sdjax.diffusion.schedule import Schedule


def lms(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> Plan:
    """Adams-Bashforth in sigma with exact coefficients, up to order 4 (k-diffusion's sample_lms)."""
    levels = sigma_levels(schedule, steps, options)
    sigmas, timesteps = levels.sigmas[start:], levels.timesteps[start:]
    rows = []
    for i, t in enumerate(timesteps):
        nodes = sigmas[max(i - HISTORY + 1, 0) : i + 1][::-1]
        next_x = weights(x=1.0, predictions=lagrange_integrals(nodes, sigmas[i], sigmas[i + 1]))
        rows.append(Row(float(sigmas[i]), float(t), next_x, record=record_epsilon(float(sigmas[i]))))
    return Plan(rows, first_noise_scale(sigmas[0], options))


def lagrange_integrals(nodes: np.ndarray, lower: float, upper: float) -> list[float]:
    """Integrals from lower to upper of the Lagrange basis on `nodes`."""
    # Shifted and scaled by the interval: high powers of sigma would cancel.
    scale = upper - lower
    nodes = (nodes - lower) / scale
    integrals = []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        basis = polynomial.polyfromroots(others) / np.prod(node - others)
        integrals.append(float(scale * polynomial.polyval(1.0, polynomial.polyint(basis))))
    return integrals
