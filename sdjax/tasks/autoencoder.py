"""The first stage: an autoencoder, with a KL term or a codebook, learns to reconstruct images (LDM, section 3.1).

Reads config.model.autoencoder (a variant, and what differs from it), config.data, and of config.task: reconstruction
("l1" or "l2"), kl_weight, codebook_weight, learn_logvar, crop, noiseless_start, perceptual_weight (0: without LPIPS)
and discriminator (weight, start, layers, width, criterion; a weight of 0: without one).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sdjax.checkpoints import metric_weights
from sdjax.checkpoints.layouts.diffusers import Component, write_component
from sdjax.checkpoints.networks import perceptual
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.core.prng import stream
from sdjax.core.tree import Params, Tree, flatten, unflatten
from sdjax.data.images import tile, to_uint8
from sdjax.data.loader import Loader
from sdjax.data.sources import open as sources
from sdjax.data.transforms import images as transforms
from sdjax.diffusion_model.model import AUTOENCODER as VAE
from sdjax.models import quantize
from sdjax.models.autoencoder import VARIANTS, AnyAutoencoder, Autoencoder, Posterior, Quantized, autoencoder_of
from sdjax.models.conditioning import apply
from sdjax.models.layers import Conv
from sdjax.models.lpips import LPIPS
from sdjax.models.patchgan import PatchDiscriminator
from sdjax.tasks.base import batches, data_identity, gathered, open_images
from sdjax.tasks.first_stage.objective import CRITERIA, MOST, Adversary, adversarial, reconstruction
from sdjax.tasks.variants import sizes_of
from sdjax.training.task import DevicePut, Metrics, Task

logger = logging.getLogger("sdjax")

DISCRIMINATOR, PERCEPTUAL, LOGVAR = "discriminator", "lpips", "logvar"
ERRORS = {"l1": jnp.abs, "l2": jnp.square}
# Of the posterior at a noiseless start: the decoder then learns from the first step.
FIRST_LOGVAR = -8.0
SHOWN = 8


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "autoencoder"."""
    size, options = config.data.size, config.task
    error = ERRORS.get(options.reconstruction)
    if error is None:
        raise unknown("reconstruction loss", options.reconstruction, ERRORS, "config.task.reconstruction")
    sizes = sizes_of(config.model.autoencoder, VARIANTS, "config.model.autoencoder")
    if size % sizes.factor or options.crop % sizes.factor:
        raise UserError(f"data.size={size} and task.crop={options.crop} must be multiples of {sizes.factor}")
    model = autoencoder_of(sizes, dtype_named(config.train.dtype, "config.train.dtype"))
    critic, adversary = _adversary(config, options.crop**2 * 3 if isinstance(model, Autoencoder) else 1)
    perceives = _perceives(options.perceptual_weight)
    images = _images(config, "train")

    def init(key: PRNGKeyArray) -> Params:
        dummy = jnp.zeros((1, options.crop, options.crop, 3))
        vae = dict(model.init(key, dummy, key)["params"])
        params = {VAE: _nearly_noiseless(vae) if options.noiseless_start else vae}
        if adversary is not None:
            params[DISCRIMINATOR] = dict(critic.init(jax.random.fold_in(key, 1), dummy)["params"])
        return params | ({LOGVAR: {"value": jnp.zeros(())}} if options.learn_logvar else {})

    def loss(params: Params, batch: Any, key: PRNGKeyArray, step: Int[Array, ""]) -> tuple[Array, Metrics]:
        crop_key, latent_key = jax.random.split(key)
        x = random_crops(crop_key, batch["image"], options.crop, sizes.factor)
        x = x.astype(jnp.float32) / 127.5 - 1.0
        (made, latent), sown = model.apply({"params": params[VAE]}, x, latent_key, mutable=["last"])
        made, logvar = made.astype(jnp.float32), params.get(LOGVAR, {"value": 0.0})["value"]
        regular, metrics = _regularisation(config, sizes, latent, x[0].size)

        def likelihood(made: Array, logvar: Array | float = logvar) -> Float[Array, ""]:
            difference = error(x - made)
            if not perceives:
                return reconstruction(difference, None, logvar)
            seen = options.perceptual_weight * apply(LPIPS(), params[PERCEPTUAL], x, made)
            return reconstruction(difference, seen, logvar)

        metrics["reconstruction"] = error(x - made).mean()
        if perceives:
            metrics["perceptual"] = likelihood(made, 0.0) - metrics["reconstruction"]
        if adversary is None:
            return likelihood(made) + regular, metrics
        (features,) = cast(Any, sown)["last"]["decoder"]["features"]
        last = _last_layer(model, params[VAE], features)
        still = jax.lax.stop_gradient(logvar)
        value, judged = adversarial(
            adversary, params[DISCRIMINATOR], x, made, lambda y: likelihood(y, still), last, step
        )
        if options.learn_logvar:  # whose gradient the reconstruction's own does not carry
            own = likelihood(jax.lax.stop_gradient(made), logvar)
            value += own - jax.lax.stop_gradient(own)
        return value + regular, metrics | judged

    def preview(params: Params) -> UInt8[np.ndarray, "h w 3"]:
        x = np.stack([images[i * len(images) // SHOWN]["image"] for i in range(SHOWN)])
        return tile(np.concatenate([x, to_uint8(reconstruct(model, params[VAE], x))]), SHOWN)

    def batch(params: Params) -> Loader:
        del params
        select = transforms.Select(("image",))
        return batches(config, images, [select], mesh)

    def export(params: Params, folder: Path) -> None:
        scaling_factor = 1.0 / latent_std(model, params[VAE], images) if isinstance(model, Autoencoder) else 1.0
        measured = dataclasses.replace(sizes, scaling_factor=scaling_factor)
        write_component(folder / VAE, VAE, Component(measured, params[VAE]))

    def batch_spec(rows: int) -> dict[str, Any]:
        return {"image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)}

    def pretrained(put: DevicePut) -> Params:
        if not perceives:
            return {}
        weights = flatten(metric_weights.load("vgg16"))
        return {PERCEPTUAL: unflatten({name: put(leaf, f"{PERCEPTUAL}/{name}") for name, leaf in weights.items()})}

    frozen = {PERCEPTUAL: perceptual.lpips_shapes()} if perceives else {}
    use = "python train.py --config configs/ldm.py:VARIANT --config.task.first_stage={workdir} --workdir ..."
    return Task(init, loss, preview, batch, export, batch_spec, frozen, pretrained, use, lambda: data_identity(config))


def _adversary(config: Config, values: int) -> tuple[PatchDiscriminator, Adversary | None]:
    """Args: `values`, what the reconstruction loss is divided by, which the original sums over an image."""
    options = config.task.discriminator
    if options.criterion not in CRITERIA:
        raise unknown("criterion", options.criterion, CRITERIA, "config.task.discriminator.criterion")
    critic = PatchDiscriminator(options.layers, options.width, dtype_named(config.train.dtype, "config.train.dtype"))
    if not options.weight:
        return critic, None
    smallest = 2 ** (options.layers + 2)
    if config.task.crop < smallest:
        raise UserError(
            f"task.crop={config.task.crop} is too small for a discriminator of task.discriminator.layers="
            f"{options.layers}: it needs {smallest} pixels"
        )

    def judge(params: Any, x: Array) -> Array:
        return apply(critic, params, x)

    return critic, Adversary(judge, CRITERIA[options.criterion], options.weight, options.start, MOST / values)


def _perceives(weight: float) -> bool:
    """True if LPIPS takes part: it is wanted, and its weights are there."""
    if weight and metric_weights.find("vgg16") is None:
        logger.warning("training goes on without the perceptual loss: %s", metric_weights.missing("vgg16"))
        return False
    return bool(weight)


def _regularisation(config: Config, sizes: Any, latent: Posterior | Quantized, values: int) -> tuple[Array, Metrics]:
    if isinstance(latent, Quantized):
        share, perplexity = quantize.usage(quantize.counts(latent.codes, sizes.codes))
        metrics = {"codebook": latent.loss, "codes_used": share, "perplexity": perplexity, "latent_std": latent.z.std()}
        return config.task.codebook_weight * latent.loss, metrics
    # LDM sums over an image and weighs the KL by 1e-6; the mean over its values keeps that proportion.
    kl = latent.kl().mean() / values
    return config.task.kl_weight * kl, {"kl": kl, "latent_std": latent.mean.std()}


def _last_layer(model: AnyAutoencoder, params: Params, features: Array) -> Callable[[Array], Array]:
    """A gradient with respect to reconstructions -> that of the last convolution's kernel."""
    last = jax.lax.stop_gradient((params["decoder"]["conv_out"], features))
    _, pull = jax.vjp(
        lambda kernel: apply(Conv(3, dtype=model.dtype), {**last[0], "kernel": kernel}, last[1]), last[0]["kernel"]
    )
    return lambda gradient: pull(gradient.astype(model.dtype))[0]


def _images(config: Config, split: str) -> sources.Source:
    images = grain.MapDataset.source(open_images(config, split))
    return sources.CachedSource(images.map(transforms.Square(config.data.size, config.data.crop)))


def _nearly_noiseless(params: Params) -> Params:
    quant = params["quant_conv"]
    half = quant["bias"].shape[0] // 2
    kernel = quant["kernel"].at[..., half:].set(0.0)
    bias = quant["bias"].at[half:].set(FIRST_LOGVAR)
    return {**params, "quant_conv": {"kernel": kernel, "bias": bias}}


def random_crops(key: PRNGKeyArray, images: Array, size: int, grid: int) -> Array:
    """A square of each image, [b size size c], its corner on a grid of that many pixels."""
    if images.shape[1] == size:
        return images
    corners = grid * jax.random.randint(key, (len(images), 2), 0, (images.shape[1] - size) // grid + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, image.shape[-1]))

    return jax.vmap(crop)(images, corners)


def reconstruct(
    model: AnyAutoencoder, params: Tree, images: UInt8[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "b h w 3"]:
    """Images through the mean of their posterior and back, in [0, 1]."""
    return np.clip(np.asarray(_reconstruct(model, params, images)) / 2.0 + 0.5, 0.0, 1.0)


@jax.jit(static_argnums=0)
def _reconstruct(model: AnyAutoencoder, params: Params, images: Array) -> Array:
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    mean = apply(model, params, x, method="encode").mean
    return gathered(apply(model, params, mean, method="decode").astype(jnp.float32))


def latent_std(model: Autoencoder, params: Params, images: sources.Source, most: int = 1024) -> float:
    """The standard deviation of sampled latents over up to `most` images, evenly chosen (LDM's scale_by_std)."""
    chosen = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    moments = np.zeros(3)
    for start in range(0, len(chosen), 32):
        batch = np.stack([images[i]["image"] for i in chosen[start : start + 32]])
        latents = np.asarray(_sample_latents(model, params, batch, stream(0, "latent_std", start)), np.float64)
        moments += latents.size, latents.sum(), np.square(latents).sum()
    count, total, squares = moments
    return float(np.sqrt(squares / count - (total / count) ** 2))


@jax.jit(static_argnums=0)
def _sample_latents(model: Autoencoder, params: Params, images: Array, key: PRNGKeyArray) -> Array:
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
    return apply(model, params, x, method="encode").sample(key)
