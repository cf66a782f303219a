"""Checkpoints in one file of the original naming: read, and written.

Such a file says neither its family nor its sizes: they are found in its keys, shapes and metadata. It holds no
tokenizer either; CLIP's published one is what all these models were trained with.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdjax.convert.averages import chosen_weights
from sdjax.convert.components import FORMATS, TOKENIZERS, Checkpoint, Component, Dtypes, Reading, read_params
from sdjax.convert.families import FAMILIES, SKIPPED, UNET, VAE, find_family, find_prediction, scheduler_config
from sdjax.convert.files import Writable, write_safetensors
from sdjax.convert.layout import Detected, Network, networks_in, networks_of, vae_in
from sdjax.convert.original import SQUEEZED, Part, Piece, inward, is_vae_attention, outward
from sdjax.convert.rules import Kind, Placer, check_shapes, export
from sdjax.convert.weights import Source, read_file
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named

logger = logging.getLogger("sdjax")

TOKENIZER_FOLDERS = Path(__file__).parents[1] / "data" / "clip"
UNSQUEEZED = Kind(SQUEEZED.outward, SQUEEZED.inward)
ALIASES = (  # the first files were written before transformers had the inner name
    (
        r"^((cond_stage_model|conditioner\.embedders\.0)\.transformer\.)(embeddings|encoder|final_layer_norm)\.",
        r"\1text_model.\3.",
    ),
)


def detect(source: Source, *, family: str | None = None, prediction: str | None = None) -> Detected:
    """What `read_single_file` takes a file for; of a safetensors file only the header is read.

    Raises:
        UserError: as `read_single_file`.
    """
    stored = read_file(source)
    first = stored.tensors.get(f"{UNET}input_blocks.0.0.weight")
    in_channels = None if first is None or len(first.shape) < 2 else int(first.shape[1])
    name = find_family(stored.tensors, in_channels, family, stored.path)
    assert in_channels is not None, "a file of a family has a UNet"
    return Detected(name, *find_prediction(name, stored.tensors, stored.facts, in_channels, prediction), in_channels)


def read_single_file(
    source: Source,
    dtype: Dtypes = "float32",
    *,
    family: str | None = None,
    prediction: str | None = None,
    weights: str = "model",
    place: Placer | None = None,
) -> Checkpoint:
    """Reads a `.safetensors` file, or a `.ckpt` through torch's restricted loader; `detect` says what it is taken for.

    Args:
        dtype, place: as in `sdjax.convert.folder.read_folder`.
        family: one of `FAMILIES`; None to find out.
        prediction: "epsilon" or "v_prediction"; None to find out.
        weights: "model", or "ema" for the UNet's average over training, which some files hold besides.

    Raises:
        UserError: the file is missing or corrupt, is of no family here (the message says what it looks like), or lacks
            keys of its family or has others (both are listed).
    """
    stored = read_file(source)
    found, path = detect(stored, family=family, prediction=prediction), stored.path
    logger.info("%s is taken for %s", path.name, found)
    tensors = wanted(chosen_weights(stored.tensors, weights, path))
    networks = networks_in(shapes_of(tensors), found, path)
    expected = {key: shape for network in networks for key, shape in network.original_shapes().items()}
    tensors = as_expected(tensors, networks)
    check_shapes(expected, shapes_of(tensors), path)
    how = Reading(dtype, place)
    folders = {n.name: "open_clip" if n.is_open_clip else "clip_l" for n in networks if n.name in TOKENIZERS}
    return Checkpoint(
        components={network.name: component_of(network, tensors, path, how) for network in networks},
        scheduler=scheduler_config(found.family, found.prediction, stored.tensors),
        tokenizers={name: TOKENIZER_FOLDERS / folder for name, folder in folders.items()},
        low_res_scheduler=FAMILIES[found.family].low_res_scheduler,
    )


def read_autoencoder_file(
    source: Source, dtype: Dtypes = "float32", *, family: str = "sd1", place: Placer | None = None
) -> Component:
    """Reads an autoencoder alone, in the original naming or in diffusers' own.

    Args:
        family: whose latents it makes; nothing in the file says it, and the scale of the latents follows from it.

    Raises:
        UserError: the file holds something else, or lacks or has unexpected keys.
    """
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    stored = read_file(source)
    tensors, path = _without_prefix(wanted(stored.tensors)), stored.path
    if any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in tensors):
        raise UserError(f"{path} is an autoencoder in diffusers' naming; put it into a diffusers folder")
    network = vae_in(shapes_of(tensors), FAMILIES[family], "", path)
    tensors = as_expected(tensors, [network])
    check_shapes(network.original_shapes(), shapes_of(tensors), path)
    return component_of(network, tensors, path, Reading(dtype, place))


def is_autoencoder_file(source: Source) -> bool:
    """Whether a file holds an autoencoder in the original naming and no UNet.

    Raises:
        UserError: it cannot be read.
    """
    keys = list(read_file(source).tensors)
    named = any(re.fullmatch(r"(first_stage_model\.|vae\.)?decoder\.mid\..*", key) for key in keys)
    return named and not any(key.startswith(UNET) for key in keys)


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
    prediction = checkpoint.scheduler.get("prediction_type", "epsilon")
    networks = networks_of(checkpoint, family)
    tensors: dict[str, Writable] = {}
    for network in networks:
        form, component = FORMATS[network.name], checkpoint.components[network.name]
        named = f"the {network.name} to be written"
        arrays = export(form.table(network.config), component.params, form.shapes(network.config), named)
        tensors |= {network.prefix + key: whole for key, whole in outward(network.pieces, arrays).items()}
    shapes = shapes_of(tensors)
    in_channels = checkpoint.components["unet"].config.in_channels
    _check_expressed(networks, networks_in(shapes, Detected(family, prediction, "", in_channels), path))
    if checkpoint.scheduler.get("rescale_betas_zero_snr"):
        marks = ("ztsnr", "v_pred") if prediction == "v_prediction" else ("ztsnr",)
        tensors |= {mark: np.zeros(0, np.float32) for mark in marks}  # as other programs mark such files
    said = {"modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction}
    write_safetensors(path, tensors, None if dtype is None else dtype_named(dtype), said)
    return family


def family_of(checkpoint: Checkpoint) -> str:
    """The family whose original layout holds the networks of a checkpoint.

    Raises:
        UserError: it is none of Stable Diffusion's.
    """
    if checkpoint.conditioning != "text":
        raise UserError(
            f"one file holds Stable Diffusion in its original naming, no model of {checkpoint.conditioning}"
        )
    text = checkpoint.components.get("text_encoder")
    if "text_encoder_2" in checkpoint.components:
        return "sdxl_refiner" if text is None else "sdxl"
    if checkpoint.low_res_scheduler is not None:
        return "x4_upscaler"
    return "sd2" if text is not None and text.config.activation == "gelu" else "sd1"


def wanted(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """The tensors of networks, under today's spelling of their keys."""
    skipped = re.compile("|".join(f"({pattern})" for pattern in SKIPPED))
    kept: dict[str, Writable] = {}
    for key, tensor in tensors.items():
        if skipped.fullmatch(key):
            continue
        name = key
        for pattern, replacement in ALIASES:
            name = re.sub(pattern, replacement, name)
        kept[name] = tensor
    return kept


