"""A whole CLIP, both of its towers, as Hugging Face transformers stores it (`CLIPModel`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints.mapping import check_blocks, read
from sdjax.checkpoints.metric_weights import FOLDER, folders
from sdjax.checkpoints.networks import clip, clip_image
from sdjax.checkpoints.storage.weights import find_weights
from sdjax.core.errors import UserError
from sdjax.core.tree import Tree
from sdjax.core.untrusted import read_json
from sdjax.models.clip import CLIPTextConfig
from sdjax.models.clip_image import CLIPImageConfig

NAME = "clip-vit-large-patch14"


class CLIPPair(NamedTuple):
    """Both towers; their parameters are float32.

    Attributes:
        text, image: sizes; embeddings of both have `projection_dim` features.
        folder: which holds the tokenizer.
    """

    text: CLIPTextConfig
    text_params: Tree
    image: CLIPImageConfig
    image_params: Tree
    folder: Path


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
    )
