"""Conditions as training sees them: the conditioner of a config, and how its columns are made from data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints.checkpoint import TOKENIZERS, find_tokenizer
from sdjax.checkpoints.layouts.diffusers import ZEROS
from sdjax.checkpoints.layouts.original import TOKENIZER_FOLDERS
from sdjax.checkpoints.open import resolve
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.precision import dtype_named
from sdjax.data.image_inputs import corner_weights
from sdjax.data.text.t5_tokenizer import load_t5_tokenizer
from sdjax.data.text.tokenizers import Tokenizer, load_tokenizer
from sdjax.data.text.word_pieces import load_word_pieces
from sdjax.data.transforms.conditions import DRAW_CAPTION, CleanCaption, Layout, TokenizeWords
from sdjax.data.transforms.degradation import LowResolution, NoiseLevel
from sdjax.data.transforms.images import InRange, OfShape
from sdjax.data.transforms.masks import RandomMask
from sdjax.diffusion.samplers import schedule_of
from sdjax.diffusion_model.conditioner import Columns, Combined, Conditioner, in_unit_range
from sdjax.diffusion_model.conditioners import CAPTIONS, TEXT
from sdjax.diffusion_model.conditioners.captions import ENCODER, CaptionConditioner
from sdjax.diffusion_model.conditioners.class_label import LABEL, BackboneClassConditioner, ClassConditioner
from sdjax.diffusion_model.conditioners.inpaint import MASK, InpaintConditioner
from sdjax.diffusion_model.conditioners.maps import LABEL_MAP, LabelMapConditioner
from sdjax.diffusion_model.conditioners.neighbours import NEIGHBOURS, NeighbourConditioner
from sdjax.diffusion_model.conditioners.text import SIZES, TextConditioner
from sdjax.diffusion_model.conditioners.tokens import (
    BERT,
    TOKENS,
    BertTextConditioner,
    LayoutConditioner,
    layout_tokens,
)
from sdjax.diffusion_model.conditioners.upscale import (
    LEVEL,
    LOW,
    SIGNAL,
    SMALL,
    LowResolutionConditioner,
    PixelUpscaleConditioner,
)
from sdjax.diffusion_model.model import BACKBONE, clip_encoders, micro_conditioning, null_ids
from sdjax.diffusion_model.text_encoders import T5TextEncoder
from sdjax.models import bert, clip, t5, unet
from sdjax.models.autoencoder import AutoencoderConfig
from sdjax.models.embedders import ClassEmbedderConfig, RescalerConfig
from sdjax.models.t5 import T5Encoder
from sdjax.tasks.pretrained import frozen_source
from sdjax.tasks.variants import sizes_of
from sdjax.tasks.words import NewWord, new_words, with_new_words


class TrainingCondition(NamedTuple):
    """A condition and its data.

    Attributes:
        conditioner: of the model.
        transforms: Grain's, which turn an example with a square image into one with the columns.
        spec: columns that the loader adds to the image: shape of one row, and type.
        columns: batch -> what the conditioner reads.
        tokenizers: folder of each tokenizer that a finished model is stored with.
        loaded: the same tokenizers, where they are CLIP's.
        settings: facts that a finished model keeps, beside the conditioner's own.
        text: the conditioner of prompts; None where there is none.
        words: new words of its prompts.
        low_res_scheduler: how a small image is noised; None without one.
    """

    conditioner: Conditioner
    transforms: tuple[Any, ...] = ()
    spec: Mapping[str, jax.ShapeDtypeStruct] = {}
    columns: Callable[[Columns], Columns] = lambda batch: batch
    tokenizers: Mapping[str, Path] = {}
    loaded: Mapping[str, Tokenizer] = {}
    settings: Mapping[str, Any] = {}
    text: TextConditioner | None = None
    words: tuple[NewWord, ...] = ()
    low_res_scheduler: Mapping[str, Any] | None = None


def training_condition(config: Config, first_stage: AutoencoderConfig | None, backbone: Any) -> TrainingCondition:
    """The condition that `config.task.conditioning` names.

    Args:
        config: of the run.
        first_stage: of the autoencoder; None for models of pixels.
        backbone: config of the denoising network.

    Raises:
        UserError: there is no such condition, or what the config says of it does not fit.
    """
    name = config.task.conditioning
    if name not in CONDITIONS:
        raise unknown("conditioning", name, CONDITIONS, "config.task.conditioning")
    return CONDITIONS[name](config, first_stage, backbone)


def _unconditional(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    del config, first_stage, backbone
    return TrainingCondition(Conditioner())


def _classes(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """A label; where the condition is dropped, one more class is learned, which stands for none."""
    spec = {LABEL: jax.ShapeDtypeStruct((), np.int32)}
    if first_stage is None:
        conditioner, classes = BackboneClassConditioner(backbone.classes), backbone.classes
    else:
        section, drops = config.model.class_embedder, bool(config.task.dropout)
        classes = section.classes
        sizes = ClassEmbedderConfig(classes + drops, section.width)
        conditioner = ClassConditioner(sizes, classes if drops else None)
    return TrainingCondition(conditioner, (InRange(LABEL, classes),), spec)


def _bert_text(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """Captions; the empty one's tokens are the null condition."""
    del first_stage, backbone
    sizes = sizes_of(config.model.bert, bert.VARIANTS, "config.model.bert")
    tokenizer = load_word_pieces(config.model.tokenizer, sizes.max_length)
    _check_vocabulary(tokenizer, sizes, config.model.tokenizer, "config.model.bert")
    null = tuple(int(token) for token in tokenizer.encode([""])[0]) if config.task.dropout else ()
    spec = {TOKENS: jax.ShapeDtypeStruct((sizes.max_length,), np.int32)}
    folders = {BERT: Path(config.model.tokenizer)}
    transforms = (DRAW_CAPTION, TokenizeWords(tokenizer))
    return TrainingCondition(BertTextConditioner(sizes, null), transforms, spec, tokenizers=folders)


