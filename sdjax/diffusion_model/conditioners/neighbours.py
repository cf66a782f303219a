"""Retrieval-augmented diffusion: cross-attention to CLIP embeddings of nearest neighbours (Blattmann et al. 2022).

The LDM repository's rdm768x768; scripts/knn2img.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.image_inputs import read_embeddings
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits, required
from sdjax.models.conditioning import Cond

NEIGHBOURS = "neighbours"


@dataclass(frozen=True)
class NeighbourConditioner(Conditioner):
    """`neighbours`, float32 [b k d], of any number k; zeros are the null condition.

    Attributes:
        width: d.
    """

    width: int = 768

    @property
    def traits(self) -> Traits:
        return Traits((NEIGHBOURS,), context_width=self.width, has_null=True)

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        given = required(inputs, NEIGHBOURS, host.name)
        array = given if isinstance(given, np.ndarray) else read_embeddings(Path(given), NEIGHBOURS)
        if array.ndim != 2 or array.shape[1] != self.width or not len(array) or not np.isfinite(array).all():
            raise UserError(
                f"neighbours have the shape {list(array.shape)}; {host.name} wants [k, {self.width}], all finite"
            )
        return {NEIGHBOURS: array.astype(np.float32)}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        return Cond(context=jnp.asarray(columns[NEIGHBOURS], jnp.float32))

    def null(self, columns: Columns) -> Columns:
        return {**columns, NEIGHBOURS: jnp.zeros_like(jnp.asarray(columns[NEIGHBOURS]))}
