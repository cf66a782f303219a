"""Standard normal noise as PyTorch's CPU generator makes it, so that a seed gives diffusers' and ComfyUI's noise.

PyTorch's sources are ATen/core/MT19937RNGEngine.h, ATen/core/TransformationHelper.h and
ATen/native/cpu/DistributionTemplates.h (normal_fill).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt32

from sdjax.core.errors import UserError

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
# normal_fill works on blocks of as many values; fewer are drawn in pairs, in float64.
BLOCK = 16
TWO_PI = np.float32(2.0 * math.pi)


class TorchGenerator:
    """`torch.Generator().manual_seed(seed)`; call after call it gives what `torch.randn(shape, generator=g)` would.

    Values agree to 5e-7 with PyTorch's AVX2 and AVX-512 code, to 2e-6 with its code for other processors.
    """

    def __init__(self, seed: int) -> None:
        """Seeds the Mersenne Twister with the lowest 32 bits of the seed, which is all that PyTorch's reads.

        Raises:
            UserError: the seed is not an integer of -2^63 to 2^64 - 1, PyTorch's own range.
        """
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not MIN_SEED <= seed <= MAX_SEED:
            raise UserError(f"seed {seed!r}: choose an integer of {MIN_SEED} to {MAX_SEED}")
        # NumPy's legacy generator seeds as PyTorch does; its newer ones hash the seed first.
        self._twister = np.random.RandomState(int(seed) % 2**32)
        self._spare: float | None = None

    def normal(self, shape: Sequence[int]) -> Float[np.ndarray, "..."]:
        """Standard normal float32 values in row-major order of a shape as PyTorch's, e.g. channels first."""
        count = math.prod(shape)
        return (self._blocks(count) if count >= BLOCK else self._pairs(count)).reshape(tuple(shape))

    def _blocks(self, count: int) -> Float[np.ndarray, " count"]:
        values = self._uniform(count)
        whole = count - count % BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole != count:
            # The last block is drawn anew and written over the end of the one before.
            values[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return values

    def _uniform(self, count: int) -> Float[np.ndarray, " count"]:
        """Multiples of 2^-24 in [0, 1)."""
        return (self._raw(count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)

    def _pairs(self, count: int) -> Float[np.ndarray, " count"]:
        """Pairs in float64; one that is left over begins the next call of so few values."""
        values = []
        while len(values) < count:
            if self._spare is not None:
                values.append(self._spare)
                self._spare = None
                continue
            angle, length = self._uniform64(), self._uniform64()
            radius = math.sqrt(-2.0 * math.log1p(-length))
            values.append(radius * math.cos(2.0 * math.pi * angle))
            self._spare = radius * math.sin(2.0 * math.pi * angle)
        return np.array(values, np.float32)

    def _uniform64(self) -> float:
        high, low = (int(word) for word in self._raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53

    def _raw(self, count: int) -> UInt32[np.ndarray, " count"]:
        return self._twister.randint(0, 2**32, count, np.uint32)


def _box_muller(uniform: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Box and Muller's transform of blocks: eight radii, then eight angles, give eight cosines, then eight sines."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, BLOCK // 2), 1, 0)
    # Every operation rounds to float32, as there; functions go through float64 to be the same on every processor.
    radius = np.sqrt(np.float32(-2.0) * _rounded(np.log, np.float32(1.0) - first))
    angle = TWO_PI * second
    return np.stack([radius * _rounded(np.cos, angle), radius * _rounded(np.sin, angle)], axis=1).reshape(-1)


def _rounded(function: np.ufunc, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return function(values.astype(np.float64)).astype(np.float32)
