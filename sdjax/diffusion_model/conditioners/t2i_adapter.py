"""T2I-Adapters: features of hints that are added on the way down of the backbone (Mou et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.core.errors import UserError
from sdjax.core.tree import Params, numbered
from sdjax.data.image_inputs import LUMA, load_image
from sdjax.diffusion.denoise import per_image
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Network, Traits
from sdjax.diffusion_model.conditioners.hints import Hinted
from sdjax.models.conditioning import Cond, apply
from sdjax.models.t2i_adapter import T2IAdapter, T2IAdapterConfig

ADAPTER = "t2i_adapter"
IMAGE, SCALE, FACTOR = "t2i_image", "t2i_scale", "t2i_factor"
ON, FEATURES = "t2i_on", "t2i_features"


@dataclass(frozen=True)
class T2IAdapterConditioner(Conditioner):
    """`t2i_image`, `t2i_image_1`, ..., [b H W c] in [0, 1], of each adapter, and `t2i_scale` [b a] of all.

    Parameters are the components "t2i_adapter", "t2i_adapter_1", ...; the sum of their features, `t2i_features`, ...,
    is computed once, and acts at the rows where `t2i_on` [b n] is 1.

    Attributes:
        adapters: their sizes; all have features of the same shapes.
        dtype: of their arithmetic.
    """

    adapters: tuple[T2IAdapterConfig, ...] = ()
    dtype: DTypeLike = jnp.float32

    @property
    def traits(self) -> Traits:
        places = range(len(self.adapters[0].features))
        return Traits(
            optional=(IMAGE, SCALE, FACTOR),
            step_columns=(ON, *(numbered(FEATURES, i) for i in places)),
            row_columns=(ON,),
        )

    @property
    def components(self) -> dict[str, Any]:
        return {numbered(ADAPTER, i): config for i, config in enumerate(self.adapters)}

    def init(self, key: PRNGKeyArray) -> Params:
        made = {}
        for (name, config), own in zip(self.components.items(), jax.random.split(key, len(self.adapters)), strict=True):
            made[name] = T2IAdapter(config).init(own, config.example_hint())["params"]
        return made

    def image_size(self, inputs: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
        return self._hinted.image_size(inputs, max(factor, self.adapters[0].factor))

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        if inputs.get(IMAGE) is None:
            return {}
        multiple = self.adapters[0].factor
        if any(side % multiple for side in host.size):
            size = f"{host.size[1]}x{host.size[0]}"
            raise UserError(f"{size}: sides are multiples of {multiple} where this T2I-Adapter acts")
        images = self._hinted.each(IMAGE, inputs[IMAGE])
        hints = [_hint(image, config, host.size) for image, config in zip(images, self.adapters, strict=True)]
        scale = self._hinted.numbers(SCALE, 1.0 if inputs.get(SCALE) is None else inputs[SCALE])
        share = 1.0 if inputs.get(FACTOR) is None else inputs[FACTOR]
        on = (np.arange(host.rows) < int(host.calls * share)).astype(np.float32)
        columns = {numbered(IMAGE, i): hint for i, hint in enumerate(hints)}
        return {**columns, SCALE: np.array(scale, np.float32), ON: on}

    @property
    def _hinted(self) -> Hinted:
        return Hinted(ADAPTER, IMAGE, len(self.adapters))

    def precompute(self, params: Params, columns: Columns) -> dict[str, Array]:
        if IMAGE not in columns:
            return {}
        scales, total = jnp.asarray(columns[SCALE]), None
        for i, (name, config) in enumerate(self.components.items()):
            made = apply(T2IAdapter(config, self.dtype), params[name], jnp.asarray(columns[numbered(IMAGE, i)]))
            scaled = [per_image(scales[:, i], feature) * feature for feature in made]
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
        return {numbered(FEATURES, i): feature for i, feature in enumerate(total or ())}

    def wrap(self, params: Params, columns: Columns, network: Network) -> Network:
        if FEATURES not in columns:
            return network
        names = [numbered(FEATURES, i) for i in range(len(self.adapters[0].features))]
        features = [jnp.asarray(columns[name]) for name in names]
        if ON in columns:
            features = [per_image(jnp.asarray(columns[ON]), feature) * feature for feature in features]

        def adapted(x: Array, t: Array, cond: Cond) -> Array:
            rows = len(x) // len(features[0])
            return network(x, t, cond._replace(features=[jnp.repeat(feature, rows, axis=0) for feature in features]))

        return adapted


def _hint(image: Any, config: T2IAdapterConfig, size: tuple[int, int]) -> Float[np.ndarray, "H W c"]:
    pixels = load_image(image, size, IMAGE)
    return pixels if config.in_channels == 3 else (pixels @ LUMA).astype(np.float32)[..., None]
