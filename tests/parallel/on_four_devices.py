"""Trains a small network for three steps on several meshes of this process's devices; prints what came out as JSON."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdjax.core.tree import nbytes
from sdjax.parallel.batches import put_batch
from sdjax.parallel.mesh import make_mesh
from sdjax.training.step import init_state, make_step
from sdjax.training.task import Task

WIDTH = 128


def network() -> Task:
    """Two layers with noise in the loss, so that the order of random numbers counts too."""

    def init(key):
        a, b = jax.random.split(key)
        return {"a": jax.random.normal(a, (WIDTH, WIDTH)), "b": jax.random.normal(b, (WIDTH, WIDTH))}

    def loss(params, batch, key, step):
        x = batch + 0.1 * jax.random.normal(key, batch.shape)
        return jnp.square(jnp.tanh(x @ params["a"]) @ params["b"] / WIDTH - batch).mean(), {}

    return Task(init, loss, None, None, None, None)  # pyright: ignore[reportArgumentType]


def train(mesh_sizes: dict[str, int], accumulate: int) -> dict:
    """The losses of three steps, and the bytes of state that the first device holds."""
    mesh, task, optimizer = make_mesh(mesh_sizes), network(), optax.adam(1e-2)
    state = init_state(task, optimizer, 0, mesh)
    first = mesh.devices.flat[0]
    shards = [
        shard.data for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards if shard.device == first
    ]
    step = make_step(task, optimizer, 0, decay=0.9, accumulate=accumulate)
    losses, rng = [], np.random.default_rng(0)
    for _ in range(3):
        state, metrics = step(state, {}, put_batch(rng.standard_normal((16, WIDTH)).astype(np.float32), mesh))
        losses.append(float(metrics["loss"]))
    return {"losses": losses, "bytes": nbytes(shards)}


if __name__ == "__main__":
    meshes = [{"data": -1}, {"data": -1, "fsdp": min(2, jax.device_count())}, {"data": 1, "fsdp": -1}]
    print(json.dumps([train(sizes, accumulate) for sizes in meshes for accumulate in (1, 2)]))
