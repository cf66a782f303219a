"""The devices that are measured, and what they tell each other."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.parallel.mesh import text_of
from sdjax.plan.chips import chip_of
from sdjax.plan.programs import Figures, Flops, Program, compile_program
from sdjax.plan.topology import Target


def take(sizes: Mapping[str, int], count: int | None = None) -> Sequence[Any]:
    """The first devices of all: `count`, else as many as a mesh names, else every one.

    Where there is only a CPU it becomes that many, if JAX has not looked for devices yet.

    Args:
        sizes: devices along each axis of a mesh; -1 names no number.
        count: how many.

    Raises:
        UserError: there are fewer than `count`.
    """
    named = None if -1 in sizes.values() else math.prod(sizes.values())
    wanted = count or named
    if jax.distributed.is_initialized():  # every process must take part
        return jax.devices()
    if wanted and wanted > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", wanted)
    if count and count > jax.device_count():
        raise UserError(f"--devices {count}: there are {jax.device_count()}")
    return jax.devices()[:wanted]


def tell_virtual(devices: Sequence[Any]) -> None:
    """Says what figures of virtual devices are worth."""
    if devices[0].platform == "cpu" and len(devices) > 1:
        print("note: these devices share one CPU; their speed says nothing of real ones. What they send is exact.")


def mesh_text(mesh: Mesh) -> str:
    """Text of a mesh, as command lines write it."""
    return text_of(tuple(mesh.shape.values()))


def sent(programs: Sequence[Program], mesh: Mesh) -> dict[str, int]:
    """Bytes that each device sends in one call of each program, every turn counted, by the kind of collective.

    Read from the programs as they are compiled for these devices.
    """
    devices = list(mesh.devices.flat)
    target = Target("local", devices[0].platform, devices, chip_of(devices[0].device_kind))
    total: dict[str, float] = {}
    for program in programs:
        figures = compile_program(program, target, mesh, Flops(0, 0, 0, 0, 0.0))
        if not isinstance(figures, Figures):
            raise UserError(f"the {program.name} does not fit: {figures.message}")
        for kind, moved in figures.moved.items():
            total[kind] = total.get(kind, 0.0) + program.turns * moved.nbytes
    return {kind: round(nbytes) for kind, nbytes in total.items()}


def sent_text(nbytes: Mapping[str, int]) -> str:
    """The bytes as MB by kind."""
    return ", ".join(f"{kind} {size / 1e6:.6g} MB" for kind, size in nbytes.items()) or "nothing"
