"""Forms in which a finished run of a diffusion model is written: what it learned says which, else `config.task.export`.

lora               factors beside frozen networks, for diffusers and in kohya's naming (`sdjax.tasks.lora`)
pivotal_tuning     those, and new words in a folder beside them
controlnet         the ControlNet (`sdjax.tasks.control`)
controlled_model   all of it as a folder of diffusers, with the ControlNet in it: the base learned, too
model              all of it, as a folder of diffusers; where the config does not say otherwise
embeddings         its new words (`sdjax.tasks.words`)
custom_diffusion   its new words, and the cross-attention's layers as Custom Diffusion stores them
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sdjax.checkpoints.checkpoint import Checkpoint
from sdjax.checkpoints.custom_diffusion import write_custom_diffusion
from sdjax.checkpoints.embeddings import add_words, file_names, write_embeddings
from sdjax.checkpoints.layouts.diffusers import write_checkpoint, write_component
from sdjax.core.config import EXPORT, Config
from sdjax.core.errors import UserError, unknown
from sdjax.data.text.textual_inversion import Embedding
from sdjax.diffusion_model.conditioners.control import CONTROLNET
from sdjax.diffusion_model.model import BACKBONE
from sdjax.models.lora import LORA
from sdjax.tasks.lora import write_adapter
from sdjax.tasks.words import TRAINED


class Learnt(NamedTuple):
    """A finished run's result.

    Attributes:
        config: of the run.
        checkpoint: the model without its new words.
        words: those words.
        trained: names of all parameters that were trained.
        entry: name of its LoRA's factors.
    """

    config: Config
    checkpoint: Checkpoint
    words: Sequence[Embedding]
    trained: Collection[str]
    entry: str


class Export(NamedTuple):
    """A form of a finished run.

    Attributes:
        write: (folder, what was learnt, type of the numbers) -> None.
        flags: of `sample.py` that use it, with {workdir} in them.
        holds: patterns of the parameters that it keeps, with {entry} for the name of the run's LoRA.
        by_word: as of `write_embeddings`.
    """

    write: Callable[[Path, Learnt, str], None]
    flags: str
    holds: tuple[str, ...]
    by_word: bool = False


def _model(folder: Path, learnt: Learnt, dtype: str) -> None:
    write_checkpoint(folder, _with_words(learnt), dtype)


def _with_words(learnt: Learnt) -> Checkpoint:
    return add_words(learnt.words)(learnt.checkpoint) if learnt.words else learnt.checkpoint


def _embeddings(folder: Path, learnt: Learnt, dtype: str) -> None:
    del dtype
    folder.mkdir()
    write_embeddings(folder, learnt.words)


def _lora(folder: Path, learnt: Learnt, dtype: str) -> None:
    write_adapter(learnt.checkpoint, folder, learnt.config, learnt.entry, dtype)


def _pivotal_tuning(folder: Path, learnt: Learnt, dtype: str) -> None:
    _lora(folder, learnt, dtype)
    _embeddings(folder / WORDS, learnt, dtype)


def _controlnet(folder: Path, learnt: Learnt, dtype: str) -> None:
    folder.mkdir()
    write_component(folder, CONTROLNET, learnt.checkpoint.components[CONTROLNET], dtype)


def _controlled_model(folder: Path, learnt: Learnt, dtype: str) -> None:
    base = {name: part for name, part in learnt.checkpoint.components.items() if name != CONTROLNET}
    _model(folder, learnt._replace(checkpoint=replace(learnt.checkpoint, components=base)), dtype)
    _controlnet(folder / CONTROLNET, learnt, dtype)


def _custom_diffusion(folder: Path, learnt: Learnt, dtype: str) -> None:
    del dtype
    folder.mkdir()
    write_custom_diffusion(folder, learnt.checkpoint, set(learnt.trained))
    write_embeddings(folder, learnt.words, by_word=True)


WORDS = "embeddings"
"""Folder of the new words that a run learned beside a LoRA."""
FACTORS = f"*/{LORA}/{{entry}}/*"
EXPORTS = {
    "lora": Export(_lora, "--lora {workdir}", (FACTORS,)),
    "pivotal_tuning": Export(
        _pivotal_tuning, f"--lora {{workdir}} --embedding {{workdir}}/{EXPORT}/{WORDS}", (FACTORS, TRAINED)
    ),
    "controlnet": Export(_controlnet, "--controlnet {workdir}", (f"{CONTROLNET}/*",)),
    "controlled_model": Export(_controlled_model, "--checkpoint {workdir} --controlnet {workdir}", ("*",)),
    "model": Export(_model, "--checkpoint {workdir}", ("*",)),
    "embeddings": Export(_embeddings, "--embedding {workdir}", (TRAINED,)),
    "custom_diffusion": Export(
        _custom_diffusion,
        "--custom_diffusion {workdir} --embedding {workdir}",
        (f"{BACKBONE}/*attn2/to_*", TRAINED),
        by_word=True,
    ),
}


def export_of(task: Config, trained: Collection[str], *, entry: str | None, words: Sequence[str]) -> Export:
    """The form of a run's result.

    Args:
        task: the config's section.
        trained: names of all parameters that are trained.
        entry: name of the run's LoRA; None where it has none.
        words: new ones that are learnt.

    Raises:
        UserError: the config names one that there is not, or trains what is not in it; as `file_names`.
    """
    name = task.get("export", "model")
    if name not in EXPORTS:
        raise unknown("export", name, EXPORTS, "config.task.export")
    if entry is not None:
        name = "pivotal_tuning" if words else "lora"
    elif any(path.startswith(f"{CONTROLNET}/") for path in trained):
        is_alone = all(path.startswith(f"{CONTROLNET}/") for path in trained)
        name = "controlnet" if is_alone else "controlled_model"
    held = [pattern.format(entry=entry) for pattern in EXPORTS[name].holds]
    lost = (path for path in trained if not any(fnmatch.fnmatchcase(path, pattern) for pattern in held))
    if (first := next(lost, None)) is not None:
        raise UserError(
            f"config.train.trainable names {first}, which the export {name!r} does not hold; it holds {', '.join(held)}"
        )
    if TRAINED in held:
        file_names(words, by_word=EXPORTS[name].by_word)
    return EXPORTS[name]
