"""Canny's edges (Canny 1986) as OpenCV finds them, which the published ControlNets were trained with."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Int, UInt8
from scipy import ndimage

# The tangent of 22.5 degrees in OpenCV's fixed point; that of 67.5 is 2 more.
ONE = 1 << 15
TANGENT = int(math.tan(math.radians(22.5)) * ONE + 0.5)


def canny(pixels: UInt8[np.ndarray, "h w c"], low: float = 100.0, high: float = 200.0) -> UInt8[np.ndarray, "h w"]:
    """Edges in white on black, the same pixels as `cv2.Canny(pixels, low, high)` gives.

    Nothing is smoothed before; of the channels the one with the largest gradient |dx| + |dy| counts.

    Args:
        low, high: gradients above which a pixel belongs to an edge that has begun, and above which one begins; in
            either order.
    """
    low, high = sorted((low, high))
    dx, dy = _gradient(pixels)
    size = np.abs(dx) + np.abs(dy)
    edges = _peaks(dx, dy, size) & (size > math.floor(low))
    begun = edges & (size > math.floor(high))
    return np.uint8(255) * ndimage.binary_propagation(begun, np.ones((3, 3)), mask=edges).astype(np.uint8)


def _gradient(pixels: UInt8[np.ndarray, "h w c"]) -> tuple[Int[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    values = pixels.astype(np.int32)
    # SciPy's own sobel would smooth over the channels, too.
    steps = (ndimage.correlate1d(values, [-1, 0, 1], axis, mode="nearest") for axis in (1, 0))
    dx, dy = (ndimage.correlate1d(step, [1, 2, 1], axis, mode="nearest") for axis, step in enumerate(steps))
    largest = np.argmax(np.abs(dx) + np.abs(dy), axis=-1)[..., None]
    return np.take_along_axis(dx, largest, -1)[..., 0], np.take_along_axis(dy, largest, -1)[..., 0]


def _peaks(
    dx: Int[np.ndarray, "h w"], dy: Int[np.ndarray, "h w"], size: Int[np.ndarray, "h w"]
) -> Bool[np.ndarray, "h w"]:
    """Maxima along the gradient's direction, one of four; of two equal neighbours in a row or column the first."""
    height, width = size.shape
    around = np.pad(size, 1)

    def beside(down: int, right: int) -> Int[np.ndarray, "h w"]:
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    def maximum(down: int, right: int) -> Bool[np.ndarray, "h w"]:
        after = beside(down, right)
        return (size > beside(-down, -right)) & (size > after if down and right else size >= after)

    across, up = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) * ONE
    flat, steep = up < across * TANGENT, up > across * (TANGENT + 2 * ONE)
    return np.select([flat, steep, dx * dy < 0], [maximum(0, 1), maximum(1, 0), maximum(1, -1)], maximum(1, 1))
