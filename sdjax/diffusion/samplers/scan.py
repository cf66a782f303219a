"""The one loop that runs every sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdjax.diffusion.denoise import Denoise, parts
from sdjax.diffusion.guidance import dynamic_threshold, static_threshold
from sdjax.diffusion.samplers.table import HISTORY, Table

Between = Callable[[Float[Array, "b h w c"], Float[Array, ""], Key[Array, " b"]], Float[Array, "b h w c"]]
"""between(x, sigma_next, keys) -> x: applied after every row, e.g. to blend in the known part of a picture."""

_FIRST_NOISE = 2**31 - 1


class _State(NamedTuple):
    x: Array
    anchor: Array
    kept: Array  # [K - 1, b, h, w, c] newest first


def first_noise(keys: Key[Array, " b"], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """Standard normal noise of each image, from its own key alone and apart from that of every row.

    Args:
        keys: [b].
        shape: (h, w, c).
    """
    return _noise(keys, _FIRST_NOISE, shape)


def sample(
    denoise: Denoise,
    table: Table,
    x_init: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    between: Between | None = None,
    callback: Callable[[int], None] | None = None,
    given: Float[Array, "b n h w c"] | None = None,
) -> Float[Array, "b h w c"]:
    """Runs a sampler's rows, in float32; the result is a clean sample in the network's coordinates.

    Args:
        denoise: denoise(x, sigma, timestep) -> x0, or (x0, v) with a learned variance, or `Drawn` by a guide.
        table: of `make_table`; its arrays may be traced.
        x_init: in variance-exploding coordinates: first_scale noise, or x0 + sigma[0] noise.
        keys: [b], one an image; the noise of row i is drawn from fold_in(key, i), whatever the batch.
        between: see `Between`; None for nothing.
        callback: called on the host with each row's number once it has run, in no certain order.
        given: the noise of each row, n of them as the table has, in place of what the keys draw.
    """
    table = jax.tree.map(_to_device, table)
    limits = jnp.asarray(table.limits)
    x_init = x_init.astype(jnp.float32)
    state = _State(x_init, x_init, jnp.zeros((HISTORY - 1, *x_init.shape), jnp.float32))
    per_row = table._replace(first_scale=None, limits=None)  # pyright: ignore[reportArgumentType]

    def active(state: _State, row: Table, index: Int[Array, ""]) -> _State:
        noise = _noise(keys, index, x_init.shape[1:]) if given is None else given[:, index]
        state = _step(denoise, state, row, limits, noise)
        if between is not None:
            state = state._replace(x=between(state.x, jnp.asarray(row.sigma_next), keys))
        if callback is not None:
            jax.debug.callback(callback, index)
        return state

    def body(state: _State, scanned: tuple[Table, Int[Array, ""]]) -> tuple[_State, None]:
        row, index = scanned
        return jax.lax.cond(row.active, active, lambda state, row, index: state, state, row, index), None

    state, _ = jax.lax.scan(body, state, (per_row, jnp.arange(table.sigma.shape[0])))
    return state.x


def _step(denoise: Denoise, state: _State, row: Table, limits: Array, noise: Array) -> _State:
    raw, v, gradient = parts(denoise(state.x, row.sigma, row.timestep))
    x0 = _limit(raw, limits)
    if gradient is not None:
        by_score = jnp.where(row.drift > 0.0, 0.0, row.sigma**2 / jnp.sqrt(row.sigma**2 + 1.0))
        x0 = raw = x0 + by_score * gradient
    prediction = row.record[0] * state.x + row.record[1] * x0 + row.record[2] * raw
    fraction = (v + 1.0) / 2.0
    log_variance = fraction * row.log_variance[1] + (1.0 - fraction) * row.log_variance[0]
    noise = noise * jnp.exp(0.5 * log_variance)
    terms = jnp.concatenate([jnp.stack([state.x, state.anchor, prediction]), state.kept, noise[None]])
    # Not a dot product: accelerators would round its inputs.
    x, anchor = (jnp.sum(weights.reshape(-1, 1, 1, 1, 1) * terms, axis=0) for weights in row.weights)
    if gradient is not None:
        x = x + row.drift * jnp.exp(log_variance) * gradient
    kept = jnp.where(row.keep, jnp.concatenate([prediction[None], state.kept[:-1]]), state.kept)
    return _State(x, anchor, kept)


def _limit(x0: Array, limits: Array) -> Array:
    clip, ratio, greatest = limits
    return jax.lax.cond(
        ratio > 0.0,
        lambda x0: dynamic_threshold(x0, ratio, greatest),
        lambda x0: static_threshold(x0, clip),
        x0,
    )


def _to_device(values: Array | np.ndarray) -> Array:
    return jnp.asarray(values, values.dtype if values.dtype == bool else jnp.float32)


def _noise(keys: Key[Array, " b"], index: int | Int[Array, ""], shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)
