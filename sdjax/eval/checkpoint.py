"""Figures of a text-to-image checkpoint on the data set of its config.

The autoencoder's PSNR on held-out images, and retrieval: the share of sampled images whose nearest neighbour among
all images of the data set is the prompt's own, for `config.eval.captions` training captions and for all held-out
ones. Seeds are fixed. A CLIP of the data set adds its own figures of the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

import sdjax
from sdjax.checkpoints.clip_pair import CLIPPair, read_clip
from sdjax.core.config import Config
from sdjax.data.images import to_uint8
from sdjax.data.sources.open import Source, source
from sdjax.eval.caption_retrieval import matched_above_shuffled
from sdjax.eval.clip_score import caption_embeddings, image_embeddings, score_of
from sdjax.eval.inception_score import inception_score
from sdjax.eval.reconstruction import reconstruction_psnr
from sdjax.eval.retrieval import features, retrieval


def evaluate(config: Config, checkpoint: str, clip: str = "") -> dict[str, Any]:
    """All figures of a checkpoint, by name: PSNR in decibels, retrieval as shares.

    Args:
        clip: folder of the CLIP that judges, too; "" for the one that the config names, if it does.

    Raises:
        UserError: the data, the checkpoint or the CLIP cannot be read.
    """
    clip = clip or config.eval.get("clip", "")
    pair = read_clip(Path(clip).expanduser()) if clip else None
    pipe = sdjax.load(checkpoint)
    train, held_out = source(config.data.source, "train"), source(config.data.source, config.eval.held_out)
    figures: dict[str, Any] = {
        "psnr_held_out_db": round(reconstruction_psnr(pipe.autoencoder, pipe.params["vae"], held_out), 2)
    }
    gallery, captions = _gallery(train, held_out)
    judge = None if pair is None else _judge(pair, captions, config.eval.batch_size)
    chosen = np.random.default_rng(config.eval.seed).choice(
        len(train), min(config.eval.captions, len(train)), replace=False
    )
    groups = {"train": np.sort(chosen), "held_out": np.arange(len(train), len(captions))}
    for group, rows in groups.items():
        sampled = _sample(pipe, [captions[row] for row in rows], config, group)
        figures[f"prompts_{group}"] = len(rows)
        for k, share in retrieval(features(sampled), rows, gallery)._asdict().items():
            figures[f"{k}_{group}"] = round(share, 4)
        if judge is not None:
            figures |= {f"{name}_{group}": value for name, value in judged(judge, to_uint8(sampled), rows).items()}
    return figures


class Judge(NamedTuple):
    """A CLIP and its embeddings of all captions of the data set; `batch_size` images at a time."""

    pair: CLIPPair
    captions: Float[np.ndarray, "m p"]
    batch_size: int


def _judge(pair: CLIPPair, captions: Sequence[str], batch_size: int) -> Judge:
    return Judge(pair, caption_embeddings(pair, captions, batch_size), batch_size)


def judged(judge: Judge, images: UInt8[np.ndarray, "n h w 3"], own: Sequence[int] | np.ndarray) -> dict[str, float]:
    """CLIP's figures of sampled images: the score, how often the own caption is above another image's, whether it is
    the nearest of all, and a kind of Inception Score, whose classes are the captions of the data set (zero-shot;
    Radford et al. 2021, section 3.1).

    Args:
        own: row of each image's caption among all.
    """
    embedded = image_embeddings(judge.pair, [{"image": image} for image in images], judge.batch_size)
    found, theirs = retrieval(embedded, own, judge.captions), judge.captions[np.asarray(own)]
    logits = np.exp(judge.pair.logit_scale) * embedded @ judge.captions.T
    return {
        "clip_score": round(score_of(embedded, theirs), 2),
        "clip_matched_above_shuffled": round(matched_above_shuffled(embedded, theirs), 4),
        "clip_top1": round(found.top1, 4),
        "clip_top5": round(found.top5, 4),
        "clip_inception_score": round(inception_score(logits, splits=1).mean, 2),
    }


def _gallery(train: Source, held_out: Source) -> tuple[np.ndarray, list[str]]:
    """Features and captions of all images, the held-out ones last."""
    examples = [images[i] for images in (train, held_out) for i in range(len(images))]
    return np.concatenate([features(example["image"][None]) for example in examples]), [
        example["caption"] for example in examples
    ]


def _sample(pipe: Any, prompts: list[str], config: Config, name: str) -> Float[np.ndarray, "n h w 3"]:
    """One image for each prompt; each has the noise of its own place in the list."""
    with tqdm(desc=name, unit="call") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        how = {"seed": config.eval.seed, "batch_size": config.eval.batch_size, "syntax": "plain"}
        return pipe(prompts, **how, progress=progress)