def _captions(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """Captions through T5, which learns with the backbone unless `train.trainable` leaves it out."""
    del first_stage
    place = f"config.model.text_encoders.{ENCODER}"
    sizes, length = sizes_of(config.model.text_encoders[ENCODER], t5.VARIANTS, place), config.model.text_length
    tokenizer = load_t5_tokenizer(config.model.tokenizer, length)
    _check_vocabulary(tokenizer, sizes, config.model.tokenizer, place)
    encoder = T5TextEncoder(ENCODER, T5Encoder(sizes, dtype_named(config.train.dtype, "config.train.dtype")))
    spec, folders = {TOKENS: jax.ShapeDtypeStruct((length,), np.int32)}, {ENCODER: Path(config.model.tokenizer)}
    transforms = (DRAW_CAPTION, CleanCaption(), TokenizeWords(tokenizer))
    captions = TrainingCondition(CaptionConditioner(encoder, length), transforms, spec, tokenizers=folders)
    return captions if backbone.classes is None else _with_small_image(captions, config, backbone.classes)


def _with_small_image(captions: TrainingCondition, config: Config, levels: int) -> TrainingCondition:
    """Captions, and a small image of `task.small` pixels with noise of a random level, made of the large one."""
    small, side = config.task.small, config.data.size
    if not 0 < small < side or side % small:
        raise UserError(f"config.task.small={small}: choose a divisor of config.data.size={side}, and less than it")
    weights = corner_weights(small, side).astype(np.float32)
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": levels,
        **PixelUpscaleConditioner.usual_schedule,
    }
    signal = schedule_of(scheduler).alphas_cumprod.astype(np.float32)

    def columns(batch: Columns) -> Columns:
        low = in_unit_range(batch[LOW]) * 2.0 - 1.0
        enlarged = jnp.einsum("Hh,bhwc,Ww->bHWc", weights, low, weights)
        return {**batch, SMALL: enlarged, SIGNAL: jnp.asarray(signal)[jnp.asarray(batch[LEVEL])]}

    spec = {LOW: jax.ShapeDtypeStruct((small, small, 3), np.uint8), LEVEL: jax.ShapeDtypeStruct((), np.int32)}
    return captions._replace(
        conditioner=Combined((PixelUpscaleConditioner(levels), captions.conditioner)),
        transforms=(*captions.transforms, LowResolution(side // small, config.data.degradation), NoiseLevel(levels)),
        spec={**captions.spec, **spec},
        columns=columns,
        low_res_scheduler=scheduler,
    )


def _check_vocabulary(tokenizer: Any, sizes: Any, folder: str, place: str) -> None:
    """Hold a tokenizer to the tokens that a text encoder knows; a UserError where it has more."""
    if tokenizer.vocab_size > sizes.vocab_size:
        raise UserError(
            f"{place}.vocab_size={sizes.vocab_size}; the tokenizer {folder} has {tokenizer.vocab_size} tokens"
        )


def _layout(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """Tokens of objects in boxes; an empty layout is the null condition."""
    del first_stage, backbone
    sizes, classes = sizes_of(config.model.bert, bert.VARIANTS, "config.model.bert"), config.task.classes
    tokens = layout_tokens(sizes, classes)
    null = tuple(int(token) for token in tokens.encode([], np.zeros((0, 4)))) if config.task.dropout else ()
    spec = {TOKENS: jax.ShapeDtypeStruct((tokens.length,), np.int32)}
    conditioner = LayoutConditioner(sizes, null, classes)
    return TrainingCondition(conditioner, (Layout(tokens),), spec, settings={"object_classes": classes})


def _label_map(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """A label map, halved until it has the latents' size."""
    del backbone
    classes, side = config.model.rescaler.classes, config.data.size
    conditioner = LabelMapConditioner(RescalerConfig(classes, int(math.log2(first_stage.factor))))
    spec = {LABEL_MAP: jax.ShapeDtypeStruct((side, side), np.uint8)}
    return TrainingCondition(conditioner, (InRange(LABEL_MAP, classes),), spec)


def _super_resolution(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """A small image, made of the large one; the factor is the first stage's."""
    del backbone
    side = config.data.size // first_stage.factor
    spec = {LOW: jax.ShapeDtypeStruct((side, side, 3), np.uint8)}
    transforms = (LowResolution(first_stage.factor, config.data.degradation),)
    return TrainingCondition(LowResolutionConditioner(), transforms, spec)


def _inpainting(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """An image and a random mask."""
    del backbone
    least, most = config.data.holes
    side = config.data.size
    conditioner = InpaintConditioner(first_stage.latent_channels, first_stage.factor, stable_diffusion=False)
    return TrainingCondition(
        conditioner, (RandomMask(least, most),), {MASK: jax.ShapeDtypeStruct((side, side, 1), np.uint8)}
    )


def _retrieval(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """Embeddings of as many neighbours as the config says."""
    del first_stage
    shape = (config.task.neighbours, sizes_of(config.model.unet, unet.VARIANTS, "config.model.unet").context_dim)
    spec = {NEIGHBOURS: jax.ShapeDtypeStruct(shape, np.float32)}
    return TrainingCondition(NeighbourConditioner(backbone.context_dim), (OfShape(NEIGHBOURS, shape),), spec)


def _text(config: Config, first_stage: Any, backbone: Any) -> TrainingCondition:
    """Prompts through CLIP's text encoders: token ids, or precomputed embeddings where `task.text` says so."""
    del first_stage
    if config.task.text not in TEXTS:
        raise unknown("text", config.task.text, TEXTS, "config.task.text")
    dtype, place = dtype_named(config.train.dtype, "config.train.dtype"), "config.model.text_encoders"
    sections = config.model.text_encoders
    for name in sections:
        if name not in TOKENIZERS:
            raise unknown("text encoder", name, TOKENIZERS, place)
    sizes = {name: sizes_of(sections[name], clip.VARIANTS, f"{place}.{name}") for name in sorted(sections)}
    folders = {name: _tokenizer_folder(config, name, sizes[name]) for name in sizes}
    words = new_words(config.task)
    loaded = _LazyTokenizers(folders, sizes, words)
    if words:  # the end of a prompt no longer has its highest id
        sizes = {name: dataclasses.replace(sizes[name], eos_token_id=loaded[name].eos) for name in sizes}
    encoders = clip_encoders({BACKBONE: backbone, **sizes}, dtype, sum(word.vectors for word in words))
    numbers = micro_conditioning(backbone, encoders, 256, "config.model")
    zeros = config.task.get(ZEROS, numbers == SIZES)
    null = () if zeros else null_ids(encoders, loaded)
    conditioner = TextConditioner(encoders, numbers, 256, null)
    spec = text_spec(conditioner, config.task.text)
    return TrainingCondition(conditioner, (), spec, _text_columns, folders, loaded, text=conditioner, words=words)


TEXTS = ("prepared", "tokens")
"""Values of `task.text`: embeddings that were precomputed, or token ids."""


class _LazyTokenizers(dict):
    """Tokenizers by text encoder, which read new words, each loaded when it is first asked for."""

    def __init__(
        self, folders: Mapping[str, Path], sizes: Mapping[str, clip.CLIPTextConfig], words: tuple[NewWord, ...]
    ) -> None:
        self._folders, self._sizes, self._words = folders, sizes, words

    def __missing__(self, name: str) -> Tokenizer:
        sizes = self._sizes[name]
        self[name] = with_new_words(
            load_tokenizer(self._folders[name], sizes.max_length), self._words, sizes.vocab_size
        )
        return self[name]


def _tokenizer_folder(config: Config, name: str, sizes: clip.CLIPTextConfig) -> Path:
    """The config's own tokenizer, that of the frozen networks' folder, or CLIP's published one."""
    if config.model.get("tokenizer"):
        return Path(config.model.tokenizer)
    _, source = frozen_source(config.task)
    if source and Path(source).expanduser().is_dir():
        return find_tokenizer(resolve(source) / TOKENIZERS[name])
    return TOKENIZER_FOLDERS / ("clip_l" if sizes.activation == "quick_gelu" else "open_clip")


def text_spec(conditioner: TextConditioner, text: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Columns of one caption that a loader gives: token ids, or embeddings, and SDXL's sizes."""
    length, sizes = conditioner.encoders[0].max_length, {}
    if conditioner.numbers:
        sizes = {"sizes": jax.ShapeDtypeStruct((SIZES,), jnp.float32)}
    if text != "prepared":
        return {"tokens": jax.ShapeDtypeStruct((len(conditioner.encoders), length), jnp.int32), **sizes}
    shapes = embedding_shapes(conditioner)
    return {**{name: jax.ShapeDtypeStruct(x.shape, jnp.float16) for name, x in shapes.items()}, **sizes}


def embedding_shapes(conditioner: TextConditioner) -> dict[str, jax.ShapeDtypeStruct]:
    """Embeddings of one caption."""
    length = conditioner.encoders[0].max_length
    shapes = {"context": jax.ShapeDtypeStruct((length, conditioner.traits.context_width), jnp.float32)}
    if conditioner.numbers:
        shapes["pooled"] = jax.ShapeDtypeStruct((conditioner.pooled_width,), jnp.float32)
    return shapes


def _text_columns(batch: Columns) -> Columns:
    rows = len(next(iter(batch.values())))
    columns: dict[str, Any] = {"keep": jnp.ones(rows)}
    if "tokens" in batch:
        columns["ids"] = jnp.asarray(batch["tokens"])[:, :, None]
    if "sizes" in batch:
        columns["numbers"] = batch["sizes"]
    return {**columns, **{name: batch[name] for name in ("context", "pooled") if name in batch}}


CONDITIONS: dict[str, Callable[[Config, Any, Any], TrainingCondition]] = {
    "unconditional": _unconditional,
    "class_conditional": _classes,
    TEXT: _text,
    CAPTIONS: _captions,
    "text_bert": _bert_text,
    "layout": _layout,
    "semantic_synthesis": _label_map,
    "super_resolution": _super_resolution,
    "inpainting": _inpainting,
    "retrieval": _retrieval,
}
