"""Forms in which a finished run of a diffusion model is written, by `config.task.export`.

model              all of it, as a folder of diffusers; where the config does not say otherwise
embeddings         its new words (`sdjax.tasks.words`)
custom_diffusion   its new words, and the cross-attention's layers as Custom Diffusion stores them
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from sdjax.checkpoints.checkpoint import Checkpoint
from sdjax.checkpoints.custom_diffusion import write_custom_diffusion
from sdjax.checkpoints.embeddings import add_words, write_embeddings
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.core.config import Config
from sdjax.core.errors import unknown
from sdjax.data.text.textual_inversion import Embedding


class Learnt(NamedTuple):
    """A finished run's result.

    Attributes:
        checkpoint: the model without its new words.
        words: those words.
        trained: names of all parameters that were trained.
    """

    checkpoint: Checkpoint
    words: Sequence[Embedding]
    trained: Collection[str]


class Export(NamedTuple):
    """A form of a finished run.

    Attributes:
        write: (folder, what was learnt, type of the numbers) -> None.
        flags: of `sample.py` that use it, with {workdir} in them.
    """

    write: Callable[[Path, Learnt, str], None]
    flags: str


def _model(folder: Path, learnt: Learnt, dtype: str) -> None:
    words = learnt.words
    write_checkpoint(folder, add_words(words)(learnt.checkpoint) if words else learnt.checkpoint, dtype)


def _embeddings(folder: Path, learnt: Learnt, dtype: str) -> None:
    del dtype
    folder.mkdir()
    write_embeddings(folder, learnt.words)


def _custom_diffusion(folder: Path, learnt: Learnt, dtype: str) -> None:
    del dtype
    folder.mkdir()
    write_custom_diffusion(folder, learnt.checkpoint, set(learnt.trained))
    write_embeddings(folder, learnt.words, by_word=True)


EXPORTS = {
    "model": Export(_model, "--checkpoint {workdir}"),
    "embeddings": Export(_embeddings, "--embedding {workdir}"),
    "custom_diffusion": Export(_custom_diffusion, "--custom_diffusion {workdir} --embedding {workdir}"),
}


def export_of(task: Config) -> Export:
    """The form that a `task` section names; a UserError for one that there is not."""
    name = task.get("export", "model")
    if name not in EXPORTS:
        raise unknown("export", name, EXPORTS, "config.task.export")
    return EXPORTS[name]
