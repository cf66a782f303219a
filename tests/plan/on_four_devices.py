"""What the analysis says of programs whose every figure is known, on four virtual CPU devices; prints JSON."""

import json
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.openmoji import get_config
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.sharding import device_bytes
from sdjax.plan import training
from sdjax.plan.chips import GIB, Chip
from sdjax.plan.plans import make_plan
from sdjax.plan.programs import Program, compile_program
from sdjax.plan.topology import find_target
from sdjax.tasks.base import make_task
from sdjax.training.step import init_state

TURNS, WIDTH, ROWS = 5, 256, 64


@dataclass
class Known:
    """The target and the mesh of all programs here."""

    target: object
    mesh: object

    def on(self, shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(self.mesh, P(*axes)))

    def compiled(self, function, *args, donated=()):
        return compile_program(Program("known", function, args, donated), self.target, self.mesh)


def gathered_in_a_loop(known: Known) -> dict:
    """Each turn gathers a weight [WIDTH, WIDTH] split in four and multiplies with it: 2 ROWS WIDTH^2 flops."""

    def function(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = known.compiled(
        function, known.on((TURNS, WIDTH, WIDTH), None, None, "fsdp"), known.on((ROWS, WIDTH), "fsdp")
    )
    return {
        "moved": {kind: list(moved) for kind, moved in found.moved.items()},
        "flops": found.flops._asdict(),
        "traffic": found.traffic,
    }


def donated(known: Known) -> dict:
    """A state that is changed in place, and an argument that the program drops."""
    state, unused = known.on((1024, 1024), "fsdp"), known.on((512, 512), "fsdp")
    found = known.compiled(lambda state, unused: state * 2.0, state, unused, donated=(0,))
    return found.memory._asdict()


def convolution(known: Known) -> dict:
    """3x3, 8 to 16 channels, over 4 pictures of 10x10 without padding, one a device; and the kernel's gradient."""
    x, kernel = known.on((4, 10, 10, 8), "fsdp"), known.on((3, 3, 8, 16))

    def apply(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradient(x, kernel):
        return jax.grad(lambda kernel: (apply(x, kernel) ** 2).sum())(kernel)

    return {name: known.compiled(f, x, kernel).flops.device for name, f in (("apply", apply), ("gradient", gradient))}


def training_step(known: Known) -> dict:
    """The arguments of a training step against what its arrays take where they are made."""
    config = get_config("autoencoder_tiny")
    with config.unlocked():
        config.optim.name = "adamw"
    config.model.autoencoder.channels = (32, 32)
    (program,) = training.training_programs(config, known.mesh, 8)
    small = known.target._replace(chip=Chip(1.0, hbm=1e-3, usable=1e-3, bandwidth=1.0, links=1.0))
    plan = make_plan([program], 8, small, known.mesh)
    state = init_state(make_task(config, known.mesh), optax.adamw(1e-3), 0, known.mesh)
    first = jax.devices()[0]
    live = sum(s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == first)
    memory = plan.parts[0].result.memory
    return {
        "arguments": memory.arguments + memory.beside,
        "specs": device_bytes(program.args),
        "batch": device_bytes(program.args[2]),
        "live": live,
        "aliased": memory.aliased,
        "fits": plan.fits,
        "lacking": -plan.free,
        "peak": memory.peak,
        "usable": 1e-3 * GIB,
        "flops": plan.parts[0].result.flops._asdict(),
        "moved": {kind: list(moved) for kind, moved in plan.parts[0].result.moved.items()},
    }


if __name__ == "__main__":
    target = find_target("cpu:4")
    known = Known(target, make_mesh({"fsdp": 4}, target.devices))
    found = {f.__name__: f(known) for f in (gathered_in_a_loop, donated, convolution, training_step)}
    json.dump(found, sys.stdout)
