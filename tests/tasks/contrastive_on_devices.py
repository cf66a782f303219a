"""Writes a CLIP's contrastive loss and its gradients over 1, 2, 4 and 8 of this process's devices as COUNT.npz.

    python tests/tasks/contrastive_on_devices.py CLIP FOLDER SOURCE

FOLDER has the batch, batch.npz. On 4 and 8 devices parameters are split, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

from configs import clip
from sdjax.core.tree import flatten
from sdjax.parallel.batches import put_batch
from sdjax.parallel.mesh import AXES
from sdjax.parallel.sharding import sharded_put
from sdjax.tasks.make import make_task

SHAPES = {1: (1, 1, 1, 1), 2: (2, 1, 1, 1), 4: (2, 2, 1, 1), 8: (2, 2, 2, 1)}


def main(folder: str, results: str, source: str) -> None:
    config = clip.get_config("tiny")
    config.task.initial, config.data.source = folder, source
    batch = dict(np.load(Path(results) / "batch.npz"))
    for count, shape in SHAPES.items():
        devices = jax.devices()[:count]
        mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
        with jax.set_mesh(mesh):
            task = make_task(config, mesh)
            step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
            (loss, _), gradients = step(task.pretrained(sharded_put(mesh)), put_batch(batch, mesh), None, 0)
            np.savez(Path(results) / f"{count}.npz", loss=loss, **flatten(gradients))


if __name__ == "__main__":
    main(*sys.argv[1:])
