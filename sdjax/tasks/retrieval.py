"""Pictures from what is near them: embeddings of neighbours for cross-attention (retrieval-augmented diffusion).

Blattmann et al. 2022, the LDM repository's rdm768x768: CLIP's embeddings of pictures found beside the one to be made,
or of a caption. Reads what `sdjax.tasks.ldm.training` reads, config.task.neighbours, how many there are, and
config.model.unet.context_dim, how wide each is. The data needs `neighbours`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdjax.core.config import Config
from sdjax.core.tree import Params
from sdjax.data.transforms import OfShape
from sdjax.models import unet
from sdjax.models.conditioning import Cond
from sdjax.tasks.latent.networks import UNET, sizes_of
from sdjax.tasks.ldm.conditioner import Columns, Conditioner, Told
from sdjax.tasks.ldm.training import make_latent_task
from sdjax.training.task import Task

NAME = "neighbours"


@dataclass(frozen=True)
class NeighbourConditioner(Conditioner):
    """`neighbours`, float32 [b k d], of any number k; zeros say nothing (scripts/knn2img.py).

    Attributes:
        width: d.
    """

    width: int = 768

    @property
    def context_width(self) -> int:
        return self.width

    def cond(self, params: Params, columns: Columns) -> Cond:
        del params
        return Cond(context=jnp.asarray(columns[NAME], jnp.float32))

    def silent(self, columns: Columns) -> Columns:
        return {**columns, NAME: jnp.zeros_like(jnp.asarray(columns[NAME]))}


def conditioner_of(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> NeighbourConditioner:
    """Of a stored model."""
    del settings
    return NeighbourConditioner(sizes[UNET].context_dim)


def told_by(config: Config) -> Told:
    """The embeddings of as many neighbours as the config says."""
    width = sizes_of(config.model.unet, unet.VARIANTS, "config.model.unet").context_dim
    shape = (config.task.neighbours, width)
    return Told(NeighbourConditioner(width), (OfShape(NAME, shape),), {NAME: jax.ShapeDtypeStruct(shape, np.float32)})


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "retrieval"."""
    return make_latent_task(config, mesh, told_by(config))
