"""A sampler is a table: one row a network call, each a fixed linear map of what is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sdjax.core.errors import UserError

HISTORY = 4
"""K: this call's prediction and the three that were kept before it."""

LENGTHS = (16, 32, 64, 128, 256, 1024, 2048)
"""Tables are padded to one of these, so that another number of steps seldom means another compilation."""

RECORD_X0 = (0.0, 1.0, 0.0)
UNCHANGED = np.array([0.0, 1.0] + [0.0] * (HISTORY + 1))
"""Weights that leave the anchor as it is."""


class SamplerStep(NamedTuple):
    """One network call, in float64.

    Attributes:
        sigma: noise level of x, in variance-exploding coordinates, when the network is called.
        timestep: that the network is conditioned on.
        next_x: [2 + K + 1] weights on (x, anchor, prediction, the last K - 1 kept predictions newest first, noise).
        next_anchor: the same, for the anchor.
        record: weights on (x, x0, x0 before clipping) that make this call's prediction.
        keep: whether the prediction joins the kept ones.
        log_variance: bounds between which a learned variance lies, as a factor on the noise; (0, 0) without one.
        drift: weight on that variance times the gradient of a guide, see `denoise.Guided`; where it is 0, the gradient
            moves x0.
        begins: whether this is the first network call of a step.
    """

    sigma: float
    timestep: float
    next_x: np.ndarray
    next_anchor: np.ndarray = UNCHANGED
    record: tuple[float, float, float] = RECORD_X0
    keep: bool = True
    log_variance: tuple[float, float] = (0.0, 0.0)
    drift: float = 0.0
    begins: bool = True


class SamplerPlan(NamedTuple):
    """Rows of a sampler, and the factor of standard normal noise at the first."""

    rows: list[SamplerStep]
    first_scale: float


class SamplerTable(NamedTuple):
    """Stacked rows, an argument of the compiled scan. n is one of LENGTHS; rows that are not active do nothing.

    Attributes:
        sigma, timestep: [n].
        sigma_next: [n] level after the row: the next row's sigma, 0 after the last.
        weights: [n, 2, 2 + K + 1], next_x then next_anchor.
        record: [n, 3].
        keep, active: [n] bool.
        index: [n] the row's own number, which with an image's key decides its noise.
        log_variance: [n, 2].
        drift: [n].
        first_scale: [] noise times this is where sampling from nothing begins.
        limits: [3] clip range, dynamic threshold's ratio and greatest value; (inf, 0, 1) is neither.
        step: [n] the sampler's step that the row belongs to, from 0; the host's alone, None on devices.
    """

    sigma: np.ndarray
    timestep: np.ndarray
    sigma_next: np.ndarray
    weights: np.ndarray
    record: np.ndarray
    keep: np.ndarray
    active: np.ndarray
    index: np.ndarray
    log_variance: np.ndarray
    drift: np.ndarray
    first_scale: np.ndarray
    limits: np.ndarray
    step: np.ndarray | None = None


def weights(
    *, x: float = 0.0, anchor: float = 0.0, predictions: Sequence[float] = (), noise: float = 0.0
) -> np.ndarray:
    """A row of weights [2 + K + 1]; `predictions` begins with this call's own."""
    padded = [*predictions, *[0.0] * (HISTORY - len(predictions))]
    return np.array([x, anchor, *padded, noise], np.float64)


KEEP_X = weights(x=1.0)
"""Weights that make x the anchor."""


def record_epsilon(sigma: float) -> tuple[float, float, float]:
    """The prediction as noise: (x - x0) / sigma."""
    return (1.0 / sigma, -1.0 / sigma, 0.0)


def record_velocity(sigma: float) -> tuple[float, float, float]:
    """The prediction as v: (x / (sigma^2 + 1) - x0) sqrt(sigma^2 + 1) / sigma."""
    root = np.sqrt(sigma**2 + 1.0)
    return (1.0 / (sigma * root), -root / sigma, 0.0)


def network_coordinates(rows: list[SamplerStep], sigma: float) -> list[SamplerStep]:
    """The rows with their result in the network's coordinates, which differ from x's where sampling ends above 0."""
    last = rows[-1]
    return [*rows[:-1], last._replace(next_x=last.next_x / np.sqrt(1.0 + sigma**2))]


def stack(
    plan: SamplerPlan, limits: tuple[float, float, float], rows_without_start: int, start: int = 0
) -> SamplerTable:
    """Stacks and pads a plan's rows.

    Args:
        plan, limits: at least one row, and what `SamplerTable` says of limits.
        rows_without_start: number of rows had the plan begun at its first step: it decides the padded length, so that
            beginning later compiles nothing.
        start: number of the first step.

    Raises:
        UserError: more rows than the longest table holds.
    """
    rows = plan.rows
    length = padded_length(max(rows_without_start, len(rows)))
    sigma = np.array([row.sigma for row in rows])

    def pad(values: object, dtype: type = np.float64) -> np.ndarray:
        array = np.asarray(values, dtype)
        return np.concatenate([array, np.zeros((length - len(rows), *array.shape[1:]), dtype)])

    return SamplerTable(
        sigma=pad(sigma),
        timestep=pad([row.timestep for row in rows]),
        sigma_next=pad([*sigma[1:], 0.0]),
        weights=pad([np.stack([row.next_x, row.next_anchor]) for row in rows]),
        record=pad([row.record for row in rows]),
        keep=pad([row.keep for row in rows], bool),
        active=pad(np.ones(len(rows)), bool),
        index=np.arange(length, dtype=np.int32),
        log_variance=pad([row.log_variance for row in rows]),
        drift=pad([row.drift for row in rows]),
        first_scale=np.array(plan.first_scale),
        limits=np.array(limits, np.float64),
        step=pad(start - 1 + np.cumsum([row.begins for row in rows]), np.int32),
    )


def padded_length(rows: int) -> int:
    """The least of LENGTHS that holds so many rows; a UserError where none does."""
    for length in LENGTHS:
        if rows <= length:
            return length
    raise UserError(f"too many sampling steps: {rows} network calls, the limit is {LENGTHS[-1]}")


def network_calls(table: SamplerTable) -> int:
    """The number of network calls that a table makes."""
    return int(np.sum(table.active))


def batched(tables: Sequence[SamplerTable]) -> SamplerTable:
    """One table an image, [b n ...] in float32 on the host, padded to the longest of them.

    Images with different samplers, schedules and numbers of steps go through one loop: those that are done wait.
    """
    length = max(len(table.sigma) for table in tables)

    def stacked(name: str, *columns: np.ndarray) -> np.ndarray:
        per_row = name not in ("first_scale", "limits")
        padded = [np.pad(c, [(0, length - len(c)), *[(0, 0)] * (c.ndim - 1)]) if per_row else c for c in columns]
        array = np.stack(padded)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    fields: Any = zip(SamplerTable._fields, *tables, strict=True)
    return SamplerTable(*(stacked(name, *columns) for name, *columns in fields if name != "step"))
