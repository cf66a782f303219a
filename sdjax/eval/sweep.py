"""FID and CLIP score over guidance scales, of images generated from captions of a data set.

With COCO's validation images of 2014 and 30,000 captions it is zero-shot FID-30K (Saharia et al. 2022, section 4.1):
captions are drawn at random, one an image, and the reference is all of the images, cut to 256 px squares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sdjax
from sdjax.core.errors import UserError
from sdjax.data.sources.base import Images
from sdjax.data.sources.folder import plain_images
from sdjax.eval.comparison import MetricOptions, Real, compare
from sdjax.eval.plot import PlotAxis, write_plot
from sdjax.eval.samples import Sampling, write_samples

METRICS = ("fid", "clip_score")
TITLES = {"fid": "FID", "clip_score": "CLIP score"}
PLOT = "sweep.svg"


def parse_scales(text: str) -> list[float]:
    """Guidance scales of a list with commas.

    Raises:
        UserError: one is no number of at least 0, or comes twice.
    """
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--sweep {text!r} is no list of guidance scales such as 1,1.5,2,3") from error
    if not all(0.0 <= scale < float("inf") for scale in scales) or len(set(scales)) < len(scales):
        raise UserError(f"--sweep {text!r}: guidance scales are different numbers of at least 0")
    return scales


def drawn_captions(images: Images, limit: int | None, seed: int) -> list[str]:
    """Captions of images drawn at random, one an image, of `limit` images or all.

    Raises:
        UserError: an image has none.
    """
    rng = np.random.default_rng(seed)
    captions = []
    for row in rng.permutation(len(images))[:limit]:
        example = images[int(row)]
        several = example.get("captions", (example["caption"],))
        captions.append(several[int(rng.integers(len(several)))])
        if not captions[-1]:
            raise UserError(f"{images.id(int(row))} has no caption, from which an image could be generated")
    return captions


def sweep(
    model: str,
    real: Real,
    captions: Sequence[str],
    scales: Sequence[float],
    folder: Path,
    how: Sampling,
    options: MetricOptions,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Sample every caption at each scale into FOLDER/guidance_SCALE, and compare with the real images.

    Writes FOLDER/sweep.svg: FID over CLIP score, or the one that can be computed over the scale.

    Args:
        model: what `sdjax.load` takes.
        options: of the metrics; what is left out is said once.

    Returns:
        Both metrics at each scale, and the lowest FID with its scale.

    Raises:
        UserError: as `sdjax.load`, `write_samples` and `compare`.
    """
    pipe, said = sdjax.load(model), set[str]()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    found: dict[float, dict[str, float]] = {}
    for scale in scales:
        target = folder / f"guidance_{scale:g}"
        write_samples(pipe, captions, target, how._replace(guidance_scale=scale))
        found[scale] = compare(plain_images(target), real, METRICS, options, once)
    if any(found.values()):
        plot(folder / PLOT, found)
    return flat(found)


def flat(found: dict[float, dict[str, float]]) -> dict[str, Any]:
    """Figures of all scales by name, and the lowest FID with its scale."""
    figures: dict[str, Any] = {f"{k}_at_{scale:g}": v for scale, row in found.items() for k, v in row.items()}
    fids = {scale: row["fid"] for scale, row in found.items() if "fid" in row}
    if fids:
        best = min(fids, key=lambda scale: fids[scale])
        figures |= {"fid": fids[best], "fid_guidance_scale": best}
    return figures


def plot(path: Path, found: dict[float, dict[str, float]]) -> None:
    """Write the plot of a sweep."""
    have = [name for name in METRICS if all(name in row for row in found.values())]
    labels = [f"{scale:g}" for scale in found]
    values = {name: [row[name] for row in found.values()] for name in have}
    y = PlotAxis(TITLES[have[0]], values[have[0]])
    if len(have) == len(METRICS):
        x = PlotAxis(f"{TITLES['clip_score']}; labels are guidance scales", values["clip_score"])
    else:
        x = PlotAxis("guidance scale", list(found))
    write_plot(path, x, y, labels)
