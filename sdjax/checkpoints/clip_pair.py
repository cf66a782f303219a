"""A whole CLIP, both of its towers, as Hugging Face transformers stores it (`CLIPModel`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints.checkpoint import write_tokenizer
from sdjax.checkpoints.mapping import Stored, check_blocks, export, finite, read
from sdjax.checkpoints.metric_weights import FOLDER, folders
from sdjax.checkpoints.networks import clip, clip_image
from sdjax.checkpoints.storage.safetensors import write_json, write_safetensors
from sdjax.checkpoints.storage.weights import find_weights
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Tree
from sdjax.core.untrusted import read_json
from sdjax.data.image_inputs import CLIP_MEAN, CLIP_STD
from sdjax.data.text.tokenizers import load_tokenizer
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.clip_image import CLIPImageConfig

NAME = "clip-vit-large-patch14"
TEMPERATURE = "logit_scale"
FIRST_LOGIT_SCALE = math.log(1.0 / 0.07)
"""Of a CLIP before its training (Radford et al. 2021, section 2.5)."""


class CLIPPair(NamedTuple):
    """Both towers; their parameters are float32.

    Attributes:
        text, image: sizes; embeddings of both have `projection_dim` features.
        folder: which holds the tokenizer.
        logit_scale: natural logarithm of what cosines are multiplied by in training, the inverse temperature.
    """

    text: CLIPTextConfig
    text_params: Tree
    image: CLIPImageConfig
    image_params: Tree
    folder: Path
    logit_scale: float = FIRST_LOGIT_SCALE


def find_clip(given: str | Path | None) -> Path | None:
    """The folder of a CLIP: the one given, or openai/clip-vit-large-patch14 where weights are looked for."""
    if given is not None:
        return Path(given).expanduser()
    return next((folder / NAME for folder in folders() if (folder / NAME / "config.json").is_file()), None)


def missing_clip() -> str:
    """The message for where `find_clip` finds nothing."""
    places = ", ".join(map(str, folders()))
    return f"no CLIP: a folder {NAME} (from openai on the Hub) is in none of {places}; ${FOLDER} names another place"


def read_clip(folder: Path) -> CLIPPair:
    """Reads both towers.

    Raises:
        UserError: a file is missing or corrupt, or the networks are of a structure that is not here.
    """
    place = folder / "config.json"
    config = read_json(place)
    text = config.get("text_config")
    if not isinstance(text, Mapping) or not isinstance(config.get("vision_config"), Mapping):
        raise UserError(f"{place} does not describe a whole CLIP: it has no text_config and vision_config")
    width = config.get("projection_dim", 512)
    own: dict[str, Any] = {**text, "architectures": [clip.PROJECTED], "projection_dim": width}
    text_config = clip.from_diffusers_config(own, str(place))
    image_config = clip_image.from_config(config, str(place))
    tensors = find_weights(folder, "model", None)
    parts = {
        table: {key: tensor for key, tensor in tensors.items() if key.startswith(prefixes)}
        for table, prefixes in (
            ("text", ("text_model.", "text_projection.")),
            ("image", ("vision_model.", "visual_projection.")),
        )
    }
    check_blocks(text_config.blocks + image_config.blocks, tensors, folder)
    return CLIPPair(
        text_config,
        read(clip.TABLE, parts["text"], clip.shapes(text_config), np.float32, folder),
        image_config,
        read(clip_image.TABLE, parts["image"], clip_image.shapes(image_config), np.float32, folder),
        folder,
        _logit_scale(tensors, folder),
    )


def _logit_scale(tensors: Mapping[str, Stored], folder: Path) -> float:
    if TEMPERATURE not in tensors:
        return FIRST_LOGIT_SCALE
    value = finite(np.asarray(tensors[TEMPERATURE]), np.float32, f"{TEMPERATURE} in {folder}")
    if value.size != 1:
        raise UserError(f"{TEMPERATURE} in {folder} has the shape {list(value.shape)}; it is one number")
    return float(value.reshape(()))


def write_clip(folder: Path, pair: CLIPPair, dtype: str = "float32") -> None:
    """Writes a CLIP into a new folder, which `read_clip` reads, and transformers' CLIPModel and CLIPProcessor.

    Args:
        pair: whose `folder` holds the tokenizer; it is copied.
        dtype: of the file; the networks built from it are float32.

    Raises:
        UserError: there is no tokenizer, the parameters do not fit their sizes or are not finite in `dtype`.
    """
    write_tokenizer("text_encoder", pair.folder, folder, {})
    said = folder / "tokenizer_config.json"
    words = read_json(said) if said.is_file() else {}
    write_json(said, {**words, "model_max_length": pair.text.max_length})
    tensors = {
        **export(clip.TABLE, pair.text_params, clip.shapes(pair.text), "the text tower to be written"),
        **export(clip_image.TABLE, pair.image_params, clip_image.shapes(pair.image), "the image tower to be written"),
        TEMPERATURE: np.array(pair.logit_scale, np.float32),
    }
    write_safetensors(folder / "model.safetensors", tensors, dtype_named(dtype))
    write_json(folder / "config.json", _config(pair))
    write_json(folder / "preprocessor_config.json", _image_processor(pair.image.size))


def _config(pair: CLIPPair) -> dict[str, Any]:
    """The config.json of a CLIPModel."""
    words = load_tokenizer(pair.folder, pair.text.max_length)
    ids = {"bos_token_id": words.bos, "pad_token_id": words.pad}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float32",
        "projection_dim": pair.image.projection_dim,
        "logit_scale_init_value": FIRST_LOGIT_SCALE,
        "text_config": {**clip.to_diffusers_config(pair.text), **ids},
        "vision_config": clip_image.to_config(pair.image),
    }


def _image_processor(side: int) -> dict[str, Any]:
    """The preprocessor_config.json that is `sdjax.data.image_inputs.clip_pixels`."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # Pillow's bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": True,
        "image_mean": CLIP_MEAN.tolist(),
        "image_std": CLIP_STD.tolist(),
        "do_convert_rgb": True,
    }
