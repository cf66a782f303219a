"""A checkpoint's parts: its networks, how each is stored, and its tokenizers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from numpy.typing import DTypeLike

from sdjax.checkpoints.kinds import CAPTIONS, LDM, PIXELS, STABLE_DIFFUSION
from sdjax.checkpoints.mapping import KeyTable, Put, Stored, check_blocks, read
from sdjax.checkpoints.networks import (
    added_kv_unet,
    autoencoder,
    clip,
    clip_image,
    controlnet,
    efficient_unet,
    embedders,
    prior,
    t2i_adapter,
    t5,
    unet,
    unet2d,
)
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Tree
from sdjax.core.untrusted import read_json
from sdjax.data.text.added_tokens import ADDED, CONFIG, WHOLE, apart, write_added
from sdjax.data.text.t5_tokenizer import load_t5_tokenizer, write_t5_tokenizer
from sdjax.data.text.tokenizers import Tokenizer, load_tokenizer, with_placeholders
from sdjax.data.text.word_pieces import read_vocabulary, write_vocabulary
from sdjax.models.added_kv_unet import AddedKVUNetConfig
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.efficient_unet import EfficientUNetConfig
from sdjax.models.t5 import T5Config
from sdjax.models.unet import UNetConfig
from sdjax.models.unet2d import UNet2DConfig


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


class LoadedLora(NamedTuple):
    """A file of LoRA whose factors stand in a checkpoint's parameters.

    Attributes:
        name: by which prompts call it, the file's.
        path: the file.
        scale: strength where a call names none.
        alias: another name, which its training gave it; "" for none.
        changes_weights: whether some of it is no branch beside a layer, so that images of unlike strengths cannot share
            a batch.
    """

    name: str
    path: Path
    scale: float = 1.0
    alias: str = ""
    changes_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole model: what a folder or a single file holds.

    Attributes:
        components: its networks: "unet", "vae" (not in models that diffuse pixels), "text_encoder", "text_encoder_2",
            then "bert", "class_embedder" or "rescaler".
        scheduler: scheduler_config.json; `_class_name` names the sampler.
        conditioning: "text" for Stable Diffusion, whose refiner and upscaler included; for other latent models the
            file of `sdjax.tasks` that trains such; "unconditional" or "class_conditional" for models of pixels.
        settings: how it is best sampled, e.g. {"steps": 25, "guidance_scale": 2.5}, and what its condition means, e.g.
            {"classes": ["cat", "dog"]}; diffusers passes over it.
        tokenizers: the folder with a tokenizer's files, by the text encoder that reads its tokens.
        low_res_scheduler: how an upscaler's low-resolution image is noised; None for other models.
        model_index: what model_index.json says beside its components, e.g. {"_class_name":
            "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}.
        placeholders: words of textual inversions, and the number of vectors of each. Their ids are the last of every
            text encoder, in this order.
        loras: files whose factors stand in the parameters, as the entries "0", "1", ... of a layer's "lora".
        controlnets: names of the components "controlnet", "controlnet_1", ..., those of their files or folders.
    """

    components: Mapping[str, Component]
    scheduler: Mapping[str, Any]
    conditioning: str = "text"
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    low_res_scheduler: Mapping[str, Any] | None = None
    model_index: Mapping[str, Any] = field(default_factory=dict)
    placeholders: Mapping[str, int] = field(default_factory=dict)
    loras: tuple[LoadedLora, ...] = ()
    controlnets: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of folder that holds it."""
        return STABLE_DIFFUSION if self.conditioning == "text" else LDM if "vae" in self.components else PIXELS

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images it was trained on."""
        # diffusers keeps them as the UNet's sample_size, 64 where it says nothing.
        own, size = self.settings.get("size"), self.components["unet"].extra.get("sample_size")
        if size is None and own is not None:
            return int(own), int(own)
        height, width = size if isinstance(size, list | tuple) else (size or 64, size or 64)
        factor = self.components["vae"].config.factor if "vae" in self.components else 1
        return height * factor, width * factor

    def replace_component(self, name: str, component: Component) -> Checkpoint:
        """The checkpoint with another network in place of the one called `name`."""
        return replace(self, components={**self.components, name: component})


