"""A checkpoint's folder, as diffusers has it: Stable Diffusion's, LDM's other models', and models' of pixels."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdjax.convert.components import ALL_FORMATS, TOKENIZERS, Checkpoint, Component, Dtypes, Reading, read_params
from sdjax.convert.files import read_json, write_json, write_safetensors
from sdjax.convert.model_index import (
    DIFFUSERS_VERSION,
    INDEX,
    OWN,
    PIXELS,
    STABLE_DIFFUSION,
    TOKENIZER_FOLDERS,
    WRITER,
    components_in,
    extras_in,
    folder_of,
    index_of,
    kind_of_checkpoint,
    kind_of_index,
    pixel_conditioning,
    present,
    schedulers_of,
    settings_in,
)
from sdjax.convert.rules import Placer, export
from sdjax.convert.tokenizers import check_text_encoders, find_tokenizer, write_tokenizer
from sdjax.convert.weights import find_weights
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named


def read_folder(
    path: str | Path, dtype: Dtypes = "float32", *, variant: str | None = None, place: Placer | None = None
) -> Checkpoint:
    """Reads a checkpoint that `write_checkpoint` or diffusers wrote.

    Args:
        dtype: of the parameters: a name, None for the type that each is stored in, or either for each network.
        variant: e.g. "fp16": the weights of that name are taken where there are some, else the plain ones. Without it
            the half-precision ones are taken only where there are no others.
        place: called with each array (NumPy) as soon as it is converted and with its path, e.g. "unet/conv_in/kernel";
            what it returns, e.g. the array on devices, takes its place in the tree.

    Raises:
        UserError: the folder or a file of it is missing or corrupt, the networks are of a structure that is not here,
            the weights do not fit their configs, or `dtype` is unknown.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    index = read_json(path / INDEX)
    kind, names = kind_of_index(index), components_in(index, path / INDEX)
    settings, conditioning = settings_in(index, path / INDEX)
    tokenizers = {encoder: path / folder for encoder, folder in TOKENIZER_FOLDERS.items() if encoder in names}
    if kind == STABLE_DIFFUSION:
        tokenizers = {encoder: find_tokenizer(folder) for encoder, folder in tokenizers.items()}
    components = {
        part: read_component(path / folder_of(part, kind), part, dtype, variant=variant, place=place) for part in names
    }
    if kind == PIXELS:
        conditioning = pixel_conditioning(components["unet"].config, path / "unet")
    if conditioning == "super_resolution" and OWN not in index:
        components["vae"] = _unscaled(components["vae"])
    low = path / "low_res_scheduler"
    return Checkpoint(
        components=components,
        scheduler=read_json(path / "scheduler" / "scheduler_config.json"),
        conditioning=conditioning,
        settings=settings,
        tokenizers={encoder: folder for encoder, folder in tokenizers.items() if folder.is_dir()},
        low_res_scheduler=read_json(low / "scheduler_config.json") if present(index, low.name) else None,
        model_index=extras_in(index) if kind == STABLE_DIFFUSION else {},
    )


def read_component(
    path: str | Path,
    name: str,
    dtype: Dtypes = "float32",
    *,
    variant: str | None = None,
    place: Placer | None = None,
) -> Component:
    """Reads one network of the kind `name` ("unet", "vae", "text_encoder", "text_encoder_2") from its own folder.

    Raises:
        UserError: as `read_folder`.
    """
    form, path = ALL_FORMATS[name], Path(path)
    extra = read_json(path / "config.json")
    config = form.from_config(extra, str(path / "config.json"))
    tensors = find_weights(path, form.weights, variant)
    return Component(config, read_params(name, config, tensors, path, Reading(dtype, place)), extra)


def _unscaled(autoencoder: Component) -> Component:
    """The autoencoder as diffusers' LDMSuperResolutionPipeline uses it: without its scaling_factor."""
    return replace(autoencoder, config=replace(autoencoder.config, scaling_factor=1.0))


def read_config(path: str | Path, name: str) -> Any:
    """The sizes of a network in a folder of its own, e.g. an `AutoencoderConfig`; its weights are not read.

    Raises:
        UserError: as `read_folder`.
    """
    place = Path(path) / "config.json"
    return ALL_FORMATS[name].from_config(read_json(place), str(place))


def write_checkpoint(path: str | Path, checkpoint: Checkpoint, dtype: str | None = "float32") -> None:
    """Writes a folder that diffusers' pipeline of its kind loads, where it has one (see `pipeline_class`).

    All is written into a temporary sibling, which then takes the name; a killed run leaves the old folder. Where
    the folder is one that was written here before, its other contents (a model card, pictures) are kept. A `dtype` of
    None keeps the type of each array.

    Raises:
        UserError: `path` holds something else, the parameters do not fit their config or are not finite in `dtype`,
            a text encoder or a tokenizer's files are missing.
    """
    path, kind = Path(path).resolve(), kind_of_checkpoint(checkpoint)
    if kind == STABLE_DIFFUSION:
        check_text_encoders(checkpoint)
    _check_target(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for part, component in checkpoint.components.items():
            write_component(partial / folder_of(part, kind), part, component, dtype)
        for encoder, tokenizer in checkpoint.tokenizers.items():
            write_tokenizer(encoder, tokenizer, partial / TOKENIZER_FOLDERS[encoder])
        for folder, config in schedulers_of(checkpoint).items():
            (partial / folder).mkdir()
            write_json(partial / folder / "scheduler_config.json", config)
        write_json(partial / INDEX, index_of(checkpoint))
        _swap(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_component(path: str | Path, name: str, component: Component, dtype: str | None = "float32") -> None:
    """Writes one network of the kind `name` into a folder of its own, which `read_component` reads.

    Raises:
        UserError: the parameters do not fit their config or are not finite in `dtype`.
    """
    path, form, config = Path(path), ALL_FORMATS[name], component.config
    arrays = export(form.table(config), component.params, form.shapes(config), f"the {name} to be written")
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / f"{form.weights}.safetensors", arrays, None if dtype is None else dtype_named(dtype))
    # transformers 5 would build its model in the type that the config names
    kind = dtype or str(next(iter(arrays.values())).dtype)
    stored = {"dtype": kind} if name in TOKENIZERS else {"_diffusers_version": DIFFUSERS_VERSION}
    kept = {key: value for key, value in component.extra.items() if key not in ("torch_dtype", "_name_or_path")}
    write_json(path / "config.json", {**kept, **form.to_config(config), **stored})


def _check_target(path: Path) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not (path / INDEX).is_file() or read_json(path / INDEX).get(WRITER) != "sdjax":
        raise UserError(f"{path} exists and was not written by sdjax; it is left as it is")


def _swap(new: Path, path: Path) -> None:
    """`new` takes the place of `path`, and over what `path` held beside a checkpoint."""
    if not path.exists():
        new.rename(path)
        return
    old = new.with_suffix(".old")
    path.rename(old)
    new.rename(path)
    for entry in old.iterdir():
        if not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(old)
