"""The contract between a system and the training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sdjax.core.tree import Params
from sdjax.data.loader import Loader

Metrics = dict[str, Float[Array, ""]]

Place = Callable[[np.ndarray, str], Array]
"""(array, its path such as "unet/conv_in/kernel") -> the same on devices."""


def _nothing(place: Place) -> Params:
    del place
    return {}


class Task(NamedTuple):
    """A system as pure functions: to training what optax's GradientTransformation is to optimisation.

    Attributes:
        init: key -> the components that are trained; traceable, so that it may be jitted to a sharding.
        loss: (all params, batch, key, optimiser steps so far) -> the scalar to descend, and more scalars to log.
        sample: params -> a picture that shows what the run has learnt, uint8 [h w 3].
        batch: params -> the endless iterator over this process's rows of the batches.
        export: (params, folder) -> None; writes what `sdjax.load` reads.
        specimen: (rows of all processes) -> the shapes of a batch, for compiling ahead of time.
        frozen: the shapes of the components that are not trained.
        stored: reads what files hold: every frozen component, and the trained ones that do not begin from random
            numbers, which replace those of `init`. Called with a function that puts each array where it will live.
    """

    init: Callable[[PRNGKeyArray], Params]
    loss: Callable[[Params, Any, PRNGKeyArray, Int[Array, ""]], tuple[Float[Array, ""], Metrics]]
    sample: Callable[[Params], UInt8[np.ndarray, "h w 3"]]
    batch: Callable[[Params], Loader]
    export: Callable[[Params, Path], None]
    specimen: Callable[[int], Any]
    frozen: Params = {}  # noqa: RUF012  (nobody writes into it)
    stored: Callable[[Place], Params] = _nothing
