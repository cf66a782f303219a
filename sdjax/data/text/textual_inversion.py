"""Textual inversion (Gal et al. 2022): words of one's own, each with vectors learnt for a text encoder's input.

The layouts found in files: A1111's (`string_to_param`, modules/textual_inversion/textual_inversion.py), diffusers' (the
word is the tensor's name), a bare `emb_params`, and for SDXL's two encoders `clip_l` with `clip_g`, or
`text_encoders_0` with `text_encoders_1` (diffusers' examples/advanced_diffusion_training).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sdjax.core.errors import UserError

ENCODERS = ("clip_l", "clip_g", "text_encoders_0", "text_encoders_1")
UNNAMED = ("emb_params", "*")


class Embedding(NamedTuple):
    """A word and its vectors, float32, for each text encoder that it was made for; as many for each."""

    word: str
    vectors: tuple[Float[np.ndarray, "n d"], ...]


def read_embedding(tensors: Mapping[str, Any], stem: str) -> Embedding:
    """An embedding from a file's content.

    Args:
        tensors: what the file holds, by name: arrays, or (A1111) a mapping of those.
        stem: the file's name without its suffix; the word, unless the file names one as diffusers' do.

    Raises:
        UserError: the content is in no known layout, or is not finite vectors.
    """
    named, word = _named(tensors, stem)
    vectors = tuple(_vectors(tensor, f"{name!r} in textual inversion {stem!r}") for name, tensor in named.items())
    if len({len(v) for v in vectors}) > 1:
        counts = " and ".join(str(len(v)) for v in vectors)
        raise UserError(f"textual inversion {stem!r} has {counts} vectors for its two encoders; they must be as many")
    return Embedding(word, vectors)


class Fitted(NamedTuple):
    """Embeddings as a model's text encoders need them, which keeps two encoders in step.

    Attributes:
        counts: for each word its number of vectors, for `with_placeholders` of every encoder's tokenizer.
        rows: for each encoder the vectors of all words one after another, for its `extend_vocabulary`.
    """

    counts: dict[str, int]
    rows: list[Float[np.ndarray, "n d"]]


def fit(embeddings: Sequence[Embedding], widths: Sequence[int]) -> Fitted:
    """Several words for the text encoders of the given widths.

    Raises:
        UserError: a word has no vectors as wide as one of the encoders, or two embeddings have the same word.
    """
    counts: dict[str, int] = {}
    for embedding in embeddings:
        if embedding.word in counts:
            raise UserError(f"there are two textual inversions for the word {embedding.word!r}")
        counts[embedding.word] = len(embedding.vectors[0])
    chosen = [_fit(embedding, widths) for embedding in embeddings]
    empty = [np.zeros((0, width), np.float32) for width in widths]
    return Fitted(counts, [np.concatenate([empty[i], *(vectors[i] for vectors in chosen)]) for i in range(len(widths))])


def _named(tensors: Mapping[str, Any], stem: str) -> tuple[Mapping[str, Any], str]:
    """The tensors of a file, in the encoders' order, and the word."""
    if "string_to_param" in tensors:
        stored = tensors["string_to_param"]
        if isinstance(stored, Mapping) and len(stored) == 1:
            return stored, stem
    elif any(name in tensors for name in ENCODERS):
        return {name: tensors[name] for name in ENCODERS if name in tensors}, stem
    elif len(tensors) == 1 or "emb_params" in tensors:
        name = "emb_params" if "emb_params" in tensors else next(iter(tensors))
        return {name: tensors[name]}, stem if name in UNNAMED else name
    names = ", ".join(list(tensors)[:5]) or "nothing"
    raise UserError(f"{stem!r} is no textual inversion: one tensor, or clip_l and clip_g, were expected, not {names}")


def _vectors(tensor: Any, place: str) -> Float[np.ndarray, "n d"]:
    try:
        array = np.asarray(tensor, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} is not a tensor of numbers") from error
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise UserError(f"{place} is not a list of finite vectors; its shape is {array.shape}")
    return array


def _fit(embedding: Embedding, widths: Sequence[int]) -> list[Float[np.ndarray, "n d"]]:
    left = list(embedding.vectors)
    chosen = []
    for width in widths:
        at = next((i for i, vectors in enumerate(left) if vectors.shape[1] == width), None)
        if at is None:
            made = " and ".join(str(vectors.shape[1]) for vectors in embedding.vectors)
            needed = " and ".join(map(str, widths))
            raise UserError(
                f"textual inversion {embedding.word!r} was made for text encoders of width {made}, not {needed}"
            )
        chosen.append(left.pop(at))
    return chosen
