"""Checkpoints of Stable Diffusion's family written into one file of the original naming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints.checkpoint import FORMATS, TOKENIZERS, Checkpoint, family_of
from sdjax.checkpoints.families import FAMILIES, UNET, VAE
from sdjax.checkpoints.layouts.original import Detected, Network, networks_in, shapes_of
from sdjax.checkpoints.mapping import Writable, export
from sdjax.checkpoints.networks import autoencoder, clip, unet, unet2d
from sdjax.checkpoints.original_keys import Piece, outward
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.models.unet2d import UNet2DConfig


def write_single_file(path: str | Path, checkpoint: Checkpoint, dtype: str | None = "float32") -> str:
    """Writes all networks under their original keys, and returns the family.

    What the original layout has no place for is not written: the tokenizer, and the scheduler but for what it predicts.
    Nor is what diffusers' folders lack: the last layer and the projection of Stable Diffusion 2's text encoder, unused.
    A `dtype` of None keeps the type of each array.

    Raises:
        UserError: the layout cannot express the checkpoint, `path` exists and was not written here, the parameters do
            not fit their configs, or they are not finite in `dtype`.
    """
    family = family_of(checkpoint)
    width = checkpoint.components["unet"].extra.get(unet.SIZE_WIDTH) or 256
    if width != 256:
        raise UserError(
            f"{unet.SIZE_WIDTH} = {width}: a single file does not tell it, and is read as 256; write a folder"
        )
    prediction = checkpoint.scheduler.get("prediction_type", "epsilon")
    prefixes = {"unet": UNET, "vae": VAE, **FAMILIES[family].prefixes}
    tensors: dict[str, Writable] = {}
    for name, part in checkpoint.components.items():
        form, named = FORMATS[name], f"the {name} to be written"
        arrays = export(form.table(part.config), part.params, form.shapes(part.config), named)
        wholes = outward(pieces_of(name, prefixes[name], part.config), arrays)
        tensors |= {prefixes[name] + key: whole for key, whole in wholes.items()}
    in_channels = checkpoint.components["unet"].config.in_channels
    _check_expressed(checkpoint, networks_in(shapes_of(tensors), Detected(family, prediction, "", in_channels), path))
    if checkpoint.scheduler.get("rescale_betas_zero_snr"):
        marks = ("ztsnr", "v_pred") if prediction == "v_prediction" else ("ztsnr",)
        tensors |= {mark: np.zeros(0, np.float32) for mark in marks}  # as other programs mark such files
    said = {"modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction}
    write_safetensors(path, tensors, None if dtype is None else dtype_named(dtype), said)
    return family


def pieces_of(name: str, prefix: str, config: Any) -> dict[str, Piece]:
    """The place of each tensor of a network of Stable Diffusion's or LDM's, by diffusers' key."""
    if name in TOKENIZERS:
        return clip.pieces(config, prefix.endswith(".model."))
    if name == "vae":
        return autoencoder.pieces(config)
    return unet2d.pieces(config) if isinstance(config, UNet2DConfig) else unet.pieces(config)


def _check_expressed(checkpoint: Checkpoint, read: list[Network]) -> None:
    """Refuses what would be read back as another model: the layout says no head counts, groups, scales."""
    for network in read:
        ours, theirs = vars(checkpoint.components[network.name].config), vars(network.config)
        lost = [f"{key} {ours[key]} (not {theirs[key]})" for key in ours if ours[key] != theirs[key]]
        lost = [text for text in lost if not text.startswith("eos_token_id 2 ")]  # the older way to say the same
        if lost:
            raise UserError(f"the original layout cannot say of the {network.name}: {', '.join(lost)}")
