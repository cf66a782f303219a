"""An autoencoder by what it gives back: PSNR, SSIM, LPIPS, the FID of reconstructions, the use of its codebook."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.core.errors import UserError
from sdjax.data.images import to_uint8
from sdjax.data.sources.base import Example, Images
from sdjax.data.transforms.images import square
from sdjax.eval.comparison import METRICS, Figures, MetricOptions, Real, compare
from sdjax.models import quantize
from sdjax.models.autoencoder import AnyAutoencoder, VQAutoencoder, autoencoder_of
from sdjax.models.conditioning import apply
from sdjax.tasks.autoencoder import reconstruct
from sdjax.training.task import Params

WANTED = ("fid", *(name for name, metric in METRICS.items() if metric.paired))


def judge(folder: Path, real: Real, options: MetricOptions, say: Callable[[str], None]) -> Figures:
    """All figures of the autoencoder in `folder`, or in its part vae/.

    Args:
        real: images, which must be of one size, a multiple of the autoencoder's factor, unless `options.size` is one.
        say: as for `compare`.

    Raises:
        UserError: it cannot be read, or the images do not suit it.
    """
    path = folder / "vae" if (folder / "vae").is_dir() else folder
    component = read_component(path, "vae")
    model, params = autoencoder_of(component.config), jax.device_put(component.params)
    if real.images is None:
        raise UserError(f"{real.name} holds statistics; an autoencoder is judged by images")
    images = Squares(real.images, options.size)
    height, width = images.size(0)
    if height % component.config.factor or width % component.config.factor:
        raise UserError(
            f"images of {width}x{height} do not suit an autoencoder that divides sides by {component.config.factor}; "
            "--size resamples them"
        )
    given = Reconstructions(model, params, images, options.batch_size)
    figures = compare(given, Real(real.name, images, {}), WANTED, options, say)
    renamed = {"rfid" if name == "fid" else name: value for name, value in figures.items()}
    return renamed | (given.usage() if isinstance(model, VQAutoencoder) else {})


class Squares:
    """Images as squares of one size, or as they are."""

    def __init__(self, images: Images, side: int | None):
        self._images, self._side = images, side

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        example = self._images[index]
        if self._side is None:
            return example
        return Example(image=square(example["image"], self._side), caption=example["caption"], id=example["id"])

    def id(self, index: int) -> str:
        """The image's name."""
        return self._images.id(index)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return self._images.size(index) if self._side is None else (self._side, self._side)


class Reconstructions:
    """Reconstructions of images of one size, made in batches and kept as bytes in a file."""

    def __init__(self, model: AnyAutoencoder, params: Params, images: Images, rows: int):
        self._model, self._params, self._images, self._rows = model, params, images, rows
        self._folder = tempfile.TemporaryDirectory()
        shape = (len(images), *images.size(0), 3)
        self._made = np.lib.format.open_memmap(Path(self._folder.name) / "made.npy", "w+", np.uint8, shape)
        self._known = np.zeros(len(images), bool)
        self._counts = jnp.zeros(getattr(model.config, "codes", 1))
        self._bar = tqdm(total=len(images), desc="reconstructed", unit="picture")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        if not self._known[index]:
            self._make(index)
        return {"image": self._made[index], "caption": "", "id": self.id(index)}

    def id(self, index: int) -> str:
        """The image's name."""
        return self._images.id(index)

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the image."""
        return self._images.size(index)

    def usage(self) -> Figures:
        """The share of the codebook that all images use, and its perplexity."""
        for index in range(len(self)):
            _ = self[index]
        share, perplexity = quantize.usage(self._counts)
        return {"codes_used": float(share), "perplexity": float(perplexity)}

    def _make(self, first: int) -> None:
        chosen = range(first, min(first + self._rows, len(self)))
        images = np.stack([self._images[i]["image"] for i in chosen])
        padded = np.pad(images, [(0, self._rows - len(images)), (0, 0), (0, 0), (0, 0)], mode="edge")
        made = to_uint8(reconstruct(self._model, self._params, padded)[: len(images)])
        self._made[chosen.start : chosen.stop] = made
        self._known[chosen.start : chosen.stop] = True
        if isinstance(self._model, VQAutoencoder):
            self._counts += _codes(self._model, self._params, jnp.asarray(padded))[: len(images)].sum(0)
        self._bar.update(len(images))
        if self._known.all():
            self._bar.close()


@jax.jit(static_argnums=0)
def _codes(model: VQAutoencoder, params: Params, images: Array) -> Float[Array, "b n"]:
    """Counts of each vector of the codebook in each image."""
    x = images.astype(jnp.float32) / 127.5 - 1.0
    quantized = apply(model, params, apply(model, params, x, method="encode").mean, method="round")
    return jax.vmap(lambda codes: quantize.counts(codes, model.config.codes))(quantized.codes)
