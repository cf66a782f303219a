"""Traffic of one device, computation and memory, in one call of a compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from sdjax.plan.hlo import Computation, Instruction, Module, Shape

# They move nothing themselves: names for what is there, containers of others, the ends of what has begun.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
FREE |= {"async-start", "async-update", "async-done", "partition-id", "replica-id", "opt-barrier", "domain", "iota"}
SLICES = {"dynamic-slice", "slice", "gather"}
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def memory_traffic(module: Module) -> float:
    """Bytes between a device and its main memory: every kernel reads its operands and writes its results once.

    What is kept in on-chip memory is left out, and of an array that a kernel only slices, or updates a slice of, that
    slice counts.
    """
    return sum(
        times * _traffic(module, module.computations[name], instruction)
        for name, times in module.sequences.items()
        for instruction in module.computations[name].instructions.values()
        if instruction.opcode not in FREE and not instruction.opcode.endswith("-done")
    )


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    operands = computation.operands(instruction)
    if instruction.opcode in SLICES:
        return 2 * _main(instruction.shapes)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _main(operands[1].shapes)
    if instruction.opcode.endswith("-start"):  # its result names its operands, too
        return max(_main(instruction.shapes), sum(_main(o.shapes) for o in operands))
    if instruction.opcode != "fusion":
        return _main(instruction.shapes) + sum(_main(operand.shapes) for operand in operands)
    fused = module.computations[next(iter(instruction.callees()))]
    return _written(fused, instruction) + sum(_read(fused, i, operand) for i, operand in enumerate(operands))


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.nbytes for shape in shapes if not shape.on_chip)


def _read(fused: Computation, index: int, operand: Instruction) -> int:
    """Bytes of one operand of a fusion."""
    parameter = fused.parameter(index)
    if parameter is None or not _main(operand.shapes):
        return 0
    users = _users(fused, parameter.name)
    if users and all(user.opcode in SLICES for user, _ in users):
        return min(_main(operand.shapes), sum(sum(s.nbytes for s in user.shapes) for user, _ in users))
    if users and all(user.opcode == "dynamic-update-slice" and place == 0 for user, place in users):
        return 0
    return _main(operand.shapes)


def _users(fused: Computation, name: str) -> list[tuple[Instruction, int]]:
    """Users of a value, and the operand as which they take it; a value under another shape is the same value."""
    found = [(i, i.operands.index(name)) for i in fused.instructions.values() if name in i.operands]
    return [
        pair
        for user, place in found
        for pair in (_users(fused, user.name) if user.opcode == "bitcast" else [(user, place)])
    ]


def _written(fused: Computation, instruction: Instruction) -> int:
    root = fused.root
    while root.opcode == "bitcast":
        root = fused.operands(root)[0]
    if root.opcode == "dynamic-update-slice" and _main(instruction.shapes):
        return sum(shape.nbytes for shape in fused.operands(root)[1].shapes)
    return _main(instruction.shapes)


class Arithmetic(NamedTuple):
    """Arithmetic of one device in one call.

    Attributes:
        flops: of matrix products and convolutions, two a multiplication.
        kernels: custom calls, whose arithmetic the text does not show.
    """

    flops: int
    kernels: int


def device_work(module: Module) -> Arithmetic:
    """Counted in the compiled program, so with what is computed again and with what every device computes alike."""
    flops = kernels = 0
    for computation, instruction, times in module.executed():
        if instruction.opcode == "dot":
            flops += times * _dot(computation, instruction)
        elif instruction.opcode == "convolution":
            flops += times * _convolution(computation, instruction)
        elif instruction.opcode == "custom-call" and re.search(
            r"tpu_custom_call|\$(gemm|conv|cublas|cudnn|fmha)|__cu", instruction.attributes
        ):
            kernels += times
    return Arithmetic(flops, kernels)


def _dot(computation: Computation, instruction: Instruction) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = computation.operands(instruction)[0].shapes[0].dims
    depth = math.prod(dims[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2 * depth * math.prod(instruction.shapes[0].dims)


def _convolution(computation: Computation, instruction: Instruction) -> int:
    """Multiplications with what is really there: neither with padding nor with the zeros of a dilated image."""
    labels = _LABELS.search(instruction.attributes)
    assert labels is not None, instruction.attributes
    lhs, rhs, out = (o.shapes[0].dims for o in (*computation.operands(instruction), instruction))
    pairs = 1
    for position, window in enumerate(_windows(instruction, len(rhs) - 2)):
        label = str(position)
        pairs *= _pairs(window, lhs[labels[1].index(label)], rhs[labels[2].index(label)], out[labels[3].index(label)])
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    return 2 * pairs * batch * features * rhs[labels[2].index("i")]


def _windows(instruction: Instruction, dimensions: int) -> list[dict[str, list[int]]]:
    """Window of each spatial dimension: stride, pad, lhs_dilate and rhs_dilate."""
    found = _WINDOW.search(instruction.attributes)
    fields = dict(word.split("=") for word in found[1].split()) if found else {}
    columns = {
        name: fields[name].split("x") for name in ("stride", "pad", "lhs_dilate", "rhs_dilate") if name in fields
    }
    return [{name: [int(n) for n in parts[d].split("_")] for name, parts in columns.items()} for d in range(dimensions)]


def _pairs(window: dict[str, list[int]], length: int, taps: int, outputs: int) -> int:
    """Number of pairs of an output and a tap that meet a value of the image along one dimension."""
    stride, dilation, step = (window.get(name, [1])[0] for name in ("stride", "lhs_dilate", "rhs_dilate"))
    at = np.arange(outputs)[:, None] * stride + np.arange(taps) * step - window.get("pad", [0])[0]
    return int(((at >= 0) & (at <= (length - 1) * dilation) & (at % dilation == 0)).sum())
