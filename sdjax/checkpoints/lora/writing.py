"""Files of LoRA in kohya's naming and in diffusers', with the metadata by which others read and describe them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from sdjax.checkpoints.checkpoint import Checkpoint, family_of
from sdjax.checkpoints.lora.names import PREFIXES, TEXT, TEXT_2, UNET, Layer, layers_of
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.core.errors import unknown
from sdjax.models.weight_changes import DORA, MAGNITUDE

# ss_base_model_version and modelspec.architecture (kohya-ss/sd-scripts library/train_util.py and sai_model_spec.py).
BASES = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "sdxl_refiner": ("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner/lora"),
    "x4_upscaler": ("sd_v2", "stable-diffusion-v2-512/lora"),
}
VELOCITY = {"sd2": ("sd_v2_v", "stable-diffusion-v2-768-v/lora"), "sd1": ("sd_v1_v", "stable-diffusion-v1/lora")}

Factors = Mapping[str, Mapping[str, Any]]
"""Entries of `sdjax.models.lora`, by the path of their layer, e.g. "unet/conv_in"."""


def write_lora(
    path: str | Path,
    checkpoint: Checkpoint,
    factors: Factors,
    naming: str,
    metadata: Mapping[str, str] | None = None,
    dtype: DTypeLike = np.float32,
) -> None:
    """Write factors into one safetensors file.

    Args:
        path: of a file that does not exist or was written here.
        checkpoint: of the model; its parameters are not read.
        factors: scales are scalars.
        naming: "kohya", which every program reads, or "diffusers".
        metadata: beside what follows from the model and the factors, e.g. {"ss_output_name": "style"}.

    Raises:
        UserError: an unknown naming; as `write_safetensors`.
    """
    if naming not in NAMINGS:
        raise unknown("naming", naming, NAMINGS)
    layers = layers_of({name: part.config for name, part in checkpoint.components.items()})
    entries = {name: {n: np.asarray(leaf, np.float32) for n, leaf in entry.items()} for name, entry in factors.items()}
    tensors, facts = NAMINGS[naming](checkpoint, {name: layers[name] for name in entries}, entries)
    tensors = {name: np.asarray(tensor, dtype) for name, tensor in tensors.items()}
    digest = hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors)))
    facts |= {"sshs_model_hash": digest.hexdigest()}
    write_safetensors(path, tensors, None, {**facts, **(metadata or {})})


def rank_of(entry: Mapping[str, Any]) -> int:
    """Rank of an entry's factors."""
    return entry["up"].shape[0]


def _alpha(entry: Mapping[str, Any]) -> float:
    return float(entry["scale"]) * rank_of(entry)


def _stored(layer: Layer, entry: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Factors in PyTorch's layout: down [r, i, *hw], up [o, r, *hw], and mid [r, r, h, w]."""
    if len(layer.kernel.shape) == 2:  # linear in PyTorch, too, or a 1x1 convolution there
        return {"down": layer.kind.outward(entry["down"]), "up": layer.kind.outward(entry["up"])}
    own = {name: entry[name].transpose(3, 2, 0, 1) for name in ("down", "mid") if name in entry}
    return {**own, "up": entry["up"].T[..., None, None]}


def _kohya(checkpoint: Checkpoint, layers: Mapping[str, Layer], entries: Factors) -> tuple[dict[str, Any], Any]:
    prefixes = {name: prefix[0] for name, prefix in PREFIXES.items()}
    if TEXT_2 in checkpoint.components:
        prefixes |= {TEXT: PREFIXES[TEXT][1]} if TEXT in checkpoint.components else {TEXT_2: PREFIXES[TEXT][0]}
    tensors: dict[str, Any] = {}
    for name, entry in entries.items():
        layer = layers[name]
        stem = prefixes[layer.component] + layer.theirs.replace(".", "_")
        stored = _stored(layer, entry)
        tensors |= {f"{stem}.lora_{part}.weight": array for part, array in stored.items()}
        tensors[f"{stem}.alpha"] = np.float32(_alpha(entry))
        if MAGNITUDE in entry:
            tensors[f"{stem}.{DORA}"] = entry[MAGNITUDE].reshape(-1, *[1] * (stored["down"].ndim - 1))
    return tensors, kohya_facts(checkpoint, entries)


def kohya_facts(checkpoint: Checkpoint, entries: Factors) -> dict[str, str]:
    """Facts that kohya's tools and A1111 read (kohya-ss/sd-scripts, `SS_METADATA_MINIMUM_KEYS`)."""
    family, prediction = family_of(checkpoint), checkpoint.scheduler.get("prediction_type", "epsilon")
    bases = BASES | VELOCITY if prediction == "v_prediction" else BASES
    base, architecture = bases[family]
    rank, alpha = _commonest(entries.values())
    facts = {
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }
    if large := [entry for entry in entries.values() if "mid" in entry or entry["down"].shape[:-2] > (1, 1)]:
        rank, alpha = _commonest(large)
        facts["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": f"{alpha:g}"})
    return facts


def _commonest(entries: Iterable[Mapping[str, Any]]) -> tuple[int, float]:
    """Rank and alpha of most entries."""
    return Counter((rank_of(entry), _alpha(entry)) for entry in entries).most_common(1)[0][0]


def _diffusers(checkpoint: Checkpoint, layers: Mapping[str, Layer], entries: Factors) -> tuple[dict[str, Any], Any]:
    tensors, configs = {}, {}
    for component in (UNET, TEXT, TEXT_2):
        own = {name: entry for name, entry in entries.items() if layers[name].component == component}
        for name, entry in own.items():
            stored, stem = _stored(layers[name], _without_core(entry)), f"{component}.{layers[name].theirs}"
            tensors |= {f"{stem}.lora_A.weight": stored["down"], f"{stem}.lora_B.weight": stored["up"]}
            if MAGNITUDE in entry:
                shape = (-1,) if stored["down"].ndim == 2 else (1, -1, 1, 1)
                tensors[f"{stem}.lora_magnitude_vector"] = entry[MAGNITUDE].reshape(shape)
        if own:
            configs |= {f"{component}.{key}": value for key, value in _peft_config(layers, own).items()}
    return tensors, {"lora_adapter_metadata": json.dumps(configs, indent=2, sort_keys=True)}


def _without_core(entry: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The entry with a convolution's core, which diffusers does not know, in its first factor."""
    if "mid" not in entry:
        return entry
    return {**entry, "down": np.einsum("in,hwnm->hwim", entry["down"][0, 0], entry["mid"])}


def _peft_config(layers: Mapping[str, Layer], entries: Factors) -> dict[str, Any]:
    """The config that peft builds such factors by: its LoraConfig, without which alpha is lost."""
    # transformers' CLIPTextModel has no text_model from 5.6 on; to peft the end of a name is enough.
    theirs = {name: layers[name].theirs for name in entries}
    names = {theirs[name].removeprefix("text_model."): entry for name, entry in entries.items()}
    start = "" if any(name.startswith("text_model.") for name in theirs.values()) else "^"
    ranks = {name: rank_of(entry) for name, entry in names.items()}
    alphas = {name: _alpha(entry) for name, entry in names.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"{start}{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"{start}{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(names),
        "use_dora": any(MAGNITUDE in entry for entry in names.values()),
        "use_rslora": False,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


NAMINGS: dict[str, Callable[..., tuple[dict[str, Any], Any]]] = {"kohya": _kohya, "diffusers": _diffusers}
