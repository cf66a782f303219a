"""The sizes of networks in the original naming, read off the shapes of their tensors, as diffusers' configs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.convert import autoencoder, clip, unet
from sdjax.core.errors import UserError
from sdjax.models.bert import BertConfig
from sdjax.models.unet2d import UNet2DConfig

Shapes = Mapping[str, tuple[int, ...]]
HEAD_WIDTH, GROUPS = 64, 32
CODEBOOK = "quantize.embedding.weight"


class Heads(NamedTuple):
    """How many heads attention has, which no shape says: the same number at every level, or as many as fit.

    Attributes:
        number: of every level; None where each head has `width` channels.
    """

    number: int | None = None
    width: int = HEAD_WIDTH

    def of(self, channels: int) -> int:
        """The heads of a level."""
        return self.number or max(channels // self.width, 1)


class _Shapes:
    """Shapes by key; a key that is not there, or has fewer axes, is the user's file's fault."""

    def __init__(self, shapes: Shapes, place: object) -> None:
        self._shapes, self._place = shapes, place
        self._numbers: dict[str, set[int]] = defaultdict(set)
        for key in shapes:
            parts = key.split(".")
            for i, part in enumerate(parts):
                if part.isdecimal() and len(part) < 4:
                    self._numbers[".".join(parts[:i])].add(int(part))

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def axis(self, key: str, axis: int) -> int:
        """The length of one axis of the tensor `key`."""
        shape = self._shapes.get(key)
        if shape is None or not -len(shape) <= axis < len(shape):
            found = "lacks it" if shape is None else f"has it with shape {list(shape)}"
            raise UserError(f"the sizes of {self._place} follow from {key}, and it {found}")
        return shape[axis]

    def rank(self, key: str) -> int:
        """The number of axes of the tensor `key`."""
        self.axis(key, 0)
        return len(self._shapes[key])

    def count(self, stem: str) -> int:
        """How many numbers follow one another below `stem`, from 0."""
        numbers = self._numbers.get(stem, set())
        return next(n for n in range(len(numbers) + 1) if n not in numbers)


def unet_config(shapes: Shapes, heads: Heads, place: object) -> dict[str, Any]:
    """diffusers' config of a UNet whose original tensors have `shapes`.

    Raises:
        UserError: a tensor that says a size is missing, or the levels are not alike.
    """
    sizes = _Shapes(shapes, place)
    levels = _levels(sizes)
    if not all(levels):
        raise UserError(f"{place} lacks residual blocks of its UNet")
    if len({len(level) for level in levels}) > 1 or any(len(set(level)) > 1 for level in levels):
        raise UserError(f"{place} has levels of unlike blocks (a distilled or pruned model), which are not supported")
    channels = [level[0][0] for level in levels]
    depths = [level[0][1] for level in levels]
    mid_depth = sizes.count("middle_block.1.transformer_blocks")
    if depths[-1] not in (0, mid_depth) or mid_depth == 0:
        raise UserError(f"{place} has depths {depths} and {mid_depth} in the middle, which is not supported")
    crossed = [depth > 0 for depth in depths]
    return {
        **_conditioning(sizes, crossed),
        "_class_name": unet.CLASS_NAME,
        "act_fn": "silu",
        "attention_head_dim": [heads.of(width) for width in channels],
        "block_out_channels": channels,
        "cross_attention_dim": sizes.axis("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "down_block_types": [unet.DOWN[here] for here in crossed],
        "in_channels": sizes.axis("input_blocks.0.0.weight", 1),
        "layers_per_block": len(levels[0]),
        "norm_num_groups": 32,
        "out_channels": sizes.axis("out.2.weight", 0),
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [mid_depth],
        "up_block_types": [unet.UP[here] for here in reversed(crossed)],
        "use_linear_projection": sizes.rank("middle_block.1.proj_in.weight") == 2,
    }


def _levels(sizes: _Shapes) -> list[list[tuple[int, int]]]:
    """For each level its residual blocks, as (channels, depth of the transformer or 0)."""
    levels: list[list[tuple[int, int]]] = [[]]
    for i in range(1, sizes.count("input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in sizes:
            levels.append([])
            continue
        depth = sizes.count(f"input_blocks.{i}.1.transformer_blocks")
        levels[-1].append((sizes.axis(f"input_blocks.{i}.0.out_layers.3.weight", 0), depth))
    return levels


def _conditioning(sizes: _Shapes, crossed: list[bool]) -> dict[str, Any]:
    if "label_emb.0.0.weight" in sizes:
        return {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": unet.TIME_IDS_WIDTH,
            "projection_class_embeddings_input_dim": sizes.axis("label_emb.0.0.weight", 1),
        }
    if "label_emb.weight" in sizes:  # the x4 upscaler: no self-attention but at the coarsest level
        return {
            "num_class_embeds": sizes.axis("label_emb.weight", 0),
            "only_cross_attention": [True] * (len(crossed) - 1) + [False],
        }
    return {}


def unet2d_config(shapes: Shapes, heads: Heads, place: object) -> UNet2DConfig:
    """The sizes of a UNet without cross-attention whose original tensors have `shapes`.

    Where residual blocks change the resolution their keys are as any other's; only that one stands behind another in
    the last block of each level on the way up tells how many levels there are.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes = _Shapes(shapes, place)
    blocks = sizes.count("output_blocks")
    raised = [
        kind
        for i in range(blocks)
        for kind in ("in_layers.2", "conv")
        for j in (1, 2)
        if f"output_blocks.{i}.{j}.{kind}.weight" in sizes
    ]
    levels = len(raised) + 1
    if blocks % levels or blocks <= levels:
        raise UserError(f"{place} has {blocks} blocks on the way up, which are no {levels} levels of equal length")
    layers = blocks // levels - 1
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    channels = tuple(sizes.axis(f"input_blocks.{i}.0.out_layers.3.weight", 0) for i in firsts)
    if any(level % GROUPS for level in channels):
        raise UserError(f"{place} has a UNet of {list(channels)} channels; each must be a multiple of {GROUPS}")
    width = sizes.axis("time_embed.0.weight", 1)
    return UNet2DConfig(
        channels=channels,
        attention_levels=tuple(n for n, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in sizes),
        heads=tuple(map(heads.of, channels)),
        width=None if width == channels[0] else width,
        in_channels=sizes.axis("input_blocks.0.0.weight", 1),
        out_channels=sizes.axis("out.2.weight", 0),
        layers_per_block=layers,
        classes=sizes.axis("label_emb.weight", 0) if "label_emb.weight" in sizes else None,
        scale_shift=sizes.axis("input_blocks.1.0.emb_layers.1.weight", 0) == 2 * channels[0],
        resblock_updown="in_layers.2" in raised,
    )


