"""Trains a tiny config for three steps and samples from it on several meshes of this process's devices.

    python tests/parallel/on_meshes.py CONFIG OUTPUT.npz MESH [MESH ...]      with MESH like data=2,fsdp=4

What came out is written as arrays: `losses` [meshes, 3], `pictures` [meshes, h, w, 3], and `bytes`, those of the
training state that the first device holds.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

from sdjax.core.flags import load_config
from sdjax.core.tree import nbytes
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import placer, put_batch
from sdjax.tasks.base import make_task
from sdjax.training.optim import make_optimizer
from sdjax.training.step import init_state, make_step

STEPS = 3


def main(name: str, target: str, *meshes: str) -> None:
    """Runs all meshes in turn."""
    made = [run(name, dict(part.split("=") for part in mesh.split(","))) for mesh in meshes]
    losses, pictures, held = zip(*made, strict=True)
    np.savez(target, losses=losses, pictures=pictures, bytes=held)


def run(name: str, sizes: dict[str, str]) -> tuple[list[float], np.ndarray, int]:
    """The losses, a picture by the average of the parameters, and the bytes of state on one device."""
    config = load_config(name)
    if "components" in config.task:
        config.task.text = "frozen"  # whose captions need no prepared data
    mesh = make_mesh({axis: int(size) for axis, size in sizes.items()})
    task = make_task(config, mesh)
    optimizer = make_optimizer(config.optim, STEPS)
    with jax.set_mesh(mesh):
        stored = task.stored(placer(mesh))
        frozen = {part: stored.pop(part) for part in task.frozen}
        state = init_state(task, optimizer, 0, mesh, stored)
        step = make_step(task, optimizer, 0, decay=0.9)
        losses = []
        for number in range(STEPS):
            state, metrics = step(state, frozen, put_batch(batch(task.specimen(8), number), mesh))
            losses.append(float(metrics["loss"]))
        held = nbytes([leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)])
        return losses, task.sample({**frozen, **state.ema}), held


def batch(shapes: dict[str, jax.ShapeDtypeStruct], number: int) -> dict[str, np.ndarray]:
    """Rows of random numbers in the form of a training batch."""
    rng = np.random.default_rng(number)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(shape.dtype, np.integer):
            return rng.integers(0, 255, shape.shape).astype(shape.dtype)
        return (0.5 * rng.standard_normal(shape.shape)).astype(shape.dtype)

    return {name: draw(shape) for name, shape in shapes.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
