"""Files of LoRA, read into one entry a layer of the model that they are for."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints.lora.keys import is_whole, split
from sdjax.checkpoints.lora.names import TEXT_MODEL, Layer, spellings
from sdjax.checkpoints.mapping import Stored, finite
from sdjax.checkpoints.storage.safetensors import data_section
from sdjax.checkpoints.storage.weights import SAFETENSORS, Weights, read_file
from sdjax.core.errors import UserError
from sdjax.core.files import cached_by_stat
from sdjax.core.untrusted import parse_json, read_json
from sdjax.models.weight_changes import DORA, IA3, MAGNITUDE, differences

PEFT_CONFIG, PEFT_FACTS = "adapter_config.json", "lora_adapter_metadata"
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin")
EXAMPLES, MOST_ALPHA = 3, 2.0**64
BASE, ALIAS, HASH = "ss_base_model_version", "ss_output_name", "sshs_model_hash"

FLAGS = ("alpha", "scale", "on_input")
"""Roles of tensors that are numbers about others."""
UNSCALED = {"diff", "diff_b", "w_norm", "b_norm", IA3}

Tensors = Mapping[str, Stored]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class LoraFile(NamedTuple):
    """A file of LoRA beside a model.

    Attributes:
        path: the file.
        facts: its metadata.
        layers: tensors by their roles, by the path of a layer of the model.
        unmatched: names of layers in the file that the model does not have, or of a kind that is not read.
        peft: config of peft by component; of all of them where the component is "".
    """

    path: Path
    facts: Mapping[str, str]
    layers: Mapping[str, Tensors]
    unmatched: list[str]
    peft: Mapping[str, Mapping[str, Any]]

    @property
    def matched(self) -> str:
        """Phrase that says how much of it is of use."""
        return f"{len(self.layers)} of {len(self.layers) + len(self.unmatched)} layers"


def find_file(path: Path) -> Path:
    """The file of LoRA in a folder of diffusers or peft; any other path as it is.

    Raises:
        UserError: there is nothing, or the folder holds none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"there is no LoRA {str(path)!r}")
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path} holds no file of LoRA: none of {', '.join(FILES)}")
    return found


def read_lora(path: Path, layers: Mapping[str, Layer]) -> LoraFile:
    """Match a file of LoRA, whatever its naming, with the layers of a model.

    Raises:
        UserError: it cannot be read, is of another base, or has nothing in common with the model.
    """
    stored = read_file(find_file(path))
    known, found, unmatched = spellings(layers), dict[str, tuple[bool, Tensors]](), []
    for stem, tensors in _by_stem(stored).items():
        spelt = stem.replace(".", "_")
        layer = known.get(spelt)
        if layer is None or not is_whole(set(tensors)):
            unmatched.append(stem)
            continue
        best = spelt.endswith(layer.theirs.removeprefix(TEXT_MODEL).replace(".", "_"))
        own, _ = found.get(layer.path, (None, {}))
        if own is best:
            raise UserError(f"{stored.path} has {stem} twice, in two spellings")
        if own is not True:  # where a layer is there in both namings, diffusers' one counts, as there
            found[layer.path] = best, tensors
    if not found:
        raise UserError(
            f"{stored.path} is no LoRA for this model, of which it has no layer: it names {_examples(unmatched)}; the "
            f"model has {_examples([layer.path for layer in layers.values()])}"
        )
    read = LoraFile(stored.path, stored.facts, {n: t for n, (_, t) in found.items()}, unmatched, _peft(stored))
    for name in read.layers:
        _check_fit(read, layers[name])
    return read


def _by_stem(stored: Weights) -> dict[str, dict[str, Stored]]:
    """Tensors by the layer's name and their role."""
    found: dict[str, dict[str, Stored]] = defaultdict(dict)
    for key, tensor in stored.tensors.items():
        stem, role = split(key) or (key, "")
        if role in found[stem]:
            raise UserError(f"{stored.path} holds {key} twice, in two spellings")
        found[stem][role] = tensor
    return found


def _examples(names: list[str]) -> str:
    return ", ".join(names[:EXAMPLES]) or "nothing"


def _peft(stored: Weights) -> dict[str, Mapping[str, Any]]:
    """Configs of peft that diffusers writes into the file, or peft beside it."""
    beside = stored.path.with_name(PEFT_CONFIG)
    if stored.path.stem == "adapter_model" and beside.is_file():
        return {"": read_json(beside)}
    if PEFT_FACTS not in stored.facts:
        return {}
    place = f"{PEFT_FACTS} of {stored.path}"
    said = parse_json(stored.facts[PEFT_FACTS].encode(), place)
    if not isinstance(said, dict):
        raise UserError(f"{place} is no JSON object")
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in said.items():
        component, _, name = key.partition(".")
        found[component][name] = value
    return dict(found)


def scale_of(file: LoraFile, layer: Layer) -> float:
    """The factor of a layer's difference at strength 1: alpha / rank, or alpha / sqrt(rank) where peft says so.

    Without an alpha it is 1. A1111's own key `scale` wins.

    Raises:
        UserError: it is no finite number.
    """
    tensors = file.layers[layer.path]
    if "scale" in tensors:
        return _number(file, layer, tensors["scale"])
    rank = _rank(tensors)
    if rank is None:
        return 1.0
    config = file.peft.get(layer.component, file.peft.get("", {}))
    alpha = _number(file, layer, tensors["alpha"]) if "alpha" in tensors else _peft_alpha(config, layer.theirs)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _rank(tensors: Tensors) -> int | None:
    """Rank of the factors; None where there is none, so that alpha has no say."""
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in tensors and tensors[name].shape:
            return max(tensors[name].shape[0], 1)
    return None


