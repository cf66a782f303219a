"""Data of tasks: square images, batches of this process's rows, and arrays that every process reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array

from sdjax.checkpoints.checkpoint import CONTROLNET
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.data.identity import identity_of
from sdjax.data.loader import Loader, Prefetch, Shard, Transform, loader
from sdjax.data.prepared.dataset import PreparedSource
from sdjax.data.sources import open as sources
from sdjax.data.sources.base import CAPTION, CONDITIONING_IMAGE
from sdjax.data.sources.rules import RowRules
from sdjax.data.text.prompt_templates import prompts_of
from sdjax.data.transforms import crops
from sdjax.ops.partition import constrain
from sdjax.parallel.batches import rows_of_process


def process_shard(mesh: Mesh) -> Shard:
    """The part of every batch that this process reads.

    Raises:
        UserError: as `rows_of_process`.
    """
    return Shard(*rows_of_process(mesh))


NEEDS = {
    "text": ("caption",),
    "text_bert": ("caption",),
    "text_t5": ("caption",),
    "class_conditional": ("label",),
    "layout": ("objects",),
    "semantic_synthesis": ("label_map",),
    "retrieval": ("neighbours",),
}
"""Keys that examples must have for a value of `task.conditioning`."""
TASK_NEEDS = {"classifier": ("label",), "contrastive": (CAPTION,)}
"""Those that they must have for a task without a conditioning."""


def row_rules(config: Config) -> RowRules:
    """Rules for the rows of a run's data."""
    data, task = config.data, config.task
    needs = TASK_NEEDS.get(task.name) or NEEDS.get(task.get("conditioning", ""), ())
    if CONTROLNET in config.model and not data.get("control_from"):
        needs = (*needs, CONDITIONING_IMAGE)
    if data.get("prompt"):
        needs = tuple(name for name in needs if name != CAPTION)
    return RowRules(needs, data.minimum_side, data.size, data.on_bad, tuple(data.links))


def open_images(config: Config, split: str = "train") -> sources.UsableRows | sources.PromptedRows:
    """The images of `config.data.source`, held to the rules of the run, with `config.data.prompt` where it has one.

    Raises:
        UserError: as `sources.source`.
    """
    images, prompt = sources.source(config.data.source, split, rules=row_rules(config)), config.data.get("prompt", "")
    return sources.PromptedRows(images, prompts_of(prompt, config.task.get("word", ""))) if prompt else images


def data_identity(config: Config) -> dict[str, Any]:
    """The identity of a run's data: of what was prepared, or of config.data.source.

    Raises:
        UserError: it cannot be opened.
    """
    if config.task.get("latents") == "prepared":
        return identity_of(PreparedSource(Path(config.data.prepared).expanduser()))
    return identity_of(open_images(config))


def square_crops(config: Config) -> tuple[sources.Source, list[Any]]:
    """The training images of config.data.source, as large as config.data.size, cut as config.data.crop says.

    Returns:
        The images, and the transforms that make each of them anew in every epoch.

    Raises:
        UserError: no such source or crop.
    """
    data = config.data
    return crops.squares(open_images(config), data.size, data.crop, data.crop_sides)


def batches(config: Config, images: sources.Source, transforms: Sequence[Transform], mesh: Mesh) -> Loader:
    """This process's rows of the batches of a run.

    Raises:
        UserError: as `sdjax.data.loader.loader` and `loader_options`.
    """
    train, repeats = config.train, config.data.get("repeats", 1)
    images = sources.RepeatedSource(images, repeats) if repeats > 1 else images
    return loader(images, train.batch_size, train.seed, transforms, process_shard(mesh), loader_options(config))


def loader_options(config: Config) -> Prefetch:
    """Threads of a loader: `config.data.threads` of this process, or of each of `config.data.workers` more.

    Raises:
        UserError: there is no thread, or less than no worker.
    """
    threads, workers = config.data.threads, config.data.workers
    if threads < 1 or workers < 0:
        raise UserError(f"config.data.threads={threads} must be at least 1, config.data.workers={workers} at least 0")
    return Prefetch(threads, workers=workers)


def gathered(x: Array) -> Array:
    """x, whole on every device, so that every process can read it."""
    return constrain(x, *[None] * x.ndim)
