"""What the analysis says of programs whose every figure is known, on four virtual CPU devices; prints JSON."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.core.scripts import load_config
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.trees import device_bytes
from sdjax.plan import training
from sdjax.plan.__main__ import main
from sdjax.plan.chips import GIB, Chip
from sdjax.plan.plans import make_plan
from sdjax.plan.programs import Program, compile_program
from sdjax.plan.topology import Target
from sdjax.training.step import init_state, make_step, state_shapes

TURNS, WIDTH, ROWS = 5, 256, 64
CONFIG, BATCH = "configs/openmoji.py:autoencoder_tiny", 4
CHANGES = {"optim.name": "adamw", "model.autoencoder.channels": (8,), "task.crop": 8, "data.size": 8}


@dataclass
class Known:
    """The target and the mesh of all programs here."""

    target: Target
    mesh: Mesh

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
    """3x3, 8 to 16 channels, over 4 images of 10x10 without padding, one a device; and the kernel's gradient."""
    x, kernel = known.on((4, 10, 10, 8), "fsdp"), known.on((3, 3, 8, 16))

    def apply(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradient(x, kernel):
        return jax.grad(lambda kernel: (apply(x, kernel) ** 2).sum())(kernel)

    return {name: known.compiled(f, x, kernel).flops.device for name, f in (("apply", apply), ("gradient", gradient))}


def state(known: Known) -> dict:
    """What planning says of a state's memory against the arrays that training makes."""

    def init(key: jax.Array) -> dict:
        return {"net": {"kernel": jax.random.normal(key, (256, 512)), "bias": jnp.zeros(512)}}

    def loss(params, batch, key, step):
        del key
        return jnp.square(batch["x"] @ params["net"]["kernel"] + params["net"]["bias"]).mean(), {}

    task: Any = SimpleNamespace(init=init, loss=loss)
    optimizer = optax.adamw(1e-3)
    made = init_state(task, optimizer, 0, known.mesh)
    here = [s.data.nbytes for leaf in jax.tree.leaves(made) for s in leaf.addressable_shards if s.device.id == 0]
    shapes = state_shapes(task, optimizer, known.mesh)
    step = make_step(task, optimizer, 0, decay=0.99).__wrapped__
    batch = {"x": known.on((8, 256), "fsdp")}
    program = Program("step", step, (shapes, {}, batch), donated=(0,))
    small = known.target._replace(chip=Chip(1.0, hbm=1e-4, usable=1e-4, bandwidth=1.0, links=1.0))
    plan = make_plan([program], 8, small, known.mesh)
    memory = plan.parts[0].result.memory
    return {
        "live": sum(here),
        "specs": device_bytes(shapes),
        "batch": device_bytes(batch),
        "arguments": memory.arguments,
        "aliased": memory.aliased,
        "peak": memory.peak,
        "fits": plan.fits,
        "lacking": -plan.free,
        "usable": 1e-4 * GIB,
        "seconds": plan.seconds,
        "parts": list(plan.parts[0].estimate),
    }


def command(known: Known) -> dict:
    """What the command wrote of a tiny config, and what the arguments of its step take by their shardings."""
    written = json.loads(Path(sys.argv[-1]).read_text())
    config = load_config(CONFIG)
    for key, value in CHANGES.items():
        config.update_from_flattened_dict({key: value})
    (program,) = training.training_programs(config, known.mesh, BATCH)
    return {"plan": written["plans"][0], "specs": device_bytes(program.args), "told": written["command"]}


if __name__ == "__main__":
    changes = [f"--config.{key}={value}" for key, value in CHANGES.items()]
    words = [f"--config={CONFIG}", "--topology=cpu:4", "--mesh=fsdp=4", f"--batch_size={BATCH}", *changes]
    sys.argv = [sys.argv[0], *words, "--output", sys.argv[1]]
    with redirect_stdout(sys.stderr):
        main()
    devices = jax.devices()
    known = Known(Target("cpu:4", "cpu", devices, Chip()), make_mesh({"fsdp": 4}))
    json.dump({f.__name__: f(known) for f in (gathered_in_a_loop, donated, convolution, state, command)}, sys.stdout)
