"""Large pictures from small ones (LDM, section 4.4): the small one joined to the latents, which are as large.

Reads what `sdjax.tasks.ldm.training` reads, and config.data.degradation ("bicubic" or "bsr_light"). The factor is the
first stage's.
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
from sdjax.data.degradation import LowResolution
from sdjax.models.conditioning import Cond
from sdjax.tasks.latent.networks import VAE
from sdjax.tasks.ldm.conditioner import Columns, Conditioner, Told
from sdjax.tasks.ldm.training import first_stage_of, make_latent_task
from sdjax.training.task import Task

LOW = "low_res"


@dataclass(frozen=True)
class LowResolutionConditioner(Conditioner):
    """`low_res`, uint8 [b h w 3], as large as the latents.

    Attributes:
        factor: by which pictures are larger.
    """

    factor: int = 4

    @property
    def concat_channels(self) -> int:
        return 3

    def cond(self, params: Params, columns: Columns) -> Cond:
        del params
        return Cond(concat=jnp.asarray(columns[LOW], jnp.float32) / 127.5 - 1.0)

    def size(self, columns: Columns) -> tuple[int, int]:
        _, height, width, _ = columns[LOW].shape
        return height * self.factor, width * self.factor


def conditioner_of(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> LowResolutionConditioner:
    """Of a stored model."""
    del settings
    return LowResolutionConditioner(sizes[VAE].factor)


def told_by(config: Config) -> Told:
    """A small picture, made of the large one."""
    factor = first_stage_of(config).factor
    side = config.data.size // factor
    return Told(
        LowResolutionConditioner(factor),
        (LowResolution(factor, config.data.degradation),),
        {LOW: jax.ShapeDtypeStruct((side, side, 3), np.uint8)},
    )


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "super_resolution"."""
    return make_latent_task(config, mesh, told_by(config))
