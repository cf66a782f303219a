"""Pictures of a class: one token for cross-attention, a learned one for no class (LDM, section 4.4, table 3).

Reads what `sdjax.tasks.ldm.training` reads, and config.model.class_embedder: classes (those of the data) and width.
Where task.dropout is not 0, one more class is learned, which stands for none.
"""

from __future__ import annotations

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
from sdjax.models.embedders import ClassEmbedder, ClassEmbedderConfig
from sdjax.tasks.ldm.conditioner import Columns, Conditioner, Told
from sdjax.tasks.ldm.training import make_latent_task
from sdjax.training.task import Task

NAME, LABEL = "class_embedder", "label"


@dataclass(frozen=True)
class ClassConditioner(Conditioner):
    """`label`, int32 [b].

    Attributes:
        config: of the embedder.
        none: the class that stands for none; None where no such class was learned.
    """

    config: ClassEmbedderConfig = field(default_factory=ClassEmbedderConfig)
    none: int | None = None

    @property
    def components(self) -> dict[str, Any]:
        return {NAME: self.config}

    @property
    def settings(self) -> dict[str, Any]:
        return {"none": self.none}

    @property
    def context_width(self) -> int:
        return self.config.width

    def init(self, key: PRNGKeyArray) -> Params:
        return {NAME: dict(ClassEmbedder(self.config).init(key, jnp.zeros(1, jnp.int32))["params"])}

    def cond(self, params: Params, columns: Columns) -> Cond:
        return Cond(context=apply(ClassEmbedder(self.config), params[NAME], jnp.asarray(columns[LABEL])))

    def silent(self, columns: Columns) -> Columns | None:
        if self.none is None:
            return None
        return {**columns, LABEL: jnp.full_like(jnp.asarray(columns[LABEL]), self.none)}


def conditioner_of(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> ClassConditioner:
    """Of a stored model."""
    return ClassConditioner(sizes[NAME], settings.get("none"))


def told_by(config: Config) -> Told:
    """A label."""
    classes, drops = config.model.class_embedder.classes, bool(config.task.dropout)
    sizes = ClassEmbedderConfig(classes + drops, config.model.class_embedder.width)
    return Told(
        ClassConditioner(sizes, classes if drops else None),
        (InRange(LABEL, classes),),
        {LABEL: jax.ShapeDtypeStruct((), np.int32)},
    )


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "class_conditional"."""
    return make_latent_task(config, mesh, told_by(config))
