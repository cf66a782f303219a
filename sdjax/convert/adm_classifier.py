"""ADM's classifier as openai/guided-diffusion stores it (`256x256_classifier.pt`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.convert import unet2d
from sdjax.convert.rules import Kind, Row, Table, at, layer
from sdjax.core.errors import UserError
from sdjax.models.adm_classifier import ClassifierConfig, classifier_of
from sdjax.models.unet2d import UNet2DConfig

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


def from_config(config: Mapping[str, Any], place: str = "classifier/config.json") -> ClassifierConfig:
    """Sizes from the config.json that `to_config` made.

    Raises:
        UserError: a size is missing, or there is one that is unknown.
    """
    try:
        encoder: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config["encoder"].items()}
        return ClassifierConfig(UNet2DConfig(**encoder), config["size"], config["classes"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place} does not describe a classifier: {error}") from error


def to_config(config: ClassifierConfig) -> dict[str, Any]:
    """The config.json of a classifier."""
    return {"_class_name": "EncoderUNetModel", **dataclasses.asdict(config)}


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
