"""The contract between a condition of LDM and all that does not depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.core.tree import Params
from sdjax.models.conditioning import Cond

Columns = Mapping[str, Array | np.ndarray]
"""What a batch says of its pictures, e.g. {"label": int32 [b]}; `image`, uint8 [b H W 3], may be among it."""


@dataclass(frozen=True)
class Conditioner:
    """How a UNet is told what to draw. Hashable, as it is a static argument; this one tells it nothing."""

    @property
    def components(self) -> dict[str, Any]:
        """The sizes of the networks that learn with the UNet, by name."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """What a stored model must say of its condition beside those sizes, as JSON has it."""
        return {}

    @property
    def concat_channels(self) -> int:
        """How many channels are joined to the noisy latents."""
        return 0

    @property
    def context_width(self) -> int | None:
        """Features of the tokens for cross-attention; None where there are none."""
        return None

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh parameters of `components`; traceable."""
        del key
        return {}

    def cond(self, params: Params, columns: Columns) -> Cond:
        """What the UNet is told; traceable.

        Args:
            params: of `components`, and of the first stage, "vae".
            columns: of a batch.
        """
        del params, columns
        return Cond()

    def silent(self, columns: Columns) -> Columns | None:
        """The same columns, saying nothing: what guidance departs from. None: there is no guidance for this."""
        del columns
        return None

    def finished(self, images: Float[Array, "b H W 3"], columns: Columns) -> Float[Array, "b H W 3"]:
        """What becomes of decoded pictures in [0, 1]."""
        del columns
        return images

    def size(self, columns: Columns) -> tuple[int, int] | None:
        """Height and width of the pictures that these conditions ask for; None where they do not say."""
        del columns
        return None


class Told(NamedTuple):
    """A task's condition, and where it comes from.

    Attributes:
        conditioner: what the model is told.
        transforms: Grain's, which turn an example with a square picture into one with the columns.
        columns: those that the conditioner reads besides `image`: the shape of one row, and the type.
        tokenizer: the folder of the tokenizer that made them, which a finished model is stored with.
    """

    conditioner: Conditioner
    transforms: tuple[Any, ...] = ()
    columns: Mapping[str, jax.ShapeDtypeStruct] = {}
    tokenizer: Path | None = None
