"""Tasks by name."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from sdjax.core.config import Config
from sdjax.core.errors import unknown
from sdjax.tasks import autoencoder, classifier, contrastive, diffusion
from sdjax.training.task import Task

TASKS: dict[str, Callable[[Config, Mesh], Task]] = {
    "autoencoder": autoencoder.make,
    "classifier": classifier.make,
    "contrastive": contrastive.make,
    "diffusion": diffusion.make,
}


def make_task(config: Config, mesh: Mesh) -> Task:
    """The task that `config.task.name` asks for.

    Raises:
        UserError: there is none of this name.
    """
    name = config.task.name
    if name not in TASKS:
        raise unknown("task", name, TASKS, "config.task.name")
    return TASKS[name](config, mesh)
