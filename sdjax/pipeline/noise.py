"""Random numbers in the order in which PyTorch diffusers draws them on a CPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.torch_rng import TorchGenerator


class Draws(NamedTuple):
    """Numbers that a call of diffusers draws before its first step, in this order.

    Attributes:
        small: (h, w, 3) of an upscaler's small image; None for other models.
        posteriors: given images that are encoded, each of which draws from its posterior.
        masked: images that are encoded a second time, masked, after the noise of the latents.
    """

    small: tuple[int, ...] | None
    posteriors: int
    masked: int


class TorchNoise(NamedTuple):
    """Noise that `torch.Generator("cpu").manual_seed(seed)` gives diffusers for one batch.

    Draws from a posterior are not used: its mean is taken, whose difference is far below a byte.

    Attributes:
        seed: of the generator.
        batch: images that it draws for together, from index 0 on.
        shape: (h, w, z) of the latents.
        noisy: rows that add noise, one tuple for each model that draws after the other.
        draws: numbers that come before.
    """

    seed: int
    batch: int
    shape: tuple[int, ...]
    noisy: tuple[tuple[bool, ...], ...]
    draws: Draws

    def small(self, index: int) -> Float[np.ndarray, "h w 3"]:
        """Noise of the small image of an upscaler, of the image with this index."""
        small = _drawn(self)[0]
        assert small is not None, "an upscaler's"
        return small[index]

    def first(self, index: int) -> Float[np.ndarray, "h w z"]:
        """Standard normal first noise of the image with this index."""
        return _drawn(self)[1][index]

    def steps(self, part: int, index: int) -> Float[np.ndarray, "n h w z"] | None:
        """Noise of every row of a model's table, for the image with this index; None where no row adds any."""
        steps = _drawn(self)[2][part]
        if steps is None:
            return None
        rows = np.zeros((len(self.noisy[part]), *self.shape), np.float32)
        rows[np.flatnonzero(self.noisy[part])] = steps[:, index]
        return rows


@functools.lru_cache(maxsize=2)  # a call and its second pass
def _drawn(noise: TorchNoise) -> tuple[np.ndarray | None, np.ndarray, list[np.ndarray | None]]:
    """The small image's noise [b h w 3], the first noise [b h w z], and that of each model's noisy rows [n b h w z]."""
    generator = TorchGenerator(noise.seed)

    def draw(count: int, shape: tuple[int, ...]) -> np.ndarray:
        h, w, c = shape
        return generator.normal((count, c, h, w)).transpose(0, 2, 3, 1)

    small = None if noise.draws.small is None else draw(noise.batch, noise.draws.small)
    if noise.draws.posteriors:
        draw(noise.draws.posteriors, noise.shape)
    first = draw(noise.batch, noise.shape)
    if noise.draws.masked:
        draw(noise.draws.masked, noise.shape)
    steps = [
        np.stack([draw(noise.batch, noise.shape) for _ in range(sum(rows))]) if any(rows) else None
        for rows in noise.noisy
    ]
    return small, first, steps
