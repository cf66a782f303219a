"""The UNet of Stable Diffusion 1, 2 and XL as PyTorch diffusers stores it (`UNet2DConditionModel`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.convert import configs
from sdjax.convert.rules import LINEAR, POINTWISE, Row, Table, at, conv, embedding, layer, norm
from sdjax.core.errors import UserError
from sdjax.models.conditioning import Cond
from sdjax.models.unet import UNet, UNetConfig

CLASS_NAME = "UNet2DConditionModel"
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
TIME_IDS_WIDTH = 256  # SDXL's sinusoids of sizes and crops; they are made outside the network
DEFAULT_CHANNELS = (320, 640, 1280, 1280)

ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "addition_time_embed_dim": (None, TIME_IDS_WIDTH),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False, True),  # read by another mid_block_type only
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "use_linear_projection": (False, True),
}

RESBLOCK = (
    *norm("norm1"),
    *conv("conv1"),
    *layer("time_emb_proj"),
    *norm("norm2"),
    *conv("conv2"),
    *conv("conv_shortcut"),
)
ATTENTION = (*layer("to_q"), *layer("to_k"), *layer("to_v"), *layer("to_out", "to_out.0"))
TRANSFORMER_BLOCK = (
    *norm("norm1"),
    *at("attn1", "attn1", ATTENTION),
    *norm("norm2"),
    *at("attn2", "attn2", ATTENTION),
    *norm("norm3"),
    *layer("ff/proj_in", "ff.net.0.proj"),
    *layer("ff/proj_out", "ff.net.2"),
)
EMBEDDING_MLP = (*layer("linear_1"), *layer("linear_2"), *layer("cond_proj"))


def table(config: UNetConfig) -> Table:
    """Rows for this config: only the projections around the transformers depend on it."""
    projection = LINEAR if config.linear_projection else POINTWISE
    transformer = (
        *norm("norm"),
        *layer("proj_in", kind=projection),
        *at("transformer_blocks_*", "transformer_blocks.*", TRANSFORMER_BLOCK),
        *layer("proj_out", kind=projection),
    )
    blocks: tuple[Row, ...] = (
        *at("mid_block_resnets_*", "mid_block.resnets.*", RESBLOCK),
        *at("mid_block_attentions_*", "mid_block.attentions.*", transformer),
        *conv("down_blocks_*_downsamplers_*/conv", "down_blocks.*.downsamplers.*.conv"),
        *conv("up_blocks_*_upsamplers_*/conv", "up_blocks.*.upsamplers.*.conv"),
    )
    for side in ("down_blocks", "up_blocks"):
        blocks += at(f"{side}_*_resnets_*", f"{side}.*.resnets.*", RESBLOCK)
        blocks += at(f"{side}_*_attentions_*", f"{side}.*.attentions.*", transformer)
    return Table(
        (
            *at("time_embedding", "time_embedding", EMBEDDING_MLP),
            *at("add_embedding", "add_embedding", EMBEDDING_MLP),
            *embedding("class_embedding", "class_embedding"),
            *conv("conv_in"),
            *blocks,
            *norm("conv_norm_out"),
            *conv("conv_out"),
        )
    )


@functools.cache
def shapes(config: UNetConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    side = 2 ** (len(config.channels) - 1)

    def init() -> Any:
        cond = Cond(
            context=jnp.zeros((1, 1, config.context_dim)),
            vector=None if config.vector_dim is None else jnp.zeros((1, config.vector_dim)),
            label=jnp.zeros(1, int),
            guidance=None if config.guidance_dim is None else jnp.zeros((1, config.guidance_dim)),
        )
        return UNet(config).init(jax.random.key(0), jnp.zeros((1, side, side, config.in_channels)), jnp.zeros(1), cond)

    return jax.eval_shape(init)["params"]


def from_diffusers_config(config: Mapping[str, Any], place: str = "unet/config.json") -> UNetConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    diffusers' `attention_head_dim` is the number of heads of each level (huggingface/diffusers issue 2011).

    Raises:
        UserError: a value asks for a structure that `UNet` does not have.
    """
    channels = configs.integers(config, "block_out_channels", DEFAULT_CHANNELS, 0, place)
    configs.check(config, ALLOWED | {"time_embedding_dim": (None, 4 * channels[0])}, place)
    levels = len(channels)
    crossed = _crossed(config, levels, place)
    depths = _depths(config, crossed, place)
    heads = configs.integers(config, "attention_head_dim", 8, levels, place)
    if any(c % h for c, h, here in zip(channels, heads, [*crossed[:-1], True], strict=True) if here):
        raise configs.unsupported(config, "attention_head_dim", place, f"divisors of the channels {list(channels)}")
    return UNetConfig(
        channels=channels,
        depths=tuple(depth if here else 0 for depth, here in zip(depths, crossed, strict=True)),
        mid_depth=depths[-1],
        heads=heads,
        context_dim=_equal(config, "cross_attention_dim", 1280, levels, place),
        vector_dim=_vector_dim(config, place),
        classes=_optional(config, "num_class_embeds", place),
        guidance_dim=_optional(config, "time_cond_proj_dim", place),
        cross_only=_cross_only(config, crossed, place),
        linear_projection=config.get("use_linear_projection", False),
        in_channels=configs.integer(config, "in_channels", 4, place),
        out_channels=configs.integer(config, "out_channels", 4, place),
        layers_per_block=_equal(config, "layers_per_block", 2, levels, place),
        groups=configs.groups(config, channels, place),
    )


