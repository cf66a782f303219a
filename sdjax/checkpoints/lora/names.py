"""Spellings of a model's layers in files of LoRA, made from the model: names with `_` for `.` cannot be taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdjax.checkpoints.mapping import Kind, places
from sdjax.checkpoints.networks import clip, unet
from sdjax.core.tree import Tree, flatten
from sdjax.models.unet import UNetConfig

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
PREFIXES: Mapping[str, tuple[str, ...]] = {
    # kohya's, diffusers', peft's of one network, ComfyUI's, and diffusers' before 0.20, which has none.
    UNET: ("lora_unet_", "unet_", "base_model_model_", "diffusion_model_", "model_diffusion_model_", ""),
    TEXT: ("lora_te_", "lora_te1_", "text_encoder_", "text_encoders_clip_l_transformer_", "base_model_model_"),
    TEXT_2: ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_"),
}
"""What stands before a layer's name by component, with `_` for `.`; the first is kohya's."""
BLOCKS = {"input_blocks": "IN", "output_blocks": "OUT"}
TEXT_MODEL = "text_model."
"""What transformers 5 leaves out of the names of a bare CLIPTextModel."""


class Layer(NamedTuple):
    """A layer of a model that has a weight.

    Attributes:
        path: its place in our parameters, e.g. "unet/down_blocks_0_resnets_0/conv1".
        theirs: its name in diffusers or transformers, e.g. "down_blocks.0.resnets.0.conv1".
        original: its name in the original layout, e.g. "input_blocks.1.0.in_layers.2"; `theirs` where it has none.
        kind: storage of its weight.
        leaves: shapes of its parameters by their names, e.g. {"kernel": ..., "bias": ...}.
    """

    path: str
    theirs: str
    original: str
    kind: Kind
    leaves: Tree

    @property
    def kernel(self) -> Any:
        """Shape of its weight."""
        return next(iter(self.leaves.values()))

    @property
    def component(self) -> str:
        """The network that it is of."""
        return self.path.split("/")[0]


def layers_of(configs: Mapping[str, Any]) -> dict[str, Layer]:
    """Layers, by their paths, of the networks that files of LoRA are for, by the configs of a model's components."""
    found = {}
    for component in PREFIXES:
        if component in configs:
            found |= {layer.path: layer for layer in _layers(component, configs[component])}
    return found


def _layers(component: str, config: Any) -> list[Layer]:
    table, shapes, pieces = clip.TABLE, clip.shapes, {}
    if isinstance(config, UNetConfig):
        table, shapes, pieces = unet.table(config), unet.shapes, unet.pieces(config)
    flat, found = flatten(shapes(config)), []
    for name, place in places(table, flat).items():
        path, _, leaf = name.rpartition("/")
        if leaf not in ("kernel", "scale"):
            continue
        original = pieces[place.key].key if place.key in pieces else place.key
        theirs, original = (key.rpartition(".")[0] for key in (place.key, original))
        leaves = {n: flat[f"{path}/{n}"] for n in (leaf, "bias") if f"{path}/{n}" in flat}
        found.append(Layer(f"{component}/{path}", theirs, original, place.kind, leaves))
    return found


def blocks_of(layers: Mapping[str, Layer]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of a UNet's blocks, as user interfaces count them, and the number of the block of each outermost module.

    The blocks are those of the original layout: IN00, ..., M00, OUT00, ...; last comes "", for what is in none.
    """
    modules = {layer.path.split("/")[1]: _block(layer) for layer in layers.values() if layer.component == UNET}
    order = {"I": 0, "M": 1, "O": 2}
    names = (*sorted({name for name in modules.values() if name}, key=lambda name: (order[name[0]], name)), "")
    return names, {module: names.index(name) for module, name in modules.items()}


def _block(layer: Layer) -> str:
    side, number, *_ = layer.original.split(".")
    if side == "middle_block":
        return "M00"
    return f"{BLOCKS[side]}{int(number):02d}" if side in BLOCKS else ""


def spellings(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers by every name that files may give them, with `_` for `.`; diffusers' names win over others."""
    found: dict[str, Layer] = {}
    components = {layer.component for layer in layers.values()}
    for component, prefixes in PREFIXES.items():
        # SDXL's refiner has the second text encoder alone, which kohya calls the only one.
        own = TEXT_2 if component == TEXT and TEXT not in components else component
        mine = [layer for layer in layers.values() if layer.component == own]
        for names in ([layer.theirs for layer in mine], [layer.original for layer in mine]):
            for prefix in prefixes:
                for name, layer in zip(names, mine, strict=True):
                    for spelt in dict.fromkeys((name, name.removeprefix(TEXT_MODEL))):
                        found.setdefault(prefix + spelt.replace(".", "_"), layer)
    return found
