"""The one loop that runs every sampler, each image by a table of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdjax.diffusion.denoise import Denoise, parts, per_image
from sdjax.diffusion.guidance import dynamic_threshold, static_threshold
from sdjax.diffusion.samplers.table import HISTORY, SamplerTable

Between = Callable[[Float[Array, "b *space c"], Float[Array, " b"]], Float[Array, "b *space c"]]
"""between(x, sigma_next) -> x: applied after every row, e.g. to blend in the known part of an image."""

DenoiseAt = Callable[[Int[Array, ""]], Denoise]
"""denoise_at(number) -> the denoiser of a row, whose condition may be another than its neighbours'."""

_FIRST_NOISE = 2**31 - 1


class State(NamedTuple):
    """The carry of the loop; every array begins with the batch, so that images may join and leave between calls.

    Attributes:
        x: variance-exploding samples.
        anchor: where a step of several network calls began.
        kept: the last predictions, newest first.
        x0: the last denoised samples, for previews alone; zeros before the first row.
    """

    x: Float[Array, "b *space c"]
    anchor: Float[Array, "b *space c"]
    kept: Float[Array, "b k *space c"]
    x0: Float[Array, "b *space c"]


def first_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b *space c"]:
    """Standard normal noise of each image, of this shape, from its own key alone and apart from that of every row."""
    return _noise(keys, jnp.full(len(keys), _FIRST_NOISE, jnp.int32), shape)


def init_state(x: Float[Array, "b *space c"]) -> State:
    """The state before the first row, from x in variance-exploding coordinates."""
    x = x.astype(jnp.float32)
    # Buffers of its own for each: a state is donated.
    kept = jnp.zeros((len(x), HISTORY - 1, *x.shape[1:]), jnp.float32)
    return State(x, jnp.copy(x), kept, jnp.zeros_like(x))


def advance(
    denoise_at: DenoiseAt,
    tables: SamplerTable,
    state: State,
    keys: Key[Array, " b"],
    rows: tuple[Int[Array, ""] | int, Int[Array, ""] | int],
    between: Between | None = None,
    given: Float[Array, "b n *space c"] | None = None,
) -> State:
    """Run some rows of every image's table, in float32.

    The bounds are arguments of the compiled loop: all rows in one call or one row a call run the same program, and give
    the same images to the bit.

    Args:
        denoise_at: of every row, denoise(x, sigma [b], timestep [b]) -> x0, or (x0, v) with a learned variance, or
            `Guided`.
        tables, state: of `batched`, one table an image, and of `init_state` or an earlier call.
        keys: [b], one an image; noise is drawn from fold_in(key, index of the row), whatever the batch.
        rows: the first row and the one after the last.
        between: see `Between`; None for nothing.
        given: noise of each row in place of what the keys draw.
    """
    limits = tables.limits
    per_row = tables._replace(first_scale=None, limits=None)  # pyright: ignore[reportArgumentType]

    def body(number: Array, state: State) -> State:
        row = jax.tree.map(lambda values: values[:, number], per_row)
        noise = _noise(keys, row.index, state.x.shape[1:]) if given is None else given[:, number]
        after = _step(denoise_at(number), state, row, limits, noise)
        if between is not None:
            after = after._replace(x=between(after.x, row.sigma_next))
        # An image whose table has ended, or has not begun, waits for the others.
        return jax.tree.map(lambda new, old: jnp.where(per_image(row.active, new), new, old), after, state)

    return jax.lax.fori_loop(*rows, body, state)


def sample(
    denoise: Denoise,
    table: SamplerTable,
    x_init: Float[Array, "b *space c"],
    keys: Key[Array, " b"],
    between: Between | None = None,
    given: Float[Array, "b n *space c"] | None = None,
) -> Float[Array, "b *space c"]:
    """Run all rows of one table for every image; the result is a clean sample in the network's coordinates.

    Args:
        denoise: of all rows, as in `advance`.
        table: of `make_table`; its arrays may be traced.
        x_init: in variance-exploding coordinates: first_scale noise, or x0 + sigma[0] noise.
        keys, between, given: as in `advance`.
    """

    def rows(values: Array | np.ndarray) -> Array:
        on_device = jnp.asarray(values, jnp.float32 if values.dtype == np.float64 else values.dtype)
        return jnp.broadcast_to(on_device, (len(x_init), *values.shape))

    tables = jax.tree.map(rows, table._replace(step=None))
    bounds = 0, jnp.sum(table.active)
    return advance(lambda number: denoise, tables, init_state(x_init), keys, bounds, between, given).x


def _step(denoise: Denoise, state: State, row: SamplerTable, limits: Array | np.ndarray, noise: Array) -> State:
    # Each array of `row` holds one value an image: images at different levels share a network call.
    raw, v, gradient = parts(denoise(state.x, row.sigma, row.timestep))
    x0 = _limit(raw, limits)
    if gradient is not None:
        # DDIM's rule (ADM, algorithm 2) moves x0; where the row has a drift, algorithm 1 moves the mean below.
        by_score = jnp.where(row.drift > 0.0, 0.0, row.sigma**2 / jnp.sqrt(row.sigma**2 + 1.0))
        x0 = raw = x0 + per_image(by_score, x0) * gradient
    prediction = _weighted(row.record, (state.x, x0, raw))
    # A learned variance lies between the row's bounds (iDDPM, eq. 15); without one both are 0.
    low, high = (per_image(row.log_variance[:, i], x0) for i in (0, 1))
    log_variance = low + (v + 1.0) / 2.0 * (high - low)
    noise = noise * jnp.exp(0.5 * log_variance)
    terms = (state.x, state.anchor, prediction, *jnp.moveaxis(state.kept, 1, 0), noise)
    x, anchor = (_weighted(row.weights[:, i], terms) for i in (0, 1))
    if gradient is not None:
        x = x + per_image(row.drift, x) * jnp.exp(log_variance) * gradient
    pushed = jnp.concatenate([prediction[:, None], state.kept[:, :-1]], axis=1)
    return State(x, anchor, jnp.where(per_image(row.keep, pushed), pushed, state.kept), x0)


def _weighted(weights: Float[Array | np.ndarray, "b k"], terms: tuple[Array, ...]) -> Array:
    """Each image's own sum of terms; not a dot product, whose inputs accelerators would round."""
    return sum(per_image(weights[:, i], term) * term for i, term in enumerate(terms))  # pyright: ignore[reportReturnType]


def _limit(x0: Array, limits: Float[Array | np.ndarray, "b 3"]) -> Array:
    clip, ratio, greatest = (limits[:, i] for i in range(3))

    def dynamic(x0: Array) -> Array:
        return jnp.where(per_image(ratio > 0.0, x0), dynamic_threshold(x0, ratio, greatest), static_threshold(x0, clip))

    # The quantile sorts every image: only where some image asks for it.
    return jax.lax.cond(jnp.any(ratio > 0.0), dynamic, lambda x0: static_threshold(x0, clip), x0)


def _noise(keys: Key[Array, " b"], index: Int[Array, " b"], shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key, i: jax.random.normal(jax.random.fold_in(key, i), shape))(keys, index)
