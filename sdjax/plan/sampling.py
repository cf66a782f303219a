"""The stages of a pipeline's call as programs to compile: text encoders, the sampler's scan, the decoder."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sdjax.core.errors import UserError
from sdjax.diffusion.samplers import SamplerTable, batched, network_calls, table_for
from sdjax.diffusion_model import sampling
from sdjax.diffusion_model.conditioners.text import TextConditioner
from sdjax.diffusion_model.model import DiffusionModel
from sdjax.diffusion_model.sampling import Guidance, SamplingBatch, Start
from sdjax.ops.partition import BATCH, fitting
from sdjax.parallel.sharding import check_batch
from sdjax.parallel.trees import shapes_on, tree_shardings
from sdjax.pipeline.devices import Devices
from sdjax.pipeline.prepare import TILE
from sdjax.plan.programs import Program
from sdjax.plan.variants import Shaped

TOKENS = 77


class Wanted(NamedTuple):
    """A sampling job: pixels of a side, images of a batch, steps, and the sampler, None for the model's own."""

    size: int
    batch_size: int
    steps: int
    sampler: str | None = None


def sampling_programs(model: Shaped, wanted: Wanted, mesh: Mesh) -> list[Program]:
    """Programs that `Pipeline` runs for one batch of prompts of one chunk, with guidance.

    Raises:
        UserError: the size is no multiple of the autoencoder's factor, or the mesh does not divide the batch.
    """
    networks, factor = model.model, model.model.factor
    if wanted.size % factor:
        raise UserError(f"--size {wanted.size}: choose a multiple of {factor}")
    batch = wanted.batch_size
    if batch != Devices(mesh).min_batch:
        check_batch(batch, mesh, "batch_size")
    params = shapes_on(model.params, tree_shardings(model.params, mesh))
    conditioner = _text_conditioner(networks)
    encoders = [encoder.name for encoder in conditioner.encoders]
    columns, guidance = _rows(_columns(conditioner, batch), mesh), _rows(Guidance(*[_floats(batch)] * 2), mesh)
    keys = _rows(jax.eval_shape(_keys, np.arange(batch)), mesh)
    condition = _condition(networks)
    cond = _rows(jax.eval_shape(condition, params, columns, keys, guidance)[0], mesh)
    latents = (batch, *networks.latent_shape((wanted.size, wanted.size)))
    tables = batched([sampler_rows(model, wanted)] * batch)
    x, mask = _floats(*latents), _floats(*latents[:-1], 1)
    fixed = _rows(SamplingBatch(_shapes(tables), cond, {}, guidance, keys, Start(x, x, mask)), mesh)
    state = _rows(jax.eval_shape(sampling.init_state, x), mesh)
    calls = tables.sigma.shape[1]
    side, tiles = _tiles(latents[1], TILE // factor)
    tile = _rows(_floats(batch, side, side, latents[3]), mesh)
    others = {name: {k: v for k, v in params.items() if k not in kept} for name, kept in _stages(encoders).items()}
    return [
        Program("text encoders", condition, (_only(params, encoders), columns, keys, guidance), beside=others["text"]),
        Program(
            f"scan of {calls} network calls",
            _loop(networks, calls),
            (_only(params, ["unet"]), fixed, state),
            donated=(2,),
            beside=others["scan"],
        ),
        Program("decoder", _decode(networks), (_only(params, ["vae"]), tile), beside=others["decode"], turns=tiles),
    ]


def sampler_rows(model: Shaped, wanted: Wanted) -> SamplerTable:
    """The sampler's table without the rows that only fill it up: no network is called in these."""
    table = table_for(model.scheduler, wanted.sampler, wanted.steps)
    calls = network_calls(table)
    return jax.tree.map(lambda v: v[:calls] if v.ndim and len(v) == len(table.active) else v, table)


def _stages(encoders: list[str]) -> dict[str, list[str]]:
    return {"text": encoders, "scan": ["unet"], "decode": ["vae"]}


def _text_conditioner(model: DiffusionModel) -> TextConditioner:
    parts: Any = getattr(model.conditioner, "parts", (model.conditioner,))
    return next(part for part in parts if isinstance(part, TextConditioner))


def _condition(model: DiffusionModel) -> Any:
    stage = inspect.unwrap(sampling.condition)
    return lambda params, columns, keys, guidance: stage(model, params, columns, keys, guidance, guided=True)


def _loop(model: DiffusionModel, calls: int) -> Any:
    """The loop with bounds that are no arguments, so that its turns are known."""
    stage = inspect.unwrap(sampling.sample)
    return lambda params, batch, state: stage(model, params, batch, state, 0, calls)


def _decode(model: DiffusionModel) -> Any:
    stage = inspect.unwrap(sampling.decode)
    return lambda params, latents: stage(model, params, latents)


def _columns(conditioner: TextConditioner, batch: int) -> dict[str, Any]:
    encoders = len(conditioner.encoders)
    columns: dict[str, Any] = {"clip_skip": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    for prefix in ("", "negative_"):
        columns[f"{prefix}ids"] = jax.ShapeDtypeStruct((batch, encoders, 1, TOKENS), jnp.int32)
        columns[f"{prefix}weights"] = _floats(batch, encoders, 1, TOKENS)
        columns[f"{prefix}keep"] = _floats(batch)
        if conditioner.numbers:
            columns[f"{prefix}numbers"] = _floats(batch, conditioner.numbers)
    return columns


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _keys(indices: Any) -> Any:
    return jax.vmap(jax.random.key)(indices)


def _only(params: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: params[name] for name in names}


def _rows(tree: Any, mesh: Mesh) -> Any:
    """One row an image, where `Devices.shard_batch` puts it."""

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