Patch: TypeAlias = Callable[[Checkpoint], Checkpoint]
"""A change of a checkpoint, e.g. another autoencoder."""


class Format(NamedTuple):
    """The storage of a network: its file, and the translation of its config and parameters."""

    weights: str
    from_config: Callable[[Mapping[str, Any], str], Any]
    to_config: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], KeyTable]
    shapes: Callable[[Any], Tree]


def _format(weights: str, module: Any) -> Format:
    config = module.from_diffusers_config, module.to_diffusers_config
    return Format(weights, *config, lambda sizes: module.TABLE, module.shapes)


def _constant(table: KeyTable) -> Callable[[Any], KeyTable]:
    return lambda config: table


NETWORK = "diffusion_pytorch_model"
UNETS: dict[type, Format] = {
    UNetConfig: Format(NETWORK, unet.from_diffusers_config, unet.to_diffusers_config, unet.table, unet.shapes),
    UNet2DConfig: Format(NETWORK, unet2d.from_config, unet2d.to_config, _constant(unet2d.TABLE), unet2d.shapes),
    AddedKVUNetConfig: _format(NETWORK, added_kv_unet),
    EfficientUNetConfig: _format(NETWORK, efficient_unet),
}


TEXT_ENCODERS: dict[type, Format] = {CLIPTextConfig: _format("model", clip), T5Config: _format("model", t5)}


def _unet_type(config: Mapping[str, Any]) -> type:
    if config.get("_class_name") in (unet2d.CLASS_NAME, unet2d.OWN_CLASS_NAME):
        return UNet2DConfig
    if config.get("_class_name") == efficient_unet.CLASS_NAME:
        return EfficientUNetConfig
    return AddedKVUNetConfig if added_kv_unet.is_added_kv(config) else UNetConfig


def _text_type(config: Mapping[str, Any]) -> type:
    return T5Config if t5.is_t5(config) else CLIPTextConfig


def _by_type(formats: Mapping[type, Format], type_of: Callable[[Mapping[str, Any]], type]) -> Format:
    """The storage of networks of several structures, by the type of sizes that a config.json means."""
    return Format(
        next(iter(formats.values())).weights,
        lambda config, place: formats[type_of(config)].from_config(config, place),
        lambda sizes: formats[type(sizes)].to_config(sizes),
        lambda sizes: formats[type(sizes)].table(sizes),
        lambda sizes: formats[type(sizes)].shapes(sizes),
    )


FORMATS: dict[str, Format] = {
    "unet": _by_type(UNETS, _unet_type),
    "vae": _format(NETWORK, autoencoder),
    "text_encoder": _by_type(TEXT_ENCODERS, _text_type),
    "text_encoder_2": _format("model", clip),
}
CONDITIONERS: dict[str, Format] = {
    "bert": Format(
        "model",
        embedders.bert_from_config,
        embedders.bert_to_config,
        _constant(embedders.BERT_TABLE),
        embedders.bert_shapes,
    ),
    "class_embedder": Format(
        "model",
        embedders.class_from_config,
        embedders.class_to_config,
        _constant(embedders.CLASS_TABLE),
        embedders.class_shapes,
    ),
    "rescaler": Format(
        "model",
        embedders.rescaler_from_config,
        embedders.rescaler_to_config,
        _constant(embedders.RESCALER_TABLE),
        embedders.rescaler_shapes,
    ),
}
CLASSIFIERS: dict[str, Format] = {
    "classifier": Format(
        "model",
        unet2d.classifier_from_config,
        unet2d.classifier_to_config,
        _constant(unet2d.CLASSIFIER_TABLE),
        unet2d.classifier_shapes,
    )
}
CONTROLNET = "controlnet"
CONTROLNETS: dict[str, Format] = {
    CONTROLNET: Format(
        NETWORK,
        controlnet.from_diffusers_config,
        controlnet.to_diffusers_config,
        controlnet.table,
        controlnet.shapes,
    )
}
ADAPTERS: dict[str, Format] = {
    "image_encoder": Format(
        "model", clip_image.from_config, clip_image.to_config, _constant(clip_image.TABLE), clip_image.shapes
    ),
    "t2i_adapter": _format(NETWORK, t2i_adapter),
}
ADDITIONS = ("ip_adapter", *CONTROLNETS, *ADAPTERS)
"""Beginnings of the names of components that act beside a model's own, and are no part of what is written of it."""
PRIORS: dict[str, Format] = {"prior": _format(NETWORK, prior)}
ALL_FORMATS = FORMATS | CONDITIONERS | CLASSIFIERS | CONTROLNETS | ADAPTERS | PRIORS

