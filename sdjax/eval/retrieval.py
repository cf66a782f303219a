"""Does a sampled image look more like its own prompt's image than like any other of the data set?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

SIDE = 32


class Retrieval(NamedTuple):
    """The share of images whose prompt's own image is the nearest, and among the five nearest."""

    top1: float
    top5: float


def features(images: Shaped[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n f"]:
    """Means of the red, green and blue of a 32x32 grid of cells; images are in [0, 1] or bytes.

    Sides must be multiples of 32.
    """
    n, h, w, c = images.shape
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    cells = images.reshape(n, SIDE, h // SIDE, SIDE, w // SIDE, c)
    return (cells.mean(axis=(2, 4), dtype=np.float64) / scale).reshape(n, -1)


def retrieval(
    sampled: Float[np.ndarray, "n f"], own: Sequence[int] | Int[np.ndarray, " n"], gallery: Float[np.ndarray, "m f"]
) -> Retrieval:
    """Ranks the gallery by L2 distance to each sample.

    Args:
        sampled: features of the sampled images.
        own: for each, the row of the gallery that its prompt describes.
        gallery: features of all images of the data set.
    """
    squared = np.square(sampled).sum(1)[:, None] - 2.0 * sampled @ gallery.T + np.square(gallery).sum(1)
    distance = np.take_along_axis(squared, np.asarray(own)[:, None], axis=1)
    rank = (squared < distance).sum(axis=1)
    return Retrieval(float((rank < 1).mean()), float((rank < 5).mean()))
