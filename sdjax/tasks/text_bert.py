"""Pictures from text by LDM's own models: a BERT-like transformer that learns with the UNet (LDM, section 4.3.1).

Reads what `sdjax.tasks.ldm.training` reads, config.model.bert (a variant of `models.bert`, and what differs from it)
and config.model.tokenizer, a folder with BERT's vocab.txt. For CLIP's text encoder see `text_to_image`.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.data.word_pieces import TokenizeWords, load_word_pieces
from sdjax.models import bert
from sdjax.tasks.latent.networks import sizes_of
from sdjax.tasks.ldm.conditioner import Told
from sdjax.tasks.ldm.tokens import TOKENS, TokenConditioner, conditioner_of
from sdjax.tasks.ldm.training import make_latent_task
from sdjax.training.task import Task

__all__ = ["conditioner_of", "make", "told_by"]


def told_by(config: Config) -> Told:
    """A caption's tokens; the empty caption's say nothing.

    Raises:
        UserError: the tokenizer cannot be read, or knows more tokens than the transformer.
    """
    sizes = sizes_of(config.model.bert, bert.VARIANTS, "config.model.bert")
    tokenizer = load_word_pieces(config.model.tokenizer, sizes.max_length)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise UserError(
            f"config.model.bert.vocab_size={sizes.vocab_size}; the tokenizer {config.model.tokenizer} has "
            f"{tokenizer.vocab_size} tokens"
        )
    nothing = tuple(int(token) for token in tokenizer.encode([""])[0]) if config.task.dropout else ()
    return Told(
        TokenConditioner(sizes, nothing),
        (TokenizeWords(tokenizer),),
        {TOKENS: jax.ShapeDtypeStruct((sizes.max_length,), np.int32)},
        Path(config.model.tokenizer),
    )


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "text_bert"."""
    return make_latent_task(config, mesh, told_by(config))