Dtypes: TypeAlias = str | Mapping[str, str | None] | None


class ReadOptions(NamedTuple):
    """Options of reading parameters.

    Attributes:
        dtype: "float32", "bfloat16", "float16", or None for the type that each is stored in; or such a value a network.
        place: called with each array, as soon as it is converted, and its path, e.g. "unet/conv_in/kernel"; what it
            returns takes the array's place in the tree. None keeps NumPy arrays.
    """

    dtype: Dtypes = "float32"
    place: Put | None = None


def read_params(
    name: str, config: Any, tensors: Mapping[str, Stored], source: object, how: ReadOptions
) -> dict[str, Any]:
    """The parameters of the network `name` from tensors under diffusers' keys, one at a time.

    Raises:
        UserError: the tensors do not fit `config` or are not finite in the type asked for, or that type is unknown.
    """
    form, place = ALL_FORMATS[name], how.place
    below = None if place is None else lambda array, path: place(array, f"{name}/{path}")
    check_blocks(config.blocks, tensors, source)
    return read(form.table(config), tensors, form.shapes(config), dtype_of(name, how), source, below)


def dtype_of(name: str, how: ReadOptions) -> DTypeLike | None:
    """The type that the parameters of a network shall have; None for the one that each is stored in."""
    kind = how.dtype if how.dtype is None or isinstance(how.dtype, str) else how.dtype.get(name)
    return None if kind is None else dtype_named(kind)


def pixel_conditioning(config: Any, place: object) -> str:
    """The conditioning of a UNet that makes images of images: "class_conditional" or "unconditional".

    Raises:
        UserError: it has cross-attention, or other channels than 3 in, and 3 or 6 out.
    """
    if not isinstance(config, UNet2DConfig) or config.in_channels != 3 or config.out_channels not in (3, 6):
        raise UserError(f"{place} is no UNet of images without cross-attention, of 3 channels in and 3 or 6 out")
    return "unconditional" if config.classes is None else "class_conditional"


BERT = "bert"
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""The folder of the tokenizer of each of CLIP's text encoders, or of T5 in place of the first."""
TOKENIZER_FILES = ("vocab.json", "merges.txt", WHOLE, CONFIG, "special_tokens_map.json", ADDED)


def find_tokenizer(path: Path) -> Path:
    """`path` itself, where it holds a tokenizer of CLIP's.

    Raises:
        UserError: it does not.
    """
    if not any(all((path / file).is_file() for file in files) for files in (TOKENIZER_FILES[:2], TOKENIZER_FILES[2:3])):
        raise UserError(f"{path} holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json")
    return path


def tokenizer_class(encoder: str, sizes: Any) -> str:
    """Transformers' class of the tokenizer of a text encoder."""
    return "BertTokenizer" if encoder == BERT else "T5Tokenizer" if isinstance(sizes, T5Config) else "CLIPTokenizer"


