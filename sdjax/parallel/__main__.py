"""Prints where every parameter of a config goes on a mesh, and how many bytes every device holds whole.

    python -m sdjax.parallel --config configs/stable_diffusion_training.py:sdxl --mesh fsdp=8 [--all]

Nothing is made or read; the mesh needs no devices. --all lists every parameter, else those of a kind are one line.
Exit code 2 where more than 1 % of a network's bytes stay whole under FSDP. Networks of less than 64 MiB only warn.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from sdjax.core.errors import UserError, run_or_exit
from sdjax.core.flags import parse_flags
from sdjax.core.tree import merge
from sdjax.parallel.audit import Audit, AuditEntry, audit, check
from sdjax.parallel.mesh_text import parse_mesh
from sdjax.tasks.make import make_task

LARGE = 2**26
MIB = 2**20


def main() -> None:
    """Reads the command line, prints, and fails where too much is replicated."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a Python file with get_config()", flag_values=values)
    flags.DEFINE_string("mesh", "fsdp=8", "devices along each axis, e.g. data=2,fsdp=8", flag_values=values)
    flags.DEFINE_boolean("all", False, "every parameter", flag_values=values)
    parse_flags(values, sys.argv, __doc__)
    config, every = values["config"].value, bool(values["all"].value)
    sizes = parse_mesh(str(values["mesh"].value))
    if config is None:
        raise UserError("--config is required")
    task = make_task(config, None)  # pyright: ignore[reportArgumentType]  (shapes need no devices)
    shapes = merge(jax.eval_shape(task.init, jax.random.key(0)), task.frozen)
    found = {name: audit({name: tree}, sizes) for name, tree in shapes.items()}
    for name, result in found.items():
        print("\n".join(lines(result.entries, every)))
        print(f"{name}: {summary(result)}\n")
    print(f"all: {summary(Audit([entry for result in found.values() for entry in result.entries]))}")
    for name, result in found.items():
        if result.total >= LARGE:
            check(result, sizes, name)


def lines(entries: Iterable[AuditEntry], every: bool) -> list[str]:
    """A line for each parameter, or for all of one shape and spec whose names differ in numbers only."""
    kinds: Mapping[Any, list[AuditEntry]] = defaultdict(list)
    for entry in entries:
        name = entry.name if every else re.sub(r"\d+", "*", entry.name)
        kinds[name, entry.shape, entry.spec].append(entry)
    return [
        f"{len(group):4d} x {name:<75} {'x'.join(map(str, shape)):<18} {text(spec):<40} "
        f"{sum(entry.nbytes for entry in group) / MIB:9.2f} MiB"
        for (name, shape, spec), group in kinds.items()
    ]


def text(spec: Any) -> str:
    """A spec as the axes of its dimensions."""
    return "(" + ", ".join(axis or "-" for axis in spec) + ")" if any(spec) else "whole"


def summary(found: Audit) -> str:
    """The bytes of some parameters."""
    return (
        f"{found.total / MIB:,.1f} MiB, {found.per_device / MIB:,.1f} MiB a device, whole on every device "
        f"{found.replicated / MIB:,.2f} MiB ({found.share:.3%})"
    )


if __name__ == "__main__":
    run_or_exit(main)
