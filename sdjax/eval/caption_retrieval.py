"""Figures of a CLIP: an image's own caption among those of other images, and a caption's own image."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from sdjax.checkpoints.clip_pair import read_clip
from sdjax.checkpoints.open import resolve
from sdjax.core.config import Config
from sdjax.data.sources.open import source
from sdjax.eval.clip_score import caption_embeddings, image_embeddings, score_of
from sdjax.eval.retrieval import retrieval


def evaluate_clip(config: Config, folder: str) -> dict[str, Any]:
    """Figures on the pairs of `config.eval.held_out`: retrieval both ways as shares, and the CLIP score.

    Also retrieval of captions among those of all images, of which training has seen the others.

    Raises:
        UserError: the data or the CLIP cannot be read.
    """
    pair, size = read_clip(resolve(folder)), config.eval.batch_size
    images, others = source(config.data.source, config.eval.held_out), source(config.data.source)
    captions, seen = ([rows[i]["caption"] for i in range(len(rows))] for rows in (images, others))
    image, text = image_embeddings(pair, images, size), caption_embeddings(pair, captions, size)  # pyright: ignore[reportArgumentType]
    figures: dict[str, Any] = {"pairs": len(captions)}
    every = np.concatenate([text, caption_embeddings(pair, seen, size)])
    ways = {
        "image_to_caption": (image, text),
        "caption_to_image": (text, image),
        "image_to_all_captions": (image, every),
    }
    for name, (queries, gallery) in ways.items():
        found = retrieval(queries, np.arange(len(queries)), gallery)  # of length 1, the nearest has the largest cosine
        figures |= {f"{k}_{name}": round(share, 4) for k, share in found._asdict().items()}
    figures["matched_above_shuffled"] = round(matched_above_shuffled(image, text), 4)
    figures["clip_score"] = round(score_of(image, text), 2)
    figures["clip_score_shuffled"] = round(score_of(image, np.roll(text, 1, axis=0)), 2)
    return figures


def matched_above_shuffled(image: Float[np.ndarray, "n p"], text: Float[np.ndarray, "n p"]) -> float:
    """The share of pairs whose cosine is above that of the image with another caption, over all other captions."""
    cosines = image @ text.T
    below = (cosines < np.diag(cosines)[:, None]).sum(1)
    return float(below.mean() / (len(cosines) - 1))
