"""Figures of a text-to-image checkpoint on the data set of its config.

The autoencoder's PSNR on held-out images, and retrieval: the share of sampled images whose nearest neighbour among
all images of the data set is the prompt's own, for `config.eval.captions` training captions and for all held-out
ones. Seeds are fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

import sdjax
from sdjax.core.config import Config
from sdjax.data.sources.open import Source, source
from sdjax.eval.reconstruction import reconstruction_psnr
from sdjax.eval.retrieval import features, retrieval


def evaluate(config: Config, checkpoint: str) -> dict[str, Any]:
    """All figures of a checkpoint, by name: PSNR in decibels, retrieval as shares."""
    pipe = sdjax.load(checkpoint)
    train, held_out = source(config.data.source, "train"), source(config.data.source, config.eval.held_out)
    figures: dict[str, Any] = {
        "psnr_held_out_db": round(reconstruction_psnr(pipe.autoencoder, pipe.params["vae"], held_out), 2)
    }
    gallery, captions = _gallery(train, held_out)
    chosen = np.random.default_rng(config.eval.seed).choice(
        len(train), min(config.eval.captions, len(train)), replace=False
    )
    groups = {"train": np.sort(chosen), "held_out": np.arange(len(train), len(captions))}
    for group, rows in groups.items():
        sampled = _sample(pipe, [captions[row] for row in rows], config, group)
        figures[f"prompts_{group}"] = len(rows)
        for k, share in retrieval(sampled, rows, gallery)._asdict().items():
            figures[f"{k}_{group}"] = round(share, 4)
    return figures


def _gallery(train: Source, held_out: Source) -> tuple[np.ndarray, list[str]]:
    """Features and captions of all images, the held-out ones last."""
    examples = [images[i] for images in (train, held_out) for i in range(len(images))]
    return np.concatenate([features(example["image"][None]) for example in examples]), [
        example["caption"] for example in examples
    ]


def _sample(pipe: Any, prompts: list[str], config: Config, name: str) -> np.ndarray:
    """Features of one image for each prompt; each has the noise of its own place in the list."""
    with tqdm(desc=name, unit="call") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return features(
            pipe(prompts, seed=config.eval.seed, batch_size=config.eval.batch_size, syntax="plain", progress=progress)
        )
