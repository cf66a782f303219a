"""From what a user calls a model to a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sdjax.convert.adm_file import read_adm_classifier
from sdjax.convert.components import CLASSIFIERS, TOKENIZERS, Checkpoint, Component, Patch
from sdjax.convert.folder import read_component
from sdjax.convert.hub import resolve
from sdjax.convert.model_index import INDEX, LDM, STABLE_DIFFUSION
from sdjax.convert.opening import kind_of, read_checkpoint
from sdjax.convert.patches import add_embeddings, replace_vae
from sdjax.convert.rules import Placer
from sdjax.convert.tokenizers import tokenizers_of
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.workdirs import EXPORT
from sdjax.diffusion.denoise import check_prediction
from sdjax.models.autoencoder import autoencoder_of
from sdjax.models.clip import TEXT_LAYERS, CLIPText
from sdjax.models.unet import UNet
from sdjax.parallel.sharding import placer
from sdjax.pipeline.conditional import ConditionalPipeline
from sdjax.pipeline.few_step import few_step_defaults
from sdjax.pipeline.pipeline import Pipeline
from sdjax.pipeline.pixels import PixelPipeline
from sdjax.tasks.latent import System, TextEncoder
from sdjax.tasks.latent.system import AESTHETICS, SIZES, extra_channels

UNDERSTOOD = (
    f"a diffusers folder (one with {INDEX}), a Hub id (owner/name), a single .safetensors or .ckpt file, or the "
    "workdir of a finished train.py run"
)
(CLASSIFIER,) = CLASSIFIERS
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
Source = str | Path


def load(
    source: Source,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    family: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    vae: Source | None = None,
    embeddings: Sequence[Source] = (),
) -> Pipeline:
    """A pipeline of a checkpoint; parameters are read one at a time, straight to the devices.

    Args:
        source: a Hub id, a diffusers folder, a single file, or the workdir of a finished train.py run.
        dtype: of the UNet and the text encoders, "float32" or "bfloat16"; the autoencoder works in float32 always.
        mesh: of `sdjax.parallel.mesh.make_mesh`; parameters and batches are spread over it. None for one device.
        family: what a single file is, where its keys and shapes mislead; one of `sdjax.convert.families.FAMILIES`.
        prediction: "epsilon", "v_prediction" or "sample", in place of what the checkpoint says.
        variant: of a folder's weights, e.g. "fp16"; None takes half-precision ones only where there are no others.
        vae: another autoencoder: a file, or a folder with its config.json.
        embeddings: textual inversions, `.safetensors`, `.pt` or `.bin`.

    Raises:
        UserError: the source is missing or is none of these, or what it holds is corrupt or not supported.
    """
    kind = dtype_named(dtype)
    path = find(source, variant)
    dtypes = dict.fromkeys(("unet", "text_encoder", "text_encoder_2"), dtype) | {"vae": "float32"}
    place = _placer(mesh)
    checkpoint = read_checkpoint(path, dtype=dtypes, family=family, prediction=prediction, variant=variant, place=place)
    if checkpoint.conditioning != "text":
        raise UserError(f"{path} is a model of {checkpoint.conditioning}; sdjax.load_conditional reads it")
    patches: list[Patch] = [] if vae is None else [replace_vae(vae, place)]
    for patch in [*patches, add_embeddings(embeddings)] if embeddings else patches:
        checkpoint = patch(checkpoint)
    tokenizers = tokenizers_of(checkpoint)
    system = make_system(checkpoint, kind, path)
    name = _name(source, path)
    told_guidance = checkpoint.components["unet"].config.guidance_dim is not None
    own = few_step_defaults(name, checkpoint.scheduler, told_guidance, path.is_file())
    checkpoint = dataclasses.replace(checkpoint, settings={**own, **checkpoint.settings})
    return Pipeline(name, checkpoint, system, tokenizers, dtype, mesh)


def load_conditional(
    source: Source,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    family: str | None = None,
    tokenizer: Source | None = None,
    classifier: Source | None = None,
) -> ConditionalPipeline | PixelPipeline:
    """A pipeline of a model of the LDM paper, or of ADM and DDPM: of classes, layouts, maps, pictures, or nothing.

    Args:
        source: a folder that train.py or diffusers wrote, the workdir of a finished run, a Hub id, or a file of the
            paper's own (`model.ckpt`) or of ADM's (`256x256_diffusion.pt`).
        dtype: of the UNet's arithmetic.
        mesh: of `sdjax.parallel.mesh.make_mesh`; parameters and batches are spread over it. None for one device.
        family: what a file is, where its keys and shapes mislead.
        tokenizer: the folder with BERT's vocab.txt, for a model of words that is stored without.
        classifier: for guidance of a model of pixels: the workdir or the folder of a finished run of
            `noisy_classifier`, or ADM's file.

    Raises:
        UserError: the source is missing or no such model, or what it holds is corrupt.
    """
    path = find(source)
    name, kind = _name(source, path), kind_of(path)
    if kind == STABLE_DIFFUSION:
        raise UserError(f"{path} is no model of classes, layouts, label maps or pictures; sdjax.load reads the others")
    place = _placer(mesh)
    if kind == LDM and classifier is not None:
        raise UserError(f"classifier {str(classifier)!r}: classifiers guide models of pixels, which {name} is not")
    read = read_checkpoint(path, family=family, tokenizer=tokenizer, place=place)
    if kind == LDM:
        return ConditionalPipeline(name, read, dtype, mesh)
    return PixelPipeline(
        name, read, dtype, None if classifier is None else read_guide(Path(classifier).expanduser(), place), mesh
    )


def _placer(mesh: Mesh | None) -> Placer:
    return (lambda array, name: jax.device_put(array)) if mesh is None else placer(mesh)


def read_guide(path: Path, place: Placer | None = None) -> Component:
    """A classifier of noisy pictures.

    Raises:
        UserError: it is missing or cannot be read.
    """
    if path.is_file():
        return read_adm_classifier(path, place=place)
    folders = [folder for folder in (path, path / EXPORT) if (folder / CLASSIFIER / "config.json").is_file()]
    if not folders:
        raise UserError(f"there is no classifier in {path}: neither {CLASSIFIER}/config.json nor a file of ADM's")
    return read_component(folders[0] / CLASSIFIER, CLASSIFIER, place=place)


def find(source: Source, variant: str | None = None) -> Path:
    """The diffusers folder or single file that a source means, with symbolic links followed.

    Raises:
        UserError: there is none, or it cannot be downloaded.
    """
    path = resolve(source, variant=variant)
    if path.is_dir():
        for folder in (path, path / EXPORT):
            if (folder / INDEX).is_file():
                return folder.resolve()
        if (path / "checkpoints").is_dir():
            raise UserError(f"{path} is a workdir without {EXPORT}: train.py writes it when training ends")
        raise UserError(f"{path} is no checkpoint: it has no {INDEX}; give {UNDERSTOOD}")
    if path.suffix not in SINGLE_FILES:
        raise UserError(f"{path} is no checkpoint file ({', '.join(SINGLE_FILES)}); give {UNDERSTOOD}")
    return path.absolute()  # the Hub's cache holds links to files whose names say nothing


def _name(source: Source, path: Path) -> str:
    """What a user would call the checkpoint."""
    if not Path(source).expanduser().exists():  # of the Hub, whose cache has other names
        last = str(source).split("@")[0].split("/")[-1]
        return last.removesuffix(path.suffix) if path.is_file() else last
    if path.is_file():
        return path.stem
    return path.parent.name if path.name == EXPORT else path.name


def make_system(checkpoint: Checkpoint, kind: Any, place: object) -> System:
    """The networks of a checkpoint.

    Raises:
        UserError: they do not fit each other.
    """
    parts = checkpoint.components
    unet = parts["unet"].config
    layer = TEXT_LAYERS["last" if unet.vector_dim is None else "penultimate_raw"]
    encoders = [name for name in TOKENIZERS if name in parts]
    prediction = checkpoint.scheduler.get("prediction_type", "epsilon")
    check_prediction(prediction)
    system = System(
        unet=UNet(unet, dtype=kind),
        autoencoder=autoencoder_of(parts["vae"].config),
        text_encoders=tuple(TextEncoder(name, CLIPText(parts[name].config, kind), layer) for name in encoders),
        prediction=prediction,
        number_width=parts["unet"].extra.get("addition_time_embed_dim") or 256,
    )
    _check_fit(system, place)
    return system


def _check_fit(system: System, place: object) -> None:
    unet, latent = system.unet.config, system.autoencoder.config.latent_channels
    surplus = extra_channels(system.autoencoder)
    if unet.out_channels != latent or unet.in_channels - latent not in surplus.values():
        known = ", ".join(f"{name} (+{count})" for name, count in surplus.items())
        raise UserError(
            f"{place}: the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the autoencoder's "
            f"latents have {latent}; beside them a UNet may take: {known}"
        )
    if unet.context_dim != system.context_width:
        raise UserError(
            f"{place}: the UNet attends to {unet.context_dim} features, the text encoders give {system.context_width}"
        )
    if unet.vector_dim is not None:
        rest = unet.vector_dim - system.pooled_width
        if rest not in (SIZES * system.number_width, AESTHETICS * system.number_width):
            raise UserError(
                f"{place}: the UNet takes a vector of {unet.vector_dim} features, which is not the pooled prompt's "
                f"{system.pooled_width} and {AESTHETICS} or {SIZES} numbers of {system.number_width}"
            )
