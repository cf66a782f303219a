"""The contract between a system and the training loop."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from sdjax.core.tree import Params, Tree, flatten, unflatten
from sdjax.data.loader import Loader

Metrics = dict[str, Float[Array, ""]]

DevicePut = Callable[[np.ndarray, str], Array]
"""(array, its path such as "unet/conv_in/kernel") -> the same on devices."""


def _fresh(put: DevicePut) -> Params:
    del put
    return {}


class Task(NamedTuple):
    """A system as pure functions: to training what optax's GradientTransformation is to optimisation.

    Attributes:
        init: key -> the parameters that are trained; traceable, so that it may be jitted to a sharding.
        loss: (all params, batch, key, optimiser steps so far) -> the scalar to descend, and more scalars to log.
        preview: params -> an image that shows what the run has learnt, uint8 [h w 3].
        batch: params -> the endless iterator over this process's rows of the batches.
        export: (params, folder) -> None; writes what `sdjax.load` reads.
        batch_spec: (rows of all processes) -> the shapes of a batch, for compiling ahead of time.
        frozen: shapes of the parameters that are not trained.
        pretrained: reads parameters from files: every frozen one, and the trained ones that do not begin from random
            numbers, which replace those of `init`. Called with a function that puts each array on its devices.
        use: a command that uses what was exported, with {config} and {workdir} in it; "" for none.
        identity: of the data, wherever it lies: processes must agree on it, and it may move between runs.
    """

    init: Callable[[PRNGKeyArray], Params]
    loss: Callable[[Params, Any, PRNGKeyArray, Int[Array, ""]], tuple[Float[Array, ""], Metrics]]
    preview: Callable[[Params], UInt8[np.ndarray, "h w 3"]]
    batch: Callable[[Params], Loader]
    export: Callable[[Params, Path], None]
    batch_spec: Callable[[int], Any]
    frozen: Params = {}  # noqa: RUF012  (nobody writes into it)
    pretrained: Callable[[DevicePut], Params] = _fresh
    use: str = ""
    identity: Callable[[], dict[str, Any]] = dict


def split_frozen(task: Task, params: Params) -> tuple[Params, Params]:
    """Pretrained parameters as (frozen, initial values of trained ones)."""
    return split_like(params, task.frozen)


def split_like(tree: Tree, like: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree into the leaves whose names another tree has, and all others."""
    flat, names = flatten(tree), flatten(like).keys()
    inside = unflatten({path: leaf for path, leaf in flat.items() if path in names})
    return inside, unflatten({path: leaf for path, leaf in flat.items() if path not in names})


def select(tree: Tree, patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a tree into the leaves that patterns name and all others; branches without a leaf are left out.

    Args:
        tree: nested dictionaries.
        patterns: shell patterns of slash-joined names; "unet" names all below it, "unet/*/to_k/*" some.
    """
    flat = flatten(tree)
    named = {path for path in flat if any(_matches(path, pattern) for pattern in patterns)}
    chosen = unflatten({path: leaf for path, leaf in flat.items() if path in named})
    return chosen, unflatten({path: leaf for path, leaf in flat.items() if path not in named})


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*")
