"""Fine-tuning: a config whose networks, condition and noise schedule are those of a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.checkpoint import TOKENIZERS, Checkpoint
from sdjax.checkpoints.layouts.diffusers import ZEROS, pipeline_class
from sdjax.checkpoints.open import read_checkpoint, resolve
from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.diffusion_model.conditioners import CAPTIONS, TEXT
from sdjax.diffusion_model.conditioners.captions import ENCODER, LENGTH
from sdjax.diffusion_model.conditioners.class_label import EMBEDDER
from sdjax.diffusion_model.conditioners.maps import RESCALER
from sdjax.diffusion_model.conditioners.tokens import BERT
from sdjax.diffusion_model.model import AUTOENCODER, BACKBONE
from sdjax.models import autoencoder, bert, clip, t5
from sdjax.tasks.variants import BACKBONES, section_of

VARIANTS: dict[str, dict[str, Any]] = {
    BACKBONE: dict(BACKBONES),
    AUTOENCODER: autoencoder.VARIANTS,
    BERT: bert.VARIANTS,
    **dict.fromkeys(TOKENIZERS, clip.VARIANTS | t5.VARIANTS),
}
SECTIONS = {AUTOENCODER: "autoencoder"}  # components that config.model calls otherwise
PIXELS = "none"
"""`task.first_stage` of models that diffuse pixels."""
SHRINK = 4  # of the images that a model enlarges, where the config does not say it
# Of previews, where neither the config nor the checkpoint says it.
SAMPLE = {"sampler": "ddim", "steps": 25, "guidance_scale": 1.0}
GUIDED = {TEXT: 7.5, "text_bert": 5.0, CAPTIONS: 7.0}
READ_WITH = {"text_bert": (BERT, "BERT's vocab.txt"), CAPTIONS: (ENCODER, "T5's tokenizer.json or spiece.model")}
"""The component whose tokenizer reads captions, and what the folder of that tokenizer holds."""
NULLED = (TEXT, "text_bert", CAPTIONS, "retrieval")  # conditions with a null of their own, which no setting names


def is_finetuning(config: Config) -> bool:
    """True for a config that leaves its networks to the checkpoint that it begins from."""
    return config.task.name == "diffusion" and BACKBONE not in config.model


def from_checkpoint(config: Config) -> Config:
    """The config with all that the checkpoint `config.task.initial` says, as other configs have it.

    These are `model`, `task.conditioning`, `task.scheduler` and what else depends on the condition, and where they are
    left open (0, "" or None) `data.size`, `task.small`, `task.export_dtype` and the sampler of previews. An open
    `train.trainable` is the backbone, or where it has a LoRA that one's factors.

    Raises:
        UserError: the checkpoint cannot be read, or is conditioned on what no data set holds.
    """
    source = config.task.initial
    if not source:
        raise UserError("config.task.initial is empty; it is the model to begin from, which config.model leaves open")
    checkpoint = read_checkpoint(resolve(source), dtype=None, place=_shape)
    _check_captioned(checkpoint, source)
    config = config.copy_and_resolve_references().unlock()
    config.model.update(_sections(checkpoint, config))
    config.task.update(_task(checkpoint, config.task))
    config.task.export_dtype = config.task.export_dtype or _stored_dtype(checkpoint)
    config.data.size = config.data.size or checkpoint.default_size[0]
    if checkpoint.low_res_scheduler is not None:
        config.task.small = config.task.small or config.data.size // SHRINK
    if config.train.trainable is None:
        config.train.trainable = () if config.task.lora.targets else (BACKBONE,)
    guided = {"guidance_scale": GUIDED.get(checkpoint.conditioning, 1.0)}
    for name, usual in (SAMPLE | guided | dict(checkpoint.settings)).items():
        if name in SAMPLE and config.sample[name] is None:
            config.sample[name] = usual
    return config.lock()


def _shape(array: np.ndarray, name: str) -> Any:
    """A `Put` that lets go of every array, so that a model of any size is described in little memory."""
    del name
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _check_captioned(checkpoint: Checkpoint, source: str) -> None:
    """Refuse models of Stable Diffusion's family that are conditioned on more than a caption."""
    parts = checkpoint.components
    if checkpoint.conditioning != TEXT or BACKBONE not in parts or AUTOENCODER not in parts:
        return
    sizes, latents = parts[BACKBONE].config, parts[AUTOENCODER].config.latent_channels
    if (
        sizes.in_channels != latents
        or "text_encoder" not in parts
        or sizes.classes is not None
        or sizes.guidance_dim is not None
    ):
        raise UserError(
            f"config.task.initial: {source} ({pipeline_class(checkpoint)}) is conditioned on more than captions, which "
            "is all that a folder of images has; choose a base model of Stable Diffusion 1, 2 or XL"
        )


def _sections(checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    """The `model` section."""
    sizes = {name: component.config for name, component in checkpoint.components.items()}
    found: dict[str, Any] = {SECTIONS.get(n, n): section_of(sizes[n], VARIANTS[n]) for n in sizes if n in VARIANTS}
    if encoders := {name: found.pop(name) for name in TOKENIZERS if name in found}:
        found["text_encoders"] = encoders
    if EMBEDDER in sizes:
        null = checkpoint.settings.get("none") is not None
        found[EMBEDDER] = {"classes": sizes[EMBEDDER].classes - null, "width": sizes[EMBEDDER].width}
    if RESCALER in sizes:
        found[RESCALER] = {"classes": sizes[RESCALER].classes}
    if checkpoint.conditioning == CAPTIONS:
        found["text_length"] = checkpoint.settings.get("text_length", LENGTH)
    if checkpoint.conditioning in READ_WITH:
        reader, files = READ_WITH[checkpoint.conditioning]
        found["tokenizer"] = config.model.tokenizer or str(checkpoint.tokenizers.get(reader, ""))
        if not found["tokenizer"]:
            raise UserError(f"config.model.tokenizer: {config.task.initial} has none; give the folder with {files}")
    return found


def _task(checkpoint: Checkpoint, task: Config) -> dict[str, Any]:
    """Entries of the `task` section that follow from the condition."""
    conditioning, settings = checkpoint.conditioning, checkpoint.settings
    has_null = bool(settings.get("nothing", conditioning in NULLED)) or settings.get("none") is not None
    found = {
        "conditioning": conditioning,
        "latents": task.get("latents") or ("cached" if conditioning == TEXT else "encoded"),
        "first_stage": "" if AUTOENCODER in checkpoint.components else PIXELS,
        "dropout": task.dropout if has_null else 0.0,
        "scheduler": {"prediction_type": "epsilon", **checkpoint.scheduler},
    }
    if ZEROS in checkpoint.model_index:
        found[ZEROS] = checkpoint.model_index[ZEROS]
    if conditioning == "layout":
        bert_sizes = checkpoint.components[BERT].config
        found["classes"] = int(settings.get("object_classes", bert_sizes.vocab_size - 1))
    return found


def _stored_dtype(checkpoint: Checkpoint) -> str:
    return str(jax.tree.leaves(dict(checkpoint.components[BACKBONE].params))[0].dtype)
