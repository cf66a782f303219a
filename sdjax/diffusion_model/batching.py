"""Images that join and leave a batch between calls of the sampler's loop (continuous batching)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sdjax.core.compilation import jit
from sdjax.diffusion.samplers.scan import State
from sdjax.diffusion_model.model import DiffusionModel
from sdjax.diffusion_model.sampling import SamplingBatch


class Loop(NamedTuple):
    """All arrays of a loop, each with one or several rows an image.

    Attributes:
        batch: read by every call.
        state: of `sampling.sample`, which takes it and gives the next.
    """

    batch: SamplingBatch
    state: State


@jit
def take(loop: Loop, places: Int[Array, " b"]) -> Loop:
    """The images of some places, in a loop of as many."""
    size = len(loop.state.x)

    def taken(leaf: Array) -> Array:
        own = leaf.reshape(size, -1, *leaf.shape[1:])
        return own[places].reshape(-1, *leaf.shape[1:])

    return jax.tree.map(taken, loop)


@jit(static_argnames="model", donate_argnames="loop")
def join(model: DiffusionModel, loop: Loop, new: Loop, place: Int[Array, ""], row: Int[Array, ""]) -> Loop:
    """The loop with the first image of another in a place, whose table begins at that row of the loop.

    What each row of a table has is turned, so that all images count rows alike; `SamplerTable.index` keeps each row's
    noise as it was.
    """
    size, batch = len(loop.state.x), new.batch
    turned = batch._replace(
        tables=batch.tables._replace(
            **{
                name: jnp.roll(values, row, axis=1)
                for name, values in batch.tables._asdict().items()
                if name not in ("first_scale", "limits", "step")
            }
        ),
        columns=_turned_columns(model, batch.columns, row),
        noise=None if batch.noise is None else jnp.roll(batch.noise, row, axis=1),
        schedule=None
        if batch.schedule is None
        else batch.schedule._replace(places=jnp.roll(jnp.asarray(batch.schedule.places), row, axis=1)),
    )

    def joined(leaf: Array, other: Array) -> Array:
        own = leaf.reshape(size, -1, *leaf.shape[1:])
        first = other.reshape(len(new.state.x), *own.shape[1:])[0]
        return own.at[place].set(first).reshape(leaf.shape)

    return jax.tree.map(joined, loop, Loop(turned, new.state))


def _turned_columns(model: DiffusionModel, columns: Any, row: Int[Array, ""]) -> dict[str, Any]:
    changing = model.conditioner.traits.row_columns
    return {name: jnp.roll(c, row, axis=1) if name in changing else c for name, c in columns.items()}


def signature(loop: Loop) -> tuple[Any, ...]:
    """Structure, shapes and types of one image's arrays: loops with equal ones run the same programs."""
    leaves, structure = jax.tree.flatten(loop)
    size = len(loop.state.x)
    return structure, tuple((leaf.shape[0] // size, leaf.shape[1:], str(leaf.dtype)) for leaf in leaves)
