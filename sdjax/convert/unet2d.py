"""The UNet without cross-attention as PyTorch diffusers stores it (`UNet2DModel`), and as LDM and ADM do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.convert import configs
from sdjax.convert.autoencoder import ATTENTION_BLOCK
from sdjax.convert.original import RESBLOCK as ORIGINAL_RESBLOCK
from sdjax.convert.rules import Row, Table, at, conv, embedding, norm
from sdjax.convert.unet import EMBEDDING_MLP, RESBLOCK
from sdjax.core.errors import UserError
from sdjax.models.conditioning import Cond
from sdjax.models.unet2d import UNet2D, UNet2DConfig

CLASS_NAME = "UNet2DModel"
# guided-diffusion's and LDM's own class, for sizes that diffusers' has no words for.
OWN_CLASS_NAME = "UNetModel"
# Blocks by whether they have attention, and whether residual blocks resample.
DOWN = {
    (False, False): "DownBlock2D",
    (True, False): "AttnDownBlock2D",
    (False, True): "ResnetDownsampleBlock2D",
    (True, True): "AttnDownBlock2D",
}
UP = {key: name.replace("Down", "Up") for key, name in DOWN.items()}

ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "attn_norm_num_groups": (None, 32),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1,),
    "downsample_type": ("conv", "resnet"),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D", None),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv", "resnet"),
}


def _side(blocks: str, resampler: str) -> tuple[Row, ...]:
    return (
        *at(f"{blocks}_*_resnets_*", f"{blocks}.*.resnets.*", RESBLOCK),
        *at(f"{blocks}_*_attentions_*", f"{blocks}.*.attentions.*", ATTENTION_BLOCK),
        *conv(f"{blocks}_*_{resampler}_*/conv", f"{blocks}.*.{resampler}.*.conv"),
        *at(f"{blocks}_*_{resampler}_*", f"{blocks}.*.{resampler}.*", RESBLOCK),
    )


TABLE = Table(
    rows=(
        *at("time_embedding", "time_embedding", EMBEDDING_MLP),
        *embedding("class_embedding", "class_embedding"),
        *conv("conv_in"),
        *_side("down_blocks", "downsamplers"),
        *at("mid_block_resnets_*", "mid_block.resnets.*", RESBLOCK),
        *at("mid_block_attentions_*", "mid_block.attentions.*", ATTENTION_BLOCK),
        *_side("up_blocks", "upsamplers"),
        *norm("conv_norm_out"),
        *conv("conv_out"),
    ),
    # What diffusers called the attention's layers before 0.17; the published LDM folders still say so.
    aliases=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)


def table(config: UNet2DConfig) -> Table:
    """The same rows for every config."""
    del config
    return TABLE


@functools.cache
def shapes(config: UNet2DConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    side = 2 ** (len(config.channels) - 1)
    cond = Cond(label=None if config.classes is None else jnp.zeros(1, int))
    x = jnp.zeros((1, side, side, config.in_channels))
    return jax.eval_shape(lambda: UNet2D(config).init(jax.random.key(0), x, jnp.zeros(1), cond))["params"]


def from_diffusers_config(config: Mapping[str, Any], place: str = "unet/config.json") -> UNet2DConfig:
    """Sizes from a config.json; a missing key means what it means to diffusers.

    Raises:
        UserError: a value asks for a structure that `UNet2D` does not have.
    """
    configs.check(config, ALLOWED, place)
    channels = configs.integers(config, "block_out_channels", (224, 448, 672, 896), 0, place)
    updown = config.get("downsample_type", "conv") == "resnet"
    if (config.get("upsample_type", "conv") == "resnet") != updown:
        raise configs.unsupported(config, "upsample_type", place, f"{config.get('downsample_type')!r} as the other")
    attends = []
    for key, names in (("down_block_types", DOWN), ("up_block_types", UP)):
        found = {names[here, updown]: here for here in (False, True)}
        default = [names[level > 0, False] for level in range(len(channels))]
        blocks = list(config.get(key, default if names is DOWN else default[::-1]))
        if len(blocks) != len(channels) or any(block not in found for block in blocks):
            raise configs.unsupported(config, key, place, f"{len(channels)} of {' and '.join(found)}")
        attends.append([found[block] for block in blocks])
    if attends[0] != attends[1][::-1]:
        raise configs.unsupported(config, "up_block_types", place, "the reverse of down_block_types")
    wide = config.get("attention_head_dim", 8)
    if wide is not None and (type(wide) is not int or wide < 1):
        raise configs.unsupported(config, "attention_head_dim", place, "a positive integer or null")
    classes = config.get("num_class_embeds")
    return UNet2DConfig(
        channels=channels,
        attention_levels=tuple(level for level, here in enumerate(attends[0]) if here),
        heads=tuple(1 if wide is None else max(level // wide, 1) for level in channels),
        in_channels=configs.integer(config, "in_channels", 3, place),
        out_channels=configs.integer(config, "out_channels", 3, place),
        layers_per_block=configs.integer(config, "layers_per_block", 2, place),
        groups=configs.groups(config, channels, place),
        classes=None if classes is None else configs.integer(config, "num_class_embeds", 0, place),
        scale_shift=config.get("resnet_time_scale_shift") == "scale_shift",
        resblock_updown=updown,
    )


def to_diffusers_config(config: UNet2DConfig) -> dict[str, Any]:
    """The config.json of a UNet.

    Raises:
        UserError: it has heads of different widths, or sinusoids of another width than its first level: diffusers'
            class has neither.
    """
    levels, widths = range(len(config.channels)), _head_widths(config)
    if not is_diffusers(config):
        raise UserError(
            f"diffusers' {CLASS_NAME} has neither heads of different widths ({sorted(widths)}) nor an embedding of the "
            f"timestep that is {config.width} wide where the first level has {config.channels[0]} channels"
        )
    kinds = [(level in config.attention_levels, config.resblock_updown) for level in levels]
    resample = "resnet" if config.resblock_updown else "conv"
    return {
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "attention_head_dim": widths.pop(),
        "attn_norm_num_groups": config.groups if config.scale_shift else None,
        "block_out_channels": list(config.channels),
        "down_block_types": [DOWN[kind] for kind in kinds],
        "downsample_type": resample,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "num_class_embeds": config.classes,
        "out_channels": config.out_channels,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "up_block_types": [UP[kind] for kind in reversed(kinds)],
        "upsample_type": resample,
    }


def is_diffusers(config: UNet2DConfig) -> bool:
    """Whether diffusers' class has such sizes: its heads are equally wide, its sinusoids as many as first channels."""
    return len(_head_widths(config)) == 1 and config.width in (None, config.channels[0])


