"""Multistep methods that integrate a polynomial through the last predictions exactly: LMS in sigma, DEIS in log rho."""

from __future__ import annotations

import numpy as np
from numpy.polynomial import polynomial

from sdjax.diffusion.samplers.dpm_solver import FEW_STEPS
from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import first_noise_scale, sigma_levels, solver_levels, variance_preserving_scale
from sdjax.diffusion.samplers.table import (
    HISTORY,
    SamplerPlan,
    SamplerStep,
    network_coordinates,
    record_epsilon,
    weights,
)
from sdjax.diffusion.schedule import Schedule


def lms(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Adams-Bashforth in sigma with exact coefficients, up to order 4 (k-diffusion's sample_lms)."""
    levels = sigma_levels(schedule, steps, options)
    sigmas, timesteps = levels.sigmas[start:], levels.timesteps[start:]
    rows = []
    for i, t in enumerate(timesteps):
        nodes = sigmas[max(i - HISTORY + 1, 0) : i + 1][::-1]
        next_x = weights(x=1.0, predictions=lagrange_integrals(nodes, sigmas[i], sigmas[i + 1]))
        rows.append(SamplerStep(float(sigmas[i]), float(t), next_x, record=record_epsilon(float(sigmas[i]))))
    return SamplerPlan(rows, first_noise_scale(sigmas[0], options))


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


def deis(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """DEIS of order up to 3, lower at both ends; ends at the schedule's least level (Zhang & Chen 2023, log-rho
    AB-DEIS; diffusers' DEISMultistep)."""
    levels = solver_levels(schedule, steps, options, repeat_last=True)
    total = len(levels.timesteps)
    few = options.lower_order_final and total < FEW_STEPS
    rows = []
    for i in range(start, total):
        order = min(options.solver_order, i - start + 1, total - i if few else 3)
        order = 1 if levels.sigmas[i + 1] == 0.0 else order
        nodes = levels.sigmas[i + 1 - order : i + 1][::-1]
        next_x = weights(x=1.0, predictions=log_lagrange_integrals(nodes, float(levels.sigmas[i + 1])))
        sigma = float(levels.sigmas[i])
        rows.append(SamplerStep(sigma, float(levels.timesteps[i]), next_x, record=record_epsilon(sigma)))
    return SamplerPlan(network_coordinates(rows, levels.sigmas[-1]), variance_preserving_scale(levels.sigmas[start]))


def log_lagrange_integrals(nodes: np.ndarray, target: float) -> list[float]:
    """Integrals over rho from nodes[0] to target of the Lagrange basis in log rho on `nodes`."""
    begin = float(nodes[0])
    if len(nodes) == 1:
        return [target - begin]
    places = np.log(nodes / begin)
    end = np.log(target / begin)
    integrals = []
    for i, place in enumerate(places):
        others = np.delete(places, i)
        basis = polynomial.polyfromroots(others) / np.prod(place - others)
        # d rho = rho d log rho, and p - p' + p'' - ... is what times exp has p exp for derivative.
        inner = sum((-1.0) ** k * np.pad(polynomial.polyder(basis, k), (0, k)) for k in range(len(basis)))
        integrals.append(float(target * polynomial.polyval(end, inner) - begin * polynomial.polyval(0.0, inner)))
    return integrals
