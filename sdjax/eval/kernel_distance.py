"""KID: the squared maximum mean discrepancy of Inception's features (Binkowski et al. 2018), as torch-fidelity's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.core.errors import UserError


class Kernel(NamedTuple):
    """Mean and deviation of the distance over subsets."""

    mean: float
    std: float


def kernel_distance(
    fake: Float[np.ndarray, "n f"],
    real: Float[np.ndarray, "m f"],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> Kernel:
    """The unbiased estimate with the kernel (x·y / f + 1)^3, over random subsets of both sets.

    Args:
        size: of a subset. With torch-fidelity's default `seed` the subsets are its own.

    Raises:
        UserError: a set has fewer images than a subset.
    """
    if min(len(fake), len(real)) < size:
        raise UserError(
            f"KID takes subsets of {size} images, and there are {len(fake)} and {len(real)}; choose a smaller subset"
        )
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        a = fake[rng.choice(len(fake), size, replace=False)]
        b = real[rng.choice(len(real), size, replace=False)]
        found.append(float(_discrepancy(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))))
    return Kernel(float(np.mean(found)), float(np.std(found)))


@jax.jit
def _discrepancy(x: Float[Array, "n f"], y: Float[Array, "n f"]) -> Float[Array, ""]:
    """Sums are of what exceeds the mean of the three kernels' values, whose constant part cancels."""
    count = len(x)
    within = [_kernel(a, a) for a in (x, y)]
    between = _kernel(x, y)
    middle = between.mean()
    off = [((k - middle).sum() - (jnp.diagonal(k) - middle).sum()) / (count * (count - 1)) for k in within]
    return off[0] + off[1]


def _kernel(x: Array, y: Array) -> Array:
    return (jnp.matmul(x, y.T, precision="highest") / x.shape[1] + 1.0) ** 3
