"""Aspect-ratio buckets: a fixed table of image sizes, and the resizing and cropping of an image to its own.

A batch is of one bucket, so that the networks are compiled for as many shapes as the table has and no more.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image
from tqdm import tqdm

from sdjax.core.errors import UserError, unknown
from sdjax.data.sources.base import CONDITIONING_IMAGE, Images


class Size(NamedTuple):
    """Pixels."""

    height: int
    width: int


Table = tuple[Size, ...]

# The paper's list is not its own mirror image: 704x1344 stands alone.
_PAPER = """
512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472
704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024
1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1408x704
1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512
"""
SDXL: Table = tuple(Size(*map(int, size.split("x"))) for size in _PAPER.split())
"""The 40 sizes of SDXL's multi-aspect training (Podell et al. 2023, appendix I), the widest first."""


def table(side: int, step: int = 64, max_ratio: float = 4.0) -> Table:
    """Sizes of about side^2 pixels, the widest first: for each height the largest width that does not exceed them.

    Args:
        side: pixels; the square of this side is among the sizes.
        step: what heights and widths are multiples of, e.g. 64.
        max_ratio: of the longer to the shorter side.

    Raises:
        UserError: `side` is no multiple of `step`.
    """
    if step < 1 or side < step or side % step or max_ratio < 1:
        raise UserError(
            f"buckets of {side} pixels' side: choose a multiple of the step, {step}, and a ratio of 1 or more"
        )
    wide = {}
    for height in range(step, side + 1, step):
        width = side * side // height // step * step
        if width <= max_ratio * height:
            wide[Size(height, width)] = None
    tall = [Size(size.width, size.height) for size in reversed(wide) if size.width != size.height]
    return (*wide, *tall)


def nearest(
    buckets: Sequence[Size], height: int | Int64[np.ndarray, " n"], width: int | Int64[np.ndarray, " n"]
) -> Any:
    """The index of the bucket whose aspect ratio is nearest, by the logarithm, so that tall and wide count alike.

    Args:
        buckets: at least one.
        height: of an image, or of many.
        width: likewise.

    Returns:
        An integer, or an array of them; of equally near ones the first.
    """
    ratios = np.log([size[0] / size[1] for size in buckets])
    own = np.log(np.asarray(height, np.float64) / np.asarray(width, np.float64))
    # Two distances that are equal but for rounding shall not depend on the processor.
    found = np.abs(own[..., None] - ratios).round(12).argmin(-1)
    return found if np.ndim(found) else int(found)


def cover(height: int, width: int, target: Size) -> Size:
    """The smallest size of an image's own proportions that covers `target`; one side is the target's."""
    if target.height * width >= target.width * height:
        return Size(target.height, max(target.width, _rounded(width * target.height, height)))
    return Size(max(target.height, _rounded(height * target.width, width)), target.width)


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def resize_crop(
    image: UInt8[np.ndarray, "h w 3"], target: Size, top: int, left: int
) -> UInt8[np.ndarray, "height width 3"]:
    """The image resized to `cover` the target (Lanczos, antialiased), then cropped at (top, left) of what results.

    Only what is kept is computed: a strip of 1 x 60,000 pixels costs no more than any other image.
    """
    height, width, _ = image.shape
    covered = cover(height, width, target)
    if covered == (height, width):
        return np.ascontiguousarray(image[top : top + target.height, left : left + target.width])
    y, x = height / covered.height, width / covered.width
    box = (left * x, top * y, min(width, (left + target.width) * x), min(height, (top + target.height) * y))
    size = (target.width, target.height)
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.LANCZOS, box=box))


@dataclasses.dataclass(frozen=True)
class ToBucket(grain.transforms.RandomMap):
    """Brings the image to the size of its nearest bucket; adds `bucket`, int32, and `sizes`, float32 [6].

    `sizes` is the size condition of SDXL (Podell et al. 2023, section 2.2): the original height and width, the top and
    left of the crop in the image after it was resized, the bucket's height and width. Without buckets, a table of one
    size gives the size and crop conditioning of SDXL's first stages.
    """

    buckets: Table
    crop: Literal["random", "centre"] = "random"

    def __post_init__(self) -> None:
        if self.crop not in ("random", "centre"):
            raise unknown("crop", self.crop, ("random", "centre"))

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """Args: element: with `image`. rng: draws the crop, if it is random."""
        height, width, _ = element["image"].shape
        bucket = nearest(self.buckets, height, width)
        target = Size(*self.buckets[bucket])
        covered = cover(height, width, target)
        spare = (covered.height - target.height, covered.width - target.width)
        top, left = (int(rng.integers(0, more + 1)) if self.crop == "random" else more // 2 for more in spare)
        sizes = np.array([height, width, top, left, *target], np.float32)
        names = [name for name in ("image", CONDITIONING_IMAGE) if name in element]
        images = {name: resize_crop(element[name], target, top, left) for name in names}
        return {**element, **images, "sizes": sizes, "bucket": np.int32(bucket)}


def mirrored_sizes(sizes: np.ndarray) -> np.ndarray:
    """The `sizes` of an image that was mirrored after its crop: as if it had been mirrored first, then cropped."""
    height, width, top, left, *target = (int(size) for size in sizes)
    covered = cover(height, width, Size(*target))
    return np.array([height, width, top, covered.width - target[1] - left, *target], np.float32)


def assign(source: Images, buckets: Table, threads: int = 8) -> Int64[np.ndarray, " n"]:
    """The bucket of every image of a source, from the files' headers: what `ToBucket` will find."""
    found = np.empty(len(source), np.int64)
    for start, sizes in _sizes(source, threads):
        found[start : start + len(sizes)] = nearest(buckets, *sizes.T)
    return found


def occupied(source: Images, buckets: Table, least: int, threads: int = 8) -> Table:
    """The table without the buckets that fewer than `least` images would be in; theirs go to the nearest ones left.

    The emptiest bucket is removed first, as its images may fill another.

    Raises:
        UserError: there are fewer than `least` images.
    """
    if len(source) < least:
        raise UserError(f"{len(source)} images cannot fill a bucket of {least}")
    sizes = np.concatenate([part for _, part in _sizes(source, threads)])
    while True:
        counts = np.bincount(nearest(buckets, *sizes.T), minlength=len(buckets))
        emptiest = int(counts.argmin())
        if counts[emptiest] >= least:
            return buckets
        buckets = (*buckets[:emptiest], *buckets[emptiest + 1 :])


def without_small(assigned: Int64[np.ndarray, " n"], least: int) -> Int64[np.ndarray, " n"]:
    """The buckets of all rows, -1 for those of a bucket with fewer than `least`: `bucketed` leaves such rows out."""
    counts = np.bincount(assigned[assigned >= 0], minlength=1)
    return np.where((assigned >= 0) & (counts[assigned] >= least), assigned, -1)


def _sizes(source: Images, threads: int) -> Iterator[tuple[int, Int64[np.ndarray, "m 2"]]]:
    """(start, sizes int64 [m, 2]) of runs of images."""
    chunk = 4096
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(source), desc="image sizes", leave=False, delay=2) as bar,
    ):
        for start in itertools.count(0, chunk):
            indices = range(start, min(start + chunk, len(source)))
            if not indices:
                return
            yield start, np.array(list(pool.map(source.size, indices)), np.int64)
            bar.update(len(indices))
