"""A diffusers folder of Stable Diffusion 1 or 2 (one UNet, one autoencoder, one text encoder) and a `Checkpoint`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.convert import autoencoder, clip, unet
from sdjax.convert.files import StoredTensor, read_json, read_safetensors, read_sharded, write_json, write_safetensors
from sdjax.convert.rules import Table, export, read
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Tree

INDEX = "model_index.json"
WRITER = "_writer"  # diffusers keeps and passes over keys of the index that begin with an underscore
DEFAULTS = "_sdjax"
DIFFUSERS_VERSION = "0.42.0"  # the version whose layout this is
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))


@dataclass(frozen=True)
class Component:
    """A network of a checkpoint.

    Attributes:
        config: its sizes, e.g. a `UNetConfig`.
        params: nested dictionary of arrays.
        extra: what else its config.json says or shall say, e.g. {"sample_size": 64}; the sizes win over it.
    """

    config: Any
    params: Tree
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """All that a diffusers folder holds.

    Attributes:
        scheduler_config: scheduler/scheduler_config.json; `_class_name` names the sampler.
        tokenizer: the folder with the tokenizer's files.
        defaults: how the model is best sampled, e.g. {"steps": 25, "guidance_scale": 2.5}; diffusers passes over it.
    """

    unet: Component
    vae: Component
    text_encoder: Component
    scheduler_config: Mapping[str, Any]
    tokenizer: Path
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Format(NamedTuple):
    """How a network is stored: where, and how its config and parameters are translated."""

    weights: str
    from_config: Callable[[Mapping[str, Any], str], Any]
    to_config: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    shapes: Callable[[Any], Tree]


FORMATS: dict[str, Format] = {
    "unet": Format(
        "diffusion_pytorch_model", unet.from_diffusers_config, unet.to_diffusers_config, unet.table, unet.shapes
    ),
    "vae": Format(
        "diffusion_pytorch_model",
        autoencoder.from_diffusers_config,
        autoencoder.to_diffusers_config,
        lambda config: autoencoder.TABLE,
        autoencoder.shapes,
    ),
    "text_encoder": Format(
        "model", clip.from_diffusers_config, clip.to_diffusers_config, lambda config: clip.TABLE, clip.shapes
    ),
}


def read_folder(path: str | Path, dtype: str = "float32") -> Checkpoint:
    """Reads a checkpoint; its parameters are NumPy arrays of the named type.

    Raises:
        UserError: the folder or a file of it is missing or corrupt, the networks are of a structure that is not here,
            the weights do not fit their configs, or `dtype` is unknown.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    index = read_json(path / INDEX)
    second = [name for name in ("text_encoder_2", "text_encoder_3", "transformer") if _present(index, name)]
    if second:
        raise UserError(
            f"{path / INDEX} lists {second[0]}; a folder of Stable Diffusion 1 or 2 is read, which has none"
        )
    _find_tokenizer(path / "tokenizer")
    defaults = index.get(DEFAULTS, {})
    if not isinstance(defaults, dict):
        raise UserError(f"{DEFAULTS} in {path / INDEX} is no JSON object")
    return Checkpoint(
        **{name: read_component(path / name, name, dtype) for name in FORMATS},
        scheduler_config=read_json(path / "scheduler" / "scheduler_config.json"),
        tokenizer=path / "tokenizer",
        defaults=defaults,
    )


def read_component(path: str | Path, name: str, dtype: str = "float32") -> Component:
    """Reads one network of the kind `name` ("unet", "vae", "text_encoder") from its own folder.

    Raises:
        UserError: as `read_folder`.
    """
    path, form = Path(path), FORMATS[name]
    extra = read_json(path / "config.json")
    config = form.from_config(extra, str(path / "config.json"))
    tensors = _weights(path, form.weights)
    params = read(form.table(config), tensors, form.shapes(config), dtype_named(dtype), path)
    return Component(config, params, extra)


def write_folder(path: str | Path, checkpoint: Checkpoint, dtype: str = "float32") -> None:
    """Writes a folder that diffusers' `StableDiffusionPipeline.from_pretrained` loads.

    All is written into a temporary sibling, which then takes the name; a killed run leaves the old folder. Where
    the folder is one that was written here before, its other contents (a model card, pictures) are kept.

    Raises:
        UserError: `path` holds something else, the parameters do not fit their config or are not finite in `dtype`,
            or the tokenizer's files are missing.
    """
    path = Path(path).resolve()
    _check_target(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for name in FORMATS:
            write_component(partial / name, name, getattr(checkpoint, name), dtype)
        _copy_tokenizer(checkpoint.tokenizer, partial / "tokenizer")
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / "scheduler_config.json", checkpoint.scheduler_config)
        write_json(partial / INDEX, _index(checkpoint))
        _swap(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _present(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and any(part is not None for part in entry)


def _weights(path: Path, stem: str) -> dict[str, StoredTensor]:
    """The full-precision file where there is one, then the half-precision one, whole or in shards."""
    for variant in ("", ".fp16"):
        whole, sharded = path / f"{stem}{variant}.safetensors", path / f"{stem}.safetensors.index{variant}.json"
        if whole.exists():
            return read_safetensors(whole)
        if sharded.exists():
            return read_sharded(sharded)
    pickled = f"; {stem}.bin is a pickle, which is not read" if (path / f"{stem}.bin").exists() else ""
    raise UserError(f"{path} holds no {stem}.safetensors, {stem}.fp16.safetensors or index of shards{pickled}")


def write_component(path: str | Path, name: str, component: Component, dtype: str = "float32") -> None:
    """Writes one network of the kind `name` into a folder of its own, which `read_component` reads.

    Raises:
        UserError: the parameters do not fit their config or are not finite in `dtype`.
    """
    path, form, config = Path(path), FORMATS[name], component.config
    arrays = export(form.table(config), component.params, form.shapes(config), f"the {name} to be written")
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / f"{form.weights}.safetensors", arrays, dtype_named(dtype))
    # transformers 5 would build its model in the type that the config names
    stored = {"dtype": dtype} if name == "text_encoder" else {"_diffusers_version": DIFFUSERS_VERSION}
    kept = {key: value for key, value in component.extra.items() if key not in ("torch_dtype", "_name_or_path")}
    write_json(path / "config.json", {**kept, **form.to_config(config), **stored})


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    scheduler = checkpoint.scheduler_config.get("_class_name")
    if not isinstance(scheduler, str):
        raise UserError(f"the scheduler config has no _class_name; it has {', '.join(checkpoint.scheduler_config)}")
    defaults = {DEFAULTS: dict(checkpoint.defaults)} if checkpoint.defaults else {}
    return {
        **defaults,
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        WRITER: "sdjax",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", clip.PLAIN],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", unet.CLASS_NAME],
        "vae": ["diffusers", autoencoder.CLASS_NAME],
    }


def _find_tokenizer(path: Path) -> None:
    if not any(all((path / file).is_file() for file in files) for files in VOCABULARIES):
        raise UserError(f"{path} holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json")


def _copy_tokenizer(source: Path, target: Path) -> None:
    _find_tokenizer(source)
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


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
