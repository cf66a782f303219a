"""Times sampling, alone or beside PyTorch diffusers with the same weights in the same run.

    python -m benchmarks.sampling --checkpoint SOURCE | --variant sd15|sd2|sdxl  [--part unet|decoder|pipeline]
        [--size PIXELS] [--batch 1] [--steps 20] [--dtype float32] [--sampler NAME] [--against diffusers]
        [--repetitions 5] [--append]

A --variant has random weights in its published configuration. --batch is the number of latents for the UNet, of
pictures elsewhere. --against runs ours, theirs, ours, theirs ...; the ratio is the median over those pairs of our
seconds by theirs, so below 1 ours is faster. --append writes a row to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

import jax
from absl import flags

from benchmarks import measuring
from benchmarks.models import load
from benchmarks.parts import PARTS, Subject, Work
from sdjax.core.errors import UserError, run_or_exit, unknown
from sdjax.core.flags import parse_flags
from sdjax.plan.chips import chip_of

RESULTS = Path(__file__).with_name("RESULTS.md")
TEXTS = {"checkpoint": None, "variant": None, "part": "pipeline", "dtype": "float32", "sampler": None, "against": None}
INTEGERS = {"size": None, "batch": 1, "steps": 20, "repetitions": 5}
RIVALS = ("diffusers",)
OURS, THEIRS = ("jax", "jaxlib", "flax"), ("torch", "diffusers")


def main() -> None:
    """Reads the command line, measures, prints, and appends where that is asked for."""
    flag = read_command_line(sys.argv)
    if flag["against"]:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of a GPU's memory
    jax.config.update("jax_enable_compilation_cache", False)  # which would hide what compiling costs
    pipe = load(flag["checkpoint"], flag["variant"], flag["dtype"])
    size = flag["size"] or pipe.shape.default[0]
    work = Work(size, flag["batch"], flag["steps"], flag["sampler"])
    figures = measure(PARTS[flag["part"]](pipe, work), flag)
    what = f"{pipe.name} {flag['part']}, {size} px, batch {work.batch}, {flag['dtype']}"
    what += f", {work.steps} steps of {work.sampler or 'its own sampler'}" if flag["part"] == "pipeline" else ""
    figures = {"what": what, **figures}
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    if flag["append"]:
        append(figures, RESULTS)


def read_command_line(argv: list[str]) -> dict[str, Any]:
    """The flags by name.

    Raises:
        UserError: one is unknown, or has a value that is no choice of its own.
    """
    values = flags.FlagValues()
    for name, default in TEXTS.items():
        flags.DEFINE_string(name, default, "", flag_values=values)
    for name, default in INTEGERS.items():
        flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("append", False, "", flag_values=values)
    parse_flags(values, argv, __doc__)
    flag: dict[str, Any] = {name: values[name].value for name in values}
    if flag["part"] not in PARTS:
        raise unknown("part", flag["part"], PARTS, "--part")
    if flag["against"] not in (None, *RIVALS):
        raise unknown("library", flag["against"], RIVALS, "--against")
    if flag["checkpoint"] and not Path(flag["checkpoint"]).exists() and "/" not in flag["checkpoint"]:
        raise UserError(f"there is no --checkpoint {flag['checkpoint']}")
    return flag


def measure(subject: Subject, flag: dict[str, Any]) -> dict[str, str]:
    """The figures of a row by the name of their column."""
    with measuring.compile_seconds() as compiling:
        subject.ours()
    memory, owner = measuring.peak_memory()  # before torch takes its share
    theirs = subject.theirs(flag["dtype"]) if flag["against"] else None
    if theirs is not None:
        theirs()  # where torch compiles
    times = measuring.alternate(subject.ours, theirs, flag["repetitions"])
    seconds = median(times.ours)
    call = subject.network_seconds(seconds)
    return {
        "seconds": f"{seconds:.3g}",
        "compile s": ", ".join(f"{name.removesuffix('_stage')} {compiling[name]:.1f}" for name in subject.compiled),
        "s a network call": "-" if call is None else f"{call:.3g}",
        "images/s": f"{subject.pictures / seconds:.3g}" if subject.pictures else "-",
        "peak memory": f"{memory:.2f} GiB of the {owner}",
        "TFLOP/s (of peak)": utilisation(subject.flops / seconds, flag["dtype"]),
        "ours / diffusers": beside(times) if times.theirs else "-",
        **facts(theirs is not None),
    }


def beside(times: measuring.Times) -> str:
    """The ratio, and what it is of."""
    return f"{times.ratio:.3f} ({median(times.ours):.3g} s / {median(times.theirs):.3g} s, {len(times.ours)} pairs)"


def utilisation(speed: float, dtype: str) -> str:
    """Matrix products and convolutions a second, counted in the traced program; their share of the published peak."""
    peak = chip_of(jax.devices()[0].device_kind).flops
    if peak is None or dtype != "bfloat16":
        return f"{speed / 1e12:.3g}"
    return f"{speed / 1e12:.3g} ({speed / peak:.1%})"


def facts(compared: bool) -> dict[str, str]:
    """When, where and what was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": measuring.commit(),
        "device": measuring.device_name(),
        "versions": measuring.versions(OURS + THEIRS * compared),
        "command": f"`python -m benchmarks.sampling {shlex.join(sys.argv[1:])}`",
    }


def append(figures: dict[str, str], path: Path) -> None:
    """Adds a row to the table that the file ends with.

    Raises:
        UserError: the file's table has other columns.
    """
    header = f"| {' | '.join(figures)} |"
    text = path.read_text(encoding="utf-8")
    if header not in text.splitlines():
        raise UserError(f"{path} has no table with the columns {', '.join(figures)}")
    row = " | ".join(value.replace("|", "\\|") for value in figures.values())
    path.write_text(f"{text.rstrip()}\n| {row} |\n", encoding="utf-8")


if __name__ == "__main__":
    run_or_exit(main)
