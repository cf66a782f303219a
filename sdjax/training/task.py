"""The contract between a system and the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from sdjax.data.loader import Loader

Params = dict[str, Any]
"""Parameters by component: {"unet": ..., "vae": ..., "text_encoder": ...}."""

Metrics = dict[str, Float[Array, ""]]


class Task(NamedTuple):
    """A system as pure functions: to training what optax's GradientTransformation is to optimisation.

    Attributes:
        init: key -> the components that are trained; traceable, so that it may be jitted to a sharding.
        frozen: the components that are not, as arrays.
        loss: (all params, batch, key) -> the scalar to descend, and more scalars to log.
        sample: params -> a picture that shows what the run has learnt, uint8 [h w 3].
        batch: params -> the endless iterator over this process's rows of the batches.
        export: (params, folder) -> None; writes what `sdjax.load` reads.
        initial: trained components that a run does not begin from random numbers, as arrays; they replace those of
            `init`.
    """

    init: Callable[[PRNGKeyArray], Params]
    frozen: Params
    loss: Callable[[Params, Any, PRNGKeyArray], tuple[Float[Array, ""], Metrics]]
    sample: Callable[[Params], UInt8[np.ndarray, "h w 3"]]
    batch: Callable[[Params], Loader]
    export: Callable[[Params, Path], None]
    initial: Params | None = None
