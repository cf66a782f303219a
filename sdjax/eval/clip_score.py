"""CLIP score, the fit of images and captions: the cosine of CLIP's embeddings of both, times 100 (Hessel et al. 2021).

As torchmetrics' CLIPScore: without CLIPScore's 2.5 and with the mean, not each score, held above zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from sdjax.checkpoints.clip_pair import CLIPPair
from sdjax.core.errors import UserError
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
    tokenizer = load_tokenizer(pair.folder, pair.text.max_length)
    modules, cosines = (CLIPText(pair.text), CLIPImage(pair.image)), []
    params = jax.device_put((pair.text_params, pair.image_params))
    with tqdm(total=len(captions), desc="CLIP", unit="picture") as bar:
        for rows in _rows(len(captions), batch_size):
            batch = np.stack([clip_pixels(images[i]["image"], pair.image.size) for i in rows])
            ids = tokenizer.encode([captions[i] for i in rows])
            cosines.append(np.asarray(_cosines(modules, params, ids, batch)))
            bar.update(len(set(rows)))
    return max(100.0 * float(np.concatenate(cosines)[: len(captions)].mean()), 0.0)


def _rows(count: int, size: int) -> Iterator[list[int]]:
    """Numbers below `count`, `size` at a time; the last ones are filled up, so that one compilation serves all."""
    for start in range(0, count, size):
        yield [min(i, count - 1) for i in range(start, start + size)]


@partial(jax.jit, static_argnums=0)
def _cosines(
    modules: tuple[CLIPText, CLIPImage], params: tuple, ids: Array, images: Float[Array, "b s s 3"]
) -> Float[Array, " b"]:
    text = apply(modules[0], params[0], ids).pooled
    image = apply(modules[1], params[1], images).pooled
    text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
    return (text * image).sum(-1)


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
