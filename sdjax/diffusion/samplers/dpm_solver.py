"""The DPM-Solver family with one network call a row: multistep (2M, 2M SDE, 3M SDE) and single-step (2S, 3S).

All of them expand the prediction in lambda = -log sigma about an earlier point of a step of length h (DPM-Solver, Lu et
al. 2022, eq. 3.4; DPM-Solver++, eq. 9) and differ in where its differences come from.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import solver_levels, variance_preserving_scale
from sdjax.diffusion.samplers.table import (
    KEEP_X,
    RECORD_X0,
    UNCHANGED,
    SamplerPlan,
    SamplerStep,
    network_coordinates,
    record_epsilon,
    weights,
)
from sdjax.diffusion.schedule import Schedule

FEW_STEPS = 15
"""Below so many steps lower_order_final lowers the order of the last two (diffusers)."""


class _Step(NamedTuple):
    """A step's weights on x, on the prediction D, on h D' (by either solver type), on h^2 D'', and on the noise."""

    h: float
    x: float
    value: float
    midpoint: float
    heun: float
    second: float
    noise: float

    def slope(self, solver_type: str) -> float:
        return self.midpoint if solver_type == "midpoint" else self.heun


def _step(sigma: float, target: float, options: SamplerOptions) -> _Step:
    """From sigma to target by what the network's prediction is taken to be: x0 (dpmsolver++) or noise (dpmsolver)."""
    ratio = target / sigma
    h = -float(np.log(ratio)) if target > 0.0 else float("inf")
    if options.algorithm_type == "dpmsolver":
        value = target - sigma
        heun = value / h + target if h else 0.0
        second = (heun / h + target / 2.0) if h else 0.0
        return _Step(h, 1.0, value, value / 2.0, heun, second, 0.0)
    eta = options.eta if options.algorithm_type == "sde-dpmsolver++" else 0.0
    decay, length = ratio ** (1.0 + eta), (1.0 + eta) * h
    value = 1.0 - decay
    heun = 1.0 - value / length if length else 0.0
    second = 0.5 - heun / length if length else 0.0
    noise = options.s_noise * target * float(np.sqrt(1.0 - ratio ** (2.0 * eta)))
    return _Step(h, decay, value, value / 2.0, heun, second, noise)


