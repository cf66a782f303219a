"""Pictures of one kind: latent diffusion that is told nothing (LDM, section 4.2; CelebA-HQ, FFHQ, LSUN).

Reads what `sdjax.tasks.ldm.training` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from sdjax.core.config import Config
from sdjax.tasks.ldm.conditioner import Conditioner, Told
from sdjax.tasks.ldm.training import make_latent_task
from sdjax.training.task import Task


def conditioner_of(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> Conditioner:
    """Of a stored model."""
    del sizes, settings
    return Conditioner()


def told_by(config: Config) -> Told:
    """Nothing."""
    del config
    return Told(Conditioner())


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "unconditional"."""
    return make_latent_task(config, mesh, told_by(config))
