"""IP-Adapters as tencent-ailab/IP-Adapter stores them: a pickle of two groups of tensors, or both in safetensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.checkpoints import mapping
from sdjax.checkpoints.mapping import LINEAR, KeyMapping, KeyTable, Kind, Shapes, at, layer, norm
from sdjax.checkpoints.original_keys import OriginalSizes
from sdjax.core.errors import UserError
from sdjax.models.ip_adapter import HEAD, IPAdapter, IPAdapterConfig, ResamplerConfig, block_name
from sdjax.models.unet import UNetConfig

GROUPS = ("image_proj", "ip_adapter")
UNBATCHED = Kind(lambda x: x[0], lambda x: x[None])
RESAMPLER_LAYER = (
    *norm("norm1", "0.norm1"),
    *norm("norm2", "0.norm2"),
    *layer("to_q", "0.to_q"),
    *layer("to_kv", "0.to_kv"),
    *layer("to_out", "0.to_out"),
    *norm("ff_norm", "1.0"),
    *layer("fc1", "1.1"),
    *layer("fc2", "1.3"),
)
IMAGE_PROJ = (
    *layer("proj"),
    *norm("norm"),
    KeyMapping("latents", "latents", UNBATCHED),
    *layer("proj_in"),
    *at("layers_*", "layers.*", RESAMPLER_LAYER),
    *layer("proj_out"),
    *norm("norm_out"),
)
# Adapters that are not read, by a key that each has.
OTHERS = {
    "image_proj.perceiver_resampler.proj_in.weight": "FaceID plus",
    "image_proj.proj.3.weight": "full face",
    "image_proj.proj.0.weight": "FaceID",
}


def table(config: IPAdapterConfig) -> KeyTable:
    """Rows for this config: keys and values have the numbers of attention layers, of which every other is crossed."""
    blocks = [block_name(t.name, i) for t in config.transformers for i in range(t.depth)]
    return KeyTable(
        (
            *at("image_proj", "image_proj", IMAGE_PROJ),
            *(
                KeyMapping(f"{block}/to_{letter}/kernel", f"ip_adapter.{2 * i + 1}.to_{letter}_ip.weight", LINEAR)
                for i, block in enumerate(blocks)
                for letter in "kv"
            ),
        )
    )


@functools.cache
def shapes(config: IPAdapterConfig) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; traced once a config, and shared: not to be changed."""
    states = (1, config.image_dim) if config.resampler is None else (1, 1, config.image_dim)
    return mapping.traced(IPAdapter(config).init, jax.ShapeDtypeStruct(states, jnp.float32))


def config_of(found: Shapes, unet: UNetConfig, place: object) -> IPAdapterConfig:
    """The sizes of an adapter whose tensors have the shapes `found`, for a UNet.

    Raises:
        UserError: it is none, of a kind that is not read, or of another family than the UNet.
    """
    other = next((kind for key, kind in OTHERS.items() if key in found), None)
    if other is not None:
        raise UserError(f"{place} is an IP-Adapter of the kind {other!r}; plain and plus ones are read")
    if not all(any(key.startswith(f"{group}.") for key in found) for group in GROUPS):
        raise UserError(f"{place} is no IP-Adapter: it holds no tensors of {' and '.join(GROUPS)}")
    sizes, resampler = OriginalSizes(found, place), None
    if "image_proj.latents" in found:
        resampler = ResamplerConfig(
            width=sizes.axis("image_proj.latents", 2),
            depth=sizes.count("image_proj.layers"),
            heads=max(sizes.axis("image_proj.layers.0.0.to_q.weight", 0) // HEAD, 1),
        )
        context, tokens = sizes.axis("image_proj.proj_out.weight", 0), sizes.axis("image_proj.latents", 1)
        image = sizes.axis("image_proj.proj_in.weight", 1)
    else:
        context, image = sizes.axis("image_proj.norm.weight", 0), sizes.axis("image_proj.proj.weight", 1)
        tokens = max(sizes.axis("image_proj.proj.weight", 0) // max(context, 1), 1)
    layers = len({key.split(".")[1] for key in found if re.fullmatch(r"ip_adapter\.\d+\.to_k_ip\.weight", key)})
    wanted = sum(transformer.depth for transformer in unet.transformers)
    if (context, layers) != (unet.context_dim, wanted):
        raise UserError(
            f"{place} is for a UNet of {layers} cross-attention layers to {context} features; this one has {wanted} to "
            f"{unet.context_dim}"
        )
    return IPAdapterConfig(image, context, tokens, resampler, unet.transformers)


def flat(groups: Mapping[str, Any]) -> dict[str, Any]:
    """A file's tensors by whole names: pickles hold two groups of them."""
    found = {group: groups[group] for group in GROUPS if isinstance(groups.get(group), Mapping)}
    inner = {f"{group}.{key}": tensor for group, tensors in found.items() for key, tensor in tensors.items()}
    return inner or {key: tensor for key, tensor in groups.items() if key.startswith(GROUPS)}
