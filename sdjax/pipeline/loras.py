"""LoRAs of a call: those that prompts name, at the strengths that options and prompts give."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdjax.checkpoints.checkpoint import LoadedLora
from sdjax.checkpoints.lora.names import blocks_of, layers_of
from sdjax.checkpoints.lora.patch import name_of
from sdjax.checkpoints.lora.reading import ALIAS, hash_of
from sdjax.checkpoints.storage.weights import SAFETENSORS, SUFFIXES, read_file
from sdjax.core.errors import UserError, unknown
from sdjax.core.files import cached_by_stat
from sdjax.data.text.lora_tags import LoraTag, read_tags
from sdjax.diffusion.samplers import SamplerTable
from sdjax.diffusion_model.conditioners.lora import LORA_SCALE, Strength, strengths_of

if TYPE_CHECKING:
    from sdjax.pipeline.pipeline import Pipeline

logger = logging.getLogger("sdjax")

BASE = "BASE"
# Lists of weights that name the blocks which attend, or all (sd-webui-lora-block-weight, BLOCKID17, 26, 12 and 20).
BLOCKS = {
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    26: " ".join([BASE, *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]),
    12: "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    20: " ".join([BASE, *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))]),
}
PRESETS = {"ALL": 1.0, "NONE": 0.0}


def with_strengths(pipe: Pipeline, inputs: Mapping[str, Any], table: SamplerTable) -> dict[str, Any]:
    """Inputs of an image with a strength for each LoRA, whose tags are taken out of the prompt.

    A tag wins over lora_scale, and that over the strength at load.

    Raises:
        UserError: a tag is not well-formed.
    """
    prompt, tags = read_tags(inputs["prompt"]) if inputs["syntax"] == "a1111" else (inputs["prompt"], [])
    strengths = strengths_of(pipe.loras, inputs.get(LORA_SCALE))
    for tag in tags:
        number = find(tag.name, pipe.loras)
        strengths[number] = _strength(tag, blocks_of(layers_of(pipe.model.configs()))[0], table)
    return {**inputs, "prompt": prompt, LORA_SCALE: strengths}


def load_named(pipe: Pipeline, entries: Sequence[Mapping[str, Any]]) -> None:
    """Load the LoRAs that prompts name and that are only in the pipeline's folder of them.

    Where there is neither a folder nor a LoRA, the reader of prompts leaves tags out with a warning: the prompt of
    another's image, made again, names files that may not be here.

    Raises:
        UserError: a LoRA is neither loaded nor in the folder; as of `read_tags` and `Pipeline.add_loras`.
    """
    if pipe.lora_dir is None and not pipe.loras:
        return
    known = {name for lora in pipe.loras for name in (lora.name, lora.alias) if name}
    places = {tag.name: entry["prompt"] for entry in entries for tag in _tags(entry) if tag.name not in known}
    if not places:
        return
    folder = {} if pipe.lora_dir is None else _folder(pipe.lora_dir)
    for name, prompt in places.items():
        if name not in folder:
            raise unknown("LoRA", name, known | set(folder), f"the prompt {prompt[:40]!r}")
    pipe.add_loras(list(dict.fromkeys((folder[name], 0.0) for name in places)))


def lora_files(pipe: Pipeline) -> dict[str, Path]:
    """Files by the names of LoRAs that prompts may have: those in the pipeline's folder, and those that are loaded.

    Raises:
        UserError: there is no such folder.
    """
    folder = {} if pipe.lora_dir is None else _folder(pipe.lora_dir)
    return folder | {lora.name: lora.path for lora in pipe.loras}


def _folder(path: Path) -> dict[str, Path]:
    """Files of a folder and of those in it by name, or by the name that their training gave them.

    Raises:
        UserError: there is no such folder.
    """
    if not path.is_dir():
        raise UserError(f"lora_dir {str(path)!r}: there is no such folder")
    files = sorted(file for file in path.rglob("*") if file.suffix in (SAFETENSORS, *SUFFIXES))
    aliases = {file: alias for file in files if (alias := _alias(file)) is not None}
    named = {alias: file for file, alias in aliases.items() if alias}
    return named | {name_of(file): file for file in aliases}


@cached_by_stat
def _alias(file: Path) -> str | None:
    """The name that a file's training gave it, "" for none; None, and a line in the log, where it cannot be read."""
    if file.suffix != SAFETENSORS:
        return ""
    try:
        return read_file(file).facts.get(ALIAS, "")
    except UserError as error:
        logger.warning("left out of lora_dir: %s", error)
        return None


def find(name: str, loras: Sequence[LoadedLora]) -> int:
    """The place of the loaded LoRA of a name: its file's, or else the one that its training gave it."""
    names = [lora.name for lora in loras]
    return (names if name in names else [lora.alias for lora in loras]).index(name)


def record_of(pipe: Pipeline, entry: Mapping[str, Any], strengths: Sequence[Strength]) -> dict[str, Any]:
    """Field of an image's record: name, strengths of UNet and text encoders, and hash of each LoRA that acts on it.

    The name is the one by which the prompt calls it, as in A1111's hashes, or else the file's.
    """
    called = {find(tag.name, pipe.loras): tag.name for tag in _tags(entry)}
    said = [
        [called.get(i, lora.name), strength.unet, strength.text, hash_of(lora.path)]
        for i, (lora, strength) in enumerate(zip(pipe.loras, strengths, strict=True))
        if (strength.unet, strength.text) != (0.0, 0.0)
    ]
    return {"loras": said} if said else {}


def _tags(entry: Mapping[str, Any]) -> list[LoraTag]:
    """Tags of an image's prompt, where its syntax has them."""
    return read_tags(entry["prompt"] or "")[1] if entry["syntax"] == "a1111" else []


def _strength(tag: LoraTag, blocks: Sequence[str], table: SamplerTable) -> Strength:
    assert table.step is not None, "the host's own"
    steps = table.step[table.active]
    first, last = (None if step is None else int(np.sum(steps < step)) for step in (tag.start, tag.stop))
    if tag.blocks is None:
        return Strength(tag.unet, tag.text, (), first or 0, last)
    weights = block_weights(tag.blocks, f"<lora:{tag.name}>")
    own = tuple(weights.get(name, 1.0 if not name else 0.0) for name in blocks)
    return Strength(tag.unet, tag.text * weights[BASE], own, first or 0, last)


def block_weights(text: str, place: str) -> dict[str, float]:
    """Weights by the names of blocks, of which BASE is the text encoders'.

    Raises:
        UserError: they are no numbers, or as many as no list has.
    """
    if text in PRESETS:
        return dict.fromkeys(BLOCKS[26].split(), PRESETS[text])
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"lbw {text[:80]!r} of {place}: choose numbers with commas, or {', '.join(PRESETS)}") from error
    if len(numbers) not in BLOCKS or not np.isfinite(numbers).all():
        raise UserError(f"lbw of {place} has {len(numbers)} weights; lists have {', '.join(map(str, BLOCKS))}")
    return dict(zip(BLOCKS[len(numbers)].split(), numbers, strict=True))
