"""Trains a tiny config for three steps and samples from it on several meshes of this process's devices.

    python tests/parallel/on_meshes.py --config=NAME [--config.section.key=value] --output=FILE.npz --mesh=data=2,fsdp=4

What came out is written as arrays: `losses` [meshes, 3, 2] with norms of gradients, `images` [meshes, h, w, 3] by the
first state, and `bytes`, those of the training state that the first device holds.
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from sdjax.core.flags import define_processes, parse_flags, processes
from sdjax.core.tree import Params, merge, nbytes
from sdjax.parallel.batches import put_batch, rows_of_process
from sdjax.parallel.distributed import initialise, is_first
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.parallel.trees import tree_shardings
from sdjax.tasks.make import make_task
from sdjax.training.optim import make_optimizer
from sdjax.training.step import TrainState, init_state, make_step
from sdjax.training.task import Task, split_frozen

STEPS = 3
BELOW = {"mask": 2, "label": 3, "label_map": 3}  # what some columns' integers are below


def main() -> None:
    """Runs all meshes in turn, all from the state that the first one made."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("output", None, "", flag_values=values)
    flags.DEFINE_multi_string("mesh", None, "", flag_values=values)
    define_processes(values)
    parse_flags(values, sys.argv)
    initialise(**processes(values))
    config = values["config"].value.copy_and_resolve_references()
    if "text" in config.task:
        config.task.text = "tokens"  # of captions that need no prepared data
    first = make_mesh({"data": -1})
    task, optimizer = make_task(config, first), make_optimizer(config.optim, STEPS)
    frozen, initial = split_frozen(task, task.pretrained(sharded_put(first)))
    state = init_state(task, optimizer, 0, first, initial)
    made = [run(task, optimizer, state, frozen, parse_mesh(mesh)) for mesh in values["mesh"].value]
    losses, pictures, held = zip(*made, strict=True)
    if is_first():
        np.savez(values["output"].value, losses=losses, pictures=pictures, bytes=held)


def run(
    task: Task, optimizer: optax.GradientTransformation, state: TrainState, frozen: Params, sizes: dict[str, int]
) -> tuple[list[tuple[float, float]], np.ndarray, int]:
    """Losses with norms of gradients, an image by the first state, and the bytes of state on one device."""
    started = time.perf_counter()
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        state, frozen = (jax.tree.map(jnp.copy, jax.device_put(t, tree_shardings(t, mesh))) for t in (state, frozen))
        picture = task.preview(merge(frozen, state.ema))
        step = make_step(task, optimizer, 0, decay=0.9)
        losses = []
        for number in range(STEPS):
            state, metrics = step(state, frozen, put_batch(my_rows(batch(task.batch_spec(8), number), mesh), mesh))
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        held = nbytes([leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state)])
        print(sizes, losses, held, f"{time.perf_counter() - started:.0f} s", flush=True)
        return losses, picture, held


def my_rows(rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """This process's part of a batch."""
    index, count = rows_of_process(mesh)
    return {name: np.split(values, count)[index] for name, values in rows.items()}


def batch(shapes: dict[str, jax.ShapeDtypeStruct], number: int) -> dict[str, np.ndarray]:
    """Rows of random numbers in the form of a training batch."""
    rng = np.random.default_rng(number)

    def draw(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if np.issubdtype(shape.dtype, np.integer):
            return rng.integers(0, BELOW.get(name, 255), shape.shape).astype(shape.dtype)
        return (0.5 * rng.standard_normal(shape.shape)).astype(shape.dtype)

    return {name: draw(name, shape) for name, shape in shapes.items()}


if __name__ == "__main__":
    main()
