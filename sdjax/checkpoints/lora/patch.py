"""LoRA as a change of a checkpoint: factors beside the kernels that they change, or kernels that are changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax.checkpoints.checkpoint import Checkpoint, LoadedLora, Patch
from sdjax.checkpoints.kinds import STABLE_DIFFUSION
from sdjax.checkpoints.lora.names import Layer, layers_of
from sdjax.checkpoints.lora.reading import ALIAS, EXAMPLES, FILES, LoraFile, entry_of, read_lora
from sdjax.checkpoints.mapping import Put
from sdjax.core.errors import UserError
from sdjax.core.tree import Tree, merge, unflatten
from sdjax.models.lora import LORA
from sdjax.models.weight_changes import changed, is_branch

logger = logging.getLogger("sdjax")


def add_loras(files: Sequence[tuple[Path, float]], place: Put | None = None) -> Patch:
    """Factors of files beside the checkpoint's kernels, which act at strengths that each call may choose.

    Args:
        files: with the strength of each where a call names none.
        place: as in `sdjax.checkpoints.checkpoint.ReadOptions`.

    Raises:
        UserError: by the patch, where a file cannot be read or is for another base, or the model takes none.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        layers = _layers(checkpoint)
        params, loras, leaves = params_of(checkpoint), list(checkpoint.loras), dict[str, Any]()
        for file, scale in _read(files, layers):
            branches = []
            for name in file.layers:
                entry = entry_of(file, layers[name])
                branches.append(is_branch(entry))
                kind = next(iter(own_leaves(params, layers[name]).values())).dtype if branches[-1] else np.float32
                for leaf, array in entry.items():
                    at, typed = f"{name}/{LORA}/{len(loras)}/{leaf}", np.float32 if leaf == "scale" else kind
                    leaves[at] = (place or _kept)(array.astype(typed), at)
            alias = file.facts.get(ALIAS, "")
            loras.append(LoadedLora(name_of(file.path), file.path, scale, alias, changes_weights=not all(branches)))
        return dataclasses.replace(_with(checkpoint, params, leaves), loras=tuple(loras))

    return patch


def merge_loras(files: Sequence[tuple[Path, float]], place: Put | None = None) -> Patch:
    """Files at fixed strengths in the checkpoint's weights, which keep their types; arguments as of `add_loras`.

    All differences are those of the weights as they were, so that the order of the files does not count.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        layers, params, leaves = _layers(checkpoint), params_of(checkpoint), dict[str, Any]()
        read = _read(files, layers)
        for name in dict.fromkeys(name for file, _ in read for name in file.layers):
            own = own_leaves(params, layers[name])
            here = [(entry_of(file, layers[name]), np.float32(scale)) for file, scale in read if name in file.layers]
            entries, strengths = zip(*here, strict=True)
            for leaf, array in _changed(own, entries, strengths).items():
                at = f"{name}/{leaf}"
                leaves[at] = (place or _kept)(np.asarray(array), at)
        return _with(checkpoint, params, leaves)

    return patch


def _kept(array: np.ndarray, name: str) -> np.ndarray:
    return array


_changed = jax.jit(changed)


def name_of(path: Path) -> str:
    """The name of a file by which prompts call it: that of its folder, where all files have the same."""
    return path.parent.name if path.name in FILES else path.stem


def _layers(checkpoint: Checkpoint) -> dict[str, Layer]:
    if checkpoint.kind != STABLE_DIFFUSION:
        raise UserError(f"LoRA is for Stable Diffusion, no model of {checkpoint.conditioning}")
    return layers_of({name: part.config for name, part in checkpoint.components.items()})


def _read(files: Sequence[tuple[Path, float]], layers: Mapping[str, Layer]) -> list[tuple[LoraFile, float]]:
    read = [(read_lora(path, layers), scale) for path, scale in files]
    for file, _ in read:
        logger.info("%s: matched %s", file.path, file.matched)
        if file.unmatched:
            logger.warning("%s: not used, e.g. %s", file.path, ", ".join(file.unmatched[:EXAMPLES]))
    return read


def params_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Parameters by component."""
    return {name: part.params for name, part in checkpoint.components.items()}


def own_leaves(params: Tree, layer: Layer) -> dict[str, Any]:
    """A layer's parameters."""
    node: Any = params
    for part in layer.path.split("/"):
        node = node[part]
    return {leaf: node[leaf] for leaf in layer.leaves}


def _with(checkpoint: Checkpoint, params: Tree, leaves: Mapping[str, Any]) -> Checkpoint:
    merged = merge(params, unflatten(leaves))
    parts = {n: dataclasses.replace(part, params=merged[n]) for n, part in checkpoint.components.items()}
    return dataclasses.replace(checkpoint, components=parts)