def _head_widths(config: UNet2DConfig) -> set[int]:
    used = {*config.attention_levels, len(config.channels) - 1}
    return {config.channels[level] // config.heads[level] for level in used}


def to_config(config: UNet2DConfig) -> dict[str, Any]:
    """The config.json of a UNet: diffusers', or the sizes as they are where diffusers has no words for them."""
    if is_diffusers(config):
        return to_diffusers_config(config)
    return {"_class_name": OWN_CLASS_NAME, **dataclasses.asdict(config)}


def from_config(config: Mapping[str, Any], place: str = "unet/config.json") -> UNet2DConfig:
    """Sizes from what `to_config` made.

    Raises:
        UserError: a size is missing, of another type or unknown, or a value asks for a structure that is not here.
    """
    if config.get("_class_name") != OWN_CLASS_NAME:
        return from_diffusers_config(config, place)
    channels = configs.integers(config, "channels", (), 0, place)
    levels = config.get("attention_levels", ())
    if not isinstance(levels, list | tuple) or any(level not in range(len(channels)) for level in levels):
        raise configs.unsupported(config, "attention_levels", place, f"some of {list(range(len(channels)))}")
    flags = {name: config.get(name, False) for name in ("scale_shift", "resblock_updown")}
    for name, value in flags.items():
        if type(value) is not bool:
            raise configs.unsupported(config, name, place, "true or false")
    heads = configs.integers(config, "heads", (), len(channels), place)
    if any(channels[level] % heads[level] for level in (*levels, len(channels) - 1)):
        raise configs.unsupported(config, "heads", place, f"divisors of {list(channels)}")
    optional = {name: config.get(name) for name in ("width", "classes")}
    optional = {name: None if n is None else configs.integer(config, name, 1, place) for name, n in optional.items()}
    return UNet2DConfig(
        channels=channels,
        attention_levels=tuple(levels),
        heads=heads,
        in_channels=configs.integer(config, "in_channels", 3, place),
        out_channels=configs.integer(config, "out_channels", 3, place),
        layers_per_block=configs.integer(config, "layers_per_block", 2, place),
        groups=configs.groups({"norm_num_groups": config.get("groups", 32)}, channels, place),
        **optional,
        **flags,
    )


ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def from_original(
    tensors: Mapping[str, np.ndarray], config: UNet2DConfig, *, new_order: bool = False
) -> dict[str, np.ndarray]:
    """Tensors of openai/guided-diffusion or of LDM's `model.diffusion_model.` under diffusers' keys.

    Args:
        tensors: by key, without a prefix.
        config: their sizes.
        new_order: whether queries, keys and values of all heads stand together (`use_new_attention_order`, ADM at 64
            pixels); else those of each head do.

    Raises:
        UserError: a key is not one of such a UNet.
    """
    modules, found = _modules(config), {}
    for key, tensor in tensors.items():
        stem = next((stem for stem in modules if key.startswith(f"{stem}.")), None)
        if stem is None:
            raise UserError(f"{key} is no part of a UNet of {len(config.channels)} levels")
        name, rest = modules[stem], key.removeprefix(f"{stem}.")
        if rest.startswith("qkv."):
            heads, kind = config.heads[_level(name, config)], rest.removeprefix("qkv.")
            parts = split_heads(tensor, heads, new_order)
            found |= {f"{name}.to_{letter}.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
        elif rest.startswith("proj_out."):
            kind = rest.removeprefix("proj_out.")
            found[f"{name}.to_out.0.{kind}"] = tensor[:, :, 0] if kind == "weight" else tensor
        elif rest.startswith("norm."):
            found[f"{name}.group_norm.{rest.removeprefix('norm.')}"] = tensor
        else:
            found[f"{name}.{_inner(rest)}"] = tensor
    return found


def _inner(rest: str) -> str:
    """The key within a module: of a residual block, a resampling convolution, or as it is."""
    renamed = {old: new for new, old in ORIGINAL_RESBLOCK.items()} | {"op": "conv"}
    for old, new in renamed.items():
        if rest.startswith(f"{old}."):
            return new + rest.removeprefix(old)
    return rest


def split_heads(tensor: np.ndarray, heads: int, new_order: bool) -> Iterable[np.ndarray]:
    """Queries, keys and values of a joint layer of size 3 h d.

    Raises:
        UserError: its size is no multiple of three times the heads.
    """
    matrix = tensor[:, :, 0] if tensor.ndim == 3 else tensor
    if matrix.ndim == 0 or matrix.shape[0] % (3 * heads):
        raise UserError(f"a joint layer of shape {list(tensor.shape)} has no queries, keys and values of {heads} heads")
    if new_order:
        return np.split(matrix, 3)
    by_head = matrix.reshape(heads, 3, -1, *matrix.shape[1:])
    return [by_head[:, i].reshape(-1, *matrix.shape[1:]) for i in range(3)]


def _level(name: str, config: UNet2DConfig) -> int:
    kind, number = name.split(".")[:2]
    if kind == "mid_block":
        return -1
    return int(number) if kind == "down_blocks" else len(config.channels) - 1 - int(number)


@functools.cache
def _modules(config: UNet2DConfig) -> dict[str, str]:
    """diffusers' modules by the original's, the longest names first."""
    modules = {old: new for new, old in ENDS.items()}
    layers, levels = config.layers_per_block, len(config.channels)
    for i in range(levels):
        for j in range(layers):
            block = f"input_blocks.{1 + i * (layers + 1) + j}"
            modules |= {f"{block}.0": f"down_blocks.{i}.resnets.{j}", f"{block}.1": f"down_blocks.{i}.attentions.{j}"}
        modules[f"input_blocks.{(i + 1) * (layers + 1)}.0"] = f"down_blocks.{i}.downsamplers.0"
        attends = levels - 1 - i in config.attention_levels
        for j in range(layers + 1):
            block = f"output_blocks.{i * (layers + 1) + j}"
            modules |= {f"{block}.0": f"up_blocks.{i}.resnets.{j}"}
            if attends:
                modules[f"{block}.1"] = f"up_blocks.{i}.attentions.{j}"
        last = f"output_blocks.{i * (layers + 1) + layers}"
        modules[f"{last}.{1 + attends}"] = f"up_blocks.{i}.upsamplers.0"
    return dict(sorted(modules.items(), key=lambda item: -len(item[0])))