def bert_config(shapes: Shapes, place: object) -> BertConfig:
    """The sizes of LDM's text encoder, whose keys are those of x-transformers; it has eight heads.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes = _Shapes(shapes, place)
    return BertConfig(
        vocab_size=sizes.axis("token_emb.weight", 0),
        width=sizes.axis("token_emb.weight", 1),
        layers=sizes.count("attn_layers.layers") // 2,
        heads=BertConfig.heads,
        head_size=sizes.axis("attn_layers.layers.0.1.to_q.weight", 0) // BertConfig.heads,
        max_length=sizes.axis("pos_emb.emb.weight", 0),
    )


def vae_config(shapes: Shapes, scaling_factor: float, place: object) -> dict[str, Any]:
    """diffusers' config of an autoencoder whose original tensors have `shapes`.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes = _Shapes(shapes, place)
    levels = max(sizes.count("encoder.down"), 1)
    attends = [sizes.count(f"encoder.down.{i}.attn") > 0 for i in range(levels)]
    is_vq = CODEBOOK in sizes
    special: dict[str, Any] = {"num_vq_embeddings": sizes.axis(CODEBOOK, 0)} if is_vq else {}
    if "encoder.mid.attn_1.norm.weight" not in sizes:
        special["mid_block_add_attention"] = False
    return special | {
        "_class_name": autoencoder.VQ_CLASS_NAME if is_vq else autoencoder.CLASS_NAME,
        "act_fn": "silu",
        "block_out_channels": [sizes.axis(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)],
        "down_block_types": [autoencoder.DOWN[here] for here in attends],
        "in_channels": sizes.axis("encoder.conv_in.weight", 1),
        "latent_channels": sizes.axis("post_quant_conv.weight", 0),
        "layers_per_block": max(sizes.count("encoder.down.0.block"), 1),
        "norm_num_groups": 32,
        "out_channels": sizes.axis("decoder.conv_out.weight", 0),
        "scaling_factor": scaling_factor,
        "up_block_types": [autoencoder.UP[here] for here in reversed(attends)],
    }


def clip_config(shapes: Shapes, place: object) -> dict[str, Any]:
    """The config of a CLIP text encoder under the names of transformers.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes, stem = _Shapes(shapes, place), "text_model."
    return _text_config(
        vocabulary=sizes.axis(f"{stem}embeddings.token_embedding.weight", 0),
        width=sizes.axis(f"{stem}embeddings.token_embedding.weight", -1),
        length=sizes.axis(f"{stem}embeddings.position_embedding.weight", 0),
        layers=sizes.count("text_model.encoder.layers"),
        feed_forward=sizes.axis(f"{stem}encoder.layers.0.mlp.fc1.weight", 0),
        projection=None,
    )


def open_clip_config(shapes: Shapes, projected: bool, place: object) -> dict[str, Any]:
    """The config of an OpenCLIP text encoder.

    Without `projected` (Stable Diffusion 2) what is used ends with the last layer but one. A file holds the layer
    after it exactly where it holds the projection, which is not used either.

    Raises:
        UserError: a tensor that says a size is missing.
    """
    sizes = _Shapes(shapes, place)
    layers = sizes.count("transformer.resblocks")
    return _text_config(
        vocabulary=sizes.axis("token_embedding.weight", 0),
        width=sizes.axis("token_embedding.weight", -1),
        length=sizes.axis("positional_embedding", 0),
        layers=layers - 1 if not projected and "text_projection" in sizes else layers,
        feed_forward=sizes.axis("transformer.resblocks.0.mlp.c_fc.weight", 0),
        projection=sizes.axis("text_projection", -1) if projected else None,
        activation="gelu",
    )


def _text_config(
    vocabulary: int,
    width: int,
    length: int,
    layers: int,
    feed_forward: int,
    projection: int | None,
    activation: str = "quick_gelu",
) -> dict[str, Any]:
    """CLIP's last two tokens are its begin and end of text (openai/CLIP simple_tokenizer.py)."""
    return ({} if projection is None else {"projection_dim": projection}) | {
        "architectures": [clip.PLAIN if projection is None else clip.PROJECTED],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": length,
        "model_type": "clip_text_model",
        "num_attention_heads": max(width // HEAD_WIDTH, 1),
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
    }
