"""CLIP score, the fit of images and captions: the cosine of CLIP's embeddings of both, times 100 (Hessel et al. 2021).

As torchmetrics' CLIPScore: without CLIPScore's 2.5 and with the mean, not each score, held above zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from sdjax.checkpoints.clip_pair import CLIPPair
from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.core.untrusted import read_json
from sdjax.data.image_inputs import clip_pixels
from sdjax.data.sources.base import Images
from sdjax.data.text.tokenizers import load_tokenizer
from sdjax.models.clip import CLIPText
from sdjax.models.clip_image import CLIPImage
from sdjax.models.conditioning import apply


def clip_score(pair: CLIPPair, images: Images, captions: Sequence[str], batch_size: int) -> float:
    """The mean over all images.

    Args:
        captions: one an image, in their order; what is longer than CLIP's 77 tokens is cut.
        batch_size: images at a time.
    """
    image, text = image_embeddings(pair, images, batch_size), caption_embeddings(pair, captions, batch_size)
    return score_of(image, text)


def score_of(image: Float[np.ndarray, "n p"], text: Float[np.ndarray, "n p"]) -> float:
    """CLIP score of embeddings of length 1, an image and its caption a row."""
    return max(100.0 * float((image * text).sum(1).mean()), 0.0)


def caption_embeddings(pair: CLIPPair, captions: Sequence[str], batch_size: int) -> Float[np.ndarray, "n p"]:
    """Embeddings of length 1; what is longer than the text tower's tokens is cut."""
    tokenizer, tower = load_tokenizer(pair.folder, pair.text.max_length), CLIPText(pair.text)
    params, found = jax.device_put(pair.text_params), []
    for rows in _rows(len(captions), batch_size):
        found.append(np.asarray(_embed(tower, params, tokenizer.encode([captions[i] for i in rows]))))
    return np.concatenate(found)[: len(captions)]


def image_embeddings(pair: CLIPPair, images: Sequence[Any] | Images, batch_size: int) -> Float[np.ndarray, "n p"]:
    """Embeddings of length 1 of the entries called "image", uint8 [h w 3]."""
    tower, params, found = CLIPImage(pair.image), jax.device_put(pair.image_params), []
    with tqdm(total=len(images), desc="CLIP", unit="image") as bar:
        for rows in _rows(len(images), batch_size):
            batch = np.stack([clip_pixels(images[i]["image"], pair.image.size) for i in rows])
            found.append(np.asarray(_embed(tower, params, batch)))
            bar.update(len(set(rows)))
    return np.concatenate(found)[: len(images)]


def _rows(count: int, size: int) -> Iterator[list[int]]:
    """Numbers below `count`, `size` at a time; the last ones are filled up, so that one compilation serves all."""
    for start in range(0, count, size):
        yield [min(i, count - 1) for i in range(start, start + size)]


@jax.jit(static_argnums=0)
def _embed(tower: CLIPText | CLIPImage, params: Params, rows: Array) -> Float[Array, "b p"]:
    pooled = apply(tower, params, rows).pooled
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def captions_of(folder: Path, images: Images) -> list[str]:
    """Prompt of each image of a folder: `prompt` in the JSON file beside it, as sample.py writes it.

    Raises:
        UserError: an image has none.
    """
    return [_caption(folder / images.id(i)) for i in range(len(images))]


def _caption(path: Path) -> str:
    record = path.with_suffix(".json")
    if not record.is_file():
        raise UserError(f"{path} has no prompt: there is no {record.name} beside it")
    prompt = read_json(record).get("prompt")
    if not isinstance(prompt, str):
        raise UserError(f"{record} holds no prompt")
    return prompt
