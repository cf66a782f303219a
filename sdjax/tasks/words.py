"""New words in training: those of textual inversion (Gal et al. 2022) and of Custom Diffusion (Kumari et al. 2023).

word          what stands for them in prompts; several are joined by "+", as Custom Diffusion's scripts have it; "" for
              none
initializer   a word of one token for each, whose embedding every vector of it begins from; joined likewise
vectors       of each word

They are the parameters "*/token_embedding/words" [n, d] of every text encoder, which `config.train.trainable` may name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.core.tree import Params
from sdjax.data.text.textual_inversion import Embedding
from sdjax.data.text.tokenizers import WORD_END, Tokenizer, with_placeholders
from sdjax.models.clip import WORDS
from sdjax.parallel.trees import tree_shardings

TABLE = "token_embedding"
TRAINED = f"text_encoder*/{TABLE}/{WORDS}"
"""Pattern of the vectors."""


class NewWord(NamedTuple):
    """A word that a run teaches, the one that it begins from, and the number of its vectors."""

    word: str
    initializer: str
    vectors: int


def new_words(task: Config) -> tuple[NewWord, ...]:
    """The new words of a `task` section; () where it names none.

    Raises:
        UserError: there are not as many initializers, or a word stands there twice.
    """
    if not task.get("word"):
        return ()
    words, initializers = task.word.split("+"), task.initializer.split("+")
    if len(words) != len(initializers) or not all(initializers):
        raise UserError(
            f"config.task.initializer={task.initializer!r}: config.task.word={task.word!r} needs {len(words)} of them"
        )
    if again := [word for i, word in enumerate(words) if word.lower() in map(str.lower, words[:i])]:
        raise UserError(f"config.task.word={task.word!r} has {again[0]!r} twice; choose another word")
    return tuple(NewWord(word, first, task.vectors) for word, first in zip(words, initializers, strict=True))


def with_new_words(tokenizer: Tokenizer, words: Sequence[NewWord], first: int) -> Tokenizer:
    """The tokenizer that reads new words as ids from `first` on.

    Raises:
        UserError: it knows one of them already.
    """
    known = {placeholder.word.lower() for placeholder in tokenizer.placeholders}
    for word, *_ in words:
        ids = (tokenizer.backend.token_to_id(word.lower() + end) for end in (WORD_END, ""))
        if word.lower() in known or any(i is not None for i in ids):
            raise UserError(f"config.task.word: the tokenizer knows {word!r} already; choose another word")
    return with_placeholders(tokenizer, {word: vectors for word, _, vectors in words}, first)


def first_ids(tokenizer: Tokenizer, words: Sequence[NewWord], encoder: str) -> list[int]:
    """The token whose embedding each new vector begins from.

    Raises:
        UserError: an initializer is not one token.
    """
    found = []
    for _, initializer, vectors in words:
        ids = [i for token in tokenizer.tokens(initializer) for i in token.ids]
        if len(ids) != 1:
            raise UserError(
                f"config.task.initializer: {initializer!r} is {len(ids)} tokens of the {encoder}; choose a word of one"
            )
        found += ids * vectors
    return found


def first_vectors(words: Sequence[NewWord], loaded: Mapping[str, Tokenizer], params: Params, mesh: Mesh) -> Params:
    """The vectors that a run begins from, by text encoder.

    Args:
        words, loaded: new words, and the tokenizers of the text encoders.
        params: with the text encoders'.
        mesh: of the run.

    Raises:
        UserError: as `first_ids`.
    """
    encoders = [name for name in loaded_encoders(params) if words]
    ids = {name: np.array(first_ids(loaded[name], words, name)) for name in encoders}

    def vectors(tables: Any) -> Params:
        return {name: {TABLE: {WORDS: table[ids[name]].astype(jnp.float32)}} for name, table in tables.items()}

    tables = {name: params[name][TABLE]["embedding"] for name in encoders}
    return jax.jit(vectors, out_shardings=tree_shardings(jax.eval_shape(vectors, tables), mesh))(tables)


def loaded_encoders(params: Params) -> list[str]:
    """Names of the text encoders among components, in their order."""
    return sorted(name for name in params if name.startswith("text_encoder"))


def learnt_words(words: Sequence[NewWord], params: Params) -> list[Embedding]:
    """New words with their vectors; none where a run has none."""
    if not words:
        return []
    ends = np.cumsum([word.vectors for word in words])[:-1]
    rows = [np.split(np.asarray(params[name][TABLE][WORDS], np.float32), ends) for name in loaded_encoders(params)]
    return [Embedding(word.word, tuple(own)) for word, *own in zip(words, *rows, strict=True)]


def without_words(params: Params) -> Params:
    """Parameters without the vectors of new words."""
    own = [name for name in loaded_encoders(params) if WORDS in params[name][TABLE]]
    return {
        **params,
        **{name: {**params[name], TABLE: {"embedding": params[name][TABLE]["embedding"]}} for name in own},
    }
