"""Compiled stages of sampling; `sample` is the only jitted root over a sampler's loop.

Whatever differs between two calls or two images of a batch (prompt, seed, guidance, sampler, schedule, strength, given
images) is an argument with one row an image, so that it compiles nothing. Each stage also answers whether all it
computed is finite.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sdjax.core.compilation import jit
from sdjax.core.prng import image_keys
from sdjax.core.tree import Params
from sdjax.diffusion.denoise import Denoise, make_denoise, per_image
from sdjax.diffusion.guidance import guided
from sdjax.diffusion.samplers import SamplerTable, first_noise
from sdjax.diffusion.samplers.scan import State, advance, init_state
from sdjax.diffusion_model.conditioner import Columns
from sdjax.diffusion_model.model import BACKBONE, DiffusionModel
from sdjax.models.conditioning import Cond, apply
from sdjax.models.layers import guidance_embedding

Finite = Bool[Array, ""]
# Folded into an image's key for every model after the first (the refiner); larger than any row index, so that streams
# of noise cannot collide.
_LATER = 2**31 - 2


class Guidance(NamedTuple):
    """Classifier-free guidance, one value an image.

    Attributes:
        scale: 1 for none.
        rescale: phi of Lin et al. 2024; 0 for none.
    """

    scale: Float[Array | np.ndarray, " b"]
    rescale: Float[Array | np.ndarray, " b"]


class Start(NamedTuple):
    """The known part of an image, which masked sampling holds to the level of every row.

    Attributes:
        known: scaled latents of a given image; zeros where there is none.
        noise: standard normal noise that takes `known` to a level.
        mask: [b *space 1], 1 where the image is made anew; all ones where nothing is kept.
    """

    known: Float[Array, "b *space z"]
    noise: Float[Array, "b *space z"]
    mask: Float[Array, "b *space 1"]


class SamplingBatch(NamedTuple):
    """All that a loop reads and does not change, one row an image.

    Attributes:
        tables: of `samplers.table.batched`.
        cond: of `condition`; with twice as many rows as images, an image's condition and its null are neighbours.
        columns: those that the conditioner reads at every step.
        guidance: see `Guidance`.
        keys: of the images.
        start: see `Start`.
        noise: of every row of the tables, in place of what the keys draw.
    """

    tables: SamplerTable
    cond: Cond
    columns: Columns
    guidance: Guidance
    keys: Key[Array, " b"]
    start: Start
    noise: Float[Array, "b n *space z"] | None = None


@jit(static_argnums=2)
def draw_noise(
    seeds: Int[Array, " b"], indices: Int[Array, " b"], shape: tuple[int, ...], part: Int[Array, ""]
) -> tuple[Key[Array, " b"], Float[Array, "b *space z"]]:
    """The key and the first noise of each image; models after the first, those of a higher `part`, have other keys."""
    keys = image_keys(seeds, indices)
    later = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, _LATER), part))(keys)
    keys = jnp.where(part > 0, later, keys)
    return keys, first_noise(keys, shape)


@jit(static_argnums=0)
def encode(
    model: DiffusionModel, params: Params, images: Float[Array, "b H W 3"]
) -> tuple[Float[Array, "b h w z"], Finite]:
    """Scaled latents of images in [-1, 1]."""
    latents = model.encode(params, images).astype(jnp.float32)
    return latents, all_finite(latents)


@jit(static_argnames=("model", "guided"))
def condition(
    model: DiffusionModel, params: Params, columns: Columns, keys: Key[Array, " b"], guidance: Guidance, *, guided: bool
) -> tuple[Cond, Finite]:
    """The batch's `Cond`.

    If `guided`, each image's conditional and null rows are interleaved and encoded in one forward pass, so that both
    stay on the device that holds the image.
    """
    conditioner = model.conditioner
    if guided:
        null = conditioner.null(columns)
        assert null is not None, "guidance needs a null condition"
        pairs = {name: jnp.stack([columns[name], null[name]], axis=1) for name in columns}
        pairs = {name: both.reshape(-1, *both.shape[2:]) for name, both in pairs.items()}
        cond = conditioner.cond(params, pairs, jnp.repeat(keys, 2))
    else:
        cond = conditioner.cond(params, columns, keys)
    if model.config.guidance_dim is not None:
        # A network distilled to imitate guidance is conditioned on its scale (Luo et al. 2023, LCM).
        cond = cond._replace(guidance=guidance_embedding(jnp.asarray(guidance.scale) - 1.0, model.config.guidance_dim))
    return cond, all_finite(cond)


@jit
def start_state(
    tables: SamplerTable, noise: Float[Array, "b *space z"], known: Float[Array, "b *space z"], fresh: Bool[Array, " b"]
) -> State:
    """The loop's first state: pure noise where `fresh`, else the known latents with noise up to the first level."""
    scale, sigma = per_image(tables.first_scale, noise), per_image(tables.sigma[:, 0], noise)
    return init_state(jnp.where(per_image(fresh, noise), scale * noise, known + sigma * noise))


@jit(static_argnames="model", donate_argnames="state")
def sample(
    model: DiffusionModel,
    params: Params,
    batch: SamplingBatch,
    state: State,
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> tuple[State, Finite]:
    """Run rows `first` to `last` - 1 of every image's table: the only sampling root.

    All rows in one call or one row a call run the same program, so that a caller may cancel, show progress, and let
    images join or leave between calls, without a bit of a difference.

    Args:
        state: of `start_state` or an earlier call; donated.

    Returns:
        The next state; after all rows `x` is scaled latents, with noise where the table's last row leaves some.
    """
    start = batch.start

    def keep_known(x: Array, sigma: Array) -> Array:
        return start.mask * x + (1.0 - start.mask) * (start.known + per_image(sigma, x) * start.noise)

    denoise = _denoiser(model, params, batch, len(state.x))
    state = advance(denoise, batch.tables, state, batch.keys, (first, last), keep_known, batch.noise)
    return state, all_finite(state.x)


@jit(static_argnums=0)
def decode(
    model: DiffusionModel, params: Params, latents: Float[Array, "b h w z"]
) -> tuple[Float[Array, "b H W 3"], Finite]:
    """Images in [0, 1] of scaled latents."""
    images = model.decode(params, latents)
    return jnp.clip(images, 0.0, 1.0), all_finite(images)


def all_finite(tree: object) -> Finite:
    """True if no array of a tree holds NaN or an infinity."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


def _denoiser(model: DiffusionModel, params: Params, batch: SamplingBatch, images: int) -> Denoise:
    pairs = {len(leaf) for leaf in jax.tree.leaves(batch.cond)} == {2 * images}

    def backbone(x: Array, t: Array) -> Array:
        return apply(model.backbone, params[BACKBONE], x, t, batch.cond)

    network = model.conditioner.wrap(params, batch.columns, backbone)

    def pair(x: Array, t: Array) -> tuple[Array, Array]:
        made = network(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2))
        made = made.reshape(-1, 2, *made.shape[1:])
        return made[:, 0], made[:, 1]

    acting = guided(pair, *batch.guidance) if pairs else network
    denoise = make_denoise(acting, model.parameterization)
    return model.conditioner.steer(params, batch.columns, denoise, model.decode)
