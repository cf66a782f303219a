"""Forms in which a finished run of a diffusion model is written, by `config.task.export`.

model              all of it, as a folder of diffusers; where the config does not say otherwise
embeddings         its new words (`sdjax.tasks.words`)
custom_diffusion   its new words, and the cross-attention's layers as Custom Diffusion stores them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sdjax.checkpoints.checkpoint import Checkpoint
from sdjax.checkpoints.embeddings import add_words, write_embeddings
from sdjax.checkpoints.layouts.diffusers import write_checkpoint
from sdjax.core.config import Config
from sdjax.core.errors import unknown
from sdjax.data.text.textual_inversion import Embedding


class Export(NamedTuple):
    """A form of a finished run.

    Attributes:
        write: (folder, model without its new words, those words, type of the numbers) -> None.
        flags: of `sample.py` that use it, with {workdir} in them.
    """

    write: Callable[[Path, Checkpoint, Sequence[Embedding], str], None]
    flags: str


def _model(folder: Path, checkpoint: Checkpoint, words: Sequence[Embedding], dtype: str) -> None:
    write_checkpoint(folder, add_words(words)(checkpoint) if words else checkpoint, dtype)


def _embeddings(folder: Path, checkpoint: Checkpoint, words: Sequence[Embedding], dtype: str) -> None:
    del checkpoint, dtype
    folder.mkdir()
    write_embeddings(folder, words)


EXPORTS = {
    "model": Export(_model, "--checkpoint {workdir}"),
    "embeddings": Export(_embeddings, "--embedding {workdir}"),
}


def export_of(task: Config) -> Export:
    """The form that a `task` section names; a UserError for one that there is not."""
    name = task.get("export", "model")
    if name not in EXPORTS:
        raise unknown("export", name, EXPORTS, "config.task.export")
    return EXPORTS[name]
