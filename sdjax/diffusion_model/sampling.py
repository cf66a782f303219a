"""Compiled stages of sampling; `sample` is the only jitted root over a sampler's loop.

Whatever differs between two calls or two images of a batch (prompt, seed, guidance, sampler, schedule, strength, given
images) is an argument with one row an image, so that it compiles nothing. Each stage also answers whether all it
computed is finite.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sdjax.core.compilation import jit
from sdjax.core.prng import image_keys
from sdjax.core.tree import Params
from sdjax.diffusion.denoise import Denoise, make_denoise, per_image
from sdjax.diffusion.guidance import composed, guided
from sdjax.diffusion.samplers import SamplerTable, first_noise
from sdjax.diffusion.samplers.scan import DenoiseAt, State, advance, init_state
from sdjax.diffusion_model.conditioner import Columns
from sdjax.diffusion_model.model import DiffusionModel
from sdjax.models.conditioning import Cond
from sdjax.models.layers import guidance_embedding

Finite = Bool[Array, ""]
# Folded into an image's key for every model after the first (the refiner); larger than any row index, so that streams
# of noise cannot collide.
_LATER = 2**31 - 2
# The same for the draw from the posterior of an image that is encoded.
_ENCODED = 2**31 - 3


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


class ConditionSchedule(NamedTuple):
    """Conditions that change from row to row of the tables, of which a network call may take several.

    Attributes:
        places: [b n r] among an image's rows of `SamplingBatch.cond`, those that each row's call takes; with guidance
            the last one is the null condition.
        weights: [b r-1] of the conditions that are composed.
    """

    places: Int[Array | np.ndarray, "b n r"]
    weights: Float[Array | np.ndarray, "b m"]

    def at(self, number: Int[Array, ""], cond: Cond) -> Cond:
        """The conditions of one row's call, r an image."""

        def chosen(leaf: Array) -> Array:
            own = leaf.reshape(len(self.places), -1, *leaf.shape[1:])
            return jax.vmap(lambda rows, places: rows[places])(own, self.places[:, number]).reshape(-1, *leaf.shape[1:])

        return jax.tree.map(chosen, cond)


class SamplingBatch(NamedTuple):
    """All that a loop reads and does not change, one row an image.

    Attributes:
        tables: of `samplers.table.batched`.
        cond: of `condition`; with twice as many rows as images, an image's condition and its null are neighbours.
        columns: those that the conditioner reads at every step: see `Traits.step_columns`.
        guidance: see `Guidance`.
        keys: of the images.
        start: see `Start`.
        noise: of every row of the tables, in place of what the keys draw.
        schedule: of conditions, if they change from row to row; `cond` then has as many rows an image as it needs.
    """

    tables: SamplerTable
    cond: Cond
    columns: Columns
    guidance: Guidance
    keys: Key[Array, " b"]
    start: Start
    noise: Float[Array, "b n *space z"] | None = None
    schedule: ConditionSchedule | None = None


@jit(static_argnums=2)
def draw_noise(
    seeds: Int[Array, "b 2"], indices: Int[Array, " b"], shape: tuple[int, ...], part: Int[Array, ""]
) -> tuple[Key[Array, " b"], Float[Array, "b *space z"]]:
    """The key and the first noise of each image; models after the first, those of a higher `part`, have other keys.

    Seeds are as of `seed_words`.
    """
    keys = image_keys(seeds[:, 0], indices, seeds[:, 1])
    later = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, _LATER), part))(keys)
    keys = jnp.where(part > 0, later, keys)
    return keys, first_noise(keys, shape)


@jit(static_argnums=0)
def encode(
    model: DiffusionModel, params: Params, images: Float[Array, "b H W 3"]
) -> tuple[Float[Array, "b h w 2*z"], Finite]:
    """Mean and standard deviation of scaled latents of images in [-1, 1]."""
    moments = model.moments(params, images).astype(jnp.float32)
    return moments, all_finite(moments)


@jit
def draw_latents(
    moments: Float[Array, "b h w 2*z"],
    keys: Key[Array, " b"],
    stream: Int[Array, ""],
    noise: Float[Array, "b h w z"] | None = None,
) -> Float[Array, "b h w z"]:
    """Scaled latents drawn from the moments of `encode`: by `noise`, or by the images' own keys in a stream of them."""
    mean, std = jnp.split(moments, 2, axis=-1)
    if noise is None:
        own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, _ENCODED), stream))(keys)
        noise = first_noise(own, mean.shape[1:])
    return mean + std * noise


@jit(static_argnums=0)
def change_weights(model: DiffusionModel, params: Params, columns: Columns) -> dict[str, Array]:
    """Parameters by path that take the place of the model's own, by columns that all images of a batch share."""
    return model.conditioner.change_weights(params, columns)


