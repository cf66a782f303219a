"""Strengths of LoRAs: arguments of a call, one an image, that scale factors beside the kernels which they change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sdjax.checkpoints.checkpoint import LoadedLora
from sdjax.checkpoints.lora.names import UNET
from sdjax.core.errors import UserError
from sdjax.core.tree import Params, Tree
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits
from sdjax.models.lora import LORA
from sdjax.models.weight_changes import changed, is_branch

LORA_SCALE, TEXT_SCALES, UNET_SCALES, FIXED = "lora_scale", "lora_text", "lora_unet", "lora_fixed"


class Strength(NamedTuple):
    """Factors on what a file changes for one image.

    Attributes:
        unet, text: of the UNet and of the text encoders.
        blocks: further ones of the UNet's blocks, in the order of `checkpoints.lora.names.blocks_of`; () for none.
        first, last: rows of the sampler's table between which it acts on the UNet; a `last` of None is the end.
    """

    unet: float
    text: float
    blocks: tuple[float, ...] = ()
    first: int = 0
    last: int | None = None


Strengths = float | Sequence[float | Sequence[float]] | None


def strengths_of(files: Sequence[LoadedLora], given: Strengths) -> list[Strength]:
    """Strengths of files: one number for all, one or a pair (UNet, text encoders) for each, or None for their own.

    Raises:
        UserError: there are not as many as files.
    """
    if given is None:
        given = [file.scale for file in files]
    values = [given] * len(files) if isinstance(given, int | float) else list(given)
    if len(values) != len(files):
        raise UserError(f"lora_scale has {len(values)} values for {len(files)} LoRAs; give one, or one for each")
    pairs = [(value, value) if isinstance(value, int | float) else value for value in values]
    return [Strength(float(unet), float(text)) for unet, text in pairs]


@dataclass(frozen=True)
class LoraConditioner(Conditioner):
    """Strengths `lora_text` [b f] and, for every row of the table and block, `lora_unet` [b n f k], of f files.

    They are set into the parameters as a network sees them. What files change in the weights themselves is changed
    before the loop, for all images of a batch alike, by `lora_fixed`, [b f 1+k] of those files.

    Attributes:
        files: in the order of their entries in the parameters.
        blocks: the block of each of the UNet's outermost modules, by number.
        names: of the blocks; the last one is "", of what is in none.
    """

    files: tuple[LoadedLora, ...]
    blocks: tuple[tuple[str, int], ...]
    names: tuple[str, ...] = ()

    @property
    def traits(self) -> Traits:
        rows = (UNET_SCALES,)
        return Traits(optional=(LORA_SCALE,), step_columns=rows, row_columns=rows, shared_columns=(FIXED,))

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        given = inputs.get(LORA_SCALE)
        resolved = isinstance(given, list) and all(isinstance(one, Strength) for one in given)
        strengths: Any = given if resolved else strengths_of(self.files, given)
        count = len(self.names)
        text = np.array([one.text for one in strengths], np.float32)
        unet = np.array([np.multiply(one.unet, one.blocks or [1.0] * count) for one in strengths], np.float32)
        rows = np.arange(host.rows)[:, None]
        first, last = (np.array([getattr(one, side) or 0 for one in strengths]) for side in ("first", "last"))
        last = np.where([one.last is None for one in strengths], host.rows, last)
        acts = (rows >= first) & (rows < last)
        columns = {TEXT_SCALES: text, UNET_SCALES: unet * acts[..., None].astype(np.float32)}
        if any(file.changes_weights for file in self.files):
            self._check_rows(strengths)
            fixed = np.array([file.changes_weights for file in self.files], np.float32)
            columns[FIXED] = fixed[:, None] * np.concatenate([text[:, None], unet], axis=1)
        return columns

    def _check_rows(self, strengths: Sequence[Strength]) -> None:
        for file, one in zip(self.files, strengths, strict=True):
            if file.changes_weights and (one.first, one.last) != (0, None):
                raise UserError(f"lora {file.name!r} changes weights, so that it has no start or stop; leave them out")

    def change_weights(self, params: Params, columns: Columns) -> dict[str, Array]:
        """See `Conditioner`; the columns are those of any image, since all have the same."""
        if FIXED not in columns:
            return {}
        strengths, found = jnp.asarray(columns[FIXED]), {}
        for path, layer in _adapted(params):
            entries = {int(name): entry for name, entry in layer[LORA].items() if not is_branch(entry)}
            entries = {number: entry for number, entry in entries.items() if number < len(strengths)}
            if entries:
                own = [strengths[number, self._part(path)] for number in entries]
                made = changed(layer, list(entries.values()), own)
                found |= {f"{path}/{leaf}": value for leaf, value in made.items()}
        return found

    def adapt(self, params: Params, columns: Columns) -> Params:
        """See `Conditioner`: text encoders see all columns of a call, the UNet those of the table's row alone."""
        of_unet = TEXT_SCALES not in columns
        if of_unet and UNET_SCALES not in columns:
            return params
        scales = jnp.asarray(columns[UNET_SCALES if of_unet else TEXT_SCALES])

        def strength(path: str, number: int) -> Array | float:
            if number >= scales.shape[1]:  # prepared before the file was added
                return 0.0
            return scales[:, number, self._part(path) - 1] if of_unet else scales[:, number]

        return {n: _at_strengths(t, strength, n) if (n == UNET) == of_unet else t for n, t in params.items()}

    def _part(self, path: str) -> int:
        """Place of a layer's strength among those of the text encoders and of the UNet's blocks."""
        component, module, *_ = path.split("/")
        return 1 + dict(self.blocks)[module] if component == UNET else 0


def _adapted(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths of the layers with entries, and the layers."""
    if LORA in tree:
        yield path, tree
    for name, below in tree.items():
        if isinstance(below, Mapping) and name != LORA:
            yield from _adapted(below, f"{path}/{name}" if path else name)


def _at_strengths(tree: Tree, strength: Callable[[str, int], Array | float], path: str) -> dict[str, Any]:
    """The tree with branches at their strengths, and without entries that are no branches."""
    made: dict[str, Any] = {}
    for name, below in tree.items():
        if name == LORA:
            branches = {number: entry for number, entry in below.items() if is_branch(entry)}
            made[name] = {n: {**e, "scale": e["scale"] * strength(path, int(n))} for n, e in branches.items()}
        elif isinstance(below, Mapping):
            made[name] = _at_strengths(below, strength, f"{path}/{name}")
        else:
            made[name] = below
    return made
