"""Finding tasks by name, and what several of them need."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

import sdjax.tasks
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.data import crops, sources
from sdjax.data.loader import Loader, Reading, Shard, Transform, loader
from sdjax.parallel.sharding import rows_of_process
from sdjax.training.task import Task


def task_names() -> list[str]:
    """Every file of this folder that makes a task."""
    modules = pkgutil.iter_modules(sdjax.tasks.__path__)
    return sorted(module.name for module in modules if not module.ispkg and module.name != "base")


def make_task(config: Config, mesh: Mesh) -> Task:
    """The task that `config.task.name` asks for: `make(config, mesh)` of the file of that name.

    Raises:
        UserError: no such file.
    """
    name = config.task.name
    if name not in task_names():
        raise unknown("task", name, task_names(), "config.task.name")
    return importlib.import_module(f"sdjax.tasks.{name}").make(config, mesh)


def my_rows(mesh: Mesh) -> Shard:
    """The part of every batch that this process reads.

    Raises:
        UserError: as `sdjax.parallel.sharding.rows_of_process`.
    """
    return Shard(*rows_of_process(mesh))


def squares(config: Config) -> tuple[sources.Source, list[Any]]:
    """The training pictures of config.data.source, as large as config.data.size, cut as config.data.crop says.

    Returns:
        The pictures, and what is done to each of them anew in every epoch.

    Raises:
        UserError: no such source or crop.
    """
    data = config.data
    return crops.squares(sources.source(data.source, "train"), data.size, data.crop, data.crop_sides)


def batches(config: Config, pictures: sources.Source, transforms: Sequence[Transform], mesh: Mesh) -> Loader:
    """This process's rows of the batches of a run.

    Raises:
        UserError: as `sdjax.data.loader.loader` and `reading_of`.
    """
    train = config.train
    return loader(pictures, train.batch_size, train.seed, transforms, my_rows(mesh), reading_of(config))


def reading_of(config: Config) -> Reading:
    """How the batches are read: `config.data.threads` of this process, or of each of `config.data.workers` more.

    Raises:
        UserError: there is no thread, or less than no worker.
    """
    threads, workers = config.data.threads, config.data.workers
    if threads < 1 or workers < 0:
        raise UserError(f"config.data.threads={threads} must be at least 1, config.data.workers={workers} at least 0")
    return Reading(threads, workers=workers)


def to_uint8(images: Float[np.ndarray, "*b h w 3"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """Pictures in [0, 1] to bytes, rounded."""
    return (np.clip(np.asarray(images), 0.0, 1.0) * 255.0).round().astype(np.uint8)


def tile(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """A grid of pictures, row by row; what the last row lacks is white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    missing = np.full((rows * columns - n, h, w, c), 255, np.uint8)
    cells = np.concatenate([images, missing]).reshape(rows, columns, h, w, c)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, c)