def dpmpp_2m(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """DPM-Solver++ (2M), algorithm 2 of Lu et al. 2022, at any solver_order up to 3 (diffusers' DPMSolverMultistep).

    Lower order at both ends. What is published as the third order takes half of the second difference for the second
    derivative: it is of second order with a smaller constant. algorithm_type "dpmsolver" makes it DPM-Solver,
    "sde-dpmsolver++" SDE-DPM-Solver++.
    """
    levels = solver_levels(schedule, steps, options)
    total = len(levels.timesteps)
    rows = []
    for i in range(start, total):
        step = _step(levels.sigmas[i], levels.sigmas[i + 1], options)
        # A step of no length has no order; it ends a schedule that ends at the least level.
        order = min(options.solver_order, i - start + 1, _most(i, total, options)) if step.h else 1
        earlier = -np.log(levels.sigmas[i + 1 - order : i + 1][::-1])  # lambda of the predictions, newest first
        predictions = _multistep(step, earlier, options.solver_type)
        next_x = weights(x=step.x, predictions=predictions, noise=step.noise)
        rows.append(_row(levels.sigmas[i], levels.timesteps[i], next_x, options))
    return SamplerPlan(network_coordinates(rows, levels.sigmas[-1]), variance_preserving_scale(levels.sigmas[start]))


def dpmpp_2m_sde(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """SDE-DPM-Solver++ (2M): k-diffusion's sample_dpmpp_2m_sde; diffusers' sde-dpmsolver++ at eta 1."""
    order = min(options.solver_order, 2)
    options = dataclasses.replace(options, algorithm_type="sde-dpmsolver++", solver_order=order)
    return dpmpp_2m(schedule, steps, options, start)


def dpmpp_3m_sde(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """SDE-DPM-Solver++ (3M): k-diffusion's sample_dpmpp_3m_sde.

    diffusers' third order of sde-dpmsolver++ subtracts 1/2 in its last coefficient where the expansion adds it, so that
    the coefficient does not vanish with the step; this one is k-diffusion's.
    """
    options = dataclasses.replace(
        options, algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun", lower_order_final=False
    )
    return dpmpp_2m(schedule, steps, options, start)


def _most(i: int, total: int, options: SamplerOptions) -> int:
    """The greatest order that the end of sampling allows at step i."""
    few = options.lower_order_final and total < FEW_STEPS
    if i == total - 1 and (options.euler_at_final or few or options.final_sigmas_type == "zero"):
        return 1
    return 2 if i == total - 2 and few else 3


def _multistep(step: _Step, lambdas: np.ndarray, solver_type: str) -> list[float]:
    """Weights of the last predictions, newest first, at lambdas in the same order."""
    if len(lambdas) == 1:
        return [step.value]
    near = step.h / (lambdas[0] - lambdas[1]) * np.array([1.0, -1.0, 0.0])
    if len(lambdas) == 2:
        slope = step.slope(solver_type)
        return [step.value + slope * near[0], slope * near[1]]
    r0, r1 = (lambdas[0] - lambdas[1]) / step.h, (lambdas[1] - lambdas[2]) / step.h
    difference = near - np.array([0.0, 1.0, -1.0]) / r1
    first, second = near + r0 / (r0 + r1) * difference, difference / (r0 + r1)
    return (np.array([step.value, 0.0, 0.0]) + step.heun * first + step.second * second).tolist()


def dpmpp_2s(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """Single-step DPM-Solver++ (2S or 3S), its inner points levels of the schedule (diffusers' DPMSolverSinglestep).

    A block of orders 1, 2 (, 3) starts from the x at its beginning, the anchor; `steps` counts network calls.
    """
    levels = solver_levels(schedule, steps, options)
    orders = block_orders(len(levels.timesteps), options)
    rows = []
    for i in range(start, len(orders)):
        order = min(orders[i], i - start + 1)
        begin = levels.sigmas[i + 1 - order]
        step = _step(begin, levels.sigmas[i + 1], options)
        earlier = -np.log(levels.sigmas[i + 1 - order : i + 1][::-1])
        predictions = _single_step(step, earlier, options.solver_type)
        if order == 1:
            next_x, anchor = weights(x=step.x, predictions=predictions, noise=step.noise), KEEP_X
        else:
            next_x, anchor = weights(anchor=step.x, predictions=predictions, noise=step.noise), UNCHANGED
        rows.append(_row(levels.sigmas[i], levels.timesteps[i], next_x, options, anchor))
    return SamplerPlan(network_coordinates(rows, levels.sigmas[-1]), variance_preserving_scale(levels.sigmas[start]))


def block_orders(steps: int, options: SamplerOptions) -> list[int]:
    """The order of each network call: blocks of 1, 2 (, 3), the last ones cut so that sampling ends with order 1."""
    order = options.solver_order
    if not options.lower_order_final and steps % order == 0 and options.final_sigmas_type != "zero":
        return list(range(1, order + 1)) * (steps // order)
    if order == 1:
        return [1] * steps
    if order == 2:
        return [1, 2] * ((steps - 1) // 2) + ([1] if steps % 2 else [1, 1])
    blocks, left = divmod(steps, 3)
    ends = {0: [1, 2, 1], 1: [1], 2: [1, 2]}[left]
    orders = [1, 2, 3] * (blocks - 1 if left == 0 else blocks) + ends
    return [*orders[:-1], 1] if options.final_sigmas_type == "zero" else orders


def _single_step(step: _Step, lambdas: np.ndarray, solver_type: str) -> list[float]:
    """Weights of a block's predictions, newest first; the last is the one at its beginning."""
    if len(lambdas) == 1:
        return [step.value]
    if len(lambdas) == 2:
        slope = step.slope(solver_type) * step.h / (lambdas[0] - lambdas[1])
        return [slope, step.value - slope]
    r0, r1 = (lambdas[0] - lambdas[2]) / step.h, (lambdas[1] - lambdas[2]) / step.h
    far, near = np.array([1.0, 0.0, -1.0]) / r0, np.array([0.0, 1.0, -1.0]) / r1
    if solver_type == "midpoint":
        expansion = step.heun * far
    else:
        expansion = step.heun * (r0 * near - r1 * far) / (r0 - r1) + step.second * 2.0 * (far - near) / (r0 - r1)
    return (np.array([0.0, 0.0, step.value]) + expansion).tolist()


def _row(
    sigma: float, timestep: float, next_x: np.ndarray, options: SamplerOptions, anchor: np.ndarray = UNCHANGED
) -> SamplerStep:
    record = record_epsilon(float(sigma)) if options.algorithm_type == "dpmsolver" else RECORD_X0
    return SamplerStep(float(sigma), float(timestep), next_x, anchor, record)
