"""Custom Diffusion (Kumari et al. 2023): a file of the cross-attentions' weights that learnt, as diffusers has it.

Its keys are `ATTENTION.processor.to_k_custom_diffusion.weight`, those of `to_v` and, where they were trained, of `to_q`
and `to_out`. diffusers counts all attentions of a UNet: an empty tensor under `ATTENTION.processor` stands for one that
was not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints.checkpoint import FORMATS, Checkpoint, Patch
from sdjax.checkpoints.mapping import Put, export, places, read
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.checkpoints.storage.weights import read_file
from sdjax.core.errors import UserError
from sdjax.core.tree import flatten, merge, unflatten

UNET = "unet"
FILES = ("pytorch_custom_diffusion_weights.safetensors", "pytorch_custom_diffusion_weights.bin")
TRAINED = re.compile(r"(.*attn2)\.(to_[kvq]|to_out)(\.0)?\.(weight|bias)")
STORED = re.compile(r"(.*attn2)\.processor\.(to_\w+)_custom_diffusion(\.0)?\.(weight|bias)")


def add_custom_diffusion(source: Path, put: Put | None = None) -> Patch:
    """The weights of a file, or of the one in a folder, in place of a UNet's own.

    Raises:
        UserError: by the patch, where there is none, or it holds something else or is for another UNet.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        file = next((source / name for name in FILES if (source / name).is_file()), source)
        if not file.is_file():
            raise UserError(f"{source} holds no weights of Custom Diffusion, {' or '.join(FILES)}")
        tensors = {_theirs(key, file): t for key, t in read_file(file).tensors.items() if 0 not in t.shape}
        unet = checkpoint.components[UNET]
        form = FORMATS[UNET]
        table, shapes = form.table(unet.config), flatten(form.shapes(unet.config))
        named = [name for name, place in places(table, shapes).items() if place.key in tensors]
        own = unflatten({name: shapes[name] for name in named})
        dtype = next(iter(flatten(unet.params).values())).dtype
        found = flatten(read(table, tensors, own, dtype, file))
        placed = {name: put(array, f"{UNET}/{name}") if put else array for name, array in found.items()}
        return checkpoint.replace_component(
            UNET, dataclasses.replace(unet, params=merge(unet.params, unflatten(placed)))
        )

    return patch


def _theirs(key: str, file: Path) -> str:
    """diffusers' key of the weight that one of a file stands for."""
    if match := STORED.fullmatch(key):
        return f"{match[1]}.{match[2]}{match[3] or ''}.{match[4]}"
    raise UserError(f"{file} is no file of Custom Diffusion: it has {key!r}")


def write_custom_diffusion(folder: Path, checkpoint: Checkpoint, names: set[str]) -> None:
    """Write those weights of a UNet's cross-attentions that were trained.

    Args:
        names: of all that were trained, e.g. "unet/mid_block_attentions_0/transformer_blocks_0/attn2/to_k/kernel".

    Raises:
        UserError: among them are others; as `write_safetensors`.
    """
    unet, form = checkpoint.components[UNET], FORMATS[UNET]
    table, params = form.table(unet.config), flatten(unet.params)
    keys = {name: place.key for name, place in places(table, params).items()}
    chosen: dict[str, Any] = {name: params[name] for name in keys if f"{UNET}/{name}" in names}
    for name in chosen:
        if not TRAINED.fullmatch(keys[name]):
            raise UserError(f"config.task.export='custom_diffusion' cannot hold {UNET}/{name}, which was trained, too")
    shapes = flatten(form.shapes(unet.config))
    tensors = export(table, unflatten(chosen), unflatten({name: shapes[name] for name in chosen}), folder)
    write_safetensors(folder / FILES[0], {**_empty(keys.values()), **_stored(tensors)}, np.float32)


def _stored(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {TRAINED.sub(r"\1.processor.\2_custom_diffusion\3.\4", key): tensor for key, tensor in tensors.items()}


def _empty(keys: Any) -> dict[str, np.ndarray]:
    """Stand-ins of self-attentions."""
    found = {match[1] for key in keys if (match := re.fullmatch(r"(.*attn1)\.to_q\.weight", key))}
    return {f"{attention}.processor": np.zeros(0, np.float32) for attention in found}
