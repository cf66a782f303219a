"""The LDM paper's released models, in one file each (`model.ckpt`, `last.ckpt`): read as our own runs leave them."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.convert import bert, layout, sizes, unet2d
from sdjax.convert.averages import chosen_weights
from sdjax.convert.components import FORMATS, Checkpoint, Component, Dtypes, Reading, read_params
from sdjax.convert.families import FAMILIES, UNET, VAE
from sdjax.convert.files import Writable
from sdjax.convert.ldm_families import (
    BERT,
    CLASSES,
    COND,
    LDM_FAMILIES,
    RESCALER,
    LDMFamily,
    find_ldm_family,
    is_ldm_file,
)
from sdjax.convert.rules import Placer, check_shapes
from sdjax.convert.single_file import as_expected, component_of, shapes_of, wanted
from sdjax.convert.weights import Source, read_file
from sdjax.core.errors import UserError
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig

logger = logging.getLogger("sdjax")

SIZE = 256  # of the pictures, where the family does not say another


def holds_ldm(source: Source) -> bool:
    """Whether a file is one of these models; of a safetensors file only the header is read.

    Raises:
        UserError: it cannot be read.
    """
    return is_ldm_file(shapes_of(read_file(source).tensors))


def read_ldm_file(
    source: Source,
    dtype: Dtypes = "float32",
    *,
    family: str | None = None,
    weights: str | None = None,
    place: Placer | None = None,
) -> Checkpoint:
    """Reads a `.ckpt` through torch's restricted loader, or a `.safetensors` file; neither has BERT's vocabulary.

    Args:
        dtype, place: as in `sdjax.convert.folder.read_folder`.
        family: one of `LDM_FAMILIES`; None to find out.
        weights: "ema" or "model"; None for averages where the file has them, as the paper samples.

    Raises:
        UserError: the file is missing, corrupt or no such model, lacks keys or has others (both are listed), or there
            is no such family.
    """
    stored, _, path = read_file(source)
    if not is_ldm_file(shapes_of(stored)):
        raise UserError(f"{path} is none of the LDM paper's models ({', '.join(LDM_FAMILIES)})")
    name = find_ldm_family(shapes_of(stored), family, path)
    found = LDM_FAMILIES[name]
    kept = chosen_weights(stored, weights, path)
    averaged = any(kept[key] is not stored[key] for key in kept)
    logger.info("%s is taken for %s; %s weights", path.name, name, "averaged" if averaged else "its last")
    tensors = _without_twins(wanted(kept))
    how, size = Reading(dtype, place), int(found.sampling.get("size", SIZE))
    components = {"unet": _unet(tensors, found, path, how)}
    components["vae"] = _first_stage(tensors, _scale(stored, found, path), path, how)
    pixels = {"unet": size // components["vae"].config.factor, "vae": size}  # for diffusers' pipelines
    for part, side in pixels.items():
        extra = {**components[part].extra, "sample_size": side}
        components[part] = dataclasses.replace(components[part], extra=extra)
    told, settings = _condition(tensors, found, components["vae"].config.factor, path, how)
    used = {*_keys(tensors, UNET), *_keys(tensors, VAE), *_keys(tensors, COND)}
    if left := [key for key in tensors if key not in used]:
        raise UserError(f"{path} has tensors that belong to nothing: {', '.join(left[:5])}")
    settings = {"size": size, **found.sampling, **settings}
    return Checkpoint(
        components=components | told, scheduler=found.scheduler, conditioning=found.task, settings=settings
    )


def _scale(tensors: Mapping[str, Writable], family: LDMFamily, path: object) -> float:
    """Of the latents: a file says it where it was measured while training (`scale_by_std`)."""
    if "scale_factor" not in tensors:
        return family.scaling_factor
    scale = np.asarray(tensors["scale_factor"], np.float32)
    if scale.size != 1 or not np.isfinite(scale).all() or scale.item() <= 0:
        raise UserError(f"scale_factor in {path} is no positive number")
    return float(scale.item())


def _keys(tensors: Mapping[str, Writable], prefix: str) -> list[str]:
    return [key for key in tensors if key.startswith(prefix)]


def _below(tensors: Mapping[str, Writable], prefix: str) -> dict[str, Writable]:
    return {key.removeprefix(prefix): tensors[key] for key in _keys(tensors, prefix)}


def _without_twins(tensors: Mapping[str, Writable]) -> dict[str, Writable]:
    """Without the first stage's second name: inpainting models give their condition's network by it, too."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not (key.startswith(COND) and VAE + key.removeprefix(COND) in tensors)
    }


def _unet(tensors: Mapping[str, Writable], family: LDMFamily, path: object, how: Reading) -> Component:
    below = _below(tensors, UNET)
    shapes = shapes_of(below)
    if any(".transformer_blocks." in key for key in below):
        raw = sizes.unet_config(shapes, family.heads, path)
        config = FORMATS["unet"].from_config(raw, str(path))
        network = layout.Network("unet", UNET, config, raw, layout.pieces_of("unet", UNET, config))
        return _read(network, tensors, path, how)
    config = sizes.unet2d_config(shapes, family.heads, path)
    arrays = unet2d.from_original({key: np.asarray(tensor) for key, tensor in below.items()}, config)
    return Component(config, read_params("unet", config, arrays, path, how), {})


def _first_stage(tensors: Mapping[str, Writable], scale: float, path: object, how: Reading) -> Component:
    family = FAMILIES["sd1"]._replace(scaling_factor=scale)
    network = layout.vae_in(shapes_of(_below(tensors, VAE)), family, VAE, path)
    config = dataclasses.replace(network.config, scaling_factor=scale)
    network = network._replace(config=config, extra={**network.extra, "scaling_factor": scale})
    return _read(network, as_expected(tensors, [network]), path, how)


def _read(network: layout.Network, tensors: Mapping[str, Writable], path: object, how: Reading) -> Component:
    kept = {key: tensors[key] for key in _keys(tensors, network.prefix)}
    check_shapes(network.original_shapes(), shapes_of(kept), path)
    return component_of(network, kept, path, how)


def _condition(
    tensors: Mapping[str, Writable], family: LDMFamily, factor: int, path: object, how: Reading
) -> tuple[dict[str, Component], dict[str, Any]]:
    """The network of the condition, and what the task must know of it besides."""
    below = _below(tensors, COND)
    if family.task in ("text_bert", "layout"):
        words = _below(tensors, BERT)
        config = sizes.bert_config(shapes_of(words), path)
        read = read_params("bert", config, bert.from_original(words), path, how)
        return {"bert": Component(config, read)}, {}
    if family.task == "class_conditional":
        classes, width = _shape(tensors, CLASSES, path)
        settings = {"none": classes - 1} if "guidance_scale" in family.sampling else {}  # it guides from the last
        config = ClassEmbedderConfig(classes, width)
        return {"class_embedder": Component(config, read_params("class_embedder", config, below, path, how))}, settings
    if family.task == "semantic_synthesis":
        features, classes = _shape(tensors, RESCALER, path)[:2]
        config = RescalerConfig(classes, int(math.log2(factor)), features)
        return {"rescaler": Component(config, read_params("rescaler", config, below, path, how))}, {}
    if below:
        raise UserError(f"{path} has tensors of a condition that {family.task} does not have: {', '.join(below)}")
    return {}, {}


def _shape(tensors: Mapping[str, Writable], key: str, path: object) -> tuple[int, ...]:
    if key not in tensors:
        raise UserError(f"{path} lacks {key}")
    return tuple(tensors[key].shape)
