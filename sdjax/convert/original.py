"""Keys of the original checkpoints (CompVis, Stability AI) beside diffusers' own, for every network.

The two differ in names and in three ways of storing: the autoencoder's attention is written as 1x1 convolutions,
OpenCLIP joins the weights of queries, keys and values, and keeps its projection transposed. Numbering of blocks:
CompVis/latent-diffusion ldm/modules/diffusionmodules/openaimodel.py and model.py; mlfoundations/open_clip model.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from sdjax.convert.files import Writable
from sdjax.convert.rules import SAME, Kind
from sdjax.core.errors import UserError

TRANSPOSED = Kind(lambda w: w.T, lambda w: w.T)
SQUEEZED = Kind(lambda w: w[:, :, 0, 0], lambda w: w[:, :, None, None])
Modules = dict[str, str]


class Piece(NamedTuple):
    """Where one of diffusers' tensors is in an original file.

    Attributes:
        key: the original key, without the network's prefix.
        kind: how the original is stored; `inward` makes diffusers' array of it.
        third: which third of the original's rows this is; None for all of them.
    """

    key: str
    kind: Kind = SAME
    third: int | None = None


RESBLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_RESBLOCK = {"conv_shortcut": "nin_shortcut", "norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": Piece("token_embedding.weight"),
    "text_model.embeddings.position_embedding.weight": Piece("positional_embedding"),
    "text_model.final_layer_norm.weight": Piece("ln_final.weight"),
    "text_model.final_layer_norm.bias": Piece("ln_final.bias"),
    "text_projection.weight": Piece("text_projection", TRANSPOSED),
}


def unet_pieces(keys: Iterable[str], levels: int, layers: int, crossed: tuple[bool, ...]) -> dict[str, Piece]:
    """The place of every tensor of a UNet.

    Args:
        keys: diffusers' keys.
        levels: how many resolutions there are.
        layers: residual blocks a level on the way down.
        crossed: whether each level, the finest first, has transformers; they shift the number of its upsampler.
    """
    modules = dict(UNET_ENDS)
    for number, name in ((0, "middle_block.0"), (1, "middle_block.2")):
        modules |= _below(f"mid_block.resnets.{number}", name, RESBLOCK)
    for i in range(levels):
        for j in range(layers):
            block = f"input_blocks.{1 + i * (layers + 1) + j}"
            modules |= _below(f"down_blocks.{i}.resnets.{j}", f"{block}.0", RESBLOCK)
            modules[f"down_blocks.{i}.attentions.{j}"] = f"{block}.1"
        modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (layers + 1)}.0.op"
        for j in range(layers + 1):
            block = f"output_blocks.{i * (layers + 1) + j}"
            modules |= _below(f"up_blocks.{i}.resnets.{j}", f"{block}.0", RESBLOCK)
            modules[f"up_blocks.{i}.attentions.{j}"] = f"{block}.1"
        place = 2 if crossed[levels - 1 - i] else 1
        modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (layers + 1) + layers}.{place}.conv"
    return {key: Piece(_renamed(key, modules)) for key in keys}


def vae_pieces(keys: Iterable[str], levels: int, layers: int) -> dict[str, Piece]:
    """The place of every tensor of an autoencoder with this many resolutions and encoder blocks at each."""
    modules: Modules = {}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        modules[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for number in (0, 1):
            modules |= _below(f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}", VAE_RESBLOCK)
        modules |= _below(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
    for i in range(levels):
        down, up = f"encoder.down.{i}", f"decoder.up.{levels - 1 - i}"
        for j in range(layers):
            modules |= _below(f"encoder.down_blocks.{i}.resnets.{j}", f"{down}.block.{j}", VAE_RESBLOCK)
            modules |= _below(f"encoder.down_blocks.{i}.attentions.{j}", f"{down}.attn.{j}", VAE_ATTENTION)
        for j in range(layers + 1):
            modules |= _below(f"decoder.up_blocks.{i}.resnets.{j}", f"{up}.block.{j}", VAE_RESBLOCK)
            modules |= _below(f"decoder.up_blocks.{i}.attentions.{j}", f"{up}.attn.{j}", VAE_ATTENTION)
        modules[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        modules[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    modules |= {name: name for name in ("quant_conv", "post_quant_conv", "quantize.embedding")}

    def piece(key: str) -> Piece:
        name = _renamed(key, modules)
        return Piece(name, SQUEEZED if is_vae_attention(name) else SAME)

    return {key: piece(key) for key in keys}


def is_vae_attention(key: str) -> bool:
    """Whether an original key is one of the matrices that are stored as 1x1 convolutions."""
    return re.search(r"\.(attn_1|attn\.\d+)\.(q|k|v|proj_out)\.weight$", key) is not None


def clip_pieces(keys: Iterable[str]) -> dict[str, Piece]:
    """CLIP-L keeps the names of Hugging Face transformers."""
    return {key: Piece(key) for key in keys}


def open_clip_pieces(keys: Iterable[str]) -> dict[str, Piece]:
    """The place of every tensor of an OpenCLIP text encoder."""
    return {key: OPEN_CLIP_ENDS.get(key) or _open_clip_layer(key) for key in keys}


def _open_clip_layer(key: str) -> Piece:
    number, _, rest = key.removeprefix("text_model.encoder.layers.").partition(".")
    layer, name = f"transformer.resblocks.{number}", rest.split(".")
    if name[0] == "self_attn" and name[1] in ("q_proj", "k_proj", "v_proj"):
        return Piece(f"{layer}.attn.in_proj_{name[2]}", third=("q_proj", "k_proj", "v_proj").index(name[1]))
    return Piece(f"{layer}.{_renamed(rest, OPEN_CLIP_LAYER)}")


def _below(theirs: str, ours: str, names: Mapping[str, str]) -> Modules:
    return {f"{theirs}.{new}": f"{ours}.{old}" for new, old in names.items()}


def _renamed(key: str, modules: Modules) -> str:
    """The key with its longest known beginning replaced."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (module := ".".join(parts[:end])) in modules:
            return ".".join((modules[module], *parts[end:]))
    raise UserError(f"{key} has no name in the original layout")


