"""Collectives of one call of a compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from sdjax.plan.hlo import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAINED = "chain_id="
SCATTERING = "all-reduce-scatter"  # a TPU's fusion of an all-reduce with the slice that a device keeps of it
_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")


class Moved(NamedTuple):
    """All collectives of one kind in one call.

    Attributes:
        count: how many run.
        nbytes: that a device sends.
    """

    count: int
    nbytes: float


class _CollectiveCall(NamedTuple):
    kind: str
    times: int
    nbytes: float


def collectives(module: Module, devices: int) -> dict[str, Moved]:
    """By kind; every turn of a loop counts, and the parts of an asynchronous one count once.

    A device sends, by the ring algorithms that move least: (n - 1) times its part for an all-gather among n, (n - 1)/n
    of its array for a reduce-scatter or an all-to-all, twice that for an all-reduce, and its array for a permute.

    Args:
        devices: of the program, the group where an instruction names none.
    """
    calls: dict[str, _CollectiveCall] = {}
    for computation, instruction, times in module.executed():
        call = _call(computation, instruction, times, devices)
        if call is not None and call.nbytes:
            calls[_identity(computation, instruction)] = call
    return {
        kind: Moved(sum(c.times for c in same), sum(c.times * c.nbytes for c in same))
        for kind in KINDS
        if (same := [call for call in calls.values() if call.kind == kind])
    }


def _call(computation: Computation, instruction: Instruction, times: int, devices: int) -> _CollectiveCall | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    if computation.name.startswith(SCATTERING):
        kind = "reduce-scatter"
    size = sum(operand.nbytes for operand in computation.operands(instruction))
    return _CollectiveCall(kind, times, size * _share(kind, group_size(instruction, devices)))


def _identity(computation: Computation, instruction: Instruction) -> str:
    """Operation of a collective: a TPU's compiler writes one that overlaps with other kernels into each of these."""
    channel = _CHANNEL.search(instruction.attributes)
    return (
        f"channel {channel[1]}"
        if channel and _CHAINED in instruction.attributes
        else f"{computation.name}/{instruction.name}"
    )


def _share(kind: str, group: int) -> float:
    if kind == "collective-permute":
        return 1.0
    if kind == "all-gather":
        return group - 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (group - 1) / group


def group_size(instruction: Instruction, devices: int) -> int:
    """Number of devices in one collective."""
    text = instruction.attributes
    listed, iota, mesh = _LISTED.search(text), _IOTA.search(text), _MESH.search(text)
    if iota:
        return int(iota[2])
    if listed:
        return len(listed[1].split(","))
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        return math.prod(int(part or sizes[name]) for name, part in _AXIS.findall(mesh[2]))
    return devices
