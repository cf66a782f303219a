"""Times the training step of a config, as train.py runs it: on this machine's devices, or on all hosts together.

    python -m benchmarks.training --config configs/NAME.py[:variant] [--mesh data=2,fsdp=4] [--data synthetic|real]
        [--steps 20] [--batch_size N] [--devices N] [--append] [--config.section.key=value ...]

synthetic: batches and all parameters are random in the shapes that the config says, so nothing is read. real: the
config's data and checkpoints. Without --mesh it is the config's. A step takes from the end of the one before it to its
own; data wait is what of that the devices stood idle for because the batch was not there, compute is the rest. Numbers
in parentheses are the slowest step's. TFLOP/s counts what the mathematics asks for, without what is computed twice to
save memory, so its share of the published peak is model FLOP utilisation. A machine with only a CPU makes --devices N
virtual devices of it, or as many as --mesh names. --append writes a row to benchmarks/RESULTS.md.
Several processes: as train.py, with its environment or --coordinator HOST:PORT --processes N --process_id I.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from benchmarks import measuring
from benchmarks.devices import mesh_text, take, tell_virtual
from benchmarks.models import random_params
from benchmarks.results import RESULTS, append, facts, show, utilisation
from benchmarks.stepping import Steps, middle_and_worst, time_steps
from sdjax.checkpoints.checkpoint import FORMATS, Component
from sdjax.checkpoints.layouts.diffusers import write_component
from sdjax.core.config import Config
from sdjax.core.errors import UserError, unknown
from sdjax.core.flags import define_processes, processes
from sdjax.core.scripts import command_line, load_config
from sdjax.core.tree import Params, merge
from sdjax.models.autoencoder import VARIANTS
from sdjax.parallel.batches import put_batch, rows_of_process
from sdjax.parallel.distributed import initialise, is_first, run_together
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh
from sdjax.parallel.sharding import check_batch, sharded_put
from sdjax.plan.programs import count_flops
from sdjax.plan.training import check_config, training_programs
from sdjax.tasks.make import make_task
from sdjax.tasks.variants import sizes_of
from sdjax.training.optim import make_optimizer
from sdjax.training.step import StepFn, TrainState, init_state, make_step
from sdjax.training.task import Task, split_frozen

DATA = ("synthetic", "real")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain")
FIRST_STAGE = "first_stage"
STEP = "step"  # as the function that `make_step` jits is called


class Run(NamedTuple):
    """The state of train.py when its first step begins."""

    step: StepFn
    state: TrainState
    frozen: Params
    batches: Iterator[Any]


def main() -> None:
    """Reads the command line, measures, prints, and appends where that is asked for."""
    values = command_line(__doc__, _define, define_processes)
    flag: dict[str, Any] = {name: values[name].value for name in values}
    if flag["data"] not in DATA:
        raise unknown("data", flag["data"], DATA, "--data")
    config: Config = flag["config"].copy_and_resolve_references()
    check_config(config)
    check_first_stage(config, flag["data"])
    initialise(**processes(values))
    config.train.batch_size = flag["batch_size"] or config.train.batch_size
    sizes = parse_mesh(flag["mesh"]) if flag["mesh"] else dict(config.mesh)
    devices = take(sizes, flag["devices"])
    mesh, options = make_mesh(sizes, devices), config.train
    check_batch(options.batch_size // options.accumulate, mesh, "the batch size / train.accumulate")
    jax.config.update("jax_enable_compilation_cache", False)  # which would hide what compiling costs
    what = f"{getattr(values['config'], 'config_filename', 'a config')}, mesh {mesh_text(mesh)}"
    with drawn_first_stage(config):
        figures = measure(config, mesh, flag["data"], flag["steps"])
    figures = {
        "what": f"{what}, batch {options.batch_size}, {options.dtype}, {flag['data']} data",
        **figures,
        **facts("training", PACKAGES, devices),
    }
    if not is_first():
        return
    show(figures)
    tell_virtual(devices)
    if flag["append"]:
        append(figures, RESULTS)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("mesh", None, "devices along each axis, e.g. data=2,fsdp=8", flag_values=values)
    flags.DEFINE_string("data", "synthetic", "or real", flag_values=values)
    for name, default in (("steps", 20), ("batch_size", None), ("devices", None)):
        flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("append", False, "", flag_values=values)


def check_first_stage(config: Config, data: str) -> None:
    """Refuses real data through a first stage that is not trained yet."""
    first = config.task.get(FIRST_STAGE, "")
    if data == "real" and ".py" in first:
        raise UserError(
            f"--data real: task.{FIRST_STAGE}={first} has to be a trained one's folder, as train.py leaves it"
        )


@contextlib.contextmanager
def drawn_first_stage(config: Config) -> Iterator[None]:
    """While it is entered, a first stage that is a config is a folder with random weights in its sizes."""
    first = config.task.get(FIRST_STAGE, "")
    if ".py" not in first:
        yield
        return
    sizes = sizes_of(load_config(first).model.autoencoder, VARIANTS, "config.model.autoencoder")
    with tempfile.TemporaryDirectory() as folder:
        drawn = random_params(FORMATS["vae"].shapes(sizes), lambda array, name: jax.device_put(array))
        write_component(Path(folder) / "vae", "vae", Component(sizes, drawn))
        config.task[FIRST_STAGE] = folder
        yield


def measure(config: Config, mesh: Mesh, data: str, steps: int) -> dict[str, str]:
    """The figures of a row by the name of their column.

    Args:
        config: what is trained.
        mesh: on which devices.
        data: one of `DATA`.
        steps: how many are timed.

    Raises:
        UserError: the config or its data are not what they should be.
    """
    devices, size = list(mesh.devices.flat), config.train.batch_size
    (program,) = training_programs(config, mesh, size)
    flops, _ = count_flops(program)
    with jax.set_mesh(mesh), measuring.compile_seconds() as compiling:
        timed = time_run(begin(config, mesh, data), mesh, steps)
    memory, owner = measuring.peak_memory()
    speed = timed.speed(size)
    return {
        "images/s": f"{speed:.3g}",
        "images/s a device": f"{speed / len(devices):.3g}",
        "step s": middle_and_worst(timed.wholes),
        "data wait s": middle_and_worst(timed.waits),
        "compute s": middle_and_worst(timed.computes),
        "compile s": f"{compiling[STEP]:.1f}",
        "peak memory": f"{memory:.2f} GiB of the {owner}",
        "TFLOP/s (of peak)": utilisation(flops * speed / size, config.train.dtype, devices),
    }


def begin(config: Config, mesh: Mesh, data: str) -> Run:
    """All that a run needs for its first step, from files or at random."""
    task, optimizer, options = make_task(config, mesh), make_optimizer(config.optim, config.train.steps), config.train
    step = make_step(task, optimizer, options.seed, decay=config.optim.ema_decay, accumulate=options.accumulate)
    if data == "synthetic":
        frozen = random_params(task.frozen, sharded_put(mesh))
        state = init_state(task, optimizer, options.seed, mesh)
        return Run(step, state, frozen, synthetic(task, options.batch_size, mesh))
    frozen, initial = split_frozen(task, task.pretrained(sharded_put(mesh)))
    state = init_state(task, optimizer, options.seed, mesh, initial)
    return Run(step, state, frozen, task.batch(merge(frozen, state.params)))


def synthetic(task: Task, batch_size: int, mesh: Mesh) -> Iterator[Any]:
    """The same random rows of this process for ever: noise where there are real numbers, 0 and 1 elsewhere."""
    rng = np.random.default_rng(0)
    _, parts = rows_of_process(mesh)

    def rows(leaf: Any) -> np.ndarray:
        shape = (leaf.shape[0] // parts, *leaf.shape[1:])
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.standard_normal(shape, np.float32).astype(leaf.dtype)
        return rng.integers(0, 2, shape).astype(leaf.dtype)

    return itertools.repeat(jax.tree.map(rows, task.batch_spec(batch_size)))


def time_run(run: Run, mesh: Mesh, count: int) -> Steps:
    """Compiles with a first step, then times `count` of them."""
    state = run.state

    def step(batch: Any) -> Any:
        nonlocal state
        state, metrics = run.step(state, run.frozen, put_batch(batch, mesh))
        return metrics

    jax.block_until_ready(step(next(run.batches)))
    return time_steps(step, run.batches, count)


if __name__ == "__main__":
    run_together(main)
