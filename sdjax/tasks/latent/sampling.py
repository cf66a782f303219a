"""Sampling by latent diffusion (LDM, section 3.3; Stable Diffusion): a UNet over an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sdjax.core.tree import Params
from sdjax.diffusion.denoise import Denoise, Network, make_denoise
from sdjax.diffusion.guidance import guided
from sdjax.diffusion.samplers import Table
from sdjax.diffusion.samplers import sample as run_sampler
from sdjax.models.apply import apply
from sdjax.models.conditioning import Cond
from sdjax.models.layers import guidance_embedding
from sdjax.tasks.latent.system import Diffuser


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


def encode_image(system: Diffuser, params: Params, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w z"]:
    """Scaled latents, the posterior's mean, of pictures in [-1, 1]."""
    return apply(system.autoencoder, params["vae"], images, method="encode").mean * system.scale


def decode(system: Diffuser, params: Params, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
    """Pictures in [0, 1] of scaled latents, in float32."""
    return jnp.clip(decode_unclipped(system, params, latents), 0.0, 1.0)


def decode_unclipped(system: Diffuser, params: Params, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
    """As `decode`, with what lies outside of [0, 1], infinities included."""
    images = apply(system.autoencoder, params["vae"], latents / system.scale, method="decode")
    return images.astype(jnp.float32) / 2.0 + 0.5


def denoise_latents(
    system: Diffuser,
    params: Params,
    table: Table,
    conditions: tuple[Cond, ...],
    guidance: Guidance,
    start: Start,
    keys: Key[Array, " b"],
    callback: Callable[[int], None] | None = None,
    noise: Float[Array, "b n h w z"] | None = None,
    steer: Callable[[Denoise], Denoise] | None = None,
) -> Float[Array, "b h w z"]:
    """Runs a sampler; the result is scaled latents, with noise where the table's last active row leaves some.

    Args:
        system: static.
        params: of the UNet at least.
        table: of `make_table`.
        conditions: of the prompts and of the negative prompts, the two halves of one batch; or of the prompts alone,
            and there is no guidance.
        guidance: may be traced.
        start: where to begin; the masked part is held to `start.known` at every level (diffusers' 4-channel rule).
        keys: [b], one an image.
        callback: called on the host after every network call.
        noise: of every row of the table, in place of what the keys draw.
        steer: changes the denoiser, e.g. guides it by a picture.
    """
    network = (_guided if len(conditions) > 1 else _unguided)(system, params, conditions, guidance)

    def keep_known(x: Array, sigma: Array, keys: Key[Array, " b"]) -> Array:
        del keys
        return start.mask * x + (1.0 - start.mask) * (start.known + sigma * start.noise)

    denoise = make_denoise(network, system.prediction)
    denoise = denoise if steer is None else steer(denoise)
    return run_sampler(denoise, table, start.x, keys, keep_known, callback, noise)


def _network(system: Diffuser, params: Params, cond: Cond) -> Network:
    return lambda x, t: apply(system.unet, params["unet"], x, t, cond)


def _unguided(system: Diffuser, params: Params, conditions: tuple[Cond, ...], guidance: Guidance) -> Network:
    """A network distilled to imitate guidance is told its scale (Luo et al. 2023, Latent Consistency Models)."""
    (cond,) = conditions
    width = getattr(system.unet.config, "guidance_dim", None)
    if width is not None and cond.context is not None:
        scale = jnp.broadcast_to(jnp.asarray(guidance.scale) - 1.0, len(cond.context))
        cond = cond._replace(guidance=guidance_embedding(scale, width))
    return _network(system, params, cond)


def _guided(system: Diffuser, params: Params, conditions: tuple[Cond, ...], guidance: Guidance) -> Network:
    # An image's two rows are neighbours, so that a device which holds the image makes both of them.
    network = _network(system, params, jax.tree.map(lambda *halves: _neighbours(jnp.stack(halves, 1)), *conditions))

    def pair(x: Array, t: Array) -> tuple[Array, Array]:
        made = network(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2))
        made = made.reshape(-1, 2, *made.shape[1:])
        return made[:, 0], made[:, 1]

    return guided(pair, guidance.scale, guidance.rescale)


def _neighbours(pairs: Array) -> Array:
    """[b 2 ...] to [2b ...]."""
    return pairs.reshape(-1, *pairs.shape[2:])
