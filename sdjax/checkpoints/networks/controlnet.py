"""ControlNets as PyTorch diffusers stores them (`ControlNetModel`), and as lllyasviel/ControlNet does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sdjax.checkpoints import config_fields, mapping
from sdjax.checkpoints.config_fields import Field
from sdjax.checkpoints.mapping import KeyTable, Modules, Shapes, conv, renamed
from sdjax.checkpoints.networks import unet
from sdjax.checkpoints.networks.blocks import original_modules
from sdjax.checkpoints.original_keys import Heads, OriginalSizes, Piece
from sdjax.models.controlnet import HINT_ENCODER, ControlNetConfig, controlnet_of

CLASS_NAME = "ControlNetModel"
ORDER, FEATURES = "controlnet_conditioning_channel_order", "conditioning_embedding_out_channels"
ALLOWED: dict[str, tuple[Any, ...]] = {ORDER: ("rgb", "bgr")}
FIELDS = (
    Field("hint_channels", "conditioning_channels", 3),
    Field("global_pool", "global_pool_conditions", False),
)
UNET_ONLY = ("out_channels", "time_cond_proj_dim", "up_block_types")
"""Keys of a UNet's config.json that a ControlNet's lacks."""
ROWS = (
    *conv(f"{HINT_ENCODER}/conv_in", f"{HINT_ENCODER}.conv_in"),
    *conv(f"{HINT_ENCODER}/blocks_*", f"{HINT_ENCODER}.blocks.*"),
    *conv(f"{HINT_ENCODER}/conv_out", f"{HINT_ENCODER}.conv_out"),
    *conv("controlnet_down_blocks_*", "controlnet_down_blocks.*"),
    *conv("controlnet_mid_block"),
)


def table(config: ControlNetConfig) -> KeyTable:
    """Rows for this config: those of its encoder, a UNet's, and its own."""
    return KeyTable((*unet.table(config.encoder).rows, *ROWS))


@functools.cache
def shapes(config: ControlNetConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    return mapping.traced(controlnet_of(config).init, *jax.eval_shape(config.example_inputs))


def from_diffusers_config(config: Mapping[str, Any], place: str = "controlnet/config.json") -> ControlNetConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `ControlNet` does not have.
    """
    config_fields.check(config, {"_class_name": (CLASS_NAME,), **ALLOWED}, place)
    theirs = {key: value for key, value in config.items() if key not in UNET_ONLY}
    encoder = unet.from_diffusers_config(
        {**theirs, "out_channels": config.get("in_channels", 4)}, place, unet.SIDES[:1]
    )
    return ControlNetConfig(
        encoder,
        hint_features=config_fields.integers(config, FEATURES, ControlNetConfig.hint_features, 0, place),
        bgr=config.get(ORDER) == "bgr",
        **config_fields.read_fields(config, FIELDS, place),
    )


def to_diffusers_config(config: ControlNetConfig) -> dict[str, Any]:
    """The config.json of a ControlNet.

    Raises:
        UserError: diffusers cannot express it, as of a UNet.
    """
    encoder = {k: v for k, v in unet.to_diffusers_config(config.encoder).items() if k not in UNET_ONLY}
    return {
        **encoder,
        **config_fields.write_fields(config, FIELDS),
        "_class_name": CLASS_NAME,
        FEATURES: list(config.hint_features),
        ORDER: "bgr" if config.bgr else "rgb",
    }


def pieces(config: ControlNetConfig) -> dict[str, Piece]:
    """The place of every tensor in the original layout, by diffusers' key."""
    attends = [depth > 0 for depth in config.encoder.depths]
    modules = _modules(attends, config.encoder.layers_per_block, len(config.hint_features))
    return {key: Piece(renamed(key, modules)) for key in mapping.stored_shapes(table(config), shapes(config))}


def _modules(attends: Sequence[bool], layers: int, halvings: int) -> Modules:
    """The original name of every module.

    Args:
        attends, layers: as of `original_modules`.
        halvings: of the hint's encoder, and one more.
    """
    last = 2 * halvings - 1
    hint = {"conv_in": 0, **{f"blocks.{i}": 2 * (i + 1) for i in range(last - 1)}, "conv_out": 2 * last}
    zeros = {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(len(attends) * (layers + 1))}
    own = {f"{HINT_ENCODER}.{name}": f"input_hint_block.{number}" for name, number in hint.items()}
    return original_modules(attends, layers) | own | zeros | {"controlnet_mid_block": "middle_block_out.0"}


def original_config(found: Shapes, place: object) -> ControlNetConfig:
    """The sizes of a ControlNet whose original tensors have the shapes `found`.

    Raises:
        UserError: a tensor that says a size is missing, or the levels are not alike.
    """
    first, hint = "input_blocks.0.0.weight", "input_hint_block.{}.weight"
    sizes = OriginalSizes(found, place)
    is_linear = sizes.rank("middle_block.1.proj_in.weight") == 2
    # Stable Diffusion 1, whose projections are convolutions, has eight heads; all later ones have 64 channels a head.
    heads = Heads(None if is_linear else 8)
    encoder = unet.original_config({**found, "out.2.weight": (sizes.axis(first, 1),)}, heads, place)
    features = itertools.takewhile(lambda n: hint.format(n + 2) in sizes, itertools.count(0, 4))
    return ControlNetConfig(
        encoder,
        hint_channels=sizes.axis(hint.format(0), 1),
        hint_features=tuple(sizes.axis(hint.format(n), 0) for n in features),
    )


def under_original_keys(found: Shapes, place: object) -> dict[str, tuple[int, ...]]:
    """Shapes by original key of those by diffusers' key, so that `original_config` reads both namings.

    Raises:
        UserError: a key is of no ControlNet.
    """
    sizes = OriginalSizes(found, place)
    levels = range(sizes.count("down_blocks"))
    attends = [sizes.count(f"down_blocks.{level}.attentions") > 0 for level in levels]
    halvings = sizes.count(f"{HINT_ENCODER}.blocks") // 2 + 1
    modules = _modules(attends, sizes.count("down_blocks.0.resnets"), halvings)
    return {renamed(key, modules): shape for key, shape in found.items()}
