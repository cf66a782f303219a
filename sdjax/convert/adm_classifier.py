"""ADM's classifier as openai/guided-diffusion stores it (`256x256_classifier.pt`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.convert import unet2d
from sdjax.convert.rules import Kind, Row, Table, at, layer
from sdjax.models.adm_classifier import ClassifierConfig, classifier_of

TRANSPOSED = Kind(lambda w: w.T, lambda w: w.T)
POOL = (
    Row("positional_embedding", "positional_embedding", TRANSPOSED),
    *layer("to_q"),
    *layer("to_k"),
    *layer("to_v"),
    *layer("to_out", "c_proj"),
)
TABLE = Table((*unet2d.TABLE.rows, *at("pool", "out.2", POOL)))


@functools.cache
def shapes(config: ClassifierConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    x = jnp.zeros((1, config.size, config.size, 3))
    return jax.eval_shape(classifier_of(config).init, jax.random.key(0), x, jnp.zeros(1))["params"]


def from_original(tensors: Mapping[str, np.ndarray], config: ClassifierConfig) -> dict[str, np.ndarray]:
    """Tensors of guided-diffusion's file under the keys of `TABLE`.

    Raises:
        UserError: a key is not one of such a classifier.
    """
    pool = {key: tensor for key, tensor in tensors.items() if key.startswith("out.2.")}
    rest = {key: tensor for key, tensor in tensors.items() if key not in pool}
    found = unet2d.from_original(rest, config.encoder)
    for key, tensor in pool.items():
        name, kind = key.rpartition(".")[::2]
        if name.endswith("qkv_proj"):
            parts = unet2d.split_heads(tensor, 1, True)
            found |= {f"out.2.to_{letter}.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
        else:
            found[key] = tensor[:, :, 0] if tensor.ndim == 3 else tensor
    return found
