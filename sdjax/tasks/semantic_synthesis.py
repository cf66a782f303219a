"""Pictures from label maps (LDM, section 4.3.2): the map, made small by a learned rescaler, joined to the latents.

Reads what `sdjax.tasks.ldm.training` reads, and config.model.rescaler.classes, those that pixels may have. The data
needs `label_map`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from sdjax.core.config import Config
from sdjax.core.tree import Params
from sdjax.data.transforms import InRange
from sdjax.models.apply import apply
from sdjax.models.conditioning import Cond
from sdjax.models.embedders import Rescaler, RescalerConfig
from sdjax.tasks.ldm.conditioner import Columns, Conditioner, Told
from sdjax.tasks.ldm.training import first_stage_of, make_latent_task
from sdjax.training.task import Task

NAME, LABELS = "rescaler", "label_map"


@dataclass(frozen=True)
class MapConditioner(Conditioner):
    """`label_map`, uint8 [b H W].

    Attributes:
        config: of the rescaler.
    """

    config: RescalerConfig = field(default_factory=RescalerConfig)

    @property
    def components(self) -> dict[str, Any]:
        return {NAME: self.config}

    @property
    def concat_channels(self) -> int:
        return self.config.features

    def init(self, key: PRNGKeyArray) -> Params:
        side = 2**self.config.stages
        return {NAME: dict(Rescaler(self.config).init(key, jnp.zeros((1, side, side), jnp.int32))["params"])}

    def cond(self, params: Params, columns: Columns) -> Cond:
        return Cond(concat=apply(Rescaler(self.config), params[NAME], jnp.asarray(columns[LABELS])))

    def size(self, columns: Columns) -> tuple[int, int]:
        _, height, width = columns[LABELS].shape
        return height, width


def conditioner_of(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> MapConditioner:
    """Of a stored model."""
    del settings
    return MapConditioner(sizes[NAME])


def told_by(config: Config) -> Told:
    """A label map, halved until it has the latents' size."""
    classes, side = config.model.rescaler.classes, config.data.size
    sizes = RescalerConfig(classes, int(math.log2(first_stage_of(config).factor)))
    column = jax.ShapeDtypeStruct((side, side), np.uint8)
    return Told(MapConditioner(sizes), (InRange(LABELS, classes),), {LABELS: column})


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "semantic_synthesis"."""
    return make_latent_task(config, mesh, told_by(config))
