"""Shards a decoder over two virtual CPU devices and counts what they send; prints JSON."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp

from benchmarks import scaling
from benchmarks.devices import mesh_text, sent, take
from benchmarks.models import random_params
from sdjax.checkpoints.checkpoint import FORMATS
from sdjax.core.errors import UserError
from sdjax.models.autoencoder import Autoencoder, AutoencoderConfig
from sdjax.models.conditioning import apply
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh
from sdjax.parallel.sharding import sharded_put
from sdjax.pipeline.devices import Devices
from sdjax.plan.programs import Program


def decoder() -> dict:
    """Bytes of its parameters, split and whole, of the first device's part, and of what a call sends.

    One level, so that no kernel is rearranged for an upsampling convolution before it is gathered.
    """
    sizes = parse_mesh("fsdp=2")
    mesh = make_mesh(sizes, take(sizes))
    config = AutoencoderConfig(channels=(32,), latent_channels=4, layers_per_block=1, groups=4)
    params = random_params(FORMATS["vae"].shapes(config), sharded_put(mesh))
    used = {name: params[name] for name in ("decoder", "post_quant_conv")}
    z = Devices(mesh).shard_batch(jnp.ones((2, 4, 4, 4)))

    def decode(params, z):
        return apply(Autoencoder(config), params, z, method="decode")

    leaves = jax.tree.leaves(used)
    return {
        "split": sum(leaf.nbytes for leaf in leaves if not leaf.sharding.is_fully_replicated),
        "whole": sum(leaf.nbytes for leaf in leaves if leaf.sharding.is_fully_replicated),
        "on_one_device": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
        "sent": sent([Program("decoder", decode, (used, z))], mesh),
    }


def points(kind: str) -> list:
    found = scaling.points({"fsdp": -1}, 2, kind, jax.devices())
    return [[mesh_text(point.mesh), point.batch] for point in found]


def refusal(sizes: dict[str, int], batch: int) -> str:
    try:
        scaling.points(sizes, batch, "strong", jax.devices())
    except UserError as error:
        return str(error)
    return ""


def rows() -> list:
    one, two = scaling.points({"fsdp": -1}, 4, "weak", jax.devices())
    measured = [
        scaling.Measured(2.0, 4, {}, {"what": ""}),
        scaling.Measured(5.0, 8, {"all-reduce": 1234}, {"what": ""}),
    ]
    return scaling.rows([(one, measured[0]), (two, measured[1])])


if __name__ == "__main__":
    found = decoder()
    found |= {"weak": points("weak"), "strong": points("strong"), "rows": rows()}
    found |= {"fixed": refusal({"fsdp": 2}, 2), "uneven": refusal({"fsdp": -1}, 3)}
    print(json.dumps(found))