@jit(static_argnums=0)
def encode_text(model: DiffusionModel, params: Params, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """States of texts that a conditioner encodes each by itself (see `Traits.text_columns`)."""
    return model.conditioner.encode_text(params, tokens)


@jit(static_argnames=("model", "guided", "scheduled"))
def condition(
    model: DiffusionModel,
    params: Params,
    columns: Columns,
    keys: Key[Array, " b"],
    guidance: Guidance,
    *,
    guided: bool,
    scheduled: bool = False,
) -> tuple[Cond, Columns, Finite]:
    """The batch's `Cond`, and the columns that the conditioner reads at every step.

    If `guided`, each image's conditional and null rows are interleaved and encoded in one forward pass, so that both
    stay on the device that holds the image. If `scheduled`, an image has several prompts, [b k ...] in the columns of
    `Traits.prompt_columns`, and as many times the rows.
    """
    conditioner = model.conditioner
    columns = {**columns, **conditioner.precompute(params, columns)}
    shown = {name: columns[name] for name in conditioner.traits.step_columns if name in columns}
    if scheduled:
        columns, keys, guidance = _by_prompt(conditioner.traits.prompt_columns, columns, keys, guidance)
    if guided:
        null = conditioner.null(columns)
        assert null is not None, "guidance needs a null condition"
        pairs = {name: jnp.stack([columns[name], null[name]], axis=1) for name in columns}
        pairs = {name: both.reshape(-1, *both.shape[2:]) for name, both in pairs.items()}
        columns, keys = pairs, jnp.repeat(keys, 2)
    cond = conditioner.cond(conditioner.adapt(params, columns), columns, keys)
    if model.config.guidance_dim is not None:
        # A network distilled to imitate guidance is conditioned on its scale (Luo et al. 2023, LCM).
        cond = cond._replace(guidance=guidance_embedding(jnp.asarray(guidance.scale) - 1.0, model.config.guidance_dim))
    return cond, shown, all_finite((cond, shown))


def _by_prompt(names: tuple[str, ...], columns: Columns, keys: Array, guidance: Guidance) -> tuple[Any, Any, Any]:
    """Columns, keys and guidance with a row for each prompt of an image."""
    each = next(columns[name].shape[1] for name in names)

    def repeated(values: Array | np.ndarray) -> Array:
        return jnp.repeat(jnp.asarray(values), each, axis=0)

    rows = {n: c.reshape(-1, *c.shape[2:]) if n in names else repeated(c) for n, c in columns.items()}
    return rows, repeated(keys), jax.tree.map(repeated, guidance)


@jit
def exchange(
    known: Float[Array, "b *space z"],
    noise: Float[Array, "b *space z"],
    mask: Float[Array, "b *space 1"],
    factor: Float[Array, " b"],
) -> Float[Array, "b *space z"]:
    """Latents with so much noise in their place where the mask is 1: A1111's masked content (modules/processing.py)."""
    return (1.0 - mask) * known + mask * per_image(factor, noise) * noise


@jit
def start_state(
    tables: SamplerTable, noise: Float[Array, "b *space z"], known: Float[Array, "b *space z"], fresh: Bool[Array, " b"]
) -> State:
    """The loop's first state: pure noise where `fresh`, else the known latents with noise up to the first level."""
    scale, sigma = per_image(tables.first_scale, noise), per_image(tables.sigma[:, 0], noise)
    return init_state(jnp.where(per_image(fresh, noise), scale * noise, known + sigma * noise))


@jit
def clean_state(tables: SamplerTable, state: State, start: Start) -> State:
    """The first state with the known part as it is at every step of a model that keeps it clean (`Traits`)."""
    return init_state(start.mask * state.x + (1.0 - start.mask) * _clean(start, per_image(tables.sigma[:, 0], state.x)))


def _clean(start: Start, sigma: Array) -> Array:
    """The known part without noise in the network's coordinates, which are not the state's."""
    return start.known * jnp.sqrt(sigma**2 + 1.0)


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
    start, keeps_clean = batch.start, model.conditioner.traits.keeps_clean

    def keep_known(x: Array, sigma: Array) -> Array:
        sigma = per_image(sigma, x)
        known = _clean(start, sigma) if keeps_clean else start.known + sigma * start.noise
        return start.mask * x + (1.0 - start.mask) * known

    denoise_at = _denoiser(model, params, batch, len(state.x))
    state = advance(denoise_at, batch.tables, state, batch.keys, (first, last), keep_known, batch.noise)
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


def _denoiser(model: DiffusionModel, params: Params, batch: SamplingBatch, images: int) -> DenoiseAt:
    schedule, changing = batch.schedule, model.conditioner.traits.row_columns
    pairs = {len(leaf) for leaf in jax.tree.leaves(batch.cond)} == {2 * images}
    rows = (2 if pairs else 1) if schedule is None else schedule.places.shape[-1]

    def denoise_at(number: Array) -> Denoise:
        columns = {name: c[:, number] if name in changing else c for name, c in batch.columns.items()}
        cond = batch.cond if schedule is None else schedule.at(number, batch.cond)
        return _conditioned(model, params, batch._replace(cond=cond, columns=columns), rows)

    return denoise_at


def _conditioned(model: DiffusionModel, params: Params, batch: SamplingBatch, rows: int) -> Denoise:
    """The denoiser under `batch.cond`, which has so many rows an image: more than one are guided."""

    adapted = model.conditioner.adapt(params, batch.columns)
    wrapped = model.conditioner.wrap(adapted, batch.columns, model.network(adapted))

    def network(x: Array, t: Array) -> Array:
        return wrapped(x, t, batch.cond)

    def pair(x: Array, t: Array) -> tuple[Array, Array]:
        made = network(jnp.repeat(x, rows, axis=0), jnp.repeat(t, rows))
        made = made.reshape(-1, rows, *made.shape[1:])
        if rows == 2:
            return made[:, 0], made[:, 1]
        assert batch.schedule is not None, "several conditions have weights"
        return composed(made[:, :-1], made[:, -1], batch.schedule.weights), made[:, -1]

    acting = guided(pair, *batch.guidance) if rows > 1 else network
    denoise = make_denoise(acting, model.parameterization)
    return model.conditioner.steer(params, batch.columns, denoise, model.decode)
