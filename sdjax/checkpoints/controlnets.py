"""ControlNets of diffusers' folders, and of files in diffusers' naming or the original one, added to a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from sdjax.checkpoints.checkpoint import ALL_FORMATS, CONTROLNET, Checkpoint, Component, Patch, ReadOptions, read_params
from sdjax.checkpoints.families import Sign
from sdjax.checkpoints.layouts.diffusers import INDEX, present, read_component
from sdjax.checkpoints.layouts.original import Network, read_alone, shapes_of
from sdjax.checkpoints.mapping import Writable, check_blocks, export
from sdjax.checkpoints.networks import controlnet
from sdjax.checkpoints.original_keys import outward, without_prefix
from sdjax.checkpoints.storage.safetensors import write_safetensors
from sdjax.checkpoints.storage.weights import SAFETENSORS, SUFFIXES, Source, read_file
from sdjax.core.errors import UserError
from sdjax.core.precision import dtype_named
from sdjax.core.tree import Tree, flatten, numbered, unflatten
from sdjax.core.untrusted import read_json
from sdjax.models.controlnet import HINT_ENCODER, ControlNetConfig, config_for
from sdjax.models.unet import UNetConfig

PREFIX, CONFIG = "control_model.", "config.json"
FIRST = {f"{HINT_ENCODER}.conv_in.weight": "diffusers", "input_hint_block.0.weight": "original"}
"""The naming that a key tells."""
ENCODER = ("channels", "layers_per_block", "context_dim", "vector_dim", "classes", "in_channels")
"""Sizes that a ControlNet shares with its UNet; it may have fewer transformers."""
SIGNS = (
    Sign(r"lora_controlnet|.*\.up", "a control-LoRA, which has low-rank factors alone"),
    Sign(r"difference", "the difference to a base model's weights, not the ControlNet"),
    Sign(r"(task_embedding|control_add_embedding\..*|transformer_layes\..*)", "a ControlNet-Union of several hints"),
    Sign(r".*(ctrl_to_base|base_to_ctrl).*|control_(down|mid)_blocks?\..*|enc_zero_convs_.*", "a ControlNet-XS"),
    Sign(r"lllite_.*", "a ControlNet-LLLite"),
    Sign(r"(adapter\.)?body\..*", "a T2I-Adapter"),
    Sign(r"(controlnet_)?(x_embedder|pos_embed_input|(single_)?transformer_blocks)\..*", "one of Flux or of SD 3"),
    Sign(r"(lora_unet_|ip_adapter|image_proj).*", "a LoRA or an IP-Adapter"),
)
SEVERAL = "MultiControlNetModel"
"""Class of several in an index of diffusers'."""
# The model whose residuals are averaged, which its file does not say (Mikubill/sd-webui-controlnet).
SHUFFLE = "shuffle"

logger = logging.getLogger("sdjax")


def add_controlnets(nets: Sequence[tuple[str, Component]]) -> Patch:
    """ControlNets, each after its source, as the components "controlnet", "controlnet_1", ..., in order.

    Raises:
        UserError: by the patch, where one is made for another UNet.
    """

    def patch(checkpoint: Checkpoint) -> Checkpoint:
        components = dict(checkpoint.components)
        for i, (name, net) in enumerate(nets):
            check_base(net.config, checkpoint, name)
            components[numbered(CONTROLNET, i)] = net
        return dataclasses.replace(
            checkpoint, components=components, controlnets=tuple(_name(name) for name, _ in nets)
        )

    return patch


def _name(source: str) -> str:
    """The name of a ControlNet: its file's or folder's, or on the Hub its repository's."""
    path = PurePath(source)
    return path.stem if path.suffix in (SAFETENSORS, *SUFFIXES) else path.name


def check_base(net: ControlNetConfig, checkpoint: Checkpoint, name: str) -> None:
    """Hold a ControlNet to the model that it shall control; a UserError names the first size that differs."""
    unet = checkpoint.components["unet"].config
    if not isinstance(unet, UNetConfig) or "vae" not in checkpoint.components:
        raise UserError(f"controlnet {name!r}: the model's UNet is none of latents and prompts, which ControlNets copy")
    wanted = config_for(unet, checkpoint.components["vae"].config.factor)
    sizes = [(key, net.encoder, wanted.encoder) for key in ENCODER]
    for key, ours, theirs in [*sizes, ("hint_channels", net, wanted), ("factor", net, wanted)]:
        own, needed = getattr(ours, key), getattr(theirs, key)
        if own != needed:
            raise UserError(f"controlnet {name!r} is for another base model: its {key} {own}, this one's {needed}")


def listed_controlnets(path: Path) -> list[Path]:
    """Folders of the ControlNets that a pipeline's folder lists, in their order; () of a model without, and of a file.

    Raises:
        UserError: one is listed that is not there.
    """
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    if not present(index, CONTROLNET):
        return []
    folders = list(itertools.takewhile(Path.is_dir, (path / numbered(CONTROLNET, i) for i in itertools.count())))
    least = 1 + (SEVERAL in index[CONTROLNET])
    if len(folders) < least:
        raise UserError(f"{path / INDEX} lists {CONTROLNET}, but there is no {path / numbered(CONTROLNET, least - 1)}")
    return folders


