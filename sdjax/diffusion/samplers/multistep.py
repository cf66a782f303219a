"""Linear multistep (LMS) and DPM-Solver++ 2M: one network call a step, earlier predictions used again."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import polynomial

from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import first_noise_scale, sigma_levels, solver_levels
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


def dpmpp_2m(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> Plan:
    """DPM-Solver++ (2M), first order at its ends (Lu et al. 2022, algorithm 2; diffusers' DPMSolverMultistep)."""
    levels = solver_levels(schedule, steps, options)
    total = len(levels.timesteps)
    sigmas, timesteps = levels.sigmas[start:], levels.timesteps[start:]
    last = len(timesteps) - 1
    final_is_first_order = (
        options.euler_at_final or (options.lower_order_final and total < 15) or options.final_sigmas_type == "zero"
    )
    rows = []
    for i, t in enumerate(timesteps):
        ratio = sigmas[i + 1] / sigmas[i]
        if options.solver_order == 1 or i == 0 or (i == last and final_is_first_order):
            predictions = [1.0 - ratio]
        else:
            predictions = _second_order(sigmas[i - 1 : i + 2], options.solver_type)
        # The result is in the network's coordinates, which differ from x's where sampling ends above 0.
        end = 1.0 / np.sqrt(1.0 + sigmas[i + 1] ** 2) if i == last else 1.0
        next_x = end * weights(x=ratio, predictions=predictions)
        rows.append(Row(float(sigmas[i]), float(t), next_x))
    return Plan(rows, float(np.sqrt(sigmas[0] ** 2 + 1.0)))


def _second_order(sigmas: np.ndarray, solver_type: str) -> list[float]:
    """Weights of this x0 and the last for a step between the later two of three levels."""
    earlier, sigma, target = sigmas
    h = np.log(sigma / target)
    share = h / np.log(earlier / sigma)  # 1 / r
    decay = 1.0 - target / sigma
    slope = 0.5 * decay if solver_type == "midpoint" else 1.0 - decay / h
    return [decay + slope * share, -slope * share]
