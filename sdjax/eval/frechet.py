"""The Fréchet distance between two sets of features: FID with Inception's pooled ones (Heusel et al. 2017), or sFID."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError


class Gaussian(NamedTuple):
    """Mean and unbiased covariance of features, in float64."""

    mean: Float[np.ndarray, " f"]
    covariance: Float[np.ndarray, "f f"]


def gaussian(features: Float[np.ndarray, "n f"], what: str) -> Gaussian:
    """The moments of features.

    Args:
        what: whose they are, for messages.

    Raises:
        UserError: fewer than two images, all alike, or features that are not finite.
    """
    if len(features) < 2:
        raise UserError(f"{what}: a covariance needs 2 images or more, and there is {len(features)}")
    x = np.asarray(features, np.float64)
    if not np.isfinite(x).all():
        raise UserError(f"{what}: the features of {(~np.isfinite(x).all(1)).sum()} images are not finite")
    if np.ptp(x, axis=0).max() == 0.0:
        raise UserError(f"{what}: all {len(x)} images are alike, so their covariance is zero")
    return Gaussian(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2).

    The trace of the root is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric: unlike a
    root of A B it needs no small multiple of the identity where there are fewer images than features.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0.0, None)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * shared)
