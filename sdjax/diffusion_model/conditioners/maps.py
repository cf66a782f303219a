"""Maps joined to the noisy latents: label maps (LDM, section 4.3.2), depth (stabilityai/stable-diffusion-2-depth)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.image_inputs import load_depth
from sdjax.data.images import image_size, read_labels
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, required
from sdjax.models.conditioning import Cond, apply
from sdjax.models.embedders import Rescaler, RescalerConfig

RESCALER, LABEL_MAP, DEPTH = "rescaler", "label_map", "depth"


@dataclass(frozen=True)
class LabelMapConditioner(Conditioner):
    """`label_map`, uint8 [b H W], made small by a learned rescaler.

    Attributes:
        config: of the rescaler.
    """

    config: RescalerConfig = field(default_factory=RescalerConfig)

    @property
    def traits(self) -> Traits:
        return Traits((LABEL_MAP,), concat_channels=self.config.features, keeps_size=True)

    @property
    def components(self) -> dict[str, Any]:
        return {RESCALER: self.config}

    def init(self, key: PRNGKeyArray) -> Params:
        side = 2**self.config.stages
        return {RESCALER: dict(Rescaler(self.config).init(key, jnp.zeros((1, side, side), jnp.int32))["params"])}

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        given = inputs.get(LABEL_MAP)
        if given is None:
            return None
        height, width = image_size(given) if isinstance(given, str | Path) else np.shape(given)[:2]
        return height, width

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        given = required(inputs, LABEL_MAP, host.name)
        labels = read_labels(given, host.size) if isinstance(given, str | Path) else np.asarray(given)
        integers = labels.ndim == 2 and labels.dtype.kind in "ui"
        if not integers or not 0 <= labels.min() <= labels.max() < self.config.classes:
            raise UserError(
                f"label_map holds {labels.dtype} {list(labels.shape)} up to {labels.max()}; {host.name} takes "
                f"[height, width] of the classes 0 to {self.config.classes - 1}"
            )
        return {LABEL_MAP: labels.astype(np.uint8)}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        return Cond(concat=apply(Rescaler(self.config), params[RESCALER], jnp.asarray(columns[LABEL_MAP])))


@dataclass(frozen=True)
class DepthConditioner(Conditioner):
    """`depth`, float32 [b h w 1] in [-1, 1], as large as the latents."""

    @property
    def traits(self) -> Traits:
        return Traits((DEPTH,), concat_channels=1)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        return {DEPTH: load_depth(required(inputs, DEPTH, host.name), host.latents)}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        return Cond(concat=jnp.asarray(columns[DEPTH]))
