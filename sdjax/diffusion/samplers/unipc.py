"""UniPC: a multistep predictor, and a corrector that uses the next network call as well (Zhao et al. 2023)."""

from __future__ import annotations

from math import factorial

import numpy as np

from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import solver_levels, variance_preserving_scale
from sdjax.diffusion.samplers.table import (
    KEEP_X,
    RECORD_X0,
    SamplerPlan,
    SamplerStep,
    network_coordinates,
    record_epsilon,
    weights,
)
from sdjax.diffusion.schedule import Schedule


def unipc(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """UniPC of order up to 3, B(h) by solver_type bh1 or bh2 (algorithms 5 to 8; diffusers' UniPCMultistep).

    The anchor is the last corrected x. A row first corrects its x from the anchor with its own prediction, which stays
    that of the uncorrected x, then predicts on from there.
    """
    levels = solver_levels(schedule, steps, options, repeat_last=True)
    total = len(levels.timesteps)
    rows, order = [], 0
    for i in range(start, total):
        corrected = KEEP_X
        if i > start and i - 1 not in options.disable_corrector:
            corrected = _corrector(levels.sigmas, i, order, options)
        order = min(options.solver_order, i - start + 1)
        order = min(order, total - i) if options.lower_order_final else order
        of_x, predictions = _predictor(levels.sigmas, i, order, options)
        next_x = of_x * corrected + weights(predictions=predictions)
        record = RECORD_X0 if options.predict_x0 else record_epsilon(float(levels.sigmas[i]))
        rows.append(SamplerStep(float(levels.sigmas[i]), float(levels.timesteps[i]), next_x, corrected, record))
    return SamplerPlan(network_coordinates(rows, levels.sigmas[-1]), variance_preserving_scale(levels.sigmas[start]))


def _predictor(sigmas: np.ndarray, i: int, order: int, options: SamplerOptions) -> tuple[float, list[float]]:
    """Weights of the corrected x and of the predictions, newest first, for the step from level i (UniP, eq. 9)."""
    of_x, scale, h = _linear(sigmas[i], sigmas[i + 1], options)
    if order == 1 or sigmas[i + 1] == 0.0 or h == 0.0:
        return of_x, [1.0 - of_x if options.predict_x0 else float(sigmas[i + 1] - sigmas[i])]
    ratios = _ratios(sigmas, i, order, h, options)
    matrix, right, b = _system(np.append(ratios, 1.0), h, options.solver_type)
    # At order 2 the paper's closed form takes the place of the linear system.
    rho = np.array([0.5]) if order == 2 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
    slopes = -scale * b * rho / ratios
    return of_x, [float(-scale * np.expm1(h) - slopes.sum()), *slopes.tolist()]


def _corrector(sigmas: np.ndarray, i: int, order: int, options: SamplerOptions) -> np.ndarray:
    """x at level i again, from the anchor at level i - 1 and this call's own prediction (UniC, eq. 8)."""
    of_x, scale, h = _linear(sigmas[i - 1], sigmas[i], options)
    if h == 0.0:
        return KEEP_X
    ratios = _ratios(sigmas, i - 1, order, h, options)
    matrix, right, b = _system(np.append(ratios, 1.0), h, options.solver_type)
    rho = np.array([0.5]) if order == 1 else np.linalg.solve(matrix, right)
    slopes = -scale * b * rho[:-1] / ratios
    own = -scale * b * rho[-1]
    before = -scale * np.expm1(h) - own - slopes.sum()
    return weights(anchor=of_x, predictions=[float(own), float(before), *slopes.tolist()])


def _linear(sigma: float, target: float, options: SamplerOptions) -> tuple[float, float, float]:
    """Weight of x, the factor on the integral, and the signed length of the step in log-SNR."""
    h = float(np.log(sigma / target)) if target > 0.0 else float("inf")
    return (float(target / sigma), 1.0, -h) if options.predict_x0 else (1.0, float(target), h)


def _ratios(sigmas: np.ndarray, i: int, order: int, h: float, options: SamplerOptions) -> np.ndarray:
    """[order - 1] places of the earlier predictions, newest first, in steps of h from level i."""
    signed = -h if options.predict_x0 else h
    return np.log(sigmas[i] / sigmas[i - np.arange(1, order)]) / signed


def _system(places: np.ndarray, h: float, solver_type: str) -> tuple[np.ndarray, np.ndarray, float]:
    """R and b of eq. 7 for predictions at `places`, and B(h)."""
    order = len(places)
    b = h if solver_type == "bh1" else float(np.expm1(h))
    phi, right = np.expm1(h) / h - 1.0, []
    for k in range(1, order + 1):
        right.append(phi * factorial(k) / b)
        phi = phi / h - 1.0 / factorial(k + 1)
    matrix = places[None, :] ** np.arange(order)[:, None]
    return matrix, np.array(right), b
