"""Folders of LDM's models beside Stable Diffusion: a UNet, its first stage, and what its condition goes through.

Where diffusers has a pipeline for the kind (unconditional, super-resolution, BERT's text), it loads the folder. What
our tasks need besides stands in model_index.json under "_sdjax", which diffusers passes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.convert import autoencoder, unet, unet2d
from sdjax.convert.components import CONDITIONERS, Component
from sdjax.convert.files import read_json, write_json
from sdjax.convert.folder import read_component, write_component
from sdjax.convert.rules import Placer
from sdjax.core.errors import UserError, unknown
from sdjax.data.word_pieces import read_vocabulary, write_vocabulary
from sdjax.models.autoencoder import VQConfig
from sdjax.models.unet2d import UNet2DConfig

INDEX, OWN = "model_index.json", "_sdjax"
FIRST_STAGE = "vqvae"
TOKENIZER = "tokenizer"
# The pipelines of diffusers that run a task's model; others are ours alone.
PIPELINES = {
    "unconditional": "LDMPipeline",
    "super_resolution": "LDMSuperResolutionPipeline",
    "text_bert": "LDMTextToImagePipeline",
}
OURS = "LatentDiffusion"


class LDMCheckpoint(NamedTuple):
    """A whole model.

    Attributes:
        task: the file of `sdjax.tasks` that made it.
        components: "unet", "vae", and those of the condition.
        scheduler: scheduler_config.json.
        settings: what the task says of it besides.
        tokenizer: the folder of its tokenizer, where it has one.
    """

    task: str
    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    settings: Mapping[str, Any] = {}
    tokenizer: Path | None = None


def write_ldm(folder: Path, checkpoint: LDMCheckpoint, dtype: str | None = "float32") -> None:
    """Writes a model into an empty folder.

    Raises:
        UserError: parameters do not fit their sizes, or are not finite in `dtype`.
    """
    index: dict[str, Any] = {"_class_name": _pipeline(checkpoint)}
    for name, component in checkpoint.components.items():
        kind = _class_name(name, component.config)
        at = FIRST_STAGE if name == "vae" else name
        write_component(folder / at, name, component, dtype)
        index[at] = [_library(index["_class_name"], name), kind]
    (folder / "scheduler").mkdir(parents=True)
    write_json(folder / "scheduler" / "scheduler_config.json", checkpoint.scheduler)
    index["scheduler"] = ["diffusers", checkpoint.scheduler["_class_name"]]
    if checkpoint.tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        write_vocabulary(folder / TOKENIZER, read_vocabulary(checkpoint.tokenizer))
        index[TOKENIZER] = ["transformers", "BertTokenizer"]
    index[OWN] = {"task": checkpoint.task, **checkpoint.settings}
    write_json(folder / INDEX, index)


def is_ldm(folder: Path) -> bool:
    """Whether a folder holds a model of LDM beside Stable Diffusion."""
    path = folder / INDEX
    return path.is_file() and read_json(path).get("_class_name") in {OURS, *PIPELINES.values()}


def read_ldm(folder: Path, dtype: str = "float32", place: Placer | None = None) -> LDMCheckpoint:
    """Reads a model that `write_ldm` or diffusers wrote.

    Raises:
        UserError: it is none, a file is missing or corrupt, or the weights do not fit their sizes.
    """
    index = read_json(folder / INDEX)
    own = index.get(OWN, {})
    named = {pipeline: task for task, pipeline in PIPELINES.items()}
    task = own.get("task", named.get(index.get("_class_name", "")))
    if not isinstance(task, str):
        raise unknown("pipeline", index.get("_class_name"), {OURS, *PIPELINES.values()}, str(folder / INDEX))
    if not isinstance(own, dict):
        raise UserError(f"{OWN} in {folder / INDEX} is no JSON object")
    names = {"unet": "unet", FIRST_STAGE: "vae"} | {name: name for name in CONDITIONERS if name in index}
    components = {name: read_component(folder / at, name, dtype, place=place) for at, name in names.items()}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    settings = {key: value for key, value in own.items() if key != "task"}
    tokenizer = folder / TOKENIZER
    return LDMCheckpoint(task, components, scheduler, settings, tokenizer if tokenizer.is_dir() else None)


def _pipeline(checkpoint: LDMCheckpoint) -> str:
    """diffusers' pipeline, where it has one for the task and a class for the UNet."""
    unet = checkpoint.components["unet"].config
    known = not isinstance(unet, UNet2DConfig) or unet2d.is_diffusers(unet)
    return PIPELINES.get(checkpoint.task, OURS) if known else OURS


def _class_name(name: str, config: Any) -> str:
    if name == "unet":
        if not isinstance(config, UNet2DConfig):
            return unet.CLASS_NAME
        return unet2d.CLASS_NAME if unet2d.is_diffusers(config) else unet2d.OWN_CLASS_NAME
    if name == "vae":
        return autoencoder.VQ_CLASS_NAME if isinstance(config, VQConfig) else autoencoder.CLASS_NAME
    return {"bert": "LDMBertModel", "class_embedder": "ClassEmbedder", "rescaler": "SpatialRescaler"}[name]


def _library(pipeline: str, name: str) -> str:
    """Where diffusers looks for a class: its LDM text encoder is defined beside the pipeline."""
    if name == "bert":
        return "latent_diffusion"
    return OURS if name in CONDITIONERS else "diffusers"
