"""A sampler's table applied row by row in float64 NumPy, as a textbook loop would."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sdjax.diffusion.samplers import SamplerTable


def to_x0(kind: str, output: np.ndarray, x: np.ndarray, sigma: float) -> np.ndarray:
    root = np.sqrt(sigma**2 + 1.0)
    return {
        "epsilon": lambda: x - sigma * output,
        "sample": lambda: output,
        "v_prediction": lambda: x / root**2 - output * sigma / root,
    }[kind]()


def limit(x0: np.ndarray, limits: np.ndarray) -> np.ndarray:
    clip, ratio, greatest = limits
    if ratio > 0:
        s = np.clip(np.quantile(np.abs(x0).reshape(len(x0), -1), ratio, axis=1), 1.0, greatest)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return np.clip(x0, -s, s) / s
    return np.clip(x0, -clip, clip)


def walk(
    table: SamplerTable,
    model: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
    prediction: str = "epsilon",
    noises: Callable[[int], np.ndarray] | None = None,
    feed_scaled: bool = False,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """x after each row, in variance-exploding coordinates (the last in the network's own).

    feed_scaled: the network's input takes the place of x, as in the tests of diffusers' sigma samplers.
    """
    anchor = x
    kept = [np.zeros_like(x)] * 3
    for i in range(first, int(table.active.sum())):
        sigma = float(table.sigma[i])
        scaled = x / np.sqrt(sigma**2 + 1.0)
        x = scaled if feed_scaled else x
        raw = to_x0(prediction, model(scaled, float(table.timestep[i])), x, sigma)
        x0 = limit(raw, table.limits)
        p = sum(w * a for w, a in zip(table.record[i], (x, x0, raw), strict=True))
        needs_noise = noises is not None and table.weights[i, :, -1].any()
        noise = noises(i) if needs_noise else np.zeros_like(x)
        terms = [x, anchor, p, *kept, noise]
        x, anchor = (sum(w * a for w, a in zip(row, terms, strict=True)) for row in table.weights[i])
        kept = [p, *kept[:-1]] if table.keep[i] else kept
        yield x