def read_controlnet(path: Path, how: ReadOptions = ReadOptions(), variant: str | None = None) -> Component:  # noqa: B008
    """A ControlNet of a local folder, its own or a pipeline's, or of a file.

    Raises:
        UserError: it cannot be read, or is of another kind.
    """
    if path.is_dir():
        folder = path / CONTROLNET if (path / CONTROLNET / CONFIG).is_file() else path
        return read_component(folder, CONTROLNET, how.dtype, variant=variant, place=how.place)
    stored = read_file(path)
    prefix, naming = naming_of(stored)
    tensors = without_prefix(stored.tensors, prefix)
    if naming == "diffusers" and path.with_name(CONFIG).is_file():
        return read_component(path, CONTROLNET, how.dtype, place=how.place)
    shapes = shapes_of(tensors)
    config = controlnet.original_config(
        shapes if naming == "original" else controlnet.under_original_keys(shapes, path), path
    )
    config = dataclasses.replace(config, global_pool=SHUFFLE in path.stem)
    check_blocks(config.blocks, tensors, path)
    logger.info("%s is taken for a ControlNet of %s", path.name, title_of(config))
    if naming == "diffusers":
        return Component(config, read_params(CONTROLNET, config, tensors, path, how))
    return read_alone(Network(CONTROLNET, "", config, {}, controlnet.pieces(config)), tensors, path, how)


def naming_of(source: Source) -> tuple[str, str]:
    """Prefix and naming, "diffusers" or "original", of a ControlNet's tensors in a file.

    Raises:
        UserError: it holds none, or one of a kind that is not read.
    """
    stored = read_file(source)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in stored.tensors) else ""
    keys = [key.removeprefix(prefix) for key in stored.tensors]
    looks = next((sign.title for sign in SIGNS for key in keys if re.fullmatch(sign.keys, key)), None)
    naming = next((naming for key, naming in FIRST.items() if key in keys), None)
    if looks is not None or naming is None:
        what = f"it looks like {looks}" if looks else f"it has none of {', '.join(FIRST)}"
        raise UserError(f"{stored.path} is no ControlNet of Stable Diffusion 1, 2 or XL: {what}")
    return prefix, naming


def is_controlnet(path: Path) -> bool:
    """Tell whether a folder is a ControlNet's own, or a file holds one, maybe with the model that it was trained on.

    Raises:
        UserError: it cannot be read.
    """
    if path.is_dir():
        config = path / CONFIG
        return config.is_file() and read_json(config).get("_class_name") == controlnet.CLASS_NAME
    return any(key.removeprefix(PREFIX) in FIRST for key in read_file(path).tensors)


def title_of(config: ControlNetConfig) -> str:
    """The family whose UNet it controls, as users call it."""
    if config.encoder.vector_dim is not None:
        return "SDXL"
    return "Stable Diffusion 2" if config.encoder.linear_projection else "Stable Diffusion 1"


def write_controlnet_file(path: str | Path, component: Component, dtype: str | None = "float32") -> None:
    """Writes a ControlNet alone under its original keys, with the prefix that the published files have.

    Raises:
        UserError: the layout cannot express its sizes, `path` exists and was not written here, or a parameter is not
            finite in `dtype`.
    """
    config, form = component.config, ALL_FORMATS[CONTROLNET]
    arrays = export(form.table(config), component.params, form.shapes(config), "the controlnet to be written")
    wholes = outward(controlnet.pieces(config), arrays)
    found = dataclasses.replace(
        controlnet.original_config(shapes_of(wholes), path), global_pool=SHUFFLE in Path(path).stem
    )
    if found != config:
        lost = [key for key, value in vars(config).items() if getattr(found, key) != value]
        raise UserError(f"{path}: the original layout cannot say a ControlNet's {', '.join(lost)}; write a folder")
    tensors: dict[str, Writable] = {PREFIX + key: whole for key, whole in wholes.items()}
    write_safetensors(path, tensors, None if dtype is None else dtype_named(dtype))


def transfer(params: Tree, old: Tree, new: Tree, place: object) -> dict[str, object]:
    """Parameters of a ControlNet for another UNet: p + (new - old) where it copied the UNet's encoder.

    Args:
        params: of the ControlNet.
        old, new: of the UNet that it was trained with, and of the one that it shall control.
        place: of the two, for messages.

    Raises:
        UserError: the three are not of one size.
    """
    before, after = flatten(old), flatten(new)

    def taken(name: str, of: Tree, like: np.ndarray) -> np.ndarray:
        array = np.asarray(of[name], np.float32) if name in of else np.zeros(0)
        if name == "conv_in/kernel":  # what is joined to the latents comes after them
            array = array[:, :, : like.shape[2]]
        if array.shape != like.shape:
            raise UserError(f"{place}: the ControlNet's {name} is {list(like.shape)}, theirs {list(array.shape)}")
        return array

    def moved(name: str, leaf: np.ndarray) -> np.ndarray:
        if name.startswith(CONTROLNET):
            return leaf
        change = taken(name, after, leaf) - taken(name, before, leaf)
        return (np.asarray(leaf, np.float32) + change).astype(leaf.dtype)

    return unflatten({name: moved(name, leaf) for name, leaf in flatten(params).items()})
