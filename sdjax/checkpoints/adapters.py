"""Networks that are added to a model and have files of their own: IP-Adapters, T2I-Adapters."""

from __future__ import annotations

from pathlib import Path

from sdjax.checkpoints.checkpoint import Component, ReadOptions, dtype_of, read_params
from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.checkpoints.mapping import check_blocks, read
from sdjax.checkpoints.networks import ip_adapter, t2i_adapter
from sdjax.checkpoints.storage.weights import read_file, read_groups
from sdjax.models.unet import UNetConfig


def read_ip_adapter(path: Path, unet: UNetConfig, how: ReadOptions) -> Component:
    """An IP-Adapter of a `.bin` or `.safetensors` file, for a UNet.

    Raises:
        UserError: the file cannot be read, holds none, one of a kind that is not read, or one of another family.
    """
    tensors = ip_adapter.flat(read_groups(path))
    config = ip_adapter.config_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, unet, path)
    check_blocks(config.blocks, tensors, path)
    place = how.place
    below = None if place is None else lambda array, name: place(array, f"ip_adapter/{name}")
    shapes = ip_adapter.shapes(config)
    return Component(config, read(ip_adapter.table(config), tensors, shapes, dtype_of("ip_adapter", how), path, below))


def read_t2i_adapter(path: Path, how: ReadOptions) -> Component:
    """A T2I-Adapter of a folder of diffusers', or of a file in its naming or the original one.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    if path.is_dir():
        return read_component(path, "t2i_adapter", how.dtype, place=how.place)
    tensors = t2i_adapter.diffusers_names(read_file(path).tensors)
    config = t2i_adapter.config_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, path)
    return Component(config, read_params("t2i_adapter", config, tensors, path, how))
