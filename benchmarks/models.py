"""Pipelines to time: a checkpoint's, or one of random weights in a published configuration."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sdjax
from sdjax.checkpoints.checkpoint import FORMATS, Checkpoint, Component, tokenizers_of
from sdjax.checkpoints.families import FAMILIES, scheduler_config
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Tree, flatten, unflatten
from sdjax.diffusion_model.model import build_model
from sdjax.models import autoencoder
from sdjax.parallel.sharding import sharded_put
from sdjax.pipeline.pipeline import Pipeline
from sdjax.plan import variants
from sdjax.training.task import DevicePut

NOISE = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)


VARIANTS = {"sd15": variants.VARIANTS["sd1"], "sd2": variants.VARIANTS["sd2"], "sdxl": variants.VARIANTS["sdxl"]}


def load(checkpoint: str | None, variant: str | None, dtype: str, mesh: Mesh | None = None) -> Pipeline:
    """The pipeline that the flags ask for, spread over a mesh where there is one.

    Raises:
        UserError: not exactly one of both is given, or there is no such checkpoint, variant or dtype.
    """
    if (checkpoint is None) == (variant is None):
        raise UserError("give either --checkpoint or --variant")
    if checkpoint is not None:
        return sdjax.load(checkpoint, dtype, mesh)
    return random_pipeline(variant or "", dtype, mesh)


def random_pipeline(name: str, dtype: str, mesh: Mesh | None = None) -> Pipeline:
    """Random weights of unit gain in the real configuration; the autoencoder's in float32, as `sdjax.load` has it.

    Raises:
        UserError: there is no such variant or dtype.
    """
    if name not in VARIANTS:
        raise unknown("variant", name, VARIANTS, "--variant")
    variant, place = VARIANTS[name], _alone if mesh is None else sharded_put(mesh)

    def component(part: str, config: Any, kind: str, extra: dict[str, Any] | None = None) -> Component:
        shapes = FORMATS[part].shapes(config)
        typed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype_named(kind)), shapes)
        return Component(config, random_params(typed, place), extra or {})

    size = FAMILIES[variant.family].size // autoencoder.VARIANTS[variant.vae].factor
    extra = {"unet": {"sample_size": size}}
    parts = {
        part: component(part, config, "float32" if part == "vae" else dtype, extra.get(part))
        for part, config in variant.configs.items()
    }
    scheduler = scheduler_config(variant.family, "epsilon", ())
    checkpoint = Checkpoint(components=parts, scheduler=scheduler, tokenizers=variant.tokenizers)
    tokenizers = dict(zip(variant.tokenizers, tokenizers_of(checkpoint), strict=True))
    model = build_model(checkpoint, tokenizers, dtype_named(dtype), name)
    return Pipeline(name, checkpoint, model, tokenizers, dtype, mesh)


def random_params(shapes: Tree, place: DevicePut) -> dict[str, Any]:
    """Kernels whose outputs are about as large as their inputs, scales of 1, biases and whole numbers of 0.

    Args:
        shapes: with the types that the arrays are to have.
        place: puts each array onto the devices.
    """

    def value(name: str, leaf: Any) -> jax.Array:
        if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return place(np.full(leaf.shape, name.endswith("scale"), leaf.dtype), name)
        array = np.resize(NOISE, leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
        return place(array.astype(leaf.dtype), name)

    return unflatten({name: value(name, leaf) for name, leaf in flatten(shapes).items()})


def _alone(array: np.ndarray, name: str) -> jax.Array:
    del name
    return jax.device_put(array)
