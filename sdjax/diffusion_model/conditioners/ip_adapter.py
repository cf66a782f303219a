"""Images as prompts: an IP-Adapter's tokens beside those of the text (Ye et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PRNGKeyArray

from sdjax.core.errors import UserError, unknown
from sdjax.core.tree import Params
from sdjax.core.untrusted import parse_json
from sdjax.data.image_inputs import clip_pixels, rgb
from sdjax.diffusion_model.conditioner import Columns, Conditioner, Host, Traits
from sdjax.models.clip_image import CLIPImage, CLIPImageConfig
from sdjax.models.conditioning import Cond, apply
from sdjax.models.ip_adapter import IPAdapter, IPAdapterConfig
from sdjax.models.unet import Transformer

ADAPTER, ENCODER = "ip_adapter", "image_encoder"
"""Components of the parameters of the two."""
IMAGE, SCALE, BLOCKS = "ip_image", "ip_scale", "ip_blocks"
PIXELS, TOKENS, NULL = "ip_pixels", "ip_tokens", "negative_ip_tokens"
# Transformers of SDXL that an image's style and its layout go through (Wang et al. 2024, InstantStyle).
PRESETS = {"style": {"up": {"block_0": [0.0, 1.0, 0.0]}}, "layout": {"down": {"block_2": [0.0, 1.0]}}}


@dataclass(frozen=True)
class ImagePromptConditioner(Conditioner):
    """`ip_pixels` [b k s s 3] of k images as CLIP sees them, `ip_scale` [b t] of the UNet's transformers.

    `precompute` makes `ip_tokens` and, of the null condition, `negative_ip_tokens` [b n d] of them.

    Attributes:
        adapter, encoder: of the adapter, and of the image tower that it was trained with.
        dtype: of their arithmetic.
    """

    adapter: IPAdapterConfig
    encoder: CLIPImageConfig
    dtype: DTypeLike = jnp.float32

    @property
    def traits(self) -> Traits:
        return Traits(optional=(IMAGE, SCALE, BLOCKS))

    @property
    def components(self) -> dict[str, Any]:
        return {ADAPTER: self.adapter, ENCODER: self.encoder}

    def init(self, key: PRNGKeyArray) -> Params:
        width, side = self.adapter.image_dim, self.encoder.size
        states = jnp.zeros((1, width) if self.adapter.resampler is None else (1, 1, width))
        keys = jax.random.split(key)
        adapter = IPAdapter(self.adapter).init(keys[0], states)["params"]
        return {
            ADAPTER: adapter,
            ENCODER: CLIPImage(self.encoder).init(keys[1], jnp.zeros((1, side, side, 3)))["params"],
        }

    def encode(self, inputs: Mapping[str, Any], host: Host) -> dict[str, Any]:
        given = inputs.get(IMAGE)
        if given is None:
            return {}
        images = list(given) if isinstance(given, list | tuple) else [given]
        if not images:
            raise UserError(f"{IMAGE} is an empty list; give an image, or several of one prompt as a list")
        pixels = [clip_pixels(np.rint(rgb(one, IMAGE) * 255.0).astype(np.uint8), self.encoder.size) for one in images]
        scale = 1.0 if inputs.get(SCALE) is None else inputs[SCALE]
        by_block = block_scales(inputs.get(BLOCKS), self.adapter.transformers, host.name)
        return {PIXELS: np.stack(pixels), SCALE: np.float32(scale) * by_block}

    def precompute(self, params: Params, columns: Columns) -> dict[str, Array]:
        if PIXELS not in columns:
            return {}
        pixels = jnp.asarray(columns[PIXELS])
        flat = pixels.reshape(-1, *pixels.shape[2:])
        if self.adapter.resampler is None:
            states = self._tower(params, flat).pooled
            null = jnp.zeros_like(states)
        else:  # CLIP's states of an image of the mean color, as published
            states, null = (self._tower(params, x).penultimate for x in (flat, jnp.zeros_like(flat)))
        return {TOKENS: self._tokens(params, states, len(pixels)), NULL: self._tokens(params, null, len(pixels))}

    def cond(self, params: Params, columns: Columns, keys: Key[Array, " b"] | None = None) -> Cond:
        if TOKENS not in columns:
            return Cond()
        images = apply(self._module, params[ADAPTER], jnp.asarray(columns[TOKENS]), method="keys_values")
        # A scaled value is a scaled result of attention, so that the UNet needs no scale.
        scales = jnp.asarray(columns[SCALE])[..., None, None]
        scaled = {
            t.name: [one._replace(values=one.values * scales[:, i].astype(one.values.dtype)) for one in images[t.name]]
            for i, t in enumerate(self.adapter.transformers)
        }
        return Cond(images=scaled)

    def null(self, columns: Columns) -> Columns | None:
        return {**columns, TOKENS: columns[NULL]} if NULL in columns else None

    @property
    def _module(self) -> IPAdapter:
        return IPAdapter(self.adapter, self.dtype)

    def _tower(self, params: Params, pixels: Float[Array, "n s s 3"]) -> Any:
        return apply(CLIPImage(self.encoder, self.dtype), params[ENCODER], pixels)

    def _tokens(self, params: Params, states: Float[Array, "n ..."], images: int) -> Float[Array, "b n d"]:
        """Tokens of all images of a prompt, one after another."""
        tokens = apply(self._module, params[ADAPTER], states, method="tokens")
        return tokens.reshape(images, -1, tokens.shape[-1])


def block_scales(given: Any, transformers: Sequence[Transformer], place: str) -> Float[np.ndarray, " t"]:
    """Scale of each transformer, in diffusers' form (`set_ip_adapter_scale`): those that are not named have 0.

    Args:
        given: e.g. {"down": {"block_2": [0, 1]}, "mid": 0.5, "up": 1}, such as JSON, or names of `PRESETS`, joined by
            commas; None for 1 everywhere.
        transformers: of the UNet.
        place: the model's name, for messages.

    Raises:
        UserError: a name is unknown, or a value is no number or not as many as a block has transformers.
    """
    scales = np.zeros(len(transformers), np.float32)
    if given is None:
        return scales + 1.0
    if isinstance(given, str):
        if not given.lstrip().startswith("{"):
            for name in given.split(","):
                if name.strip() not in PRESETS:
                    raise unknown(BLOCKS, name.strip(), PRESETS)
                scales = np.maximum(scales, block_scales(PRESETS[name.strip()], transformers, place))
            return scales
        given = parse_json(given.encode(), BLOCKS)
    if not isinstance(given, Mapping):
        raise UserError(f"{BLOCKS} {given!r}: give names ({', '.join(PRESETS)}) or scales by block")
    blocks: dict[str, list[int]] = {}
    for number, transformer in enumerate(transformers):
        side, _, block = re.fullmatch(r"(down|up|mid)_blocks?(_(\d+))?_attentions_\d+", transformer.name).groups()  # pyright: ignore
        blocks.setdefault(side if block is None else f"{side}.block_{block}", []).append(number)
    for name, value in _spread(given, blocks).items():
        values = value if isinstance(value, list | tuple) else [value]
        numbers = blocks.get(name)
        if numbers is None:
            raise unknown(f"block in {BLOCKS}", name, blocks, place)
        if len(values) not in (1, len(numbers)) or not all(_is_number(one) for one in values):
            raise UserError(f"{BLOCKS} {value!r} of {name}: give a number, or {len(numbers)} of them")
        scales[numbers] = values
    return scales


def _spread(given: Mapping[str, Any], blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Values by whole names; that of a side is each of its blocks'."""
    found: dict[str, Any] = {}
    for side, value in given.items():
        if isinstance(value, Mapping):
            found |= {f"{side}.{block}": own for block, own in value.items()}
        else:
            names = [name for name in blocks if name.split(".")[0] == side]
            found |= dict.fromkeys(names or [str(side)], value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