def shapes_of(tensors: Mapping[str, Writable]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _without_prefix(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    prefix = next((p for p in (VAE, "vae.") if any(key.startswith(p) for key in tensors)), "")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def as_expected(tensors: Mapping[str, Writable], networks: list[Network]) -> dict[str, Writable]:
    """Without what Stable Diffusion 2 leaves of its text encoder, and with attention matrices as convolutions."""
    unused: tuple[str, ...] = ()
    for network in networks:
        if network.name == "text_encoder" and network.is_open_clip:
            layer = f"{network.prefix}transformer.resblocks.{network.config.layers}."
            unused = (layer, f"{network.prefix}text_projection")
    kept = {key: tensor for key, tensor in tensors.items() if not (unused and key.startswith(unused))}
    return {key: _unsqueezed(tensor) if _is_squeezed(key, tensor) else tensor for key, tensor in kept.items()}


def _is_squeezed(key: str, tensor: Writable) -> bool:
    return is_vae_attention(key) and len(tensor.shape) == 2


def _unsqueezed(tensor: Writable) -> Part:
    return Part(tensor, Piece("", UNSQUEEZED))


def component_of(network: Network, tensors: Mapping[str, Writable], path: object, how: Reading) -> Component:
    """A network, of tensors under their whole original keys.

    Raises:
        UserError: a value is not finite in the type asked for.
    """
    below = {key.removeprefix(network.prefix): t for key, t in tensors.items() if key.startswith(network.prefix)}
    params = read_params(network.name, network.config, inward(network.pieces, below), path, how)
    return Component(network.config, params, network.extra)


def _check_expressed(given: list[Network], read: list[Network]) -> None:
    """Refuses what would be read back as another model: the layout says no head counts, groups, scales."""
    found = {network.name: network.config for network in read}
    for network in given:
        ours, theirs = vars(network.config), vars(found[network.name])
        lost = [f"{key} {ours[key]} (not {theirs[key]})" for key in ours if ours[key] != theirs[key]]
        lost = [text for text in lost if not text.startswith("eos_token_id 2 ")]  # the older way to say the same
        if lost:
            raise UserError(f"the original layout cannot say of the {network.name}: {', '.join(lost)}")
