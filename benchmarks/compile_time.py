"""Compile time saved by scanning over equal transformer blocks of a UNet, were their parameters stored stacked.

    python -m benchmarks.compile_time [--variant sdxl] [--latents 8]

Compiles one call of the UNet, batch 2, from shapes alone: as it is, and with every transformer's blocks as one
`lax.scan` over parameters that have a leading axis for the block. Seconds are those of the process on all cores.
"""

from __future__ import annotations

import sys
import time
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import Array, Bool, Float

from sdjax.checkpoints.networks.unet import shapes
from sdjax.core.compilation import options
from sdjax.core.errors import run_or_exit, unknown
from sdjax.core.flags import parse_flags
from sdjax.core.tree import Tree
from sdjax.models import unet
from sdjax.models.attention import SpatialTransformer, TransformerBlock
from sdjax.models.conditioning import Cond
from sdjax.models.layers import GroupNorm

BLOCKS = "transformer_blocks"


class ScannedTransformer(SpatialTransformer):
    """`SpatialTransformer` whose blocks' parameters are stacked."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b k d"] | None, mask: Bool[Array, "b k"] | None
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x).reshape(b, h * w, c)
        tokens = nn.Dense(c, dtype=self.dtype, name="proj_in")(tokens)
        block = TransformerBlock(self.heads, self.cross_only, self.dtype, parent=None)

        def step(tokens: Any, params: Any) -> tuple[Any, None]:
            return block.apply({"params": params}, tokens, context, mask), None

        tokens, _ = jax.lax.scan(step, tokens, self.variables["params"][BLOCKS])
        return x + nn.Dense(c, dtype=self.dtype, name="proj_out")(tokens).reshape(b, h, w, c)


def main() -> None:
    """Prints the seconds of both."""
    values = flags.FlagValues()
    flags.DEFINE_string("variant", "sdxl", "", flag_values=values)
    flags.DEFINE_integer("latents", 8, "", lower_bound=8, flag_values=values)
    parse_flags(values, sys.argv, __doc__)
    name, side = str(values["variant"].value), int(values["latents"].value or 0)
    if name not in unet.VARIANTS:
        raise unknown("variant", name, unet.VARIANTS, "--variant")
    jax.config.update("jax_enable_compilation_cache", False)
    config = unet.VARIANTS[name]
    print("as it is:", compile_seconds(config, shapes(config), side))
    with mock.patch.object(unet, "SpatialTransformer", ScannedTransformer):
        print("scanned: ", compile_seconds(config, stacked(shapes(config)), side))


def compile_seconds(config: unet.UNetConfig, params: Tree, side: int) -> str:
    """Seconds of tracing with lowering, and of XLA's compiling."""
    x, t = jax.ShapeDtypeStruct((2, side, side, config.in_channels), jnp.float32), jnp.zeros(2)
    vector = None if config.vector_dim is None else jnp.zeros((2, config.vector_dim))
    cond = Cond(context=jnp.zeros((2, 77, config.context_dim)), vector=vector)
    # A function of its own each time: what JAX has traced it does not trace again.
    call = jax.jit(lambda p, x, t, cond: unet.UNet(config).apply({"params": p}, x, t, cond), compiler_options=options())
    marks = [time.process_time()]
    lowered = call.lower(params, x, t, cond)
    marks.append(time.process_time())
    lowered.compile()
    marks.append(time.process_time())
    return f"{marks[1] - marks[0]:.1f} s to trace, {marks[2] - marks[1]:.1f} s to compile"


def stacked(tree: Tree) -> dict[str, Any]:
    """The shapes of parameters with those of each transformer's blocks under one name."""
    blocks = [value for name, value in tree.items() if name.startswith(f"{BLOCKS}_")]
    rest = {name: value for name, value in tree.items() if not name.startswith(f"{BLOCKS}_")}
    below = {name: stacked(value) if isinstance(value, dict) else value for name, value in rest.items()}
    if not blocks:
        return below
    together = jax.tree.map(
        lambda *leaves: jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype), *blocks
    )
    return {**below, BLOCKS: together}


if __name__ == "__main__":
    run_or_exit(main)
