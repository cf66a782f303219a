"""Sampled images beside real ones: which metrics there are, what each needs, and all that can be computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.checkpoints import metric_weights
from sdjax.checkpoints.clip_pair import find_clip, missing_clip, read_clip
from sdjax.core.errors import UserError, unknown
from sdjax.data.arrays import read_npz
from sdjax.data.sources.base import Images
from sdjax.data.sources.folder import FolderSource
from sdjax.data.transforms.images import square
from sdjax.eval.clip_score import captions_of, clip_score
from sdjax.eval.features import Arrays, identity, inception_features, kept
from sdjax.eval.frechet import Gaussian, frechet_distance, gaussian
from sdjax.eval.inception_score import inception_score
from sdjax.eval.kernel_distance import kernel_distance
from sdjax.eval.manifold import precision_recall
from sdjax.eval.similarity import psnr, ssim
from sdjax.models.conditioning import apply
from sdjax.models.lpips import LPIPS

# Statistics as others publish them: (mean, covariance) by metric, under pytorch-fid's and guided-diffusion's names.
STORED = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}
Figures = dict[str, float]
CLIP = "clip"


class Real(NamedTuple):
    """Reference of a comparison.

    Attributes:
        name: of the images, or of a file of statistics.
        pictures: None where there are only statistics.
        statistics: by metric; {} where there are images.
    """

    name: str
    images: Images | None
    statistics: dict[str, Gaussian]


class MetricOptions(NamedTuple):
    """Settings of metrics; the defaults are those of torch-fidelity and of the papers.

    Attributes:
        clip: the folder of a CLIP; None for the published one, where weights are looked for.
    """

    size: int | None = None
    batch_size: int = 16
    subset: int = 1000
    splits: int = 10
    neighbours: int = 3
    clip: Path | None = None


class Comparison:
    """Two sets of images; what several metrics need of them is computed once, and of the real ones kept on disk."""

    def __init__(self, fake: Images, real: Real, options: MetricOptions):
        self.fake, self.real, self.options = fake, real, options

    @functools.cached_property
    def sampled(self) -> Arrays:
        """Inception's features of the sampled images."""
        return inception_features(self.fake, "sampled", self.options.size, self.options.batch_size)

    @functools.cached_property
    def reference(self) -> Arrays:
        """Inception's features of the real images."""
        images, options = self.originals, self.options
        key = identity(images, self.real.name, options.size)
        return kept(key, lambda: inception_features(images, "real", options.size, options.batch_size))

    @property
    def originals(self) -> Images:
        """The real images.

        Raises:
            UserError: there are only statistics.
        """
        if self.real.images is None:
            raise UserError(f"{self.real.name} holds statistics, and this metric needs the images themselves")
        return self.real.images

    def gaussian_of(self, metric: str, feature: str) -> Gaussian:
        """Mean and covariance of a feature of the real images, or those that a file holds."""
        if self.real.images is not None:
            return gaussian(self.reference[feature], "real images")
        if metric not in self.real.statistics:
            raise UserError(f"{self.real.name} holds no statistics for {metric} ({', '.join(STORED[metric])})")
        return self.real.statistics[metric]

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Sampled and real images of the same place in their order, in [0, 1], some at a time.

        Raises:
            UserError: there are not as many of the one as of the other, or two have different sizes.
        """
        real, rows = self.originals, self.options.batch_size
        if len(self.fake) != len(real):
            raise UserError(f"pairs are compared, and there are {len(self.fake)} sampled and {len(real)} real images")
        for start in range(0, len(real), rows):
            chosen = range(start, min(start + rows, len(real)))
            yield tuple(np.stack([self._image(source, i) for i in chosen]) / 255.0 for source in (self.fake, real))  # pyright: ignore[reportReturnType]

    def _image(self, source: Images, index: int) -> np.ndarray:
        image = source[index]["image"]
        image = image if self.options.size is None else square(image, self.options.size)
        if source is not self.fake and image.shape != (own := self._image(self.fake, index).shape):
            raise UserError(
                f"{source.id(index)} is {image.shape[1]}x{image.shape[0]}, and its pair {self.fake.id(index)} is "
                f"{own[1]}x{own[0]}; --size makes them alike"
            )
        return image


def _fid(given: Comparison) -> Figures:
    own = gaussian(given.sampled["pooled"], "sampled images")
    return {"fid": frechet_distance(own, given.gaussian_of("fid", "pooled"))}


def _sfid(given: Comparison) -> Figures:
    own = gaussian(given.sampled["spatial"], "sampled images")
    return {"sfid": frechet_distance(own, given.gaussian_of("sfid", "spatial"))}


def _kid(given: Comparison) -> Figures:
    found = kernel_distance(given.sampled["pooled"], given.reference["pooled"], size=given.options.subset)
    return {"kid": found.mean, "kid_std": found.std}


def _inception_score(given: Comparison) -> Figures:
    found = inception_score(given.sampled["logits"], splits=given.options.splits)
    return {"inception_score": found.mean, "inception_score_std": found.std}


def _precision_recall(given: Comparison) -> Figures:
    how = {"neighbours": given.options.neighbours}
    found = precision_recall(given.sampled["pooled"], given.reference["pooled"], **how)
    return {"precision": found.precision, "recall": found.recall}


def _clip_score(given: Comparison) -> Figures:
    folder = find_clip(given.options.clip)
    if folder is None:
        raise UserError(missing_clip())
    if not isinstance(given.fake, FolderSource):
        raise UserError("clip_score is of a folder of images with their prompts beside them")
    captions = captions_of(given.fake.folder, given.fake)
    return {"clip_score": clip_score(read_clip(folder), given.fake, captions, given.options.batch_size)}


def _paired(name: str, measure: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Comparison], Figures]:
    return lambda given: {name: float(np.mean(np.concatenate([measure(a, b) for a, b in given.pairs()])))}


def _lpips(given: Comparison) -> Figures:
    params = metric_weights.load("vgg16")
    return _paired("lpips", lambda a, b: np.asarray(_distance(params, jnp.asarray(a), jnp.asarray(b))))(given)


@jax.jit
def _distance(params: Any, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, " b"]:
    return apply(LPIPS(), params, 2.0 * a - 1.0, 2.0 * b - 1.0)


class Metric(NamedTuple):
    """A figure, or a few that belong together.

    Attributes:
        figures: of a comparison.
        needs: a key of `metric_weights.PUBLISHED`, or `CLIP`; "" where no network judges.
        paired: whether sampled and real images are compared one by one.
        alone: whether the sampled images suffice.
    """

    figures: Callable[[Comparison], Figures]
    needs: str = "inception"
    paired: bool = False
    alone: bool = False


METRICS = {
    "fid": Metric(_fid),
    "sfid": Metric(_sfid),
    "kid": Metric(_kid),
    "inception_score": Metric(_inception_score),
    "precision_recall": Metric(_precision_recall),
    "psnr": Metric(_paired("psnr", psnr), needs="", paired=True),
    "ssim": Metric(_paired("ssim", ssim), needs="", paired=True),
    "lpips": Metric(_lpips, needs="vgg16", paired=True),
    "clip_score": Metric(_clip_score, needs=CLIP, alone=True),
}
UNPAIRED = tuple(name for name, metric in METRICS.items() if not metric.paired and not metric.alone)


def chosen(names: str) -> list[str]:
    """The metrics of a list with commas; "" for all that need no pairs.

    Raises:
        UserError: one is unknown.
    """
    wanted = [name.strip() for name in names.split(",")] if names else list(UNPAIRED)
    for name in wanted:
        if name not in METRICS:
            raise unknown("metric", name, METRICS, "--metrics")
    return wanted


def compare(
    fake: Images, real: Real, metrics: Iterable[str], options: MetricOptions, say: Callable[[str], None]
) -> Figures:
    """All figures that can be had.

    Args:
        metrics: names of `METRICS`.
        say: called with the metrics that are left out, and the file that they want.

    Raises:
        UserError: a metric cannot be taken of these images.
    """
    given, figures = Comparison(fake, real, options), {}
    for name in metrics:
        if absent := _absent(METRICS[name].needs, options):
            say(f"{name} is left out: {absent}")
            continue
        figures |= METRICS[name].figures(given)
    return figures


def _absent(needs: str, options: MetricOptions) -> str:
    """File that a metric lacks, and the folders that were searched for it."""
    if needs == CLIP:
        return "" if find_clip(options.clip) else missing_clip()
    return metric_weights.missing(needs) if needs and metric_weights.find(needs) is None else ""


def read_statistics(path: Path) -> dict[str, Gaussian]:
    """The moments that an .npz file of pytorch-fid or guided-diffusion holds, by metric.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    stored = read_npz(path, [key for keys in STORED.values() for key in keys])
    if any(array.dtype.kind != "f" for array in stored.values()):
        raise UserError(f"{path} holds statistics that are no floating-point numbers")
    found = {
        metric: Gaussian(*(np.asarray(stored[key], np.float64) for key in keys))
        for metric, keys in STORED.items()
        if set(keys) <= set(stored)
    }
    if not found:
        wanted: Sequence[str] = [" and ".join(keys) for keys in STORED.values()]
        raise UserError(f"{path} holds neither {' nor '.join(wanted)}")
    return found
