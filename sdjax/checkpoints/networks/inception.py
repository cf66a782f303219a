"""Inception v3 as pytorch-fid and torch-fidelity publish it (pt_inception-2015-12-05)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.checkpoints.mapping import CONV, LINEAR, SAME, KeyMapping, KeyTable
from sdjax.core.tree import flatten
from sdjax.models.inception import Inception

NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@functools.cache
def shapes() -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; shared: not to be changed."""
    return jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))["params"]


@functools.cache
def table() -> KeyTable:
    """Its modules have the same names there."""
    return KeyTable(tuple(map(_row, flatten(shapes()))), ignored=(r".*\.num_batches_tracked", r"AuxLogits\..*"))


def _row(name: str) -> KeyMapping:
    *modules, module, leaf = name.split("/")
    if leaf == "kernel":
        return KeyMapping(name, ".".join((*modules, module, "weight")), LINEAR if module == "fc" else CONV)
    return KeyMapping(name, ".".join((*modules, module, NORM[leaf])), SAME)
