"""Random numbers in the order in which PyTorch diffusers draws them on a CPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.torch_rng import TorchGenerator

GIVEN, MASKED = 0, 1  # streams of draws from posteriors


class Draws(NamedTuple):
    """Numbers that a call of diffusers draws before its first step, in this order.

    Attributes:
        small: (h, w, 3) of an upscaler's small image; None for other models.
        given: given images that are encoded, each of which draws from its posterior.
        masked: images that are encoded a second time, masked, after the noise of the latents.
        small_last: whether the small image's are drawn after those of the latents (DeepFloyd IF).
    """

    small: tuple[int, ...] | None
    given: int
    masked: int
    small_last: bool = False


class TorchNoise(NamedTuple):
    """Noise that `torch.Generator("cpu").manual_seed(seed)` gives diffusers for one batch.

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


class TorchRow(NamedTuple):
    """One image's share of the noise.

    Attributes:
        noise: of its batch.
        index: of the image in the batch.
        given: of its given image among those that are encoded.
    """

    noise: TorchNoise
    index: int
    given: int = 0

    def small(self) -> Float[np.ndarray, "h w 3"]:
        """Noise of an upscaler's small image."""
        small = _drawn(self.noise).small
        assert small is not None, "an upscaler's"
        return small[self.index]

    def encoded(self, stream: int) -> Float[np.ndarray, "h w z"] | None:
        """Draw from the posterior of the given image, or of the masked one; None where that is not encoded."""
        drawn = _drawn(self.noise).encoded[stream]
        return None if drawn is None else drawn[self.given]

    def first(self) -> Float[np.ndarray, "h w z"]:
        """Standard normal first noise."""
        return _drawn(self.noise).first[self.index]

    def steps(self, part: int) -> Float[np.ndarray, "n h w z"] | None:
        """Noise of every row of a model's table; None where no row adds any."""
        steps = _drawn(self.noise).steps[part]
        if steps is None:
            return None
        noisy = self.noise.noisy[part]
        rows = np.zeros((len(noisy), *self.noise.shape), np.float32)
        rows[np.flatnonzero(noisy)] = steps[:, self.index]
        return rows


class _Drawn(NamedTuple):
    """Noise of a batch: of small images, of posteriors by stream, of the latents, and of each model's noisy rows."""

    small: Float[np.ndarray, "b h w 3"] | None
    encoded: dict[int, Float[np.ndarray, "m h w z"] | None]
    first: Float[np.ndarray, "b h w z"]
    steps: list[Float[np.ndarray, "n b h w z"] | None]


@functools.lru_cache(maxsize=2)  # a call and its second pass
def _drawn(noise: TorchNoise) -> _Drawn:
    generator, draws = TorchGenerator(noise.seed), noise.draws

    def draw(count: int, shape: tuple[int, ...] = noise.shape) -> np.ndarray:
        h, w, c = shape
        return generator.normal((count, c, h, w)).transpose(0, 2, 3, 1)

    small = None if draws.small is None or draws.small_last else draw(noise.batch, draws.small)
    given = draw(draws.given) if draws.given else None
    first = draw(noise.batch)
    if draws.small is not None and draws.small_last:
        small = draw(noise.batch, draws.small)
    masked = draw(draws.masked) if draws.masked else None
    steps = [np.stack([draw(noise.batch) for _ in range(sum(rows))]) if any(rows) else None for rows in noise.noisy]
    return _Drawn(small, {GIVEN: given, MASKED: masked}, first, steps)
