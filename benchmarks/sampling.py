"""Times sampling: on one device, sharded over a mesh, or beside PyTorch diffusers with the same weights.

    python -m benchmarks.sampling --checkpoint SOURCE | --variant sd15|sd2|sdxl  [--part unet|decoder|pipeline]
        [--size PIXELS] [--batch 1] [--steps 20] [--dtype float32] [--sampler NAME] [--repetitions 5] [--append]
        [--against diffusers] [--mesh data=4,fsdp=2] [--scaling weak|strong] [--devices N]

A --variant has random weights in its published configuration. --batch is the number of latents for the UNet, of
images elsewhere. --against runs ours, theirs, ours, theirs ...; the ratio is the median over those pairs of our
seconds by theirs, so below 1 ours is faster. --append writes rows to benchmarks/RESULTS.md.

--mesh spreads the model and the batch over devices, and counts what each of them sends. --scaling measures on 1, 2, 4
... up to --devices N (without it: all); of --mesh, data=-1 unless given, one axis grows and so is -1. weak gives each
device --batch rows, strong shares --batch rows among all. A machine with only a CPU makes N virtual devices of it:
their speed says nothing, what they send is what so many real ones would for the same compiled program.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from benchmarks import measuring, scaling
from benchmarks.devices import mesh_text, sent, sent_text, take, tell_virtual
from benchmarks.models import load
from benchmarks.parts import PARTS, TimedModel
from benchmarks.results import RESULTS, append, facts, show, utilisation
from benchmarks.work import Work
from sdjax.core.errors import UserError, run_or_exit, unknown
from sdjax.core.flags import parse_flags
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh

TEXTS = {"checkpoint": None, "variant": None, "part": "pipeline", "dtype": "float32", "sampler": None, "against": None}
TEXTS |= {"mesh": None, "scaling": None}
INTEGERS = {"size": None, "batch": 1, "steps": 20, "repetitions": 5, "devices": None}
RIVALS = ("diffusers",)
OURS, THEIRS = ("jax", "jaxlib", "flax"), ("torch", "diffusers")


def main() -> None:
    """Reads the command line, measures, prints, and appends where that is asked for."""
    flag = read_command_line(sys.argv)
    if flag["against"]:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of a GPU's memory
    jax.config.update("jax_enable_compilation_cache", False)  # which would hide what compiling costs
    sizes = parse_mesh(flag["mesh"] or "data=-1")
    devices = take(sizes, flag["devices"]) if flag["mesh"] or flag["scaling"] else jax.devices()[:1]
    if flag["scaling"]:
        points = scaling.points(sizes, flag["batch"], flag["scaling"], devices)
        rows = scaling.rows([(point, measure_on(point.mesh, point.batch, flag)) for point in points])
        print(scaling.table(rows))
        rows = [{**row, **facts("sampling", OURS, devices[: int(row["devices"])])} for row in rows]
    else:
        mesh = make_mesh(sizes, devices) if flag["mesh"] else None
        if mesh is not None:
            scaling.check_rows(flag["batch"], mesh)
        figures = measure_on(mesh, flag["batch"], flag)
        rows = [{**figures.row, **facts("sampling", OURS + THEIRS * bool(flag["against"]), devices)}]
        show(rows[0])
    tell_virtual(devices)
    for row in rows:
        if flag["append"]:
            append(row, RESULTS)


def read_command_line(argv: list[str]) -> dict[str, Any]:
    """The flags by name.

    Raises:
        UserError: one is unknown, has a value that is no choice of its own, or does not go with another.
    """
    values = flags.FlagValues()
    for name, default in TEXTS.items():
        flags.DEFINE_string(name, default, "", flag_values=values)
    for name, default in INTEGERS.items():
        flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("append", False, "", flag_values=values)
    parse_flags(values, argv, __doc__)
    flag: dict[str, Any] = {name: values[name].value for name in values}
    for name, what, choices in (
        ("part", "part", PARTS),
        ("against", "library", RIVALS),
        ("scaling", "scaling", scaling.KINDS),
    ):
        if flag[name] not in (None, *choices):
            raise unknown(what, flag[name], choices, f"--{name}")
    if flag["checkpoint"] and not Path(flag["checkpoint"]).exists() and "/" not in flag["checkpoint"]:
        raise UserError(f"there is no --checkpoint {flag['checkpoint']}")
    spread = flag["mesh"] or flag["scaling"]
    if flag["against"] and spread:
        raise UserError("--against compares one device; leave --mesh and --scaling out")
    if flag["devices"] and not spread:
        raise UserError("--devices goes with --mesh or --scaling")
    return flag


def measure_on(mesh: Mesh | None, batch: int, flag: dict[str, Any]) -> scaling.Measured:
    """Loads the model onto a mesh, None for one device, and measures `batch` rows."""
    pipe = load(flag["checkpoint"], flag["variant"], flag["dtype"], mesh)
    work = Work(flag["size"] or pipe.default_size[0], batch, flag["steps"], flag["sampler"], mesh)
    what = f"{pipe.name} {flag['part']}, {work.size} px, batch {work.batch}, {flag['dtype']}"
    what += f", {work.steps} steps of {work.sampler or 'its own sampler'}" if flag["part"] == "pipeline" else ""
    what += f", mesh {mesh_text(mesh)}" if mesh else ""
    subject = PARTS[flag["part"]](pipe, work)
    seconds, figures = measure(subject, flag, mesh)
    nbytes = {} if mesh is None else sent(subject.programs(mesh), mesh)
    row = {"what": what, **figures, "each device sends": sent_text(nbytes) if mesh else "-"}
    return scaling.Measured(seconds, subject.images or batch, nbytes, row)


def measure(subject: TimedModel, flag: dict[str, Any], mesh: Mesh | None) -> tuple[float, dict[str, str]]:
    """The seconds of a call, and the figures of a row by the name of their column."""
    with measuring.compile_seconds() as compiling:
        subject.ours()
    memory, owner = measuring.peak_memory()  # before torch takes its share
    theirs = subject.theirs(flag["dtype"]) if flag["against"] else None
    if theirs is not None:
        theirs()  # where torch compiles
    times = measuring.alternate(subject.ours, theirs, flag["repetitions"])
    seconds = median(times.ours)
    call = subject.network_seconds(seconds)
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    return seconds, {
        "seconds": f"{seconds:.3g}",
        "compile s": ", ".join(f"{name.removesuffix('_stage')} {compiling[name]:.1f}" for name in subject.compiled),
        "s a network call": "-" if call is None else f"{call:.3g}",
        "images/s": f"{subject.images / seconds:.3g}" if subject.images else "-",
        "peak memory": f"{memory:.2f} GiB of the {owner}",
        "TFLOP/s (of peak)": utilisation(subject.flops / seconds, flag["dtype"], devices),
        "ours / diffusers": beside(times) if times.theirs else "-",
    }


def beside(times: measuring.Times) -> str:
    """The ratio, and what it is of."""
    return f"{times.ratio:.3f} ({median(times.ours):.3g} s / {median(times.theirs):.3g} s, {len(times.ours)} pairs)"


if __name__ == "__main__":
    run_or_exit(main)
