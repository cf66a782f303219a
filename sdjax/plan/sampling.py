"""The stages of a pipeline's call as programs to compile: text encoders, the sampler's scan, the decoder."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdjax.core.errors import UserError
from sdjax.core.partition import BATCH, fitting
from sdjax.diffusion.samplers import SamplerOptions, Table, make_table, sampler_of, schedule_of
from sdjax.parallel.sharding import check_batch, replicated, shapes_on, tree_shardings
from sdjax.pipeline import stages
from sdjax.pipeline.devices import Devices
from sdjax.pipeline.request import GUIDANCE_SCALE, TILE
from sdjax.plan.programs import Program
from sdjax.plan.variants import Shaped
from sdjax.tasks.latent import Asked, Guidance, Start, System, Text

TOKENS = 77


class Wanted(NamedTuple):
    """What is sampled: pixels of a side, pictures of a batch, steps, and the sampler, None for the model's own."""

    size: int
    batch_size: int
    steps: int
    sampler: str | None = None


def sampling_programs(model: Shaped, wanted: Wanted, mesh: Mesh) -> list[Program]:
    """What `Pipeline` runs for one batch of prompts of one chunk, with guidance.

    Raises:
        UserError: the size is no multiple of the autoencoder's factor, or the mesh does not divide the batch.
    """
    system, factor = model.system, model.system.autoencoder.config.factor
    if wanted.size % factor:
        raise UserError(f"--size {wanted.size}: choose a multiple of {factor}")
    if wanted.batch_size != Devices(mesh).fewest:
        check_batch(wanted.batch_size, mesh, "batch_size")
    params = shapes_on(model.params, tree_shardings(model.params, mesh))
    encoders = [encoder.name for encoder in system.text_encoders]
    asked = _rows(_asked(system, wanted.batch_size), mesh)
    table = network_calls(model, wanted)
    text = _text(system)
    conditions = _rows(jax.eval_shape(text, params, asked)[0], mesh)
    latents = (wanted.batch_size, *(2 * (wanted.size // factor,)), system.autoencoder.config.latent_channels)
    start, keys = _rows((_start(latents), jax.eval_shape(_keys, np.arange(wanted.batch_size))), mesh)
    whole = shapes_on(_shapes((table, Guidance(np.float32(GUIDANCE_SCALE), np.float32(0)))), replicated(mesh))
    side, tiles = _tiles(latents[1], TILE // factor)
    tile = _rows(jax.ShapeDtypeStruct((latents[0], side, side, latents[3]), jnp.float32), mesh)
    others = {name: {k: v for k, v in params.items() if k not in kept} for name, kept in _stages(encoders).items()}
    return [
        Program("text encoders", text, (_only(params, encoders), asked), beside=others["text"]),
        Program(
            f"scan of {len(table.sigma)} network calls",
            _scan(system),
            (_only(params, ["unet"]), whole[0], conditions, whole[1], start, keys),
            beside=others["scan"],
        ),
        Program("decoder", _decode(system), (_only(params, ["vae"]), tile), beside=others["decode"], turns=tiles),
    ]


def network_calls(model: Shaped, wanted: Wanted) -> Table:
    """The sampler's table without the rows that only fill it up: no network is called in these."""
    sampler = wanted.sampler or sampler_of(model.scheduler)
    options = SamplerOptions.from_scheduler_config(model.scheduler, sampler)
    table = make_table(sampler, schedule_of(model.scheduler), wanted.steps, options)
    calls = int(table.active.sum())
    short = Table(*(values[:calls] if values.ndim and len(values) == len(table.active) else values for values in table))
    return Table(*(v if v.dtype == bool else v.astype(np.float32) for v in short))


def _stages(encoders: list[str]) -> dict[str, list[str]]:
    return {"text": encoders, "scan": ["unet"], "decode": ["vae"]}


def _text(system: System) -> Any:
    stage = inspect.unwrap(stages.text_stage)
    return lambda params, asked: stage(system, params, asked)


def _scan(system: System) -> Any:
    stage = inspect.unwrap(stages.sampling_stage)
    return lambda *args: stage(system, *args)


def _decode(system: System) -> Any:
    stage = inspect.unwrap(stages.decode_stage)
    return lambda params, latents: stage(system, params, latents)


def _asked(system: System, batch: int) -> Asked:
    ids, weights = (jax.ShapeDtypeStruct((batch, 1, TOKENS), kind) for kind in (jnp.int32, jnp.float32))
    text: Any = Text(*((each,) * len(system.text_encoders) for each in (ids, weights)))
    numbers: Any = jax.ShapeDtypeStruct((batch, system.numbers), jnp.float32) if system.numbers else None
    share: Any = jax.ShapeDtypeStruct((batch,), jnp.float32)
    return Asked(text, text, share, numbers, numbers)


def _start(latents: tuple[int, ...]) -> Start:
    x: Any = jax.ShapeDtypeStruct(latents, jnp.float32)
    mask: Any = jax.ShapeDtypeStruct((*latents[:-1], 1), jnp.float32)
    return Start(x, x, x, mask)


def _keys(indices: Any) -> Any:
    return jax.vmap(jax.random.key)(indices)


def _only(params: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: params[name] for name in names}


def _rows(tree: Any, mesh: Mesh) -> Any:
    """One row a picture, where `Devices.rows` puts it."""

    def on(leaf: Any) -> Any:
        spec = fitting(dict(mesh.shape), leaf.shape[:1], (BATCH,))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(on, tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _tiles(side: int, tile: int) -> tuple[int, int]:
    """The side of what is decoded at once, and how many times that is: tiles overlap by a quarter."""
    if side <= tile:
        return side, 1
    return tile, (len(range(0, side - tile, tile - tile // 4)) + 1) ** 2
