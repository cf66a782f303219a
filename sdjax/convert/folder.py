"""A diffusers folder of Stable Diffusion 1, 2, XL, its refiner or the x4 upscaler, read and written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdjax.convert import autoencoder, clip, unet
from sdjax.convert.components import (
    ALL_FORMATS,
    TOKENIZERS,
    Checkpoint,
    Component,
    Dtypes,
    Reading,
    check_whole,
    read_params,
)
from sdjax.convert.files import read_json, write_json, write_safetensors
from sdjax.convert.rules import Placer, export
from sdjax.convert.weights import find_weights
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named

INDEX = "model_index.json"
WRITER = "_writer"  # diffusers keeps and passes over keys of the index that begin with an underscore
DEFAULTS = "_sdjax"
DIFFUSERS_VERSION = "0.42.0"  # the version whose layout this is
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
OTHER_NETWORKS = ("transformer", "text_encoder_3", "controlnet", "prior_prior", "motion_adapter", "movq", "vqvae")

PLAIN, XL, REFINER, INPAINTING, XL_INPAINTING, DEPTH, UPSCALER = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionUpscalePipeline",
)
# Parts of diffusers' pipelines that are not here. Each is written as absent; diffusers asks for those of the depth
# model when it loads: from_pretrained(folder, depth_estimator=..., feature_extractor=...).
_SAFETY = ("feature_extractor", "image_encoder", "safety_checker")
ABSENT: dict[str, tuple[str, ...]] = {
    PLAIN: _SAFETY,
    INPAINTING: _SAFETY,
    XL: ("feature_extractor", "image_encoder"),
    REFINER: ("feature_extractor", "image_encoder"),
    XL_INPAINTING: ("feature_extractor", "image_encoder"),
    DEPTH: ("depth_estimator", "feature_extractor"),
    UPSCALER: ("feature_extractor", "safety_checker", "watermarker"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {"requires_safety_checker": False},
    INPAINTING: {"requires_safety_checker": False},
    XL: {"force_zeros_for_empty_prompt": True},
    REFINER: {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
}


def read_folder(
    path: str | Path, dtype: Dtypes = "float32", *, variant: str | None = None, place: Placer | None = None
) -> Checkpoint:
    """Reads a checkpoint.

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
    _check_index(index, path / INDEX)
    defaults = index.get(DEFAULTS, {})
    if not isinstance(defaults, dict):
        raise UserError(f"{DEFAULTS} in {path / INDEX} is no JSON object")
    encoders = [name for name in TOKENIZERS if _present(index, name)]
    parts: dict[str, Any] = {TOKENIZERS[name]: find_tokenizer(path / TOKENIZERS[name]) for name in encoders}
    how = Reading(dtype, place)
    parts |= {name: _read_component(path / name, name, how, variant) for name in ("unet", "vae", *encoders)}
    return Checkpoint(
        **parts,
        scheduler_config=read_json(path / "scheduler" / "scheduler_config.json"),
        low_res_scheduler_config=_low_res(path, index),
        model_index={key: value for key, value in index.items() if _is_setting(key, value)},
        defaults=defaults,
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
    return _read_component(Path(path), name, Reading(dtype, place), variant)


def read_config(path: str | Path, name: str) -> Any:
    """The sizes of a network in a folder of its own, e.g. an `AutoencoderConfig`; its weights are not read.

    Raises:
        UserError: as `read_folder`.
    """
    place = Path(path) / "config.json"
    return ALL_FORMATS[name].from_config(read_json(place), str(place))


def _read_component(path: Path, name: str, how: Reading, variant: str | None) -> Component:
    extra = read_json(path / "config.json")
    config = ALL_FORMATS[name].from_config(extra, str(path / "config.json"))
    tensors = find_weights(path, ALL_FORMATS[name].weights, variant)
    return Component(config, read_params(name, config, tensors, path, how), extra)


def _check_index(index: Mapping[str, Any], place: Path) -> None:
    other = [name for name in OTHER_NETWORKS if _present(index, name)]
    if other:
        raise UserError(
            f"{place} lists {other[0]} ({index.get('_class_name')}); folders of Stable Diffusion 1, 2 and XL, which "
            "have none, are read"
        )
    missing = [name for name in ("unet", "vae", "scheduler") if not _present(index, name)]
    if missing or not any(_present(index, name) for name in TOKENIZERS):
        raise UserError(f"{place} lists no {(missing or ['text_encoder'])[0]} ({index.get('_class_name')})")


def _present(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and any(part is not None for part in entry)


def _is_setting(key: str, value: Any) -> bool:
    """Whether an entry of the index is neither a component ([library, class], or two nulls) nor this file's own."""
    return not isinstance(value, list) and key not in (WRITER, DEFAULTS, "_diffusers_version", "_name_or_path")


def _low_res(path: Path, index: Mapping[str, Any]) -> dict[str, Any] | None:
    name = "low_res_scheduler"
    return read_json(path / name / "scheduler_config.json") if _present(index, name) else None


def write_folder(path: str | Path, checkpoint: Checkpoint, dtype: str | None = "float32") -> None:
    """Writes a folder that diffusers' pipeline of its kind (see `pipeline_class`) loads.

    All is written into a temporary sibling, which then takes the name; a killed run leaves the old folder. Where
    the folder is one that was written here before, its other contents (a model card, pictures) are kept. A `dtype` of
    None keeps the type of each array.

    Raises:
        UserError: `path` holds something else, the parameters do not fit their config or are not finite in `dtype`,
            a text encoder or a tokenizer's files are missing.
    """
    path = Path(path).resolve()
    check_whole(checkpoint)
    _check_target(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for name, component in checkpoint.components().items():
            write_component(partial / name, name, component, dtype)
            tokenizer = getattr(checkpoint, TOKENIZERS[name]) if name in TOKENIZERS else None
            if tokenizer is not None:
                _copy_tokenizer(tokenizer, partial / TOKENIZERS[name])
        for name, config in _schedulers(checkpoint).items():
            (partial / name).mkdir()
            write_json(partial / name / "scheduler_config.json", config)
        write_json(partial / INDEX, _index(checkpoint))
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


def pipeline_class(checkpoint: Checkpoint) -> str:
    """The class of diffusers that runs a checkpoint: what its index says, else what its networks are made for."""
    named = checkpoint.model_index.get("_class_name")
    if isinstance(named, str):
        return named
    masked = checkpoint.unet.config.in_channels == 9
    if checkpoint.low_res_scheduler_config is not None:
        return UPSCALER
    if checkpoint.text_encoder_2 is not None:
        return REFINER if checkpoint.text_encoder is None else XL_INPAINTING if masked else XL
    return INPAINTING if masked else DEPTH if checkpoint.unet.config.in_channels == 5 else PLAIN


def absent_parts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Parts of diffusers' pipeline for this checkpoint that are not written, e.g. ("depth_estimator", ...)."""
    return ABSENT.get(pipeline_class(checkpoint), ABSENT[PLAIN])


def _schedulers(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    found = {"scheduler": checkpoint.scheduler_config}
    if checkpoint.low_res_scheduler_config is not None:
        found["low_res_scheduler"] = checkpoint.low_res_scheduler_config
    return found


def _index(checkpoint: Checkpoint) -> dict[str, Any]:
    kind = pipeline_class(checkpoint)
    index: dict[str, Any] = {name: [None, None] for name in absent_parts(checkpoint)}
    index |= SETTINGS.get(kind, {}) | dict(checkpoint.model_index)
    if checkpoint.defaults:
        index[DEFAULTS] = dict(checkpoint.defaults)
    index |= {"_class_name": kind, "_diffusers_version": DIFFUSERS_VERSION, WRITER: "sdjax"}
    for name, config in _schedulers(checkpoint).items():
        if not isinstance(config.get("_class_name"), str):
            raise UserError(f"the {name} config has no _class_name; it has {', '.join(config)}")
        index[name] = ["diffusers", config["_class_name"]]
    for name, tokenizer in TOKENIZERS.items():
        encoder = getattr(checkpoint, name)
        if encoder is not None:
            index[name] = ["transformers", clip.PLAIN if encoder.config.projection_dim is None else clip.PROJECTED]
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
        elif kind in (XL, REFINER, XL_INPAINTING):
            index[name] = index[tokenizer] = [None, None]
    return index | {"unet": ["diffusers", unet.CLASS_NAME], "vae": ["diffusers", autoencoder.CLASS_NAME]}


def find_tokenizer(path: Path) -> Path:
    """`path` itself, where it holds a tokenizer.

    Raises:
        UserError: it does not.
    """
    if not any(all((path / file).is_file() for file in files) for files in VOCABULARIES):
        raise UserError(f"{path} holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json")
    return path


def _copy_tokenizer(source: Path, target: Path) -> None:
    find_tokenizer(source)
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
