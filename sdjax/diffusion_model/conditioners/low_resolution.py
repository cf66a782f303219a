"""Super-resolution (LDM, section 4.4): the small image joined to the latents, which are as large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from sdjax.core.tree import Params
from sdjax.data.image_inputs import rgb, size_of
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, in_unit_range, required
from sdjax.models.conditioning import Cond

LOW = "low_res"


@dataclass(frozen=True)
class LowResolutionConditioner(Conditioner):
    """`low_res`, uint8 [b h w 3], as large as the latents."""

    @property
    def traits(self) -> Traits:
        return Traits(("init_image",), concat_channels=3, keeps_size=True, strength=None)

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        if inputs.get("init_image") is None:
            return None
        height, width = size_of(inputs["init_image"])
        return height * factor, width * factor

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        small = rgb(required(inputs, "init_image", host.name), "init_image")
        return {LOW: np.rint(small * 255.0).astype(np.uint8)}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        del params, keys
        return Cond(concat=in_unit_range(columns[LOW]) * 2.0 - 1.0)
