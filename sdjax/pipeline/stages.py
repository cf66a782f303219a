"""The compiled stages of a call. Each also answers whether all it computed is finite.

Whatever a user changes between two calls (prompts, seed, guidance, sampler, schedule, strength, pictures) is an
argument of these functions, so that it compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sdjax.core.compilation import jit
from sdjax.core.prng import image_keys
from sdjax.core.tree import Params
from sdjax.diffusion.loss import q_sample
from sdjax.diffusion.samplers import Table, first_noise
from sdjax.models.conditioning import Cond
from sdjax.tasks.latent import (
    Asked,
    Guidance,
    Start,
    System,
    conditions,
    decode_unclipped,
    denoise_latents,
    encode_image,
)

Finite = Bool[Array, ""]
LATER = 2**31 - 2  # what an image's key is folded with for the steps of a refiner, beyond the number of any row
LOW_RESOLUTION = 1  # what an image's key is folded with for the noise of its low-resolution picture
_listeners: list[Callable[[int], None]] = []


@jit(static_argnames=("system", "clip_skip"))
def text_stage(system: System, params: Params, asked: Asked, clip_skip: int = 0) -> tuple[tuple[Cond, Cond], Finite]:
    """The conditions of prompts and of negative prompts, through the text encoders as one batch."""
    halves = conditions(system, params, asked, clip_skip)
    return halves, all_finite(halves)


@jit(static_argnums=0)
def image_stage(
    system: System, params: Params, images: Float[Array, "b H W 3"]
) -> tuple[Float[Array, "b h w z"], Finite]:
    """Scaled latents of pictures in [-1, 1]."""
    latents = encode_image(system, params, images).astype(jnp.float32)
    return latents, all_finite(latents)


@jit(static_argnums=2)
def noise_stage(
    seed: Int[Array, ""], indices: Int[Array, " b"], shape: tuple[int, int, int], part: Int[Array, ""]
) -> tuple[Key[Array, " b"], Float[Array, "b h w z"]]:
    """The key and the first noise of each image; models after the first, those of a higher `part`, have other keys."""
    keys = image_keys(seed, indices)
    later = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, LATER), part))(keys)
    return jnp.where(part > 0, later, keys), first_noise(keys, shape)


@jit(static_argnames=("system", "watched"))
def sampling_stage(
    system: System,
    params: Params,
    table: Table,
    conditions: tuple[Cond, ...],
    guidance: Guidance,
    start: Start,
    keys: Key[Array, " b"],
    noise: Float[Array, "b n h w z"] | None = None,
    *,
    watched: bool = False,
) -> tuple[Float[Array, "b h w z"], Finite]:
    """Scaled latents; with `watched`, every row's number is told to whoever listens (see `listening`)."""
    callback = _tell if watched else None
    latents = denoise_latents(system, params, table, conditions, guidance, start, keys, callback, noise)
    return latents, all_finite(latents)


@jit
def low_resolution_stage(
    keys: Key[Array, " b"], pictures: Float[Array, "b h w 3"], abar: Float[Array, ""], noise: Array | None
) -> Float[Array, "b h w 3"]:
    """An upscaler's picture with noise, its own where none is given (SD 2's x4 upscaler; Ho et al. 2022)."""
    if noise is None:
        own = jax.vmap(lambda key: jax.random.fold_in(key, LOW_RESOLUTION))(keys)
        _, h, w, c = pictures.shape
        noise = first_noise(own, (h, w, c))
    return q_sample(pictures, noise, jnp.broadcast_to(abar, len(pictures)))


@jit
def start_stage(
    table: Table, noise: Float[Array, "b h w z"], known: Float[Array, "b h w z"], mask: Array, fresh: Float[Array, ""]
) -> Start:
    """Pure noise where `fresh` is 1; where it is 0, the known latents with noise up to the table's first level."""
    scale, sigma = jnp.asarray(table.first_scale), jnp.asarray(table.sigma[0])
    x = fresh * scale * noise + (1.0 - fresh) * (known + sigma * noise)
    return Start(x, known, noise, mask)


@jit(static_argnums=0)
def decode_stage(
    system: System, params: Params, latents: Float[Array, "b h w z"]
) -> tuple[Float[Array, "b H W 3"], Finite]:
    """Pictures in [0, 1] of scaled latents."""
    images = decode_unclipped(system, params, latents)
    return jnp.clip(images, 0.0, 1.0), all_finite(images)


def all_finite(tree: object) -> Finite:
    """Whether no array of a tree holds NaN or an infinity."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def rows_of(table: Table) -> int:
    """How many network calls a table makes."""
    return int(np.sum(table.active))


def first_bad_row(finite_after: Callable[[Table], bool], table: Table) -> int:
    """The row after which a run is no longer finite, by bisection: the same compiled scan with fewer active rows."""
    good, bad = 0, rows_of(table)
    while bad - good > 1:
        middle = (good + bad) // 2
        shorter = table._replace(active=np.arange(len(table.active)) < middle)
        good, bad = (middle, bad) if finite_after(shorter) else (good, middle)
    return good


@contextmanager
def listening(listener: Callable[[int], None] | None) -> Iterator[None]:
    """Calls `listener` with the number of each row that has run, while the context is open."""
    if listener is None:
        yield
        return
    _listeners.append(listener)
    try:
        yield
        jax.effects_barrier()
    finally:
        _listeners.remove(listener)


def _tell(row: Any) -> None:
    # One function for all calls: a compiled scan holds the function it was traced with.
    for listener in tuple(_listeners):
        listener(int(row))
