"""Compiles training or sampling for devices that are not there, and says whether it fits and how fast it would be.

    python -m sdjax.plan --config configs/NAME.py[:variant] --topology v5e:4x4 [--mesh data=2,fsdp=8] [--batch_size N]
        [--config.section.key=value ...]
    python -m sdjax.plan --what sample --model sdxl --topology v5e:2x4 [--mesh data=8] [--batch_size N] [--size PIXELS]
        [--steps 20] [--sampler NAME] [--dtype bfloat16]

--topology is a TPU slice (v4, v5e, v5p, v6e; its compiler comes with: pip install -r requirements-tpu.txt), cpu:N for N
virtual CPU devices, or local for this machine's own. Without --mesh it is the config's, or data=-1. --output FILE.md or
FILE.json writes the report, too. --search tries mesh shapes and --batch_sizes 64,128,256, at most --limit 16 of them,
and lists those that fit, best first; --spatial 4 lets it split rows of images over up to 4 devices.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from sdjax.core.errors import UserError, run_or_exit, unknown
from sdjax.core.files import check_target
from sdjax.core.flags import parse_flags
from sdjax.parallel.mesh import make_mesh
from sdjax.parallel.mesh_text import parse_mesh
from sdjax.plan import report
from sdjax.plan.plans import Plan, make_plan
from sdjax.plan.programs import Program
from sdjax.plan.sampling import Wanted, sampling_programs
from sdjax.plan.search import Candidate, candidates, search
from sdjax.plan.topology import UNDERSTOOD, Target, find_target
from sdjax.plan.training import check_config, training_programs
from sdjax.plan.variants import VARIANTS, shaped

TEXTS = {"what": "train", "topology": None, "mesh": None, "model": None, "sampler": None, "dtype": "bfloat16"}
TEXTS |= {"output": None, "batch_sizes": None}
INTEGERS = {"batch_size": None, "size": None, "steps": 20, "limit": 16, "spatial": 1}


class Subject(NamedTuple):
    """Subject of a plan.

    Attributes:
        title: of the report.
        programs: of a mesh and a number of images.
        mesh: unless the user says another.
        batch_size: likewise.
        accumulate: parts of a batch that are worked through in turn.
    """

    title: str
    programs: Callable[[Mesh, int], list[Program]]
    mesh: dict[str, int]
    batch_size: int
    accumulate: int = 1


def main() -> None:
    """Reads the command line, compiles, prints and writes."""
    flag = read_command_line(sys.argv)
    target = find_target(flag["topology"])
    subject = SUBJECTS[flag["what"]](flag)
    command = f"python -m sdjax.plan {shlex.join(sys.argv[1:])}"
    heading = report.Heading(f"Plan: {subject.title} on {target.name}", command, target)
    if flag["search"]:
        sizes = _numbers(flag["batch_sizes"]) if flag["batch_sizes"] else [flag["batch_size"] or subject.batch_size]
        options = candidates(len(target.devices), sizes, subject.accumulate, flag["spatial"])
        tried, left = search(options, flag["limit"], lambda one: _plan_of(subject, target, one))
        plans, text = [each.plan for each in tried], report.search_report(heading, tried, left)
    else:
        mesh = make_mesh(parse_mesh(flag["mesh"]) if flag["mesh"] else subject.mesh, target.devices)
        batch_size = flag["batch_size"] or subject.batch_size
        plans = [make_plan(subject.programs(mesh, batch_size), batch_size, target, mesh)]
        text = report.plan_report(heading, plans[0])
    print(text)
    if flag["output"]:
        report.write(Path(flag["output"]), text, report.as_json(heading, plans))


def read_command_line(argv: list[str]) -> dict[str, Any]:
    """The flags by name.

    Raises:
        UserError: one is unknown or missing, or does not go with another.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    for name, default in TEXTS.items():
        flags.DEFINE_string(name, default, "", flag_values=values)
    for name, default in INTEGERS.items():
        flags.DEFINE_integer(name, default, "", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("search", False, "", flag_values=values)
    parse_flags(values, argv, __doc__)
    flag: dict[str, Any] = {name: values[name].value for name in values}
    if flag["what"] not in SUBJECTS:
        raise unknown("program", flag["what"], SUBJECTS, "--what")
    if flag["topology"] is None:
        raise UserError(f"--topology is required: {UNDERSTOOD}")
    if flag["output"] and Path(flag["output"]).suffix not in report.SUFFIXES:
        raise UserError(f"--output {flag['output']}: choose a name that ends with {' or '.join(report.SUFFIXES)}")
    if flag["output"]:
        check_target(flag["output"])
    if flag["search"] and flag["mesh"]:
        raise UserError("--search tries mesh shapes; leave --mesh out")
    if flag["batch_sizes"] and not flag["search"]:
        raise UserError("--batch_sizes goes with --search; --batch_size is for one plan")
    return flag


def _training(flag: dict[str, Any]) -> Subject:
    if flag["config"] is None:
        raise UserError("--config is required for --what train")
    config = flag["config"]
    check_config(config)
    title = f"training of {_config_name(sys.argv)}"
    options = config.train
    return Subject(
        title,
        lambda mesh, size: training_programs(config, mesh, size),
        dict(config.mesh),
        options.batch_size,
        options.accumulate,
    )


def _sampling(flag: dict[str, Any]) -> Subject:
    if flag["model"] is None:
        raise UserError(f"--what sample takes a --model; choose one of: {', '.join(sorted(VARIANTS))}")
    model = shaped(flag["model"], flag["dtype"])
    size = flag["size"] or model.size

    def programs(mesh: Mesh, batch_size: int) -> list[Program]:
        return sampling_programs(model, Wanted(size, batch_size, flag["steps"], flag["sampler"]), mesh)

    title = f"sampling of {flag['model']} at {size} px, {flag['steps']} steps, {flag['dtype']}"
    return Subject(title, programs, {"data": -1}, 1)


SUBJECTS: dict[str, Callable[[dict[str, Any]], Subject]] = {"train": _training, "sample": _sampling}


def _plan_of(subject: Subject, target: Target, one: Candidate) -> Plan:
    mesh = make_mesh(one.sizes, target.devices)
    return make_plan(subject.programs(mesh, one.batch_size), one.batch_size, target, mesh)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--batch_sizes {text}: numbers with commas between them, e.g. 64,128,256")
    return [int(part) for part in parts]


def _config_name(argv: list[str]) -> str:
    words = [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return words[0] if words else argv[argv.index("--config") + 1] if "--config" in argv else "a config"


if __name__ == "__main__":
    run_or_exit(main)
