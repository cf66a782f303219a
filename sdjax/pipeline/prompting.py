"""From prompts to what a system's text encoders take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sdjax.data.prompts import Chunks, Report, chunk, plain, stack
from sdjax.data.tokenizers import Tokenizer
from sdjax.tasks.latent import Text

logger = logging.getLogger("sdjax")
READERS = {"a1111": chunk, "plain": plain}


class Prompts(NamedTuple):
    """Prompts and negative prompts in chunks, as many for all, one array [n, chunks, length] an encoder.

    Attributes:
        text, negative: token ids and weights.
        lengths: how many tokens of its own each pair has: chunks after that only fill up; None where none do.
        reports: what was cut or not understood, by prompt.
    """

    text: Text
    negative: Text
    lengths: Int[np.ndarray, " n"] | None
    reports: Mapping[str, Sequence[Report]]


def read_prompts(
    tokenizers: Sequence[Tokenizer], prompts: Sequence[str], negatives: Sequence[str], syntax: str
) -> Prompts:
    """The chunks of pairs of prompts."""
    ids, weights, counts, reports = [], [], [], {}
    for i, tokenizer in enumerate(tokenizers):
        read = {text: READERS[syntax](tokenizer, text) for text in dict.fromkeys([*prompts, *negatives])}
        if i == 0:
            reports = {text: told for text, (_, told) in read.items() if told}
        chunks = stack(tokenizer, [read[text][0] for text in (*prompts, *negatives)])
        ids.append(chunks.ids)
        weights.append(chunks.weights)
        counts += [[len(read[text][0].ids) for text in texts] for texts in (prompts, negatives)]
    longest = max(array.shape[1] for array in ids)
    padded = [_pad(*each, longest) for each in zip(tokenizers, ids, weights, strict=True)]
    whole = Text(tuple(chunks.ids for chunks in padded), tuple(chunks.weights for chunks in padded))
    own = np.max(counts, axis=0)
    lengths = None if (own == longest).all() else (own * ids[0].shape[-1]).astype(np.int32)
    return Prompts(_part(whole, slice(None, len(prompts))), _part(whole, slice(len(prompts), None)), lengths, reports)


def _part(text: Text, rows: slice) -> Text:
    return Text(tuple(x[rows] for x in text.ids), tuple(x[rows] for x in text.weights or ()))


def _pad(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray, chunks: int) -> Chunks:
    """Two tokenizers may divide a prompt differently: the one with fewer chunks gets empty ones."""
    missing = (len(ids), chunks - ids.shape[1], ids.shape[2])
    empty = np.broadcast_to(tokenizer.encode([""]), missing)
    return Chunks(np.concatenate([ids, empty], 1), np.concatenate([weights, np.ones(missing, np.float32)], 1))


def tell(reports: Mapping[str, Sequence[Report]]) -> None:
    """Says in the log what was cut from prompts or not understood, once a prompt."""
    for prompt, told in reports.items():
        for report in told:
            what = "was cut from" if report.kind == "cut" else "is not understood in"
            logger.warning("%r %s the prompt %.40r: %s", report.text, what, prompt, report.why)
