"""train.py with a network so small that a process that trains it starts in seconds.

The loop, the command line, the checkpoints and the export are train.py's own. `--pause SECONDS` lengthens each step, so
that a signal can fall between two.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import train
from sdjax.core.signals import end_well_before
from sdjax.data.loader import Shard, loader
from sdjax.data.sources.open import ArraySource
from sdjax.parallel.distributed import run_together
from sdjax.tasks.base import loader_options
from sdjax.training.task import Task

WIDTH, ROWS = 64, int(os.environ.get("TINY_ROWS", "32"))
PAUSE = float(os.environ.get("TINY_PAUSE", "0"))
NAN = -1  # the batch that holds a NaN
FAIL = os.environ.get("TINY_FAIL", "")  # "PROCESS:STEP": where one process fails


def make_task(config, mesh) -> Task:
    """Two layers with noise in the loss, so that the order of random numbers and of the data counts."""
    del mesh

    def init(key):
        a, b = jax.random.split(key)
        draw = lambda key: jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5  # noqa: E731
        return {"net": {"a": {"kernel": draw(a)}, "b": {"kernel": draw(b), "bias": jnp.zeros(WIDTH)}}}

    def loss(params, batch, key, step):
        net, x = params["net"], batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        y = jnp.tanh(x @ net["a"]["kernel"]) @ net["b"]["kernel"] + net["b"]["bias"]
        value = jnp.square(y - batch["x"]).mean()
        return value, {"twice": 2 * value}

    def batch(params):
        del params
        rows = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
        shard = Shard(jax.process_index(), jax.process_count())
        source, options = ArraySource({"x": rows}), config.train
        return slow(loader(source, options.batch_size, options.seed, (), shard, loader_options(config)))

    def preview(params):
        total = jax.jit(lambda net: sum(leaf.sum() for leaf in jax.tree.leaves(net)))(params["net"])
        return np.full((4, 4, 3), np.uint8(abs(float(total))), np.uint8)

    def export(params, folder: Path):
        folder.mkdir()
        flat = {jax.tree_util.keystr(k, simple=True, separator="."): v for k, v in leaves(params)}
        save_file({name: np.array(value) for name, value in flat.items()}, folder / "net.safetensors")

    def batch_spec(rows):
        return {"x": jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)}

    return Task(init, loss, preview, batch, export, batch_spec, identity=lambda: {"examples": ROWS})


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def slow(batches):
    """The same iterator, which waits before each batch, and may fail."""
    plain = type(batches).__next__

    def wait(self):
        time.sleep(PAUSE)
        if f"{jax.process_index()}:{self.step}" == FAIL:
            raise OSError("the disk is gone")
        batch = plain(self)
        return {**batch, "x": batch["x"] * np.float32("nan")} if self.step == NAN + 1 else batch

    batches.__class__ = type("Slow", (type(batches),), {"__next__": wait})
    return batches


if __name__ == "__main__":
    end_well_before("the first step")
    train.make_task = make_task
    run_together(train.main)
