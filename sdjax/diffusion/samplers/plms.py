"""PLMS (pseudo linear multistep, PNDM): Adams-Bashforth on the raw prediction, with either of its two warm-ups."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers.ddpm import abar_at, previous_abar
from sdjax.diffusion.samplers.options import SamplerOptions
from sdjax.diffusion.samplers.spacing import integer_timesteps
from sdjax.diffusion.samplers.table import (
    KEEP_X,
    UNCHANGED,
    SamplerPlan,
    SamplerStep,
    record_epsilon,
    record_velocity,
    weights,
)
from sdjax.diffusion.schedule import Schedule, abar_to_sigma

# Adams-Bashforth by the number of predictions at hand (PNDM, eq. 12; the lower orders are PLMS's warm-up).
_ADAMS = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


class _Call(NamedTuple):
    """A network call in variance-preserving coordinates; the anchor is kept in them as well."""

    timestep: int
    next_x: np.ndarray
    next_anchor: np.ndarray = UNCHANGED
    keep: bool = False
    begins: bool = True


def plms(schedule: Schedule, steps: int, options: SamplerOptions, start: int) -> SamplerPlan:
    """PLMS as latent diffusion uses it (skip_prk_steps: the second call repeats the first step), or PNDM's F-PNDM with
    three steps of its Runge-Kutta method first (PNDM, algorithm 2).

    Raises:
        UserError: fewer than four steps for the Runge-Kutta warm-up.
    """
    timesteps, stride = integer_timesteps(schedule, steps, options), schedule.num_timesteps // steps
    if options.skip_prk_steps:
        # A later start counts calls, of which the second and the third are at one timestep: it begins a step earlier
        # than other samplers and stops a step short of clean, as image to image with PNDM does in diffusers.
        called = np.concatenate([timesteps[:2], timesteps[1:]])[start:]
        calls = _plms_calls(schedule, called, stride, options)
    else:
        calls = _runge_kutta_calls(schedule, timesteps[start:], stride, options)
    return _plan(schedule, calls, options)


def _plan(schedule: Schedule, calls: list[_Call], options: SamplerOptions) -> SamplerPlan:
    """Rows in variance-exploding coordinates; the result stays in the network's."""
    abar = abar_at(schedule, [call.timestep for call in calls])
    ends = np.append(abar[1:], 1.0)
    record = record_velocity if options.prediction_type == "v_prediction" else record_epsilon
    rows = []
    for call, now, end in zip(calls, abar, ends, strict=True):
        into = np.concatenate([[np.sqrt(now)], np.ones(len(UNCHANGED) - 1)])
        sigma = float(abar_to_sigma(now))
        next_x, next_anchor = call.next_x * into / np.sqrt(end), call.next_anchor * into
        recorded = record(sigma)
        rows.append(
            SamplerStep(sigma, float(call.timestep), next_x, next_anchor, recorded, call.keep, begins=call.begins)
        )
    return SamplerPlan(rows, float(np.sqrt(1.0 / abar[0])))


def _transfer(schedule: Schedule, now: int, then: int, options: SamplerOptions) -> tuple[float, float]:
    """Weights of x and of the prediction for the step from one timestep to another (PNDM, eq. 11; equals DDIM's)."""
    a = float(abar_at(schedule, [min(now, schedule.num_timesteps - 1)])[0])
    b = previous_abar(schedule, then, options)
    of_x = np.sqrt(b / a)
    of_noise = np.sqrt(1.0 - b) - np.sqrt(b * (1.0 - a) / a)
    if options.prediction_type == "v_prediction":  # noise = sqrt(a) v + sqrt(1 - a) x
        return float(of_x + of_noise * np.sqrt(1.0 - a)), float(of_noise * np.sqrt(a))
    return float(of_x), float(of_noise)


def _plms_calls(schedule: Schedule, called: np.ndarray, stride: int, options: SamplerOptions) -> list[_Call]:
    first = int(called[0])
    of_x, of_p = _transfer(schedule, first, first - stride, options)
    calls = [_Call(first, weights(x=of_x, predictions=[of_p]), KEEP_X, keep=True)]
    if len(called) == 1:
        return calls
    # The second call repeats the first step from the anchor, with the mean of both ends' predictions.
    second = int(called[1])
    of_x, of_p = _transfer(schedule, second + stride, second, options)
    calls.append(_Call(second, weights(anchor=of_x, predictions=[of_p / 2, of_p / 2]), begins=False))
    return calls + _adams_calls(schedule, called[2:], stride, options, kept=1)


def _adams_calls(
    schedule: Schedule, timesteps: np.ndarray, stride: int, options: SamplerOptions, kept: int
) -> list[_Call]:
    calls = []
    for i, t in enumerate(timesteps.tolist()):
        of_x, of_p = _transfer(schedule, t, t - stride, options)
        predictions = [of_p * weight for weight in _ADAMS[min(kept + 1 + i, 4)]]
        calls.append(_Call(t, weights(x=of_x, predictions=predictions), keep=True))
    return calls


def _runge_kutta_calls(schedule: Schedule, timesteps: np.ndarray, stride: int, options: SamplerOptions) -> list[_Call]:
    if len(timesteps) < 4:
        raise UserError(f"PNDM's Runge-Kutta warm-up needs at least 4 steps, got {len(timesteps)}")
    calls = []
    half = stride // 2
    for begin, end in zip(timesteps[:3].tolist(), timesteps[1:4].tolist(), strict=True):
        middle = end + half  # begin - half where the stride is even
        near_x, near_p = _transfer(schedule, begin, begin - half, options)
        mid_x, mid_p = _transfer(schedule, begin, middle, options)
        end_x, end_p = _transfer(schedule, begin, end, options)
        calls.append(_Call(begin, weights(x=near_x, predictions=[near_p]), KEEP_X, keep=True))
        calls.append(_Call(middle, weights(anchor=mid_x, predictions=[mid_p]), begins=False))
        # x is mid_x anchor + mid_p (second prediction): the anchor takes up the sum of the first three, from which the
        # fourth call makes the step.
        of_x, of_anchor = end_p / 3 / mid_p, end_x - end_p / 3 * mid_x / mid_p
        gathered = weights(x=of_x, anchor=of_anchor, predictions=[end_p / 3, end_p / 6])
        calls.append(_Call(middle, weights(anchor=end_x, predictions=[end_p]), gathered, begins=False))
        calls.append(_Call(end, weights(anchor=1.0, predictions=[end_p / 6]), begins=False))
    return calls + _adams_calls(schedule, timesteps[3:], stride, options, kept=3)
