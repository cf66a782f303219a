"""Text to image by latent diffusion (LDM, section 3.3; Stable Diffusion): CLIP tokens condition a UNet over latents.

`System` and the functions over it are what the pipeline calls; `make` trains a UNet, and its text encoder if the config
says so, over the latents of a finished autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sdjax.diffusion.denoise import make_denoise
from sdjax.diffusion.guidance import guided
from sdjax.diffusion.samplers import Table
from sdjax.diffusion.samplers import sample as run_sampler
from sdjax.models.autoencoder import Autoencoder
from sdjax.models.clip import CLIPText
from sdjax.models.conditioning import Cond
from sdjax.models.unet import UNet
from sdjax.tasks.base import apply
from sdjax.training.task import Params


class System(NamedTuple):
    """The networks of a latent diffusion model, without their parameters; hashable, so it may be a static argument.

    Attributes:
        unet, autoencoder, text_encoder: the modules; their parameters are "unet", "vae" and "text_encoder".
        prediction: what the UNet predicts, as diffusers names it.
    """

    unet: UNet
    autoencoder: Autoencoder
    text_encoder: CLIPText
    prediction: str

    @property
    def scale(self) -> float:
        """Latents are multiplied by it before they are diffused, to have unit variance."""
        return self.autoencoder.config.scaling_factor


class Guidance(NamedTuple):
    """How strongly a prompt steers; both may be traced.

    Attributes:
        scale: of classifier-free guidance; 1 for none.
        rescale: phi of Lin et al. 2024; 0 for none.
    """

    scale: Float[Array, ""] | float
    rescale: Float[Array, ""] | float = 0.0


class Start(NamedTuple):
    """Where sampling begins, and what it must keep.

    Attributes:
        x: variance-exploding latents at the table's first level.
        known: scaled latents of a given picture; zeros where there is none.
        noise: the standard normal noise that takes `known` to a level.
        mask: [b h w 1], 1 where the picture is to be made anew; all ones where nothing is kept.
    """

    x: Float[Array, "b h w z"]
    known: Float[Array, "b h w z"]
    noise: Float[Array, "b h w z"]
    mask: Float[Array, "b h w 1"]


def encode_text(system: System, params: Params, tokens: Int[Array, "b l"]) -> Cond:
    """What the UNet is told of prompts."""
    output = apply(system.text_encoder, params["text_encoder"], tokens)
    return Cond(context=output.last)


def encode_image(system: System, params: Params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w z"]:
    """Scaled latents, the posterior's mean, of pictures in [-1, 1]."""
    return apply(system.autoencoder, params["vae"], images, method="encode").mean * system.scale


def decode(system: System, params: Params, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
    """Pictures in [0, 1] of unscaled latents, in float32."""
    return jnp.clip(decode_unclipped(system, params, latents), 0.0, 1.0)


def decode_unclipped(system: System, params: Params, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
    """As `decode`, with what lies outside of [0, 1], infinities included."""
    images = apply(system.autoencoder, params["vae"], latents, method="decode")
    return images.astype(jnp.float32) / 2.0 + 0.5


def denoise_latents(
    system: System,
    params: Params,
    table: Table,
    conditions: tuple[Cond, Cond],
    guidance: Guidance,
    start: Start,
    keys: Key[Array, " b"],
    callback: Callable[[int], None] | None = None,
) -> Float[Array, "b h w z"]:
    """Runs a sampler; the result is unscaled latents.

    Args:
        system: static.
        params: of the UNet at least.
        table: of `make_table`.
        conditions: of the prompts and of the negative prompts; the two halves of one batch.
        guidance: may be traced.
        start: where to begin; the masked part is held to `start.known` at every level (diffusers' 4-channel rule).
        keys: [b], one an image.
        callback: called on the host after every network call.
    """
    both = jax.tree.map(lambda cond, uncond: jnp.concatenate([cond, uncond]), *conditions)

    def pair(x: Array, t: Array) -> tuple[Array, Array]:
        output = apply(system.unet, params["unet"], jnp.tile(x, (2, 1, 1, 1)), jnp.tile(t, 2), both)
        cond, uncond = jnp.split(output, 2)
        return cond, uncond

    def keep_known(x: Array, sigma: Array, keys: Key[Array, " b"]) -> Array:
        del keys
        return start.mask * x + (1.0 - start.mask) * (start.known + sigma * start.noise)

    denoise = make_denoise(guided(pair, guidance.scale, guidance.rescale), system.prediction)
    return run_sampler(denoise, table, start.x, keys, keep_known, callback) / system.scale