def _number(file: LoraFile, layer: Layer, value: Stored) -> float:
    numbers = np.asarray(value).astype(np.float64).reshape(-1)
    if len(numbers) != 1 or not np.isfinite(numbers[0]):
        raise UserError(f"{file.path} has an alpha or a scale of {layer.path} that is no finite number")
    return float(numbers[0])


def _peft_alpha(config: Mapping[str, Any], name: str) -> float | None:
    """A layer's alpha: that of the pattern for its name, or else that of all."""
    patterns, alpha = config.get("alpha_pattern"), config.get("lora_alpha")
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        # Regular expressions of a name's end to peft; those that it and diffusers write are names.
        ending = pattern.lstrip("^").rstrip("$").replace("\\.", ".")
        if f".{name}".endswith(f".{ending}"):
            alpha = own
    return float(alpha) if isinstance(alpha, int | float) and abs(alpha) <= MOST_ALPHA else None


def entry_of(file: LoraFile, layer: Layer) -> dict[str, np.ndarray]:
    """A layer's entry as `sdjax.models.lora` and `sdjax.models.weight_changes` have it, in float32.

    Raises:
        UserError: a value is not finite.
    """
    tensors = file.layers[layer.path]
    what = f"{layer.path} in {file.path}"
    arrays = {n: finite(np.asarray(t), np.float32, what) for n, t in tensors.items() if n not in FLAGS}
    entry = _arranged(arrays, _on_input(tensors), layer.kernel.ndim)
    if set(entry) - UNSCALED:
        entry["scale"] = np.float32(scale_of(file, layer))
    return entry


def _on_input(tensors: Tensors) -> bool:
    return "on_input" in tensors and bool(np.asarray(tensors["on_input"]).any())


def _arranged(arrays: Mapping[str, Any], on_input: bool, rank: int) -> dict[str, Any]:
    """Tensors of a layer in the layout of the entries; traceable.

    Args:
        on_input: whether IA3 weighs inputs, not outputs.
        rank: axes of the layer's weight here.
    """
    entry = dict(arrays)
    if "weight" in entry:
        entry[IA3] = entry.pop("weight").reshape((1, -1) if on_input else (-1, 1))
    if MAGNITUDE in entry:
        entry[MAGNITUDE] = entry[MAGNITUDE].reshape(-1)
    if DORA in entry:
        entry[DORA] = entry[DORA].reshape(entry[DORA].shape[:2])
    if "down" in entry:
        down, up = entry["down"], entry["up"]
        # 1x1 convolutions and linear layers are stored as either.
        entry["down"] = down.reshape(*down.shape[:2], *(down.shape[2:] or (1, 1))).transpose(2, 3, 1, 0)
        if rank == 2:
            entry["down"] = entry["down"].reshape(-1, len(down))
        entry["up"] = up.reshape(-1, up.shape[1]).T
    if "mid" in entry:
        entry["mid"] = entry["mid"].transpose(2, 3, 1, 0)
    return entry


def _check_fit(file: LoraFile, layer: Layer) -> None:
    """Hold a layer's tensors to the layer's own shapes; a UserError says both."""
    tensors = file.layers[layer.path]
    shapes = tuple((name, tuple(t.shape)) for name, t in sorted(tensors.items()) if name not in FLAGS)
    own = tuple((name, tuple(leaf.shape)) for name, leaf in layer.leaves.items())
    if not _fits(shapes, _on_input(tensors), own):
        base = f" ({file.facts[BASE][:40]})" if BASE in file.facts else ""
        said = ", ".join(f"{name} {list(shape)}" for name, shape in shapes)
        raise UserError(
            f"{file.path} is a LoRA for another base{base}: it has {said} for {layer.path}, whose weight is "
            f"{list(own[0][1])} here"
        )


@functools.lru_cache(4096)
def _fits(shapes: Shapes, on_input: bool, own: Shapes) -> bool:
    """Tell whether tensors change leaves of a layer to leaves of the same shapes."""
    tensors, leaves = ({n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in each} for each in (shapes, own))
    if any(axis == 0 for _, shape in shapes for axis in shape):
        return False

    def changes(layer: Any, arrays: Any) -> Any:
        entry = _arranged(arrays, on_input, len(own[0][1]))
        return differences(layer, {**entry, "scale": jnp.float32(1.0)}, 1.0)

    try:
        made = jax.eval_shape(changes, leaves, tensors)
    except (TypeError, ValueError, IndexError, KeyError):
        return False
    return all(name in leaves and leaf.shape == leaves[name].shape for name, leaf in made.items())


@cached_by_stat
def hash_of(path: Path) -> str | None:
    """A1111's hash of a file, 12 digits (AutoV3: SHA-256 of the tensors, without the header); None for pickles."""
    if path.suffix != SAFETENSORS:
        return None
    said = read_file(path).facts.get(HASH, "")
    if re.fullmatch("[0-9a-f]{64}", said):
        return said[:12]
    digest = hashlib.sha256()
    for piece in data_section(path):
        digest.update(piece)
    return digest.hexdigest()[:12]