@dataclass(frozen=True)
class Part:
    """One of diffusers' tensors in an original one, read when it becomes an array."""

    stored: Writable
    piece: Piece

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.stored.shape)
        if self.piece.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return self.piece.kind.inward(np.broadcast_to(np.float32(0), shape)).shape

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array, third = np.asarray(self.stored), self.piece.third
        if third is not None:
            array = np.split(array, 3)[third]
        return self.piece.kind.inward(array).astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Whole:
    """An original tensor made of diffusers' ones, joined when it becomes an array."""

    parts: tuple[np.ndarray, ...]
    kind: Kind

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.kind.outward(self.parts[0]).shape
        return first if len(self.parts) == 1 else (sum(part.shape[0] for part in self.parts), *first[1:])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
        return self.kind.outward(array).astype(dtype or self.dtype, copy=False)


def inward(pieces: Mapping[str, Piece], originals: Mapping[str, Writable]) -> dict[str, Part]:
    """Tensors under diffusers' keys; all original keys must be there."""
    return {key: Part(originals[piece.key], piece) for key, piece in pieces.items()}


def outward(pieces: Mapping[str, Piece], arrays: Mapping[str, np.ndarray]) -> dict[str, Whole]:
    """The inverse of `inward`, for arrays under diffusers' keys."""
    parts: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    kinds = {piece.key: piece.kind for piece in pieces.values()}
    for key, piece in pieces.items():
        parts[piece.key][piece.third or 0] = arrays[key]
    return {key: Whole(tuple(array for _, array in sorted(found.items())), kinds[key]) for key, found in parts.items()}
