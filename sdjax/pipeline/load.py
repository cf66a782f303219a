"""From a source, as users name it, to a pipeline."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack, cast

import jax
from jax.sharding import Mesh

from sdjax.checkpoints.checkpoint import CLASSIFIERS, TOKENIZERS, Checkpoint, Component, ReadOptions, tokenizers_of
from sdjax.checkpoints.controlnets import CONTROLNET, add_controlnets, listed_controlnets, read_controlnet
from sdjax.checkpoints.custom_diffusion import add_custom_diffusion
from sdjax.checkpoints.embeddings import add_embeddings
from sdjax.checkpoints.layouts.diffusers import INDEX, read_component
from sdjax.checkpoints.layouts.original import read_adm_classifier
from sdjax.checkpoints.lora.patch import add_loras, merge_loras
from sdjax.checkpoints.lora.reading import find_file
from sdjax.checkpoints.mapping import Put
from sdjax.checkpoints.open import read_checkpoint, replace_vae, resolve, within_workdir
from sdjax.core.config import EXPORT
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.data.text.t5_tokenizer import T5Tokenizer, load_t5_tokenizer
from sdjax.data.text.tokenizers import Tokenizer
from sdjax.data.text.word_pieces import WordPieces, load_word_pieces
from sdjax.diffusion_model.conditioners import CAPTIONS, TEXT
from sdjax.diffusion_model.conditioners.captions import ENCODER, LENGTH
from sdjax.diffusion_model.conditioners.guides import CLASSIFIER
from sdjax.diffusion_model.conditioners.tokens import BERT
from sdjax.diffusion_model.model import AUTOENCODER, BACKBONE, build_model
from sdjax.parallel.sharding import sharded_put
from sdjax.pipeline.adapters import add_ip_adapter, add_t2i_adapters
from sdjax.pipeline.few_step import few_step_defaults
from sdjax.pipeline.options import LOAD_OPTIONS, LoadOptions
from sdjax.pipeline.pipeline import Pipeline

UNDERSTOOD = (
    f"a diffusers folder (one with {INDEX}), a Hub id (owner/name), a single .safetensors or .ckpt file, or the "
    "workdir of a finished train.py run"
)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
Source = str | Path


def load(source: Source, dtype: str = "float32", mesh: Mesh | None = None, **options: Unpack[LoadOptions]) -> Pipeline:
    """Load anything that can be sampled; parameters are read one at a time, straight to the devices.

    Args:
        source: a Hub id, a diffusers folder (with its ControlNets, unless `controlnet` names others), a single file
            (Stable Diffusion's, LDM's `model.ckpt`, ADM's `256x256_diffusion.pt`), or the workdir of a finished
            train.py run.
        dtype: of the backbone and the text encoders, "float32" or "bfloat16"; the autoencoder works in float32 always.
        mesh: of `sdjax.parallel.mesh.make_mesh`; parameters and batches are spread over it. None for one device.
        options: rows of `sdjax.pipeline.options.LoadOptions`; where a flag may be repeated, one source or a list.

    Raises:
        UserError: the source is missing or is none of these, or what it holds is corrupt or not supported.
    """
    given = {name: value for name, value in options.items() if value}
    for name in given:
        if name not in LOAD_OPTIONS:
            raise unknown("option", name, LOAD_OPTIONS, "load")
    given |= {n: [value] for n, value in given.items() if LOAD_OPTIONS[n].many and isinstance(value, Source)}
    path = find(source, cast(Any, given.get("variant")))
    place: Put = (lambda array, name: jax.device_put(array)) if mesh is None else sharded_put(mesh)
    checkpoint = _read(path, dtype, given, place)
    name = _name(source, path)
    if given.get("classifier"):
        checkpoint = _with_classifier(checkpoint, Path(cast(Any, given["classifier"])).expanduser(), name, place)
    tokenizers = _tokenizers(checkpoint)
    if checkpoint.conditioning == "text_bert" and BERT in tokenizers:
        # Folders that diffusers wrote do not say which tokens are the null condition: those of the empty prompt.
        null = tokenizers[BERT].encode([""])[0].tolist()
        checkpoint = dataclasses.replace(checkpoint, settings={"nothing": null, **checkpoint.settings})
    model = build_model(checkpoint, cast(Any, tokenizers), dtype_named(dtype), path)
    if checkpoint.conditioning == TEXT:
        distilled = model.config.guidance_dim is not None
        own = few_step_defaults(name, checkpoint.scheduler, distilled, path.is_file())
        checkpoint = dataclasses.replace(checkpoint, settings={**own, **checkpoint.settings})
    refiner = load(cast(Any, given["refiner"]), dtype, mesh) if given.get("refiner") else None
    lora_dir = None if "lora_dir" not in given else Path(cast(Any, given["lora_dir"])).expanduser()
    first, *rest = cast(Any, given.get("then")) or (None,)
    then = None if first is None else load(first, dtype, mesh, then=rest)
    return Pipeline(name, checkpoint, model, cast(Any, tokenizers), dtype, mesh, refiner, lora_dir, then)


def load_conditional(source: Source, *args: Any, **options: Any) -> Pipeline:
    """Alias of `load`, which opens every kind of model."""
    warnings.warn("load_conditional is now load; this name goes with the next release", FutureWarning, stacklevel=2)
    return load(source, *args, **options)


def _read(path: Path, dtype: str, given: Mapping[str, Any], place: Put) -> Checkpoint:
    dtypes = dict.fromkeys((BACKBONE, *TOKENIZERS), dtype) | {AUTOENCODER: "float32"}
    dtypes |= dict.fromkeys((BERT, "class_embedder", "rescaler"), "float32")
    chosen = {name: given.get(name) for name in ("family", "prediction", "variant", "tokenizer")}
    optional = (AUTOENCODER,) if "vae" in given else ()
    checkpoint = read_checkpoint(path, dtype=dtypes, place=place, optional=optional, **chosen)
    if "vae" in given:
        checkpoint = replace_vae(given["vae"], place)(checkpoint)
    how = ReadOptions(dtype, place)
    if "controlnet" in given:
        nets = [(str(one), read_controlnet(resolve(one, component=CONTROLNET), how)) for one in given["controlnet"]]
        checkpoint = add_controlnets(nets)(checkpoint)
    elif listed := listed_controlnets(path):
        nets = [(str(folder), read_controlnet(folder, how, given.get("variant"))) for folder in listed]
        checkpoint = add_controlnets(nets)(checkpoint)
    if "custom_diffusion" in given:
        checkpoint = add_custom_diffusion(resolve(given["custom_diffusion"]), place)(checkpoint)
    if "embeddings" in given:
        checkpoint = add_embeddings([resolve(source) for source in given["embeddings"]])(checkpoint)
    for name, patch in (("merge_lora", merge_loras), ("lora", add_loras)):
        if name in given:
            checkpoint = patch([find_lora(source) for source in given[name]], place)(checkpoint)
    if "image_encoder" in given and "ip_adapter" not in given:
        raise UserError(f"image_encoder {str(given['image_encoder'])!r} changes nothing without an ip_adapter")
    if "ip_adapter" in given:
        checkpoint = add_ip_adapter(given["ip_adapter"], given.get("image_encoder"), how)(checkpoint)
    if "t2i_adapter" in given:
        checkpoint = add_t2i_adapters(given["t2i_adapter"], how)(checkpoint)
    return checkpoint


def _with_classifier(checkpoint: Checkpoint, path: Path, name: str, place: Put) -> Checkpoint:
    """The checkpoint with a classifier of noisy images that guides it."""
    if AUTOENCODER in checkpoint.components:
        raise UserError(f"classifier {str(path)!r}: classifiers guide models of pixels, which {name} is not")
    guide = read_classifier(path, place)
    size = checkpoint.components[BACKBONE].extra.get("sample_size")
    if guide.config.size != size:
        raise UserError(f"{name} makes images of {size} pixels; its classifier knows those of {guide.config.size}")
    return dataclasses.replace(checkpoint, components={**checkpoint.components, CLASSIFIER: guide})


def find_lora(source: Source) -> tuple[Path, float]:
    """The file that FILE or FILE:0.8 means, local or of the Hub, and its strength; a UserError without one."""
    name, colon, number = str(source).rpartition(":")
    if not (colon and NUMBER.fullmatch(number)) or Path(source).expanduser().exists():
        return find_file(resolve(source)), 1.0
    return find_file(resolve(name)), float(number)


def read_classifier(path: Path, place: Put | None = None) -> Component:
    """A classifier of noisy images: the workdir or export of its training, or ADM's file; a UserError without one."""
    (name,) = CLASSIFIERS
    if path.is_file():
        return read_adm_classifier(path, place=place)
    folder = within_workdir(path) / name
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no classifier in {path}: neither {name}/config.json nor a file of ADM's")
    return read_component(folder, name, place=place)


def _tokenizers(checkpoint: Checkpoint) -> dict[str, Tokenizer | WordPieces | T5Tokenizer]:
    if checkpoint.conditioning == TEXT:
        names = [name for name in TOKENIZERS if name in checkpoint.components]
        return dict(zip(names, tokenizers_of(checkpoint), strict=True))
    if checkpoint.conditioning == CAPTIONS and ENCODER in checkpoint.tokenizers:
        return {ENCODER: _captions_tokenizer(checkpoint)}
    if BERT in checkpoint.tokenizers and BERT in checkpoint.components:
        length = checkpoint.components[BERT].config.max_length
        return {BERT: load_word_pieces(checkpoint.tokenizers[BERT], length)}
    return {}


def _captions_tokenizer(checkpoint: Checkpoint) -> T5Tokenizer:
    """T5's tokenizer; a UserError where it has more tokens than the text encoder."""
    folder, known = checkpoint.tokenizers[ENCODER], checkpoint.components[ENCODER].config.vocab_size
    tokenizer = load_t5_tokenizer(folder, checkpoint.settings.get("text_length", LENGTH))
    if tokenizer.vocab_size > known:
        raise UserError(f"{folder} has {tokenizer.vocab_size} tokens, the text encoder beside it {known}")
    return tokenizer


def find(source: Source, variant: str | None = None) -> Path:
    """The folder or single file that a source means, with symbolic links followed.

    Raises:
        UserError: there is none, or it cannot be downloaded.
    """
    path = resolve(source, variant=variant)
    if path.is_dir():
        if (path / INDEX).is_file():
            return path.resolve()
        if (path / "checkpoints").is_dir():
            raise UserError(f"{path} is a workdir without {EXPORT}: train.py writes it when training ends")
        raise UserError(f"{path} is no checkpoint: it has no {INDEX}; give {UNDERSTOOD}")
    if path.suffix not in SINGLE_FILES:
        raise UserError(f"{path} is no checkpoint file ({', '.join(SINGLE_FILES)}); give {UNDERSTOOD}")
    return path.absolute()  # the Hub's cache holds links to files whose names say nothing


def _name(source: Source, path: Path) -> str:
    """The checkpoint's name as a user would say it."""
    if not Path(source).expanduser().exists():  # of the Hub, whose cache has other names
        last = str(source).split("@")[0].split("/")[-1]
        return last.removesuffix(path.suffix) if path.is_file() else last
    if path.is_file():
        return path.stem
    return path.parent.name if path.name == EXPORT else path.name
