"""Tiles: exact for networks that look no further than they may, unseen for the shipped one, compiled once."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.checkpoints.layouts.diffusers import read_component
from sdjax.core.errors import UserError
from sdjax.data.images import read_image
from sdjax.data.sources.openmoji import render
from sdjax.diffusion_model.tiles import decode_tiled, encode_tiled
from sdjax.models.autoencoder import Autoencoder

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "openmoji"
RNG = np.random.default_rng(0)
# Heart, fire, globe, park, apple, man, car, sunflower, a flag.
DRAWINGS = ("2764", "1F525", "1F30D", "1F3DE", "1F34E", "1F468", "1F697", "1F33B", "1F1EF-1F1F5")
KERNELS = [RNG.standard_normal((3, 3, 4, 4)).astype(np.float32) / 4.0 for _ in range(3)]


def conv(x: jax.Array, kernel: np.ndarray, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


def decode(z: jax.Array) -> jax.Array:
    """Four times as large; a pixel depends on latents less than two away."""
    for kernel in KERNELS[:2]:
        z = jnp.repeat(jnp.repeat(jnp.tanh(conv(z, kernel)), 2, 1), 2, 2)
    return conv(z, KERNELS[2]) + 1.0


def encode(x: jax.Array) -> jax.Array:
    """Four times as small; a latent depends on latents less than two away."""
    for kernel in KERNELS[:2]:
        x = jnp.tanh(conv(x, kernel, stride=2))
    return conv(x, KERNELS[2]) + 1.0


# One tile and a bit, many tiles, a last tile that overlaps almost whole, one side within a tile, all within one.
SIZES = [(17, 19), (37, 50), (25, 41), (9, 40), (16, 16), (5, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("function", "tiled", "scale"), [(decode, decode_tiled, 1), (encode, encode_tiled, 4)])
def test_a_local_network_gives_the_same_in_tiles(size, function, tiled, scale):
    values = RNG.standard_normal((2, size[0] * scale, size[1] * scale, 4)).astype(np.float32)
    whole, found = function(values), tiled(jax.jit(function), values, tile=16, overlap=8, factor=4)
    assert whole.std() > 0.1
    np.testing.assert_allclose(found, whole, atol=1e-5)
    if size == (37, 50):
        cut = tiled(jax.jit(function), values, tile=16, overlap=2, factor=4)
        assert np.abs(cut - whole).max() > 1e-2, "so little overlap cannot do"


def test_one_compilation_for_all_sizes():
    traced = []

    @jax.jit
    def counted(z: jax.Array) -> jax.Array:
        traced.append(z.shape)
        return decode(z)

    for size in ((40, 40), (64, 33), (100, 17)):
        decode_tiled(counted, RNG.standard_normal((1, *size, 4)).astype(np.float32), 16, 4, 4)
    assert traced == [(1, 16, 16, 4)]


def test_overlaps_that_cannot_be():
    for overlap in (-1, 9):
        with pytest.raises(UserError, match=f"overlap {overlap} of tiles of 16: choose 0 to 8"):
            decode_tiled(decode, jnp.zeros((1, 32, 32, 4)), 16, overlap, 4)


@pytest.fixture(scope="module")
def shipped():
    """Decoder and encoder of the model in the repository, and nine drawings in [-1, 1], [9 128 128 3]."""
    component = read_component(SHIPPED / "vae", "vae")
    model, params = Autoencoder(component.config), {"params": component.params}
    pictures = np.stack([read_image(render(stem)) for stem in DRAWINGS]) / np.float32(127.5) - 1.0
    return (
        jax.jit(lambda z: model.apply(params, z, method="decode")),
        jax.jit(lambda x: model.apply(params, x, method="encode").mean),
        pictures,
    )


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """In decibels, of values in [-1, 1]."""
    return float(10.0 * np.log10(4.0 / np.mean(np.square(image - reference))))


def seam(image: np.ndarray, reference: np.ndarray, borders: tuple[int, ...]) -> float:
    """How much larger than the reference's the mean jump is from one row or column to the next, at or beside a border.

    A hundredth, about a byte of [-1, 1], is added to both jumps: between white and white any change would be infinite.
    """

    def jumps(x: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(np.diff(x, axis=axis)).mean(axis=tuple({0, 1, 2, 3} - {axis})) + 0.01

    beside = [border + i for border in borders for i in range(-3, 2)]
    return max(float((jumps(image, axis) / jumps(reference, axis))[beside].max()) for axis in (1, 2))


@pytest.mark.slow
def test_no_seam_is_seen_in_the_shipped_models_pictures(shipped):
    """Its attention and its norms see a whole tile, so tiles differ from the whole: in tone, but nowhere in a line."""
    decode, encode, pictures = shipped
    latents = np.asarray(encode(pictures)).reshape(3, 3, 16, 16, 16).swapaxes(1, 2).reshape(1, 48, 48, 16)
    whole = np.asarray(decode(latents))
    blended, hard = (np.asarray(decode_tiled(decode, latents, 24, overlap, 8)) for overlap in (12, 0))
    assert psnr(blended, whole) > 20.0
    assert psnr(blended, whole) > psnr(hard, whole) + 0.5
    # Blended tiles begin and end at 12, 24 and 36 latents, hard ones at 24.
    borders = (96, 192, 288)
    assert seam(blended, whole, borders) < 1.02
    assert seam(hard, whole, borders) > 3.0


def test_latents_in_tiles_decode_to_the_picture(shipped):
    """What comes back of an image encoded in tiles is as near to it as without tiles, to a decibel."""
    decode, encode, pictures = shipped
    mosaic = pictures.reshape(3, 3, 128, 128, 3).swapaxes(1, 2).reshape(1, 384, 384, 3)
    whole, tiled = encode(mosaic), encode_tiled(encode, mosaic, 24, 12, 8)
    assert float(jnp.abs(tiled - whole).max()) > 1e-3, "they are tiles"
    assert psnr(np.asarray(decode(tiled)), mosaic) > psnr(np.asarray(decode(whole)), mosaic) - 1.0
