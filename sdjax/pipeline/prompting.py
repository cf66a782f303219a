"""From prompts to what a system's text encoders take."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from sdjax.data.prompts import Chunks, Report, chunk, plain, stack
from sdjax.data.tokenizers import Tokenizer
from sdjax.tasks.latent import Text

logger = logging.getLogger("sdjax")
READERS = {"a1111": chunk, "plain": plain}


def read_prompts(
    tokenizers: Sequence[Tokenizer], prompts: Sequence[str], negatives: Sequence[str], syntax: str
) -> tuple[Text, Text]:
    """The chunks of prompts and of negative prompts, as many for all, one array [n, chunks, length] an encoder.

    What was cut or not understood is said in the log, once a prompt.
    """
    ids, weights = [], []
    for i, tokenizer in enumerate(tokenizers):
        read = {text: READERS[syntax](tokenizer, text) for text in dict.fromkeys([*prompts, *negatives])}
        if i == 0:
            for text, (_, reports) in read.items():
                _tell(text, reports)
        chunks = stack(tokenizer, [read[text][0] for text in (*prompts, *negatives)])
        ids.append(chunks.ids)
        weights.append(chunks.weights)
    longest = max(array.shape[1] for array in ids)
    padded = [_pad(*each, longest) for each in zip(tokenizers, ids, weights, strict=True)]
    count = len(prompts)
    both = Text(tuple(chunks.ids for chunks in padded), tuple(chunks.weights for chunks in padded))
    return (
        Text(tuple(x[:count] for x in both.ids), tuple(x[:count] for x in both.weights or ())),
        Text(tuple(x[count:] for x in both.ids), tuple(x[count:] for x in both.weights or ())),
    )


def _pad(tokenizer: Tokenizer, ids: np.ndarray, weights: np.ndarray, chunks: int) -> Chunks:
    """Two tokenizers may divide a prompt differently: the one with fewer chunks gets empty ones."""
    missing = (len(ids), chunks - ids.shape[1], ids.shape[2])
    empty = np.broadcast_to(tokenizer.encode([""]), missing)
    return Chunks(np.concatenate([ids, empty], 1), np.concatenate([weights, np.ones(missing, np.float32)], 1))


def _tell(prompt: str, reports: Sequence[Report]) -> None:
    for report in reports:
        what = "was cut from" if report.kind == "cut" else "is not understood in"
        logger.warning("%r %s the prompt %.40r: %s", report.text, what, prompt, report.why)
