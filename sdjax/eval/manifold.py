"""Improved precision and recall (Kynkäänniemi et al. 2019): how much of one set lies within the other's manifold."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sdjax.core.errors import UserError

ROWS = 1024


class Coverage(NamedTuple):
    """Shares.

    Attributes:
        precision: of the sampled images that lie within a real one's neighbourhood.
        recall: of the real images that lie within a sampled one's.
    """

    precision: float
    recall: float


def precision_recall(
    fake: Float[np.ndarray, "n f"], real: Float[np.ndarray, "m f"], *, neighbours: int = 3
) -> Coverage:
    """An image's neighbourhood is the ball that reaches its k-th nearest neighbour in its own set.

    Raises:
        UserError: a set has not more images than neighbours.
    """
    if min(len(fake), len(real)) <= neighbours:
        raise UserError(
            f"precision and recall look at {neighbours} neighbours, and there are {len(fake)} sampled and {len(real)} "
            f"real images; each needs {neighbours + 1} or more"
        )
    centre = real.mean(0)  # distances are those of differences; near zero they keep their digits
    a, b = (jnp.asarray(x - centre, jnp.float32) for x in (fake, real))
    return Coverage(float(_within(a, b, neighbours).mean()), float(_within(b, a, neighbours).mean()))


def _within(points: Array, manifold: Array, neighbours: int) -> Bool[np.ndarray, " n"]:
    """Mask of the points within the neighbourhood of any member of the manifold."""
    radii = jnp.concatenate([_radii(rows, manifold, neighbours) for rows in _parts(manifold)])
    return np.concatenate([np.asarray(_any_within(rows, manifold, radii)) for rows in _parts(points)])


def _parts(x: Array) -> list[Array]:
    return [x[start : start + ROWS] for start in range(0, len(x), ROWS)]


@jax.jit(static_argnums=2)
def _radii(rows: Array, manifold: Array, neighbours: int) -> Float[Array, " n"]:
    """The squared distance to the k-th neighbour; the nearest member is the point itself."""
    return -jax.lax.top_k(-_squared(rows, manifold), neighbours + 1)[0][:, -1]


@jax.jit
def _any_within(rows: Array, manifold: Array, radii: Array) -> Bool[Array, " n"]:
    return (_squared(rows, manifold) <= radii).any(1)


def _squared(x: Float[Array, "n f"], y: Float[Array, "m f"]) -> Float[Array, "n m"]:
    product = jnp.matmul(x, y.T, precision="highest")
    return jnp.maximum(jnp.square(x).sum(1)[:, None] - 2.0 * product + jnp.square(y).sum(1), 0.0)