def write_tokenizer(kind: str, source: Path, target: Path, added: Mapping[str, int]) -> None:
    """Writes a tokenizer of a `tokenizer_class` into a new folder, with the ids of tokens that are `added` to CLIP's.

    Raises:
        UserError: `source` holds none, or a file of another kind under one of its names.
    """
    if kind == "T5Tokenizer":
        write_t5_tokenizer(load_t5_tokenizer(source, 1), target)
        return
    if kind == "BertTokenizer":
        vocabulary = read_vocabulary(source)
        target.mkdir()
        write_vocabulary(target, vocabulary)
        return
    load_tokenizer(find_tokenizer(source))
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            if name.endswith(".json"):
                read_json(source / name)  # which may be a link to anything
            shutil.copyfile(source / name, target / name)
    if added:
        write_added(target, added)


def added_tokens(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """The ids of the tokens that the checkpoint's placeholders add, by text encoder.

    Raises:
        UserError: a tokenizer has fewer tokens than its text encoder had, so that transformers would number them anew.
    """
    found: dict[str, dict[str, int]] = {}
    if not checkpoint.placeholders:
        return found
    for name, tokenizer in zip(check_text_encoders(checkpoint), tokenizers_of(checkpoint), strict=True):
        own = tokenizer.placeholders[-len(checkpoint.placeholders) :]
        if own[0].ids[0] != tokenizer.vocab_size:
            raise UserError(
                f"word {own[0].word!r}: the {name} has more tokens than its tokenizer; it cannot be written"
            )
        found[name] = apart(own)
    return found


def check_text_encoders(checkpoint: Checkpoint) -> list[str]:
    """The names of CLIP's text encoders in a checkpoint of prompts.

    Raises:
        UserError: there is none, or one lacks its tokenizer.
    """
    encoders = [name for name in TOKENIZERS if name in checkpoint.components]
    if not encoders:
        raise UserError("the checkpoint has no text encoder")
    for name in encoders:
        if name not in checkpoint.tokenizers:
            raise UserError(f"the checkpoint has a {name} without its {TOKENIZERS[name]}")
    return encoders


def tokenizers_of(checkpoint: Checkpoint) -> tuple[Tokenizer, ...]:
    """The tokenizers of CLIP's text encoders, in their order, which read the checkpoint's placeholders.

    Raises:
        UserError: as `check_text_encoders`; or one cannot be read, or has more tokens than its text encoder.
    """
    found = []
    for name in check_text_encoders(checkpoint):
        folder, config = checkpoint.tokenizers[name], checkpoint.components[name].config
        tokenizer = load_tokenizer(folder, config.max_length)
        first = config.vocab_size - sum(checkpoint.placeholders.values())
        if tokenizer.vocab_size > first:
            raise UserError(f"{folder} has {tokenizer.vocab_size} tokens, the text encoder beside it {first}")
        found.append(with_placeholders(tokenizer, checkpoint.placeholders, first))
    return tuple(found)


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


def with_word_pieces(checkpoint: Checkpoint, folder: str | Path) -> Checkpoint:
    """The checkpoint with BERT's vocabulary, for a model of words that is stored without.

    Raises:
        UserError: the model reads no words, the folder holds no vocabulary, or a larger one than the model knows.
    """
    folder, kind = Path(folder).expanduser(), checkpoint.conditioning
    if kind != "text_bert":
        problem = "has a tokenizer of its own" if kind in ("text", CAPTIONS) else "reads no words"
        raise UserError(f"tokenizer {str(folder)!r}: a model of {kind} {problem}")
    count, known = len(read_vocabulary(folder)), checkpoint.components[BERT].config.vocab_size
    if count > known:
        raise UserError(f"tokenizer {str(folder)!r} has {count} tokens; the model knows {known}")
    return dataclasses.replace(checkpoint, tokenizers={BERT: folder})
