"""Names of floating-point types, as users write them in configs and on the command line."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from sdjax.core.errors import unknown

DTYPES: dict[str, DTypeLike] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def dtype_named(name: str, place: str = "dtype") -> DTypeLike:
    """The type called `name`; a UserError unless it is float32, bfloat16 or float16."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES, place)
    return DTYPES[name]
