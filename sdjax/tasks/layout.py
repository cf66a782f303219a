"""Pictures of objects in given boxes (LDM, section 4.3.1 and D.4): a layout's tokens through a transformer.

Reads what `sdjax.tasks.ldm.training` reads, config.model.bert (a variant of `models.bert`, and what differs from it),
and config.task.classes, how many classes of objects there are. The data needs `objects` and `boxes`.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from sdjax.core.config import Config
from sdjax.core.errors import UserError
from sdjax.data.layout import Layout, LayoutTokens
from sdjax.models import bert
from sdjax.models.bert import BertConfig
from sdjax.tasks.latent.networks import sizes_of
from sdjax.tasks.ldm.conditioner import Told
from sdjax.tasks.ldm.tokens import TOKENS, TokenConditioner, conditioner_of
from sdjax.tasks.ldm.training import make_latent_task
from sdjax.training.task import Task


def layout_tokens(sizes: BertConfig, classes: int) -> LayoutTokens:
    """How a transformer of these sizes reads layouts.

    Raises:
        UserError: its length is not three tokens an object and two more.
    """
    objects, rest = divmod(sizes.max_length - 2, 3)
    if rest or objects < 1:
        raise UserError(f"config.model.bert.max_length={sizes.max_length}; choose 3 times the objects, and 2 more")
    return LayoutTokens(classes, sizes.vocab_size, objects)


__all__ = ["conditioner_of", "make", "told_by"]


def told_by(config: Config) -> Told:
    """A layout's tokens; an empty layout says nothing."""
    sizes = sizes_of(config.model.bert, bert.VARIANTS, "config.model.bert")
    tokens = layout_tokens(sizes, config.task.classes)
    nothing = tokens.encode([], np.zeros((0, 4))) if config.task.dropout else ()
    return Told(
        TokenConditioner(sizes, tuple(int(token) for token in nothing)),
        (Layout(tokens),),
        {TOKENS: jax.ShapeDtypeStruct((tokens.length,), np.int32)},
    )


def make(config: Config, mesh: Mesh) -> Task:
    """The task of a config whose `task.name` is "layout"."""
    return make_latent_task(config, mesh, told_by(config))
