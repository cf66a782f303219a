"""Hints at the size of an image as A1111's extension brings them there (Mikubill/sd-webui-controlnet, controlnet.py).

A hint is no photograph: labels must not mix, and lines of one pixel must stay lines of one pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage, sparse

from sdjax.data.image_inputs import centred, cubic_weights

STRETCH, CROP, FILL = "stretch", "crop", "fill"
RESIZES = (STRETCH, CROP, FILL)
"""A1111's Just Resize, Crop and Resize, Resize and Fill."""
Size = tuple[int, int]
# Colours of a map of labels, which are not mixed.
LABELS = range(3, 200)
ROUNDS = 32  # of thinning
LONGEST = 2**13  # side of a photograph that is enlarged; a strip that is stretched would not fit in memory
# Neighbours, 1 set and -1 not, of a pixel that is no part of a line of one pixel; and of an end.
CORNERS = ([[-1, -1, -1], [0, 1, 0], [1, 1, 1]], [[0, -1, -1], [1, 1, -1], [0, 1, 0]])
ENDS = ([[-1, -1, -1], [-1, 1, -1], [0, 0, -1]], [[-1, -1, -1], [-1, 1, -1], [-1, 0, 0]])


def fit(hint: UInt8[np.ndarray, "h w 3"], size: Size, resize: str) -> UInt8[np.ndarray, "H W 3"]:
    """A hint of another size.

    Args:
        hint: white on black, labels or an image.
        size: height and width.
        resize: of `RESIZES`; where it is filled, the border has the median colour of the hint's edges.
    """
    if resize != FILL:
        return resized(_shown(hint, size, resize), size)
    small = resized(hint, _scaled(hint.shape[:2], _pixel_scale(hint.shape[:2], size, resize)))
    edges = np.concatenate([hint[0], hint[-1], hint[:, 0], hint[:, -1]])
    filled = np.tile(np.median(edges, axis=0).astype(np.uint8), (*size, 1))
    top, left = ((want - have) // 2 for have, want in zip(small.shape[:2], size, strict=True))
    filled[top : top + small.shape[0], left : left + small.shape[1]] = small
    return filled


def at_scale(pixels: UInt8[np.ndarray, "h w 3"], size: Size, resize: str) -> UInt8[np.ndarray, "H W 3"]:
    """The part of a photograph that is shown, so large that a hint made of it needs no resizing ("pixel perfect")."""
    pixels = _shown(pixels, size, resize)
    scale = min(_pixel_scale(pixels.shape[:2], size, resize), LONGEST / max(pixels.shape[:2]))
    return interpolated(pixels, _scaled(pixels.shape[:2], scale), cubic_weights if scale > 1.0 else area_weights)


def resized(hint: UInt8[np.ndarray, "h w 3"], size: Size) -> UInt8[np.ndarray, "H W 3"]:
    """Nearest pixels of labels, else means or cubic convolution; what was black and white is so again."""
    have, want = np.prod(hint.shape[:2]), np.prod(size)
    if hint.shape[:2] == size:
        return hint
    colors = len(np.unique(hint.reshape(-1, 3), axis=0))
    weights = nearest_weights if colors in LABELS else area_weights if want < have else cubic_weights
    made = interpolated(hint, size, weights)
    if colors != 2 or hint.min() >= 16 or hint.max() <= 240:
        return made
    grey = made.astype(np.float32).mean(-1).astype(np.uint8)
    opened = ndimage.grey_opening(hint, (3, 3, 1))
    if 2 * np.sum(opened < hint) <= np.sum(hint > 127):
        lines = grey > otsu(grey)
    else:
        ridges = _ridges(grey)
        lines = thinned(ridges > otsu(ridges), ends=bool(want <= have))
    return np.repeat(np.uint8(255) * lines[..., None].astype(np.uint8), 3, axis=-1)


def interpolated(
    pixels: UInt8[np.ndarray, "h w 3"], size: Size, weights: Callable[[int, int], Float[np.ndarray, "new old"]]
) -> UInt8[np.ndarray, "H W 3"]:
    """An image at another size, by the weights of each axis."""
    rows, columns = (sparse.csr_array(weights(*pair)) for pair in zip(pixels.shape[:2], size, strict=True))
    made = (rows @ pixels.reshape(len(pixels), -1)).reshape(size[0], -1, 3)
    made = (columns @ made.swapaxes(0, 1).reshape(made.shape[1], -1)).reshape(size[1], size[0], 3)
    return np.rint(np.clip(made.swapaxes(0, 1), 0, 255)).astype(np.uint8)


def otsu(grey: UInt8[np.ndarray, "h w"]) -> int:
    """The threshold that best divides the histogram in two (Otsu 1979); larger values are white."""
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    below, mean = np.cumsum(share), np.cumsum(share * np.arange(256))
    spread = np.maximum(below * (1.0 - below), 1e-12)
    return int(np.argmax((mean[-1] * below - mean) ** 2 / spread))


def thinned(lines: Bool[np.ndarray, "h w"], ends: bool) -> Bool[np.ndarray, "h w"]:
    """Lines one pixel wide; with `ends`, ends that stick out by one pixel stay."""
    for _ in range(ROUNDS):
        thinner = _without(lines, CORNERS)
        if np.array_equal(thinner, lines):
            break
        lines = thinner
    return lines if ends else _without(lines, ENDS)


def area_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Means over each new pixel's part of the old ones (OpenCV's INTER_AREA)."""
    edges, scale = np.arange(new + 1) * (old / new), old / new
    first, last = edges[:-1, None], edges[1:, None]
    at = np.arange(old)
    return np.clip(np.minimum(last, at + 1) - np.maximum(first, at), 0.0, None) / scale


def nearest_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The pixel above and left of the place (OpenCV's INTER_NEAREST)."""
    step = 1.0 / (new / old)  # rounded as there: exact quotients would take other pixels
    return np.eye(old)[np.minimum(np.arange(new) * step, old - 1).astype(int)]


def _shown(pixels: UInt8[np.ndarray, "h w 3"], size: Size, resize: str) -> UInt8[np.ndarray, "H W 3"]:
    """Cut before it is resized, which A1111 does after: enlarged, a strip would not fit in memory."""
    return centred(pixels, size) if resize == CROP else pixels


def _pixel_scale(given: Size, size: Size, resize: str) -> float:
    factors = [want / have for have, want in zip(given, size, strict=True)]
    return min(factors) if resize == FILL else max(factors)


def _scaled(given: Size, scale: float) -> Size:
    return max(1, round(given[0] * scale)), max(1, round(given[1] * scale))


def _ridges(grey: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Values of pixels that are the largest of three in a row, in a column or along a diagonal; else 0."""
    line = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]])
    footprints = line, line.T, np.eye(3), np.eye(3)[::-1]
    largest = [ndimage.grey_dilation(grey, footprint=one, mode="constant") == grey for one in footprints]
    return np.where(np.any(largest, axis=0), grey, 0).astype(np.uint8)


def _without(lines: Bool[np.ndarray, "h w"], patterns: object) -> Bool[np.ndarray, "h w"]:
    """Lines without the pixels that a pattern, turned by each quarter, finds; one after the other."""
    for turn in range(4):
        for pattern in np.array(patterns):
            turned = np.rot90(pattern, turn)
            # Beyond the edge everything fits.
            sides = (lines, turned > 0), (~lines, turned < 0)
            hits = [ndimage.binary_erosion(side, wanted, border_value=1) for side, wanted in sides]
            lines = lines & ~np.logical_and(*hits)
    return lines
