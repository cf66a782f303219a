"""The first stage: a KL autoencoder that learns to reconstruct pictures (LDM, section 3.1).

Reads config.model.autoencoder, config.data, and of config.task: reconstruction ("l1" or "l2"), kl_weight and crop.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sdjax.convert.folder import Component, write_component
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.partition import gathered
from sdjax.core.precision import dtype_named
from sdjax.core.prng import stream
from sdjax.core.tree import Tree
from sdjax.data import loader, sources, transforms
from sdjax.models.autoencoder import Autoencoder, AutoencoderConfig
from sdjax.tasks.base import apply, my_rows, tile, to_uint8
from sdjax.training.task import Metrics, Params, Task

ERRORS = {"l1": jnp.abs, "l2": jnp.square}
# Of the posterior at the start: latents are then nearly noiseless, and the decoder learns from the first step.
FIRST_LOGVAR = -8.0
SHOWN = 8


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "autoencoder"."""
    size, error = config.data.size, ERRORS.get(config.task.reconstruction)
    if error is None:
        raise unknown("reconstruction loss", config.task.reconstruction, ERRORS, "config.task.reconstruction")
    sizes = AutoencoderConfig(**config.model.autoencoder)
    if size % sizes.factor or config.task.crop % sizes.factor:
        raise UserError(f"data.size={size} and task.crop={config.task.crop} must be multiples of {sizes.factor}")
    model = Autoencoder(sizes, dtype_named(config.train.dtype, "config.train.dtype"))
    pictures = _pictures(config, "train")

    def init(key: PRNGKeyArray) -> Params:
        dummy = jnp.zeros((1, config.task.crop, config.task.crop, 3))
        return {"vae": _nearly_noiseless(dict(model.init(key, dummy, key)["params"]))}

    def loss(params: Params, batch: Any, key: PRNGKeyArray) -> tuple[Array, Metrics]:
        crop_key, latent_key = jax.random.split(key)
        x = random_crops(crop_key, batch["image"], config.task.crop, sizes.factor)
        x = x.astype(jnp.float32) / 127.5 - 1.0
        reconstruction, latent = apply(model, params["vae"], x, latent_key)
        difference = error(x - reconstruction.astype(jnp.float32)).mean()
        # LDM sums over a picture and weighs the KL by 1e-6; the mean over its values keeps that proportion.
        kl = latent.kl().mean() / x[0].size
        metrics = {"reconstruction": difference, "kl": kl, "latent_std": latent.mean.std()}
        return difference + config.task.kl_weight * kl, metrics

    def sample(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        x = np.stack([pictures[i * len(pictures) // SHOWN]["image"] for i in range(SHOWN)])
        return tile(np.concatenate([x, to_uint8(reconstruct(model, params["vae"], x))]), SHOWN)

    def batch(params: Params) -> loader.Loader:
        del params
        select = transforms.Select(("image",))
        return loader.loader(pictures, config.train.batch_size, config.train.seed, [select], my_rows(mesh))

    def export(params: Params, folder: Path) -> None:
        scaling_factor = 1.0 / latent_std(model, params["vae"], pictures)
        measured = dataclasses.replace(sizes, scaling_factor=scaling_factor)
        write_component(folder / "vae", "vae", Component(measured, params["vae"]))

    def specimen(rows: int) -> dict[str, Any]:
        return {"image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)}

    return Task(init, loss, sample, batch, export, specimen)


def _pictures(config: Config, split: str) -> sources.Source:
    pictures = grain.MapDataset.source(sources.source(config.data.source, split))
    return sources.CachedSource(pictures.map(transforms.Square(config.data.size)))


def _nearly_noiseless(params: Params) -> Params:
    quant = params["quant_conv"]
    half = quant["bias"].shape[0] // 2
    kernel = quant["kernel"].at[..., half:].set(0.0)
    bias = quant["bias"].at[half:].set(FIRST_LOGVAR)
    return {**params, "quant_conv": {"kernel": kernel, "bias": bias}}


def random_crops(key: PRNGKeyArray, images: Array, size: int, grid: int) -> Array:
    """A square of each picture, [b size size c], its corner on a grid of that many pixels."""
    if images.shape[1] == size:
        return images
    corners = grid * jax.random.randint(key, (len(images), 2), 0, (images.shape[1] - size) // grid + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, image.shape[-1]))

    return jax.vmap(crop)(images, corners)


def reconstruct(model: Autoencoder, params: Tree, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b h w 3"]:
    """Pictures through the mean of their posterior and back, in [0, 1]."""
    return np.clip(np.asarray(_reconstruct(model, params, images)) / 2.0 + 0.5, 0.0, 1.0)


@jax.jit(static_argnums=0)
def _reconstruct(model: Autoencoder, params: Params, images: Array) -> Array:
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    mean = apply(model, params, x, method="encode").mean
    return gathered(apply(model, params, mean, method="decode").astype(jnp.float32))


def latent_std(model: Autoencoder, params: Params, pictures: sources.Source, most: int = 1024) -> float:
    """The standard deviation of sampled latents over up to `most` pictures, evenly chosen (LDM's scale_by_std)."""
    chosen = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).astype(int)
    moments = np.zeros(3)
    for start in range(0, len(chosen), 32):
        images = np.stack([pictures[i]["image"] for i in chosen[start : start + 32]])
        latents = np.asarray(_sample_latents(model, params, images, stream(0, "latent_std", start)), np.float64)
        moments += latents.size, latents.sum(), np.square(latents).sum()
    count, total, squares = moments
    return float(np.sqrt(squares / count - (total / count) ** 2))


@jax.jit(static_argnums=0)
def _sample_latents(model: Autoencoder, params: Params, images: Array, key: PRNGKeyArray) -> Array:
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    return apply(model, params, x, method="encode").sample(key)
