"""An autoencoder over more than fits in memory: overlapping tiles of one shape, blended so that no seam is seen.

The blending of overlapping tiles is that of diffusers' AutoencoderKL.tiled_decode; unlike there, what lies at a tile's
very edge, where the network saw padding in place of the image, is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.core.errors import UserError

Coder = Callable[[Float[Array, "b h w c"]], Float[Array, "b h2 w2 c2"]]


class Spans(NamedTuple):
    """Tiles along one side.

    Attributes:
        starts: in latents.
        length: of every tile, in latents.
        weights: [tiles, length x scale], what each counts for; over all tiles they sum to one everywhere.
    """

    starts: list[int]
    length: int
    weights: Float[np.ndarray, "n l"]


def decode_tiled(
    decode: Coder, latents: Float[Array, "b h w z"], tile: int, overlap: int, factor: int
) -> Float[Array, "b h*f w*f c"]:
    """Decode latents tile by tile, in float32.

    The same as without tiles where a pixel depends on latents no further than a quarter of the overlap away. Every tile
    has the same shape, so a compiled `decode` is compiled once for images of all sizes that are larger than a tile
    both ways; call this outside of `jit`.

    Args:
        decode: latents of any size to images `factor` times as large; compiled.
        latents: unscaled. Those that fit in one tile are decoded as they are.
        tile: side of a tile in latents; a narrower image has narrower tiles.
        overlap: of neighbouring tiles, in latents, at most half a tile; the last tiles overlap more where the image's
            size asks for it.
        factor: pixels a latent stands for along each side.

    Raises:
        UserError: an overlap that is negative or more than half a tile.
    """
    return _tiled(decode, latents, tile, overlap, (1, factor))


def encode_tiled(
    encode: Coder, images: Float[Array, "b h*f w*f c"], tile: int, overlap: int, factor: int
) -> Float[Array, "b h w z"]:
    """Encode images, whose sides are multiples of `factor`, tile by tile; as `decode_tiled`."""
    return _tiled(encode, images, tile, overlap, (factor, 1))


def _spans(side: int, tile: int, overlap: int, scale: int) -> Spans:
    if side <= tile:
        return Spans([0], side, np.ones((1, side * scale), np.float32))
    starts = [*range(0, side - tile, tile - overlap), side - tile]
    # Neighbours meet in the middle of what they share. The outer quarters, which saw padding, count for nothing.
    meet = [(first + tile + second) / 2.0 for first, second in itertools.pairwise(starts)]
    at = (np.arange(side * scale) + 0.5) / scale
    rises = np.stack([np.ones_like(at), *(_rise((at - middle) / (overlap / 2.0 or 1e-6)) for middle in meet)])
    whole = rises - np.concatenate([rises[1:], np.zeros_like(rises[:1])])
    weights = [row[start * scale : (start + tile) * scale] for row, start in zip(whole, starts, strict=True)]
    return Spans(starts, tile, np.stack(weights).astype(np.float32))


def _rise(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """From 0 at -1/2 to 1 at 1/2, a raised cosine."""
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(x + 0.5, 0.0, 1.0))


def _tiled(function: Coder, values: Array, tile: int, overlap: int, scales: tuple[int, int]) -> Array:
    if not 0 <= overlap <= tile // 2:
        raise UserError(f"overlap {overlap} of tiles of {tile}: choose 0 to {tile // 2}")
    reads, writes = scales
    spans = [_spans(side // reads, tile, overlap, writes) for side in values.shape[1:3]]
    if all(len(side.starts) == 1 for side in spans):
        return function(values).astype(jnp.float32)
    size = tuple((side.starts[-1] + side.length) * writes for side in spans)
    extent = tuple(side.length * reads for side in spans)
    canvas = None
    for (y, down), (x, across) in itertools.product(*(zip(side.starts, side.weights, strict=True) for side in spans)):
        made = function(_cut(values, np.array([y, x], np.int32) * reads, extent))
        at = np.array([y, x], np.int32) * writes
        canvas = _first(made, down, across, at, size) if canvas is None else _add(canvas, made, down, across, at)
    assert canvas is not None, "there is at least one tile"
    return canvas


@partial(jax.jit, static_argnames="size")
def _cut(values: Array, at: Array, size: tuple[int, int]) -> Array:
    b, _, _, c = values.shape
    return jax.lax.dynamic_slice(values, (0, at[0], at[1], 0), (b, *size, c))


@partial(jax.jit, static_argnames="size")
def _first(made: Array, down: Array, across: Array, at: Array, size: tuple[int, int]) -> Array:
    """One tile on an empty canvas, where the devices have that tile."""
    b, _, _, c = made.shape
    return _laid(jnp.zeros((b, *size, c), jnp.float32), made, down, across, at)


@partial(jax.jit, donate_argnums=0)
def _add(canvas: Array, made: Array, down: Array, across: Array, at: Array) -> Array:
    return _laid(canvas, made, down, across, at)


def _laid(canvas: Array, made: Array, down: Array, across: Array, at: Array) -> Array:
    place = (0, at[0], at[1], 0)
    share = made.astype(jnp.float32) * down[:, None, None] * across[None, :, None]
    return jax.lax.dynamic_update_slice(canvas, jax.lax.dynamic_slice(canvas, place, made.shape) + share, place)
