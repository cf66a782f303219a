"""T2I-Adapters as PyTorch diffusers stores them (`T2IAdapter`), and as TencentARC/T2I-Adapter does."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import Field
from sdjax.checkpoints.mapping import KeyTable, Shapes, at, conv
from sdjax.checkpoints.original_keys import OriginalSizes
from sdjax.core.errors import UserError
from sdjax.models.t2i_adapter import KINDS, VARIANTS, T2IAdapter, T2IAdapterConfig

CLASS_NAME = "T2IAdapter"
T = TypeVar("T")
ALLOWED: dict[str, tuple[Any, ...]] = {"adapter_type": KINDS}
FIELDS = (
    Field("kind", "adapter_type", KINDS[0]),
    Field("in_channels", "in_channels", 3),
    Field("layers", "num_res_blocks", 2),
    Field("factor", "downscale_factor", 8),
)
BLOCK = (*conv("block1"), *conv("block2"))
TABLE = KeyTable(
    (
        *conv("conv_in", "adapter.conv_in"),
        *conv("body_*_in_conv", "adapter.body.*.in_conv"),
        *at("body_*_resnets_*", "adapter.body.*.resnets.*", BLOCK),
        *conv("body_*_out_conv", "adapter.body.*.out_conv"),
    )
)


@functools.cache
def shapes(config: T2IAdapterConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(T2IAdapter(config).init, jax.eval_shape(config.example_hint))


def from_diffusers_config(config: Mapping[str, Any], place: str = "config.json") -> T2IAdapterConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `T2IAdapter` does not have.
    """
    config_fields.check(config, ALLOWED, place)
    channels = config_fields.integers(config, "channels", T2IAdapterConfig.channels, 0, place)
    return T2IAdapterConfig(channels=channels, **config_fields.read_fields(config, FIELDS, place))


def to_diffusers_config(config: T2IAdapterConfig) -> dict[str, Any]:
    """The config.json of an adapter."""
    fields = config_fields.write_fields(config, FIELDS)
    return {"_class_name": CLASS_NAME, **fields, "channels": list(config.channels)}


def diffusers_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors under diffusers' names, where they have the original ones: those have a flat list of residual blocks."""
    layers = VARIANTS["full"].layers

    def name(key: str) -> str:
        if light:
            return "adapter." + re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", key)
        match = re.fullmatch(r"body\.(\d+)\.(.*)", key)
        if match is None:
            return f"adapter.{key}"
        stage, block = divmod(int(match[1]), layers)
        within = match[2] if match[2].startswith("in_conv.") else f"resnets.{block}.{match[2]}"
        return f"adapter.body.{stage}.{within}"

    if any(key.startswith("adapter.") for key in tensors):
        return dict(tensors)
    light = any(".out_conv." in key for key in tensors)
    return {name(key): tensor for key, tensor in tensors.items()}


def config_of(found: Shapes, place: object) -> T2IAdapterConfig:
    """The sizes of an adapter whose tensors have the shapes `found`, under diffusers' names.

    Grey hints and factors of 8 and 16 pixels give the first convolution different numbers of channels: 64 times 1 or 3,
    or 256 times as many.

    Raises:
        UserError: it is none.
    """
    sizes, light = OriginalSizes(found, place), "adapter.body.0.out_conv.weight" in found
    first, last = ("body.0.in_conv", "body.{}.out_conv") if light else ("conv_in", "body.{}.resnets.0.block1")
    if f"adapter.{first}.weight" not in found:
        raise UserError(f"{place} is no T2I-Adapter: it holds no adapter.{first}.weight")
    pixels = sizes.axis(f"adapter.{first}.weight", 1)
    factor = math.isqrt(pixels if pixels % 3 else pixels // 3)
    kind = KINDS[2] if light else KINDS[factor == 16]
    stages, layers = sizes.count("adapter.body"), sizes.count("adapter.body.0.resnets")
    channels = tuple(sizes.axis(f"adapter.{last.format(i)}.weight", 0) for i in range(stages - light))
    return T2IAdapterConfig(kind, 1 if pixels % 3 else 3, channels, layers, factor)
