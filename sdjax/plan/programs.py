"""Compiling a program from shapes alone, and what that shows of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sdjax.core.compilation import options
from sdjax.ops.attention import compiling_for
from sdjax.parallel.trees import device_bytes
from sdjax.plan import flops
from sdjax.plan.chips import GIB
from sdjax.plan.collectives import Moved, collectives
from sdjax.plan.hlo import Module
from sdjax.plan.topology import Target
from sdjax.plan.traffic import Arithmetic, device_work, memory_traffic

_SIZE = r"([\d.]+)([KMGT]?)i?B?"
# How compilers say that a program does not fit: what it needs, and what there is.
_REFUSED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """A function to compile.

    Attributes:
        name: what it does.
        function: what is jitted.
        donated: the arguments whose memory it may use for its results.
        args: shapes with shardings.
        beside: shapes, with shardings, of what else is in the devices' memory while it runs.
        turns: how often it runs for the images of one batch.
        plain: the same without what is computed twice to save memory; None where nothing is.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    beside: Any = ()
    turns: int = 1
    plain: Callable[..., Any] | None = None


class Memory(NamedTuple):
    """Bytes on each device.

    Attributes:
        arguments, outputs, temporaries: of the program.
        aliased: outputs that take the place of donated arguments.
        beside: what is there and the program does not use.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    beside: int

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.beside


class Flops(NamedTuple):
    """Flops of matrix products and convolutions.

    Attributes:
        model: of all devices, what the mathematics asks for, in the traced program.
        traced: the same with what is computed twice to save memory.
        device: of one device, counted in the compiled program, which hides kernels' own.
        kernels: how many such kernels run.
        reported: by XLA for one device; it counts the body of a loop once, and all kinds of arithmetic.
    """

    model: int
    traced: int
    device: int
    kernels: int
    reported: float


class Figures(NamedTuple):
    """Findings of compiling a program, for one call of it.

    Attributes:
        traffic: bytes between a device and its memory.
        moved: what a device sends to others, by the kind of collective.
        unknown_loops: loops that were counted as one turn.
        seconds: that tracing, lowering and compiling took.
    """

    memory: Memory
    flops: Flops
    traffic: float
    moved: dict[str, Moved]
    unknown_loops: int
    seconds: float


class Refused(NamedTuple):
    """The compiler found no way to fit a program into memory.

    Attributes:
        needed, available: bytes of one device; None where the message does not say.
        message: its first line.
    """

    needed: float | None
    available: float | None
    message: str


def compile_program(program: Program, target: Target, mesh: Mesh, counted: Flops | None = None) -> Figures | Refused:
    """Compiles for devices that need not exist; nothing runs.

    Args:
        counted: what is known of its flops already: those that the mesh does not change.
    """
    model, traced = (counted.model, counted.traced) if counted else count_flops(program)
    start = time.perf_counter()
    jax.clear_caches()  # a trace for another platform has other attention
    with jax.set_mesh(mesh), compiling_for(target.platform):
        jitted = jax.jit(program.function, donate_argnums=program.donated)
        trace = jitted.trace(*program.args)
        try:
            compiled = trace.lower().compile({**options()} if target.platform == "cpu" else None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return refused(str(error))
    seconds = time.perf_counter() - start
    beside = device_bytes(program.beside) + unused_bytes(trace.jaxpr.jaxpr, program.args)
    module = Module(compiled.as_text() or "")
    work: Arithmetic = device_work(module)
    reported = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return Figures(
        memory=_memory(compiled.memory_analysis(), beside),
        flops=Flops(model, traced, work.flops, work.kernels, reported),
        traffic=memory_traffic(module),
        moved=collectives(module, mesh.size),
        unknown_loops=module.unknown_loops,
        seconds=seconds,
    )


def count_flops(program: Program) -> tuple[int, int]:
    """Flops of all devices, without and with recomputation."""
    traced = flops.count(program.function, *program.args)
    return (traced if program.plain is None else flops.count(program.plain, *program.args)), traced


def unused_bytes(jaxpr: Any, args: tuple[Any, ...]) -> int:
    """Bytes on one device of arguments that a traced program drops: they stay where they are all the same."""
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars} | {id(v) for v in jaxpr.outvars}
    leaves = jax.tree.leaves(args)
    return device_bytes([leaf for leaf, v in zip(leaves, jaxpr.invars, strict=True) if id(v) not in used])


def refused(message: str) -> Refused:
    """Memory named in a compiler's message."""
    line = next(line for line in message.splitlines() if "RESOURCE_EXHAUSTED" in line)
    for pattern in _REFUSED:
        found = pattern.search(message)
        if found:
            needed, available = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
            return Refused(needed, available, line)
    return Refused(None, None, line)


def _memory(stats: Any, beside: int) -> Memory:
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        beside=beside,
    )


def gib(nbytes: float) -> float:
    """Bytes as GiB."""
    return nbytes / GIB