def to_diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """The config.json of a UNet, without what the sizes do not say (`sample_size`, `upcast_attention`).

    Raises:
        UserError: diffusers cannot express it: its middle block has as many transformers as the last level.
    """
    if config.mid_depth == 0 or config.depths[-1] not in (0, config.mid_depth):
        raise UserError(f"diffusers has no UNet with depths {config.depths} and mid_depth {config.mid_depth}")
    layers = [depth or 1 for depth in config.depths[:-1]] + [config.mid_depth]
    crossed = [bool(depth) for depth in config.depths]
    added: dict[str, Any] = {"addition_embed_type": None}
    if config.vector_dim is not None:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_IDS_WIDTH,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    if config.cross_only:
        added["only_cross_attention"] = [level in config.cross_only for level in range(len(crossed))]
    return added | {
        "_class_name": CLASS_NAME,
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context_dim,
        "down_block_types": [DOWN[here] for here in crossed],
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": config.groups,
        "num_class_embeds": config.classes,
        "out_channels": config.out_channels,
        "time_cond_proj_dim": config.guidance_dim,
        "transformer_layers_per_block": layers,
        "up_block_types": [UP[here] for here in reversed(crossed)],
        "use_linear_projection": config.linear_projection,
    }


def _crossed(config: Mapping[str, Any], levels: int, place: str) -> list[bool]:
    """Which levels have transformers, the finest first; both sides of the UNet must agree."""
    down = config.get("down_block_types", [DOWN[1]] * 3 + [DOWN[0]])
    up = config.get("up_block_types", [UP[0]] + [UP[1]] * 3)
    for key, types, known in (("down_block_types", down, DOWN), ("up_block_types", up, UP)):
        if not isinstance(types, list | tuple) or len(types) != levels or any(kind not in known for kind in types):
            raise configs.unsupported(config, key, place, f"{levels} of {' or '.join(known)}")
    crossed = [bool(DOWN.index(kind)) for kind in down]
    if [bool(UP.index(kind)) for kind in reversed(up)] != crossed:
        raise configs.unsupported(config, "up_block_types", place, "the mirror image of down_block_types")
    return crossed


def _depths(config: Mapping[str, Any], crossed: list[bool], place: str) -> tuple[int, ...]:
    """Transformer blocks of each level, the last one's being the middle's too; a level without them may say 0."""
    key, mirrored = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    given = config.get(key, 1)
    if isinstance(given, list | tuple) and len(given) == len(crossed):
        used = [*crossed[:-1], True]
        given = [depth if here or depth != 0 else 1 for depth, here in zip(given, used, strict=True)]
    depths = configs.integers({**config, key: given}, key, 1, len(crossed), place)
    up = config.get(mirrored)
    if up is not None and up != list(reversed(depths)):
        raise configs.unsupported(config, mirrored, place, f"None or the mirror image of {key}")
    return depths


def _cross_only(config: Mapping[str, Any], crossed: list[bool], place: str) -> tuple[int, ...]:
    """The levels whose transformers lack self-attention; diffusers counts from the finest on both sides."""
    value, levels = config.get("only_cross_attention", False), len(crossed)
    only = [value] * levels if isinstance(value, bool) else value
    if not isinstance(only, list | tuple) or len(only) != levels or any(type(here) is not bool for here in only):
        raise configs.unsupported(config, "only_cross_attention", place, f"True or False or {levels} of them")
    return tuple(level for level in range(levels) if only[level] and crossed[level])


def _optional(config: Mapping[str, Any], key: str, place: str) -> int | None:
    return None if config.get(key) is None else configs.integer(config, key, 0, place)


def _equal(config: Mapping[str, Any], key: str, default: int, levels: int, place: str) -> int:
    values = configs.integers(config, key, default, levels, place)
    if len(set(values)) > 1:
        raise configs.unsupported(config, key, place, "the same at every level")
    return values[0]


def _vector_dim(config: Mapping[str, Any], place: str) -> int | None:
    if config.get("addition_embed_type") is None:
        return None
    key = "projection_class_embeddings_input_dim"
    if config.get(key) is None:
        raise configs.unsupported(config, key, place, "a positive integer where addition_embed_type is 'text_time'")
    return configs.integer(config, key, 0, place)
