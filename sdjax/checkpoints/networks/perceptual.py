"""Judges of reconstructions as PyTorch stores them: VGG16 (torchvision), LPIPS (lpips) and the patch discriminator.

An original autoencoder's `.ckpt` holds all three, below `loss.`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.checkpoints.mapping import KeyMapping, KeyTable, Kind, conv, norm
from sdjax.models.lpips import LPIPS
from sdjax.models.patchgan import PatchDiscriminator
from sdjax.models.vgg import STAGES

ONE_BY_ONE = Kind(lambda w: w[0, :, 0, 0], lambda w: w[None, :, None, None])


def _vgg_rows() -> tuple[KeyMapping, ...]:
    """torchvision numbers convolutions, activations and poolings in one row."""
    rows, number = [], 0
    for i, stage in enumerate(STAGES):
        for j in range(len(stage)):
            rows += conv(f"net/stage_{i}_conv_{j}", f"net.{number}")
            number += 2
        number += 1
    return tuple(rows)


LPIPS_TABLE = KeyTable(
    rows=(*_vgg_rows(), *(KeyMapping(f"linear_{i}", f"lin{i}.model.1.weight", ONE_BY_ONE) for i in range(len(STAGES)))),
    aliases=((r"^perceptual_loss\.", ""), (r"^features\.", "net."), (r"^net\.slice\d\.", "net.")),
    ignored=(r"classifier\..*", r"(perceptual_loss\.)?scaling_layer\..*"),
)


@functools.cache
def lpips_shapes() -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; shared: not to be changed."""
    images = jnp.zeros((1, 16, 16, 3))
    return jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]


def discriminator_table(layers: int) -> KeyTable:
    """The rows of a discriminator with so many halvings; its running means are not used."""
    rows = list(conv("conv_0", "main.0"))
    for i in range(1, layers + 1):
        rows += [*conv(f"conv_{i}", f"main.{3 * i - 1}"), *norm(f"norm_{i}", f"main.{3 * i}")]
    rows += conv(f"conv_{layers + 1}", f"main.{3 * layers + 2}")
    return KeyTable(tuple(rows), ignored=(r"main\.\d+\.(running_mean|running_var|num_batches_tracked)",))


@functools.cache
def discriminator_shapes(layers: int) -> dict[str, Any]:
    """The parameters as a tree of `jax.ShapeDtypeStruct`; shared: not to be changed."""
    side = 2 ** (layers + 2)
    model = PatchDiscriminator(layers)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
